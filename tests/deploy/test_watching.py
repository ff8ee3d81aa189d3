"""Alerts, dashboard and autoscaling ask for nothing that a server does not tell."""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from guard.telemetry import Metrics
from tests.deploy.chart import DEPLOY, VALUES, of_kind, rendered

promql = pytest.importorskip("promql_parser")

TARGET = {"job", "instance", "namespace", "pod"}  # labels that Prometheus itself gives
RULES = yaml.safe_load((DEPLOY / "prometheus" / "rules.yaml").read_text(encoding="utf-8"))
ADAPTER = yaml.safe_load((DEPLOY / "prometheus" / "adapter.yaml").read_text(encoding="utf-8"))
DASHBOARD = json.loads((DEPLOY / "grafana" / "guard.json").read_text(encoding="utf-8"))
OPERATIONS = (DEPLOY.parent / "docs" / "operations.md").read_text(encoding="utf-8")
PROMTOOL = shutil.which("promtool")
GRAFANA = {"$__rate_interval": "5m", "$job": ".*"}


def every_rule() -> list[dict[str, Any]]:
    return [rule for group in RULES["groups"] for rule in group["rules"]]


def alerts() -> list[dict[str, Any]]:
    return [rule for rule in every_rule() if "alert" in rule]


def panels() -> list[dict[str, Any]]:
    return list(DASHBOARD["panels"])


def exported() -> dict[str, set[str]]:
    """What a server tells: each series and its labels."""
    metrics = Metrics()
    for metric in vars(metrics).values():
        if names := getattr(metric, "_labelnames", ()):  # which are told with a first sample alone
            metric.labels(*names)
    told: dict[str, set[str]] = {}
    for family in metrics.registry.collect():
        for sample in family.samples:
            told.setdefault(sample.name, set()).update(sample.labels)
    return told


def selectors(expression: str) -> Iterator[tuple[str, set[str]]]:
    """The series that an expression asks for, with the labels that it names of them."""
    found: list[tuple[str, set[str]]] = []

    def visit(node: Any) -> None:
        if isinstance(node, promql.VectorSelector):
            found.append((node.name, {matcher.name for matcher in node.matchers.matchers}))

    promql.walk(promql.parse(expression), pre_visit=visit)
    yield from found


def grouped_by(expression: str) -> set[str]:
    """The labels that an expression keeps."""
    clauses = re.findall(r"\b(?:by|on|without|ignoring|group_left) \(([^)]*)\)", expression)
    return {label.strip() for clause in clauses for label in clause.split(",") if label.strip()}


def filled(target: dict[str, Any]) -> str:
    """What Grafana asks, once it has put its variables in."""
    expression = str(target["expr"])
    for name, value in GRAFANA.items():
        expression = expression.replace(name, value)
    return expression


def expressions() -> list[str]:
    found = [str(rule["expr"]) for rule in every_rule()]
    for panel in panels():
        found += map(filled, panel.get("targets", ()))
    for rule in ADAPTER["rules"]:
        query = rule["metricsQuery"].replace("<<.GroupBy>>", "pod")
        found += [rule["seriesQuery"], query.replace("<<.LabelMatchers>>", 'namespace="guard",pod=~"a|b"')]
    return found


def recorded() -> dict[str, set[str]]:
    """What the rules make; the labels are those that remain."""
    return {rule["record"]: grouped_by(rule["expr"]) for rule in every_rule() if "record" in rule}


@pytest.mark.parametrize("expression", expressions())
def test_what_is_asked_for_is_told(expression: str) -> None:
    """By a server, or by a rule of ours; and so are the labels."""
    known = exported() | recorded()
    asked = list(selectors(expression))
    assert asked
    for name, labels in asked:
        assert name in known
        assert labels <= known[name] | TARGET
    assert grouped_by(expression) <= set().union(*(known[name] for name, _ in asked)) | TARGET


