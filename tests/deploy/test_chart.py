"""What the chart makes is what Kubernetes takes, and what operators are promised."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import trustme
import yaml
from typer.testing import CliRunner

from guard.cli import app
from guard.service.sidecar import Sidecar
from guard.settings import Settings
from tests.conftest import Serve
from tests.deploy.chart import CHART, NAMESPACE, VALUES, Manifest, env_of, guard_of, helm, of_kind, rendered

kubernetes = pytest.importorskip("kubernetes_validate")

OLDEST, NEWEST = "1.30", kubernetes.latest_version()
BY_THE_CHART = {"listen", "http", "policies", "device", "tls_cert", "tls_key", "tls_client_ca"}
PLACES = {"policies": ".", "policies_key": "key.pem", "tokens_file": "tokens"}


@pytest.fixture(scope="module")
def charts() -> dict[str, list[Manifest]]:
    return {name: rendered(values) for name, values in VALUES.items()}


def containers(manifests: list[Manifest]) -> Iterator[Manifest]:
    """Those of ours."""
    for manifest in manifests:
        if manifest["kind"] == "Deployment":
            for container in manifest["spec"]["template"]["spec"]["containers"]:
                if container["name"] != "backend":
                    yield container


def test_the_chart_has_no_problems() -> None:
    """By Helm's own linter."""
    report = helm.lint(CHART, strict=True)
    assert report["errors"] == []
    assert [message for message in report["messages"] if message["severity"] > 1] == []


@pytest.mark.parametrize("version", [OLDEST, NEWEST])
def test_every_manifest_is_one(charts: dict[str, list[Manifest]], version: str) -> None:
    """By the schemas of Kubernetes, where no key may be unknown; those of the Prometheus operator by what they need."""
    for manifests in charts.values():
        for manifest in manifests:
            match manifest["kind"]:
                case "ServiceMonitor":
                    assert manifest["apiVersion"] == "monitoring.coreos.com/v1"
                    assert manifest["spec"]["selector"]["matchLabels"]
                    assert all(endpoint["port"] == "http" for endpoint in manifest["spec"]["endpoints"])
                case "PrometheusRule":
                    assert manifest["apiVersion"] == "monitoring.coreos.com/v1"
                    assert manifest["spec"]["groups"]
                case _:
                    kubernetes.validate(manifest, version, strict=True)


def test_names_are_taken_once(charts: dict[str, list[Manifest]]) -> None:
    for manifests in charts.values():
        names = [(manifest["kind"], manifest["metadata"]["name"]) for manifest in manifests]
        assert len(names) == len(set(names))


def test_services_and_policies_find_their_pods(charts: dict[str, list[Manifest]]) -> None:
    """By labels that the pods have, and ports that they name."""
    for manifests in charts.values():
        pods = [each["spec"]["template"] for each in manifests if each["kind"] == "Deployment"]
        for manifest in manifests:
            spec = manifest.get("spec", {})
            wanted = spec.get("podSelector", {}).get("matchLabels") or (
                spec["selector"] if manifest["kind"] == "Service" else None
            )
            if not wanted:
                continue
            (pod,) = (pod for pod in pods if wanted.items() <= pod["metadata"]["labels"].items())
            named = {port["name"] for each in pod["spec"]["containers"] for port in each.get("ports", ())}
            ports = [port.get("targetPort") for port in spec.get("ports", ())]
            ports += [port["port"] for rule in spec.get("ingress", ()) for port in rule["ports"]]
            assert set(ports) <= named


def test_containers_may_do_nothing_but_their_work(charts: dict[str, list[Manifest]]) -> None:
    """No root, nothing to write to but /tmp, no capability, no account of the cluster's."""
    for manifests in charts.values():
        for container in containers(manifests):
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "runAsNonRoot": True,
                "runAsUser": 10001,
                "runAsGroup": 10001,
                "capabilities": {"drop": ["ALL"]},
                "seccompProfile": {"type": "RuntimeDefault"},
            }
            mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
            assert all(mount.get("readOnly") for path, mount in mounts.items() if path != "/tmp")
            assert not any("subPath" in mount for mount in mounts.values())
        for manifest in manifests:
            if manifest["kind"] == "Deployment":
                pod = manifest["spec"]["template"]["spec"]
                assert pod["automountServiceAccountToken"] is pod["enableServiceLinks"] is False
                assert "serviceAccountName" not in pod


