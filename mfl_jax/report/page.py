"""The report: results.json and its pictures as one HTML file that needs nothing else, in the order a reader asks."""

import base64
import json
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from input_pipeline.files import write_atomically
from mfl_jax.report import pictures as sheets
from mfl_jax.report import plots, tables
from mfl_jax.report.markup import Html, join, tag
from mfl_jax.report.schema import ReportError, validate
from mfl_jax.report.style import CSS

Results = Mapping[str, Any]
Pictures = Mapping[str, bytes | np.ndarray]
PICTURE_BYTES = 5_000_000  # of all together; as text they take a third more
CURVE_POINTS, CLOUD_POINTS, LEGEND_NAMES, LISTED_PAIRS = 160, 1500, 10, 12


def write(path: str | Path, results: Results, pictures: Pictures | None = None) -> Path:
    """One self-contained HTML file. ReportError where `results` is not what schema.py says, or of other pictures."""
    write_atomically(path, render(results, pictures or {}).encode())
    return Path(path)


def render(results: Results, pictures: Pictures) -> str:
    validate(results)
    page = _Page(results, pictures)
    drawn = [(key, title, _section(page, key, make)) for key, title, make in SECTIONS]
    shown = [(key, title, body) for key, title, body in drawn if body]
    nav = tag("nav", tag("ul", *(tag("li", tag("a", title, href=f"#{key}")) for key, title, _ in shown)))
    body = join(
        _answer(page), nav, *(tag("section", tag("h2", title), body, id=key) for key, title, body in shown), _foot(page)
    )
    if unused := set(pictures) - page.used:
        raise ReportError(f"pictures that nothing in the results names: {', '.join(sorted(unused))}")
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", results["title"]),
        tag("style", Html(CSS)),
    )
    return "<!DOCTYPE html>\n" + tag("html", head, tag("body", tag("main", body)), lang="en") + "\n"


class _Page:
    """What several sections need: how each arm is drawn, and the pictures with the room each may take."""

    def __init__(self, results: Results, pictures: Pictures):
        self.results = results
        self.pictures = pictures
        self.used: set[str] = set()
        ordered = sorted(results["arms"], key=lambda arm: arm["kind"] != "ours")
        self.style = {arm["name"]: i for i, arm in enumerate(ordered)}
        self.arms = {arm["name"]: arm for arm in results["arms"]}
        self.room = sheets.room(pictures.values(), PICTURE_BYTES)

    def title(self, arm: str) -> str:
        return self.arms[arm]["title"]

    def ours(self, arm: str) -> bool:
        return self.arms[arm]["kind"] == "ours"

    def figure(self, item: Mapping[str, Any]) -> Html:
        name = item["picture"]
        if name not in self.pictures:
            raise ReportError(f"there is no picture {name!r}; there are: {', '.join(sorted(self.pictures)) or 'none'}")
        self.used.add(name)
        data = sheets.jpeg(self.pictures[name], self.room)
        width, height = sheets.size(data)
        kind = "png" if data.startswith(b"\x89PNG") else "jpeg"
        source = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
        alt = item.get("alt") or item["caption"]
        image = tag("img", src=source, alt=alt, width=width, height=height)
        return tag("figure", image, tag("figcaption", item["caption"]))


def _section(page: _Page, key: str, make: Callable[[_Page], Html | None]) -> Html | None:
    why = page.results.get("skipped", {}).get(key)
    left_out = tag("p", f"Left out: {why}", class_="soft") if why else None
    made = make(page)
    return join(left_out, made) if left_out or made else None


def _answer(page: _Page) -> Html:
    results = page.results
    facts = [
        tag("div", tag("dt", name), tag("dd", f"{value:,}" if isinstance(value, int) else value))
        for name, value in results.get("cohort", {}).items()
    ]
    return join(
        tag("h1", results["title"]),
        tag("p", results["question"], class_="question"),
        tag("p", results["answer"], class_="answer"),
        tag("dl", *facts) if facts else None,
    )


def _foot(page: _Page) -> Html:
    return tag("p", f"mfl_jax {page.results['version']}, {page.results['created']}", class_="made")


def _sheet(key: str) -> Callable[[_Page], Html | None]:
    def make(page: _Page) -> Html | None:
        content = page.results.get(key)
        if not content:
            return None
        return join(_what(content), *(page.figure(item) for item in content["pictures"]))

    return make


