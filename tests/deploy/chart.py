"""The chart as Helm renders it, for values that people would set."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

helm = pytest.importorskip("helm_python")

DEPLOY = Path(__file__).parent.parent.parent / "deploy"
CHART = DEPLOY / "helm" / "guard"
NAME, NAMESPACE = "guard", "moderation"

Manifest = dict[str, Any]

BACKEND = {"image": "vllm/vllm-openai:latest", "args": ["--host=127.0.0.1", "--port=8000"]}
VALUES: Mapping[str, Mapping[str, Any]] = {
    "default": {},
    "settings": {
        "settings": {"drain_seconds": 2.5, "decision_log": "-", "decision_log_bytes": 104857600, "threads": 3}
    },
    "gpu": {"gpu": {"enabled": True, "runtimeClassName": "nvidia", "nodeSelector": {"nvidia.com/gpu.present": "true"}}},
    "policies": {"policies": {"files": {"default.yaml": "description: Mine.\n"}}},
    "secured": {
        "tls": {"secret": "guard-tls", "mutual": True},
        "files": {
            "tokens_file": {"secret": "guard-tokens", "key": "tokens"},
            "policies_key": {"secret": "guard-policies-key", "key": "public.pem"},
            "decision_log_salt": {"secret": "guard-salt", "key": "salt"},
        },
        "policies": {"configMap": "signed-policies"},
        "networkPolicy": {"egress": [{"to": [{"namespaceSelector": {"matchLabels": {"name": "tracing"}}}]}]},
    },
    "autoscaling": {"autoscaling": {"enabled": True}},
    "monitoring": {
        "monitoring": {
            "serviceMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
            "prometheusRule": {"enabled": True},
            "dashboard": {"enabled": True},
        }
    },
    "sidecar": {
        "mode": "sidecar",
        "sidecar": {"backend": BACKEND, "options": {"fail": "closed", "optimistic": True, "timeout": 300}},
        "settings": {"max_queue_seconds": 1},
    },
    "sidecar of a shared Guard": {
        "mode": "sidecar",
        "sidecar": {"backend": BACKEND, "options": {"guard": "guard-gateway.moderation.svc:50051", "fail": "open"}},
    },
    "gateway": {"gateway": {"enabled": True}},
    "gateway with TLS": {
        "gateway": {"enabled": True, "tlsSecret": "gateway-tls"},
        "tls": {"secret": "guard-tls", "mutual": True},
    },
    "bare": {"networkPolicy": {"enabled": False}, "image": {"tag": "2", "pullSecrets": ["registry"]}},
}


def rendered(values: Mapping[str, Any]) -> list[Manifest]:
    """Every manifest; raises HelmRenderError and HelmValuesError."""
    with helm.Chart.load(CHART) as chart:
        chart.validate_schema(values)
        templates = chart.render(values, name=NAME, namespace=NAMESPACE)
    texts = [text for path, text in templates.items() if path.endswith(".yaml")]
    return [manifest for text in texts for manifest in yaml.safe_load_all(text) if manifest]


def of_kind(kind: str, manifests: list[Manifest], name: str = NAME) -> Manifest:
    (found,) = (each for each in manifests if each["kind"] == kind and each["metadata"]["name"] == name)
    return found


def guard_of(manifests: list[Manifest]) -> Manifest:
    """The container of Guard."""
    pod = of_kind("Deployment", manifests)["spec"]["template"]["spec"]
    (found,) = (each for each in pod["containers"] if each["name"] == "guard")
    return dict(found)


def env_of(container: Manifest) -> dict[str, Any]:
    return {each["name"]: each.get("value", each.get("valueFrom")) for each in container["env"]}