def test_the_variables_are_settings(charts: dict[str, list[Manifest]], tmp_path: Path) -> None:
    """Guard takes all of them, with files in the place of those that are mounted."""
    for manifests in charts.values():
        container = guard_of(manifests)
        mounts = [mount["mountPath"] for mount in container["volumeMounts"]]
        given: dict[str, str] = {}
        for variable, value in env_of(container).items():
            if isinstance(value, dict):  # what the container asks for
                assert value == {"resourceFieldRef": {"resource": "requests.cpu", "divisor": "1"}}
                value = "2"
            if value.startswith("/etc/"):
                assert any(value == mount or value.startswith(f"{mount}/") for mount in mounts)
                stand_in = tmp_path / value.removeprefix("/")
                stand_in.parent.mkdir(parents=True, exist_ok=True)
                stand_in.mkdir(exist_ok=True) if variable == "GUARD_POLICIES" else stand_in.touch()
                value = str(stand_in)
            given[variable] = value
        settings = Settings.load({}, given)
        assert settings.threads in (2, 3)


def test_whole_numbers_stay_whole(charts: dict[str, list[Manifest]]) -> None:
    """However large they are."""
    env = env_of(guard_of(charts["settings"]))
    assert env["GUARD_DECISION_LOG_BYTES"] == "104857600"
    assert env["GUARD_DRAIN_SECONDS"] == "2.5"


def test_the_schema_knows_the_settings() -> None:
    """All but those that the chart makes itself."""
    with helm.Chart.load(CHART) as chart:
        schema, values = chart.schema["properties"], chart.values
    settings, files = (set(schema[name]["propertyNames"]["enum"]) for name in ("settings", "files"))
    assert settings | files | BY_THE_CHART == Settings.model_fields.keys()
    assert values["settings"]["drain_seconds"] == Settings().drain_seconds
    options = set(schema["sidecar"]["properties"]["options"]["propertyNames"]["enum"])
    assert options | {"upstream", "bind"} == Sidecar.model_fields.keys()
    assert set(values) | {"global"} == set(schema)


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"settings": {"drain_second": 1}}, "drain_second"),
        ({"settings": {"listen": "0.0.0.0:1"}}, "listen"),
        ({"replica": 1}, "replica"),
        ({"policies": {"files": {"a.yaml": "x"}, "configMap": "mine"}}, "files or configMap, not both"),
        ({"mode": "sidecar"}, "the container of the backend is needed"),
        (
            {"mode": "sidecar", "sidecar": {"backend": {"image": "x"}}, "gateway": {"enabled": True}},
            "are of mode: service",
        ),
        ({"tls": {"mutual": True}}, "tls.mutual needs tls.secret"),
        ({"gateway": {"enabled": True}, "tls": {"secret": "x"}}, "tls.secret and gateway.tlsSecret go together"),
    ],
)
def test_what_cannot_be_is_refused(values: dict[str, Any], problem: str) -> None:
    with pytest.raises((helm.HelmValuesError, helm.HelmRenderError), match=problem):
        rendered(values)


def test_a_pod_is_killed_after_its_drain_and_not_before(charts: dict[str, list[Manifest]]) -> None:
    """Last answers, and the logs that wait, take some seconds more; behind Envoy the drain begins twice."""
    for name, manifests in charts.items():
        container = guard_of(manifests)
        drain = float(env_of(container)["GUARD_DRAIN_SECONDS"]) * (2 if "sidecar" in name else 1)
        pre_stop = container["lifecycle"]["preStop"]["sleep"]["seconds"]
        pod = of_kind("Deployment", manifests)["spec"]["template"]["spec"]
        assert pre_stop >= 5
        assert pod["terminationGracePeriodSeconds"] >= math.ceil(drain) + pre_stop + 10