def _what(content: Mapping[str, Any]) -> Html | None:
    return tag("p", content["what"]) if content.get("what") else None


def _pairs(page: _Page) -> Html | None:
    rows = page.results.get("registration", [])
    shown = [item for item in rows if item.get("picture")]
    figures = []
    for item in shown:
        state = "refused" if item.get("passed") is False else "registered"
        figures.append(page.figure({"caption": f"{item['slide']}, {item['partner']}: {state}", **item}))
    return (
        join(
            _sheet("pairs")(page),
            _registration(page.results) if rows else None,
            tag("div", *figures, class_="plots") if figures else None,
        )
        or None
    )


def _registration(results: Results) -> Html:
    """In a sentence, then every pair: folded away where there are many."""
    rows = results["registration"]
    kept = [item for item in rows if item.get("passed") is not False]
    errors = sorted(item["error_um"] for item in kept if item.get("error_um") is not None)
    text = f"{len(rows)} pairs, {len(rows) - len(kept)} refused."
    if errors:
        figures = f"median {statistics.median(errors):.1f} \u00b5m, largest {errors[-1]:.1f} \u00b5m"
        text += f" Error of those kept, where the truth is known: {figures}."
    table = tables.html(tables.of_registration(results))
    if len(rows) > LISTED_PAIRS:
        table = tag("details", tag("summary", "Every pair"), table)
    return join(tag("h3", "Registration"), tag("p", text), table)


def _curves(page: _Page) -> Html | None:
    figures = []
    for arm in page.style:
        runs = [run for run in page.results.get("curves", []) if run["arm"] == arm]
        if not runs:
            continue
        series = [
            plots.Series(f"seed {run['seed']}", *_thinned(run["x"], run["y"]), style=page.style[arm], plain=True)
            for run in runs
        ]
        title = f"{page.title(arm)}: training loss by step, {len(runs)} seeds"
        drawn = plots.lines(series, title=title, names=False, width=210, height=140)
        name = tag("strong", page.title(arm)) if page.ours(arm) else page.title(arm)
        figures.append(tag("figure", tag("figcaption", name, class_="name"), drawn))
    if not figures:
        return None
    note = "Loss by step, one line a seed. Arms minimise different losses: compare the shapes, not the heights."
    return join(tag("p", note), tag("div", *figures, class_="multiples"))


