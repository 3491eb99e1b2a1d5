from xml.etree import ElementTree

import pytest

from mfl_jax.report import tables
from mfl_jax.report.tables import Cell, Row, Table
from tests.mfl_jax.report import synthetic

HOSTILE = "a|b <i>*c*</i> & `d`"


def cells(table: Table) -> list[list[str]]:
    return [[f"{c.text} {c.small}".strip() for c in row.cells] for row in table.rows]


def test_arms_are_sorted_by_the_first_metric_and_ours_stand_out():
    results = synthetic.results()
    table = tables.of_task(results, results["tasks"][0])
    shown = cells(table)
    assert [row[0] for row in shown][:3] == ["Supervised ceiling", "TriDeNT ours", "MFL ours"]
    assert shown[2][1] == "0.914 [0.897, 0.931]"
    assert [row.strong for row in table.rows] == [False, True, True, False, False, False]


def test_lower_is_better_where_the_metric_says_so():
    results = synthetic.results()
    task = {"title": "t", "metrics": [results["tasks"][0]["metrics"][2]]}
    assert cells(tables.of_task(results, task))[0][0] == "Supervised ceiling"
    results["arms"][5]["metrics"]["positive/ece"] = {"mean": None}
    assert cells(tables.of_task(results, task))[-1][0] == "Supervised ceiling"
    task["metrics"][0] = {**task["metrics"][0], "better": "higher"}
    assert cells(tables.of_task(results, task))[0][0] == "Random encoder baseline"


def test_what_is_not_defined_comes_last_and_says_so():
    results = synthetic.results()
    results["arms"][5]["metrics"]["positive/auc"] = {"mean": None}
    del results["arms"][4]["metrics"]["positive/auc"]
    shown = cells(tables.of_task(results, results["tasks"][0]))
    assert [row[:2] for row in shown[-2:]] == [["TriDeNT ours", "\u2013"], ["Supervised ceiling", "\u2013"]]


def test_without_tasks_every_metric_is_shown():
    results = {k: v for k, v in synthetic.results().items() if k != "tasks"}
    (task,) = tables.tasks(results)
    assert list(tables.of_task(results, task).header) == ["Arm", *results["arms"][0]["metrics"], "Seeds"]


def test_differences_carry_signs():
    shown = cells(tables.of_differences(synthetic.results()))
    assert shown[2] == [
        "MFL \u2212 Supervised",
        "AUC",
        "\u22120.016 [\u22120.036, +0.004]",
        "0.110",
        "0.110",
    ]
    assert shown[0][3:] == ["<0.001", "0.002"]


@pytest.mark.parametrize(
    ("value", "text"), [(None, "\u2013"), (0.0, "0.000"), (-0.0001, "0.000"), (1.5, "+1.500"), (-1.5, "\u22121.500")]
)
def test_figures(value, text):
    assert tables.figure(value, sign=True) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "\u2013"), (4.21, "4.2 s"), (96.4, "96 s"), (145, "2.4 min"), (600, "10 min"), (7200, "2.0 h")],
)
def test_durations(seconds, text):
    assert tables.duration(seconds) == text


def test_html_is_a_table_with_heads_and_text_is_text():
    root = ElementTree.fromstring(tables.html(Table(HOSTILE, ["x", HOSTILE], [Row([Cell(HOSTILE), Cell("1")], True)])))
    assert root.find("table/caption/span").text == HOSTILE
    assert [th.get("scope") for th in root.iter("th")] == ["col", "col", "row"]
    assert [th.text for th in root.iter("th")] == ["x", HOSTILE, HOSTILE]
    assert root.find("table/tbody/tr").get("class") == "strong"


def test_markdown_has_one_cell_a_column_whatever_the_names():
    text = tables.markdown(Table("c", ["x", "y"], [Row([Cell(HOSTILE), Cell("1", "[0, 2]")])], frozenset({1})))
    lines = text.splitlines()
    assert lines[1] == "| --- | ---: |"
    assert all(line.replace("\\|", "").count("|") == 3 for line in lines)
    assert "<i>" not in text
    assert "1 \\[0, 2\\]" in lines[2]


def test_readme_has_every_task_and_the_differences():
    text = tables.readme(synthetic.results())
    assert text.count("**MFL ours**") == 2
    assert text.index("Marker-positive tiles") < text.index("Tissue type") < text.index("Paired differences")


def test_metrics_of_one_title_are_told_apart_by_their_task():
    results = synthetic.results()
    assert set(tables.metric_titles(results).values()) == {"AUC", "Balanced accuracy", "Calibration error", "Kappa"}
    results["tasks"][1]["metrics"].append({"key": "type/auc", "title": "AUC"})
    found = tables.metric_titles(results)
    assert found["positive/auc"] == "AUC, Marker-positive tiles"
    assert found["type/auc"] == "AUC, Tissue type"
    assert found["type/kappa"] == "Kappa"