def test_probes_wait_for_the_model_and_bear_with_overload(charts: dict[str, list[Manifest]]) -> None:
    """Nothing is killed within five minutes of its start, nor for less than a minute of silence."""
    for manifests in charts.values():
        container = guard_of(manifests)
        startup, liveness = container["startupProbe"], container["livenessProbe"]
        assert startup["periodSeconds"] * startup["failureThreshold"] >= 300
        assert liveness["periodSeconds"] * liveness["failureThreshold"] >= 60
        assert container["readinessProbe"]["failureThreshold"] < liveness["failureThreshold"]


def test_probes_ask_where_something_answers(charts: dict[str, list[Manifest]]) -> None:
    """gRPC where it is in plain text and on the pod's address, /healthz where it is not, Envoy where it is alone."""
    kinds = {
        name: next(iter(guard_of(manifests)["readinessProbe"].keys() & {"grpc", "httpGet", "tcpSocket"}))
        for name, manifests in charts.items()
    }
    assert kinds["default"] == kinds["gpu"] == "grpc"
    assert kinds["secured"] == kinds["sidecar"] == "httpGet"
    assert kinds["sidecar of a shared Guard"] == "tcpSocket"
    assert env_of(guard_of(charts["sidecar"]))["GUARD_HTTP"] == "0.0.0.0:9090"


async def test_a_server_with_tls_answers_the_probe(
    charts: dict[str, list[Manifest]], serve: Serve, tmp_path: Path
) -> None:
    """By the scheme that the chart names, and without a certificate of the kubelet's."""
    authority = trustme.CA()
    certificate = authority.issue_cert("localhost")
    authority.cert_pem.write_to_path(tmp_path / "ca.crt")
    certificate.private_key_pem.write_to_path(tmp_path / "tls.key")
    certificate.cert_chain_pems[0].write_to_path(tmp_path / "tls.crt")
    tls = {"tls_cert": tmp_path / "tls.crt", "tls_key": tmp_path / "tls.key", "tls_client_ca": tmp_path / "ca.crt"}
    probe = guard_of(charts["secured"])["readinessProbe"]["httpGet"]
    async with serve(**tls) as service, httpx.AsyncClient(verify=False) as http:
        answer = await http.get(
            f"{probe.get('scheme', 'HTTP').lower()}://localhost:{service.server.http_port}{probe['path']}"
        )
        assert answer.status_code == 200


def test_nothing_goes_out(charts: dict[str, list[Manifest]]) -> None:
    """Unless it is listed, and then names may be asked for too."""
    default = of_kind("NetworkPolicy", charts["default"])["spec"]
    assert default["policyTypes"] == ["Ingress", "Egress"]
    assert default["egress"] == []
    listed = of_kind("NetworkPolicy", charts["secured"])["spec"]["egress"]
    assert [port["port"] for port in listed[1]["ports"]] == [53, 53]
    assert not any(manifest["kind"] == "NetworkPolicy" for manifest in charts["bare"])


def test_a_backend_is_reached_through_guard_alone(charts: dict[str, list[Manifest]]) -> None:
    """In a sidecar's pod no other port is let in."""
    for name in ("sidecar", "sidecar of a shared Guard"):
        policy = of_kind("NetworkPolicy", charts[name])["spec"]
        assert policy["policyTypes"] == ["Ingress"]
        ports = {port["port"] for rule in policy["ingress"] for port in rule["ports"]}
        assert ports - {"http"} == {"proxy"}
        assert [port["name"] for port in of_kind("Service", charts[name])["spec"]["ports"]] == ["proxy"]


