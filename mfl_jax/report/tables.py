"""Tables of results: the same rows as HTML for the report and as Markdown for a README."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mfl_jax.report.markup import Html, tag

NO_VALUE = "\u2013"
MINUS = "\u2212"


@dataclass(frozen=True)
class Cell:
    text: str
    small: str = ""  # what qualifies the text: an interval


@dataclass(frozen=True)
class Row:
    cells: Sequence[Cell]
    strong: bool = False


@dataclass(frozen=True)
class Table:
    caption: str
    header: Sequence[str]
    rows: Sequence[Row]
    numeric: frozenset[int] = field(default_factory=frozenset)  # columns that are figures


def html(table: Table) -> Html:
    """Scrolls sideways on its own where the screen is narrower; the first column heads its row."""

    def cell(i: int, content: Cell, name: str, **more: str) -> Html:
        small = tag("small", " ", content.small) if content.small else None
        return tag(name, content.text, small, class_="number" if i in table.numeric else None, **more)

    head = tag("tr", *(cell(i, Cell(text), "th", scope="col") for i, text in enumerate(table.header)))
    body = []
    for row in table.rows:
        cells = [cell(0, row.cells[0], "th", scope="row")]
        cells += [cell(i, content, "td") for i, content in enumerate(row.cells[1:], 1)]
        body.append(tag("tr", *cells, class_="strong" if row.strong else None))
    whole = tag("table", tag("caption", tag("span", table.caption)), tag("thead", head), tag("tbody", *body))
    short = "scroll short" if len(table.rows) <= 15 else "scroll"
    return tag("div", whole, class_=short, tabindex=0, role="region", aria_label=table.caption)


def markdown(table: Table) -> str:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cells) + " |"

    rule = ["---:" if i in table.numeric else "---" for i in range(len(table.header))]
    lines = [line([_plain(text) for text in table.header]), line(rule)]
    for row in table.rows:
        texts = [_plain(f"{c.text} {c.small}".strip()) for c in row.cells]
        lines.append(line([f"**{text}**" if row.strong and text else text for text in texts]))
    return "\n".join(lines) + "\n"


def _plain(text: str) -> str:
    """Text that Markdown and the HTML within it read as text."""
    for letter in "\\`*_[]|~":
        text = text.replace(letter, "\\" + letter)
    return text.replace("&", "&amp;").replace("<", "&lt;").replace("\n", " ")


def figure(value: float | None, digits: int = 3, sign: bool = False) -> str:
    if value is None:
        return NO_VALUE
    text = f"{abs(value):.{digits}f}"
    negative = value < 0 and float(text) != 0
    return (MINUS if negative else "+" if sign and float(text) != 0 else "") + text


def interval(item: Mapping[str, Any], sign: bool = False) -> str:
    low, high = item.get("low"), item.get("high")
    return "" if low is None else f"[{figure(low, sign=sign)}, {figure(high, sign=sign)}]"


def p_value(value: float | None) -> str:
    return NO_VALUE if value is None else "<0.001" if value < 0.001 else f"{value:.3f}"


def duration(seconds: float | None) -> str:
    if seconds is None:
        return NO_VALUE
    if seconds < 100:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    if seconds < 600:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def tasks(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The tasks as given; without any, one that has every metric that an arm has, under its key."""
    if results.get("tasks"):
        return list(results["tasks"])
    keys = dict.fromkeys(key for arm in results["arms"] for key in arm["metrics"])
    return [{"name": "all", "title": "All metrics", "metrics": [{"key": key, "title": key} for key in keys]}]