def _thinned(x: list[float], y: list[float | None]) -> tuple[list[float], list[float | None]]:
    """Means of as many neighbours as leave CURVE_POINTS points; a stretch with an undefined value stays undefined."""
    step = -(-len(x) // CURVE_POINTS) or 1
    groups = [(x[i : i + step], y[i : i + step]) for i in range(0, len(x), step)]
    means: list[float | None] = []
    for _, values in groups:
        numbers = [v for v in values if v is not None]
        means.append(sum(numbers) / len(numbers) if len(numbers) == len(values) else None)
    return [sum(at) / len(at) for at, _ in groups], means


def _results(page: _Page) -> Html | None:
    parts: list[Html | None] = [tables.html(tables.of_budget(page.results))]
    for task in tables.tasks(page.results):
        parts += [tag("h3", task["title"]), _what(task), tables.html(tables.of_task(page.results, task))]
        forests = [_forest(page, metric) for metric in task["metrics"][:2]]
        parts.append(tag("div", *forests, class_="plots"))
    if page.results.get("intervals"):
        parts.append(tag("p", page.results["intervals"], class_="soft"))
    if page.results.get("differences"):
        parts += [tag("h3", "Paired differences"), tables.html(tables.of_differences(page.results))]
        parts.append(tag("div", *_difference_forests(page), class_="plots"))
    return join(*parts)


def _forest(page: _Page, metric: Mapping[str, Any]) -> Html:
    points = []
    for arm in tables.sorted_arms(page.results, metric):
        item = arm["metrics"].get(metric["key"], {})
        dots = tuple(seed["metrics"].get(metric["key"]) for seed in arm.get("seeds", []))
        limits = (item.get("mean"), item.get("low"), item.get("high"))
        points.append(plots.Point(arm["title"], *limits, dots, page.style[arm["name"]], arm["kind"] == "ours"))
    title = f"{metric['title']} of every arm with its interval"
    chance = metric.get("chance")
    drawn = plots.forest(
        points,
        title=title,
        x_title=metric["title"],
        reference=chance,
        reference_name="chance" if chance is not None else "",
    )
    return tag("figure", drawn, tag("figcaption", "Mean and interval; small dots are seeds."))


def _difference_forests(page: _Page) -> list[Html]:
    titles = tables.metric_titles(page.results)
    metrics = dict.fromkeys(item["metric"] for item in page.results["differences"])
    figures = []
    for metric in metrics:
        points = [
            plots.Point(
                f"{page.title(item['a'])} {tables.MINUS} {page.title(item['b'])}",
                item["difference"],
                item.get("low"),
                item.get("high"),
                style=page.style[item["b"]],
                strong=page.ours(item["a"]),
            )
            for item in page.results["differences"]
            if item["metric"] == metric
        ]
        name = f"Difference in {titles.get(metric, metric)}"
        drawn = plots.forest(
            points, title=name, x_title=name, reference=0.0, text=lambda value: tables.figure(value, sign=True)
        )
        figures.append(tag("figure", drawn))
    return figures


def _labels(page: _Page) -> Html | None:
    curves = page.results.get("labels", [])
    titles = tables.metric_titles(page.results)
    short = {metric["key"]: metric["title"] for task in tables.tasks(page.results) for metric in task["metrics"]}
    figures, figures_behind = [], []
    for metric, by in dict.fromkeys((curve["metric"], curve["by"]) for curve in curves):
        group = [curve for curve in curves if (curve["metric"], curve["by"]) == (metric, by)]
        name = titles.get(metric, metric)
        series = [
            plots.Series(
                page.title(curve["arm"]),
                curve["x"],
                curve["y"],
                curve.get("low"),
                curve.get("high"),
                page.style[curve["arm"]],
                page.ours(curve["arm"]),
            )
            for curve in group
        ]
        drawn = plots.lines(
            series,
            title=f"{name} by fraction of {by} with labels",
            x_title=f"{by.capitalize()} with labels",
            y_title=short.get(metric, name),
            x_ticks=sorted({x for curve in group for x in curve["x"]}),
            x_text=tables.percent,
            log_x=True,
        )
        figures.append(tag("figure", tag("figcaption", f"{name}, labels of a fraction of {by}", class_="name"), drawn))
        figures_behind.append(tables.html(tables.of_labels(page.results, group, f"{name} by {by} with labels")))
    if not figures:
        return None
    note = (
        "Each encoder is frozen; the probe on top of it sees the labels of a fraction of the cases, or of the tiles. "
        "An encoder that was trained on labels itself was trained anew for each of its points, on that fraction alone."
    )
    behind = tag("details", tag("summary", "The figures behind these plots"), *figures_behind)
    return join(tag("p", note), tag("div", *figures, class_="plots"), behind)


def _projections(page: _Page) -> Html | None:
    projections = page.results.get("projections", [])
    parts: list[Html] = []
    for name in dict.fromkeys(colour["name"] for item in projections for colour in item["colours"]):
        group = [(item, colour) for item in projections for colour in item["colours"] if colour["name"] == name]
        figures = []
        for item, colour in group:
            keep = range(0, len(item["x"]), -(-len(item["x"]) // CLOUD_POINTS) or 1)
            x, y, values = ([of[i] for i in keep] for of in (item["x"], item["y"], colour["values"]))
            method = f", {item['method']}" if item.get("method") else ""
            title = f"{page.title(item['arm'])}{method}, coloured by {name}"
            categories = len(colour["names"]) if "names" in colour else None
            shown = join(tag("strong", page.title(item["arm"])) if page.ours(item["arm"]) else page.title(item["arm"]))
            drawn = plots.scatter(x, y, values, title=title, categories=categories)
            figures.append(tag("figure", tag("figcaption", shown, method, class_="name"), drawn))
        parts += [tag("h3", f"By {name}"), _key(group[0][1]), tag("div", *figures, class_="multiples")]
    if not parts:
        return None
    largest = max(len(item["x"]) for item in projections)
    what = projections[0].get("point", "an example")
    note = f"Each point is {what}, placed by its features alone ({largest:,} points"
    shown_note = f"; at most {CLOUD_POINTS:,} of them are drawn)." if largest > CLOUD_POINTS else ")."
    return join(tag("p", note + shown_note), *parts)


def _key(colour: Mapping[str, Any]) -> Html:
    if "names" not in colour:
        values = [v for v in colour["values"] if v is not None] or [0.0]
        return plots.scale(f"{min(values):.3g}", f"{max(values):.3g}", unknown=None in colour["values"])
    if len(colour["names"]) <= LEGEND_NAMES:
        return plots.legend(colour["names"])
    return tag("p", f"{len(colour['names'])} of them; colours and shapes repeat.", class_="legend")


def _saliency(page: _Page) -> Html | None:
    content = page.results.get("saliency")
    if not content:
        return None
    scores = sorted(content.get("arms", []), key=lambda item: -(item["mean"] if item["mean"] is not None else -1e9))
    points = [
        plots.Point(
            page.title(item["arm"]),
            item["mean"],
            item.get("low"),
            item.get("high"),
            style=page.style[item["arm"]],
            strong=page.ours(item["arm"]),
        )
        for item in scores
    ]
    title = content.get("score", "Agreement of saliency with the truth")
    chance = content.get("chance")
    name = "chance" if chance is not None else ""
    drawn = plots.forest(points, title=title, x_title=title, reference=chance, reference_name=name)
    figure = tag("div", tag("figure", drawn), class_="plots") if points else None
    return join(_what(content), figure, *(page.figure(item) for item in content.get("pictures", [])))


def _ledger(page: _Page) -> Html | None:
    parts: list[Html | None] = []
    for entry in page.results.get("ledger", []):
        parts.append(tag("h3", entry["title"]))
        if seconds := entry.get("seconds"):
            stages = sorted(seconds, key=lambda stage: -seconds[stage])
            total = sum(seconds.values()) or 1
            texts = [f"{tables.duration(seconds[s])}, {seconds[s] / total:.0%}" for s in stages]
            if tiles := entry.get("tiles"):
                rates = [f"; {tiles / seconds[s]:,.0f} tiles/s" if seconds[s] > 0 else "" for s in stages]
                texts = [text + rate for text, rate in zip(texts, rates, strict=True)]
            title = f"{entry['title']}: seconds by stage"
            drawn = plots.bars(stages, [seconds[s] for s in stages], title=title, texts=texts)
            parts.append(tag("div", tag("figure", drawn), class_="plots"))
        parts.append(tag("pre", entry["text"]) if entry.get("text") else None)
    return join(*parts) or None


def _reliability(page: _Page) -> Html | None:
    notes = [tag("li", note) for note in page.results.get("reliability", [])]
    return tag("ul", *notes, class_="notes") if notes else None


def _howto(page: _Page) -> Html | None:
    steps = []
    for step in page.results.get("howto", []):
        command = tag("pre", step["command"], class_="command") if step.get("command") else None
        steps.append(tag("li", step["what"], command))
    return tag("ol", *steps) if steps else None


def _config(page: _Page) -> Html | None:
    hashes = page.results.get("hashes", {})
    rows = [tables.Row([tables.Cell(name), tables.Cell(value)]) for name, value in hashes.items()]
    config = page.results.get("config")
    text = json.dumps(config, indent=2, ensure_ascii=False) if config is not None else None
    table = tables.html(tables.Table("What the figures are of", ("Of", "Hash"), rows)) if rows else None
    shown = tag("details", tag("summary", "The whole config"), tag("pre", text)) if text else None
    return join(table, shown) or None


SECTIONS: tuple[tuple[str, str, Callable[[_Page], Html | None]], ...] = (
    ("pairs", "The pairs and their registration", _pairs),
    ("views", "What the network sees while it trains", _sheet("views")),
    ("curves", "Training", _curves),
    ("results", "Results on H&E alone", _results),
    ("figures", "The predictions", _sheet("figures")),
    ("labels", "How few labels are enough", _labels),
    ("projections", "What the features separate", _projections),
    ("saliency", "Where the encoder looks", _saliency),
    ("neighbours", "Nearest neighbours", _sheet("neighbours")),
    ("ledger", "Where the time went", _ledger),
    ("reliability", "What to trust and what not", _reliability),
    ("howto", "The same with your own slides", _howto),
    ("config", "Config and hashes", _config),
)