@pytest.mark.parametrize("values", ["sidecar", "sidecar of a shared Guard"])
def test_the_sidecar_takes_what_it_is_given(values: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`guard sidecar` makes of the container's arguments and variables a configuration of Envoy."""
    container = guard_of(rendered(VALUES[values]))
    for variable, value in env_of(container).items():
        monkeypatch.setenv(variable, value if isinstance(value, str) else "2")
    done = CliRunner().invoke(app, [*container["args"], "--print-config"], catch_exceptions=False)
    resources = json.loads(done.stdout)["static_resources"]
    assert resources["listeners"][0]["address"]["socket_address"] == {"address": "0.0.0.0", "port_value": 8080}
    found = {
        each["name"]: each["load_assignment"]["endpoints"][0]["lb_endpoints"][0]["endpoint"]["address"][
            "socket_address"
        ]
        for each in resources["clusters"]
    }
    guard = VALUES[values]["sidecar"]["options"].get("guard", "127.0.0.1:50051").rpartition(":")[0]
    assert found == {
        "upstream": {"address": "127.0.0.1", "port_value": 8000},
        "guard": {"address": guard, "port_value": 50051},
    }


def test_with_a_gateway_guards_are_asked_through_it_alone(charts: dict[str, list[Manifest]]) -> None:
    """By gRPC; HTTP has no use for it."""
    grpc, http = of_kind("NetworkPolicy", charts["gateway"])["spec"]["ingress"]
    (peer,) = grpc["from"]
    assert {"podSelector": {}} in http["from"]
    assert peer["podSelector"]["matchLabels"]["app.kubernetes.io/component"] == "gateway"
    out = of_kind("NetworkPolicy", charts["gateway"], "guard-gateway")["spec"]["egress"]
    assert [port["port"] for each in out for port in each["ports"]] == [50051, 53, 53]


def test_a_gpu_is_asked_for_and_used(charts: dict[str, list[Manifest]]) -> None:
    container = guard_of(charts["gpu"])
    pod = of_kind("Deployment", charts["gpu"])["spec"]["template"]["spec"]
    assert container["resources"]["limits"] == {"cpu": "2", "memory": "2Gi", "nvidia.com/gpu": 1}
    assert env_of(container)["GUARD_DEVICE"] == "cuda"
    assert pod["runtimeClassName"] == "nvidia"
    assert pod["nodeSelector"] == {"nvidia.com/gpu.present": "true"}
    assert [each["key"] for each in pod["tolerations"]] == ["nvidia.com/gpu"]
    others = of_kind("Deployment", charts["default"])["spec"]["template"]["spec"]
    assert not others.keys() & {"runtimeClassName", "nodeSelector", "tolerations"}


def test_the_autoscaler_owns_the_number_of_replicas(charts: dict[str, list[Manifest]]) -> None:
    """And goes by the metric that the adapter makes."""
    assert "replicas" not in of_kind("Deployment", charts["autoscaling"])["spec"]
    scaler = of_kind("HorizontalPodAutoscaler", charts["autoscaling"])["spec"]
    adapter = yaml.safe_load((CHART.parent.parent / "prometheus" / "adapter.yaml").read_text(encoding="utf-8"))
    assert [metric["pods"]["metric"]["name"] for metric in scaler["metrics"]] == [
        rule["name"]["as"] for rule in adapter["rules"]
    ]
    up, down = (scaler["behavior"][way]["stabilizationWindowSeconds"] for way in ("scaleUp", "scaleDown"))
    assert up < down


def test_the_pods_are_found_by_name(charts: dict[str, list[Manifest]]) -> None:
    """Without an address of the Service's own: gRPC would keep to the one replica behind it."""
    assert of_kind("Service", charts["default"])["spec"]["clusterIP"] == "None"
    assert of_kind("Service", charts["gateway"], "guard-gateway")["spec"]["clusterIP"] == "None"


def test_the_gateway_asks_the_service_of_the_chart(charts: dict[str, list[Manifest]]) -> None:
    config = yaml.safe_load(of_kind("ConfigMap", charts["gateway"], "guard-gateway")["data"]["envoy.yaml"])
    (endpoint,) = config["static_resources"]["clusters"][0]["load_assignment"]["endpoints"][0]["lb_endpoints"]
    service = of_kind("Service", charts["gateway"])
    assert endpoint["endpoint"]["address"]["socket_address"] == {
        "address": f"{service['metadata']['name']}.{NAMESPACE}.svc",
        "port_value": service["spec"]["ports"][0]["port"],
    }