def sorted_arms(results: Mapping[str, Any], metric: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Best first by `metric`; arms without it come last, in their order."""
    sign = 1 if metric.get("better") == "lower" else -1

    def rank(arm: Mapping[str, Any]) -> tuple[bool, float]:
        mean = arm["metrics"].get(metric["key"], {}).get("mean")
        return mean is None, sign * (mean or 0.0)

    return sorted(results["arms"], key=rank)


def of_task(results: Mapping[str, Any], task: Mapping[str, Any]) -> Table:
    """Mean [low, high] of every metric of one task for every arm, best first; our arms stand out by weight."""
    arms = sorted_arms(results, task["metrics"][0]) if task["metrics"] else results["arms"]
    rows = []
    for arm in arms:
        cells = [Cell(arm["title"], "ours" if arm["kind"] == "ours" else arm["kind"])]
        for metric in task["metrics"]:
            item = arm["metrics"].get(metric["key"], {})
            cells.append(Cell(figure(item.get("mean")), interval(item)))
        rows.append(Row([*cells, Cell(str(len(arm.get("seeds", []))) or NO_VALUE)], arm["kind"] == "ours"))
    header = ["Arm", *(metric["title"] for metric in task["metrics"]), "Seeds"]
    best = f", best {task['metrics'][0]['title']} first" if task["metrics"] else ""
    return Table(f"{task['title']}: mean [interval]{best}", header, rows, frozenset(range(1, len(header))))


def of_differences(results: Mapping[str, Any]) -> Table:
    titles = {arm["name"]: arm["title"] for arm in results["arms"]}
    ours = {arm["name"] for arm in results["arms"] if arm["kind"] == "ours"}
    named = metric_titles(results)
    rows = []
    for item in results.get("differences", []):
        pair = f"{titles[item['a']]} {MINUS} {titles[item['b']]}"
        difference = Cell(figure(item["difference"], sign=True), interval(item, sign=True))
        cells = [Cell(pair), Cell(named.get(item["metric"], item["metric"])), difference]
        rows.append(
            Row([*cells, Cell(p_value(item.get("p"))), Cell(p_value(item.get("p_holm")))], bool(ours & {item["a"]}))
        )
    header = ("Difference", "Metric", "Mean [interval]", "p", "p, Holm")
    return Table("Paired differences between arms, on the same cases", header, rows, frozenset({2, 3, 4}))


def of_budget(results: Mapping[str, Any]) -> Table:
    rows = []
    for arm in results["arms"]:
        budget = arm.get("budget", {})
        counts = [f"{budget[key]:,.0f}" if key in budget else NO_VALUE for key in ("steps", "examples")]
        cells = [arm["title"], arm.get("what", ""), *counts, duration(budget.get("wall_s"))]
        rows.append(Row([Cell(text) for text in cells], arm["kind"] == "ours"))
    header = ("Arm", "What it learns from", "Steps", "Examples", "Time a seed")
    return Table("The arms and what each was given", header, rows, frozenset({2, 3, 4}))


def of_registration(results: Mapping[str, Any]) -> Table:
    rows = []
    for item in results.get("registration", []):
        gate = {True: "passed", False: "refused"}.get(item.get("passed"), NO_VALUE)
        figures = [figure(item.get("error_um"), 1), figure(item.get("score"))]
        rows.append(Row([Cell(text) for text in (item["slide"], item["partner"], *figures, gate)]))
    header = ("Slide", "Partner", "Error, \u00b5m", "Similarity", "Gate")
    return Table("Registration of every pair", header, rows, frozenset({2, 3}))


def of_labels(results: Mapping[str, Any], curves: Sequence[Mapping[str, Any]], caption: str) -> Table:
    """The figures behind a label-efficiency plot."""
    fractions = sorted({x for curve in curves for x in curve["x"]})
    arms = {arm["name"]: arm for arm in results["arms"]}
    nothing = [None] * len(fractions)
    rows = []
    for curve in curves:
        keys = ("mean", "low", "high")
        triples = zip(curve["y"], curve.get("low", nothing), curve.get("high", nothing), strict=False)
        at = {x: dict(zip(keys, triple, strict=True)) for x, triple in zip(curve["x"], triples, strict=True)}
        cells = [Cell(figure(at[x]["mean"]), interval(at[x])) if x in at else Cell(NO_VALUE) for x in fractions]
        arm = arms[curve["arm"]]
        rows.append(Row([Cell(arm["title"]), *cells], arm["kind"] == "ours"))
    counts: dict[float, Cell] = {}
    for curve in curves:
        for x, cases, tiles in zip(curve["x"], curve.get("cases", ()), curve.get("tiles", ()), strict=False):
            counts.setdefault(x, Cell(f"{cases:.3g} cases", f"{tiles:,.0f} labels"))
    if counts:
        rows.append(Row([Cell("Labels of"), *(counts.get(x, Cell(NO_VALUE)) for x in fractions)]))
    header = ["Arm", *(percent(x) for x in fractions)]
    return Table(caption, header, rows, frozenset(range(1, len(header))))


def percent(fraction: float) -> str:
    return f"{100 * fraction:.3g} %"


def metric_titles(results: Mapping[str, Any]) -> dict[str, str]:
    """Of every key; a title that several keys have is followed by that of the task."""
    named = [(metric["key"], metric["title"], task["title"]) for task in tasks(results) for metric in task["metrics"]]
    keys: dict[str, set[str]] = {}
    for key, title, _ in named:
        keys.setdefault(title, set()).add(key)
    return {key: title if len(keys[title]) == 1 else f"{title}, {task}" for key, title, task in named}


def readme(results: Mapping[str, Any]) -> str:
    """Markdown of the results of every task and of the differences."""
    parts = [f"**{_plain(task['title'])}**\n\n{markdown(of_task(results, task))}" for task in tasks(results)]
    if results.get("differences"):
        parts.append(f"**Paired differences**\n\n{markdown(of_differences(results))}")
    return "\n".join(parts)
