"""The dashboard is one that Grafana can load and show: fields, identities, and no panel over another.

What its queries give is tested against a real Prometheus, in tests/integration/test_observability.py.
"""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

GRAFANA = Path(__file__).parents[3] / "deploy" / "grafana"
DASHBOARD: dict[str, Any] = json.loads((GRAFANA / "tenuto.json").read_text())
PANELS: list[dict[str, Any]] = DASHBOARD["panels"]
SHOWN = [panel for panel in PANELS if panel["type"] != "row"]
COLUMNS = 24


def test_rows_are_the_questions() -> None:
    rows = [panel["title"] for panel in PANELS if panel["type"] == "row"]
    assert rows == ["Up?", "Fast?", "Full?", "Learning?", "Surviving?"]


def test_the_first_line_answers_with_thresholds() -> None:
    first = [panel for panel in PANELS if panel["gridPos"]["y"] == 0]
    assert sum(panel["gridPos"]["w"] for panel in first) == COLUMNS
    assert {panel["type"] for panel in first} == {"stat"}
    assert {panel["title"].split(":")[0] for panel in first} == {"Up", "Fast", "Full", "Learning"}
    assert all(panel["fieldConfig"]["defaults"]["thresholds"]["steps"] for panel in first)


def test_no_panel_lies_over_another_or_outside() -> None:
    taken: dict[tuple[int, int], str] = {}
    for panel in PANELS:
        x, y, w, h = (panel["gridPos"][key] for key in "xywh")
        assert x >= 0 and y >= 0 and w > 0 and h > 0 and x + w <= COLUMNS, panel["title"]
        for cell in ((column, line) for column in range(x, x + w) for line in range(y, y + h)):
            assert taken.setdefault(cell, panel["title"]) == panel["title"]


def test_panels_have_an_id_and_a_title_of_their_own() -> None:
    for key in ("id", "title"):
        values = [panel[key] for panel in PANELS]
        assert len(set(values)) == len(values)


@pytest.mark.parametrize("panel", SHOWN, ids=lambda panel: panel["title"])
def test_a_panel_says_what_it_shows_of_what_in_which_unit(panel: dict[str, Any]) -> None:
    assert panel["type"] in ("stat", "timeseries", "table") and panel["description"].endswith(".")
    assert panel["type"] == "table" or panel["fieldConfig"]["defaults"]["unit"]
    source = {"type": "prometheus", "uid": "${datasource}"}
    assert panel["datasource"] == source and panel["targets"]
    references = [target["refId"] for target in panel["targets"]]
    assert len(set(references)) == len(references)
    for target in panel["targets"]:
        assert target["datasource"] == source and target["expr"] and target["legendFormat"]
        assert target["instant"] is not target["range"]


def test_every_variable_that_a_query_uses_exists() -> None:
    exist = {variable["name"] for variable in DASHBOARD["templating"]["list"]} | {"__rate_interval"}
    expressions = " ".join(target["expr"] for panel in SHOWN for target in panel["targets"])
    assert set(re.findall(r"\$(\w+)", expressions)) == exist - {"datasource"}


def test_provisioning_names_the_data_source_and_the_folder_of_the_dashboard() -> None:
    assert DASHBOARD["uid"] == "tenuto"
    (source,) = yaml.safe_load((GRAFANA / "provisioning" / "datasources" / "prometheus.yml").read_text())["datasources"]
    (variable,) = [v for v in DASHBOARD["templating"]["list"] if v["type"] == "datasource"]
    assert variable["current"]["value"] == source["uid"] == "prometheus" and variable["query"] == source["type"]
    scrape = yaml.safe_load((GRAFANA.parent / "prometheus" / "prometheus.yml").read_text())["global"]
    assert source["jsonData"]["timeInterval"] == scrape["scrape_interval"]
    (provider,) = yaml.safe_load((GRAFANA / "provisioning" / "dashboards" / "tenuto.yml").read_text())["providers"]
    assert provider["options"]["path"] == "/var/lib/grafana/dashboards"