def test_what_the_rules_make_is_used_or_named_for_it() -> None:
    """Recorded names say of what, and over how long."""
    assert all(re.fullmatch(r"guard:[a-z_]+:(rate|p95_)\d+[mh]", name) for name in recorded())


def test_alerts_say_what_to_do() -> None:
    """Each has its section in the guide, a severity and a summary; the guide has no other alerts."""
    anchors = {heading.lower() for heading in re.findall(r"^### (Guard\w+)$", OPERATIONS, re.MULTILINE)}
    assert anchors == {alert["alert"].lower() for alert in alerts()}
    for alert in alerts():
        assert alert["labels"]["severity"] in {"page", "ticket"}
        assert set(alert["annotations"]) == {"summary", "description", "runbook"}
        assert alert["annotations"]["runbook"] == f"docs/operations.md#{alert['alert'].lower()}"


def test_alerts_name_labels_that_their_expression_keeps() -> None:
    for alert in alerts():
        named = set(re.findall(r"\$labels\.(\w+)", str(alert["annotations"])))
        kept = set().union(*(recorded().get(name, set()) for name, _ in selectors(alert["expr"])))
        assert named <= grouped_by(alert["expr"]) | kept | TARGET


def test_every_alert_is_set_off_by_a_test() -> None:
    """And there is a time when it is quiet."""
    tests = yaml.safe_load((DEPLOY / "prometheus" / "rules_test.yaml").read_text(encoding="utf-8"))["tests"]
    cases = [case for test in tests for case in test["alert_rule_test"]]
    names = {alert["alert"] for alert in alerts()}
    assert {case["alertname"] for case in cases if case.get("exp_alerts")} == names
    assert {case["alertname"] for case in cases if not case.get("exp_alerts")} == names
    for test in tests:
        for series in test["input_series"]:
            ((name, labels),) = selectors(series["series"])
            assert labels <= exported()[name] | TARGET


@pytest.mark.skipif(PROMTOOL is None, reason="needs promtool, which comes with Prometheus")
def test_alerts_ring_when_they_should() -> None:
    """By Prometheus itself."""
    assert PROMTOOL is not None
    command = [PROMTOOL, "test", "rules", "rules_test.yaml"]
    done = subprocess.run(command, cwd=DEPLOY / "prometheus", capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_chart_brings_rules_and_dashboard_as_they_are() -> None:
    manifests = rendered(VALUES["monitoring"])
    assert of_kind("PrometheusRule", manifests)["spec"] == RULES
    assert json.loads(of_kind("ConfigMap", manifests, "guard-dashboard")["data"]["guard.json"]) == DASHBOARD


def test_the_dashboard_is_one() -> None:
    """Each panel has an id of its own, a place on the grid, and whatever Prometheus one chooses."""
    ids = [panel["id"] for panel in panels()]
    assert len(ids) == len(set(ids))
    assert [variable["type"] for variable in DASHBOARD["templating"]["list"]] == ["datasource", "query"]
    taken: set[tuple[int, int]] = set()
    for panel in panels():
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken
        assert max(x for x, _ in cells) < 24
        taken |= cells
        for target in panel.get("targets", ()):
            assert target["datasource"]["uid"] == panel["datasource"]["uid"] == "${datasource}"
            legend = set(re.findall(r"{{(\w+)}}", target["legendFormat"]))
            assert legend <= grouped_by(target["expr"]) | TARGET


def test_every_metric_is_on_the_dashboard_or_known_to_be_missing() -> None:
    """A new one is put there, or here."""
    shown = {name for panel in panels() for target in panel.get("targets", ()) for name, _ in selectors(filled(target))}
    told = {re.sub(r"_(bucket|sum|count)$", "", name) for name in exported() if not name.endswith("_created")}
    missing = told - {re.sub(r"_(bucket|sum|count)$", "", name) for name in shown}
    assert missing == {
        "guard_queued_tokens",
        "process_max_fds",
        "process_open_fds",
        "process_start_time_seconds",
        "process_virtual_memory_bytes",
    }
