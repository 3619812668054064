"""docs/operations.md says of the metrics and alerts what the code and deploy/ say."""

import re
from collections.abc import Iterator
from pathlib import Path

import torch
import yaml
from prometheus_client.metrics import MetricWrapperBase

from tenuto_server.histogram import Histogram
from tenuto_server.metrics import Metrics

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "operations.md").read_text()
ALERTS_FILE = ROOT / "deploy" / "prometheus" / "alerts.yml"
RULES = [rule for group in yaml.safe_load(ALERTS_FILE.read_text())["groups"] for rule in group["rules"]]
ALERTS = [rule for rule in RULES if "alert" in rule]
ENDING = {"counter": "_total", "info": "_info"}


def declared() -> Iterator[tuple[str, str, tuple[str, ...], str]]:
    """Name, type, labels and meaning of every metric, in the order of metrics.py."""
    metrics = Metrics(torch.device("cpu"))
    # Info is the one that is not kept as an attribute.
    yield "tenuto_build_info", "info", ("version", "python", "torch", "device"), "What runs here."
    for metric in vars(metrics).values():
        if isinstance(metric, MetricWrapperBase):
            (family,) = metric.describe()
            labels, kind = metric._labelnames, family.type
            if kind == "stateset":  # Prometheus sees a gauge for each state, told by a label of the metric's own name.
                labels, kind = (*labels, family.name), "gauge"
            yield family.name + ENDING.get(kind, ""), kind, labels, family.documentation
        elif isinstance(metric, Histogram):
            yield metric.name, "histogram", metric.labels, metric.documentation


def test_the_table_of_metrics_is_that_of_the_code() -> None:
    expected = [
        f"| `{name}` | {kind} | {', '.join(labels)} | {meaning} |" for name, kind, labels, meaning in declared()
    ]
    shown = re.findall(r"^\| `tenuto_\w+` \|.*$", PAGE, re.MULTILINE)
    assert shown == expected, "paste into docs/operations.md:\n" + "\n".join(expected)


def test_every_metric_has_a_panel_or_an_alert() -> None:
    used = (ROOT / "deploy" / "grafana" / "tenuto.json").read_text() + ALERTS_FILE.read_text()
    assert not [name for name, *_ in declared() if not re.search(rf"{name}(_bucket|_sum|_count)?\b", used)]


def test_every_alert_has_severity_texts_and_a_section_that_its_link_leads_to() -> None:
    anchors = {heading.lower().replace(" ", "-") for heading in re.findall(r"^#+ (.+)$", PAGE, re.MULTILINE)}
    for alert in ALERTS:
        assert alert["labels"]["severity"] in ("critical", "warning", "info")
        assert alert["annotations"].keys() == {"summary", "description", "runbook_url"}
        file, _, anchor = alert["annotations"]["runbook_url"].partition("#")
        assert file == "docs/operations.md" and anchor in anchors and anchor == alert["alert"].lower()
    sections = re.findall(r"^### (Tenuto\w+)$", PAGE, re.MULTILINE)
    assert sorted(sections) == sorted(alert["alert"] for alert in ALERTS), "a section for no alert"


def test_every_alert_has_a_case_in_which_it_fires_and_one_in_which_it_does_not() -> None:
    cases = yaml.safe_load(ALERTS_FILE.with_name("alerts.test.yml").read_text())["tests"]
    tested = [case for group in cases for case in group["alert_rule_test"]]
    for alert in ALERTS:
        expected = [bool(case.get("exp_alerts")) for case in tested if case["alertname"] == alert["alert"]]
        assert True in expected and False in expected, alert["alert"]
