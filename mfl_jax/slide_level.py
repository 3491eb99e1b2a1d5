"""`mfl slides`: a study of slide embeddings as results.json, pictures and tables; pure, whatever the arms came from."""

import csv
import datetime
import importlib.util
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import mfl_jax
from input_pipeline.files import write_atomically
from mfl_jax import report
from mfl_jax.evaluators import projection, slide_knn
from mfl_jax.evaluators.mil import figures
from mfl_jax.evaluators.slide_study import RECALLED, RETRIEVAL, SlideArm, Study, key, spread
from mfl_jax.report import tables
from mfl_jax.statistics import Interval

TITLES = {"auc": "AUC", "accuracy": "Accuracy", "balanced_accuracy": "Balanced accuracy"}
BY_FOLD = "auc_by_fold"
DRAWN = 6  # arms in one plot
FEW_CASES = 30
MODES = {
    "transductive": "its encoder was trained on cases that are tested (as the paper does, without their labels)",
    "inductive": "its encoder has seen no case that is tested (checked)",
    "unknown": "which cases its encoder was trained on was not said: of those, figures are too good",
}


def write(
    folder: str | Path,
    study: Study,
    *,
    title: str = "Slides from embeddings of their regions",
    question: str = "Whose embeddings tell the slides apart?",
    notes: Sequence[str] = (),
    more: Mapping[str, Any] | None = None,
) -> tuple[dict[str, Any], Path]:
    """results.json, report.html, predictions.csv and folds.csv. -> results, the path of the report. `more` is added to
    the results, such as config, hashes, cohort."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "predictions.csv", predictions(study).encode())
    write_atomically(folder / "folds.csv", folds_table(study).encode())
    results = results_of(study, title, question, notes)
    more = dict(more or {})
    results["cohort"] |= more.pop("cohort", {})
    drawn = pictures_of(study)
    results["figures"] = {"pictures": [{"picture": n, "caption": caption} for n, (caption, _) in drawn.items()]}
    results |= more
    return results, report.save(folder, results, {name: picture for name, (_, picture) in drawn.items()})


def results_of(study: Study, title: str, question: str, notes: Sequence[str] = ()) -> dict[str, Any]:
    table = study.table
    counts = np.bincount(table.labels, minlength=len(table.names))
    classes = ", ".join(f"{count} {name}" for name, count in zip(table.names, counts, strict=True))
    results: dict[str, Any] = {
        "title": title,
        "question": question,
        "answer": "",
        "created": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "version": mfl_jax.__version__,
        "cohort": {
            "Slides": classes,
            "Cases": len(set(table.cases)),
            "Folds": len(next(iter(study.draws.values()))),
            "Labels": ", ".join(tables.percent(share) for share in study.draws),
        },
        "arms": [_arm(arm, study) for arm in study.arms],
        "tasks": tasks(study),
        "differences": [
            {"a": d.first, "b": d.second, "metric": name, "difference": _known(d.interval.value)}
            | _ends(d.interval)
            | {"p": _known(d.p), "p_holm": _known(d.p_holm)}
            for name, d in study.differences
        ],
        "labels": _labels(study),
        "projections": _projections(study),
        "intervals": INTERVALS,
        "reliability": reliability(study, notes),
    }
    return results | {"answer": answer(results)}


INTERVALS = (
    "Patients are dealt to folds: one tests, the next chooses, the others train. Intervals are 95 % bootstraps over "
    "cases, BCa, the metric averaged over seeds within each resample; differences are paired on the same resamples, "
    "and their p values corrected by Holm's method over all of them. AUC compares slides that the same fold tests. "
    "By fold: the mean over folds, with one standard deviation to each side, as papers report it."
)


def label_of(arm: SlideArm, study: Study) -> str:
    mode = study.modes[arm.name]
    told = {"transductive": " (transductive)", "unknown": " (pre-training unknown)"}.get(mode, "")
    return (arm.title or arm.name) + told


def _arm(arm: SlideArm, study: Study) -> dict[str, Any]:
    metrics: dict[str, Any] = {}
    seeds: list[dict[str, Any]] = [{} for _ in arm.bags]
    folds = {}
    for (name, way, share), scored in study.scored.items():
        if name != arm.name:
            continue
        metrics |= {key(way, share, m): {"mean": _known(i.value)} | _ends(i) for m, i in scored.metrics.items()}
        mean, sd = spread(scored.folds)
        ends = {"low": mean - sd, "high": mean + sd} if math.isfinite(sd) else {}
        metrics[key(way, share, BY_FOLD)] = {"mean": _known(mean)} | ends
        folds[f"{way}/{share:g}"] = list(scored.folds)
        for row, found in zip(seeds, scored.seeds, strict=True):
            row |= {key(way, share, m): _known(value) for m, value in found.items()}
    if retrieved := study.found.get(arm.name):
        metrics |= {f"{RETRIEVAL}/{m}": {"mean": _known(i.value)} | _ends(i) for m, i in retrieved.metrics.items()}
        for row, found in zip(seeds, retrieved.seeds, strict=True):
            row |= {f"{RETRIEVAL}/{m}": value for m, value in found.items()}
    lengths = arm.bags[0].lengths
    size = f"{len(arm.bags[0].features):,} embeddings of {arm.bags[0].features.shape[1]} numbers, "
    size += f"{lengths.min()} to {lengths.max()} a slide"
    return {
        "name": arm.name,
        "title": label_of(arm, study),
        "kind": arm.kind,
        "what": f"{arm.what}; {size}" if arm.what else size,
        "mode": study.modes[arm.name],
        "seeds": [{"seed": i, "metrics": row} for i, row in enumerate(seeds)],
        "metrics": metrics,
        "by_fold": folds,
    }


def tasks(study: Study) -> list[dict[str, Any]]:
    found = []
    chance = {"auc": 0.5, "balanced_accuracy": 1 / len(study.table.names)}
    for way in study.ways:
        for share in study.draws:
            rows = [
                {"key": key(way, share, name), "title": title} | ({"chance": chance[name]} if name in chance else {})
                for name, title in TITLES.items()
            ]
            rows.insert(1, {"key": key(way, share, BY_FOLD), "title": "AUC, by fold", "chance": 0.5})
            named = f"{way}/{share:g}"
            title = f"{way_title(way, study)}; {tables.percent(share)} of the labels"
            found.append({"name": named, "title": title, "what": way_told(way, study), "metrics": rows})
    if study.found:
        of = {"map": "mAP"} | {f"recall_{k}": f"Recall@{k}" for k in RECALLED}
        chances = next(iter(study.found.values())).chance
        rows = [
            {"key": f"{RETRIEVAL}/{name}", "title": title} | ({"chance": chances[name]} if name in chances else {})
            for name, title in of.items()
        ]
        what = "Each slide asks for slides of its label among those of other patients, by the cosine of means. No fit."
        found.append({"name": RETRIEVAL, "title": "Slides like this one", "what": what, "metrics": rows})
    return found


def way_title(way: str, study: Study) -> str:
    titles = {"knn": "Nearest slides", "linear": "Linear on the mean", "hipt": "HIPT's aggregator"}
    return titles.get(way, f"Head {way}")


def way_told(way: str, study: Study) -> str:
    told = {
        "knn": "The nearest slides by the mean embedding vote; nothing is fitted.",
        "linear": "Logistic regression on the mean embedding, its penalty chosen on the cases of another fold.",
    }
    text = told.get(way, f"The head {way} of all embeddings of a slide, its epoch chosen on the cases of another fold.")
    others = [f"{arm.title or arm.name} has {arm.instead[way]}" for arm in study.arms if way in arm.instead]
    return f"{text} {'; '.join(others)}." if others else text


def _labels(study: Study) -> list[dict[str, Any]]:
    """AUC by share of the labels, where there are several."""
    if len(study.draws) < 2:
        return []
    found = []
    for arm in study.arms:
        for way in study.ways:
            line: dict[str, Any] = {"x": [], "y": [], "low": [], "high": []}
            for share in sorted(study.draws):
                scored = study.scored.get((arm.name, way, share))
                if scored is None or "auc" not in scored.metrics:
                    continue
                interval = scored.metrics["auc"]
                ends = _ends(interval)
                line["x"].append(share)
                for name, value in (("y", _known(interval.value)), ("low", ends["low"]), ("high", ends["high"])):
                    line[name].append(value)
            if line["x"]:
                found.append({"arm": arm.name, "by": "cases", "metric": f"AUC, {way_title(way, study)}"} | line)
    return found


def _projections(study: Study) -> list[dict[str, Any]]:
    """The first seed of every arm, a point a slide: UMAP where umap-learn is installed, else PCA."""
    method = "umap" if importlib.util.find_spec("umap") else "pca"
    columns = {"label": np.array(study.table.names)[study.table.labels]}
    found = []
    for arm in study.arms:
        x = slide_knn.means(arm.bags[0])
        if len(x) < projection.LEAST["pca"] or x.shape[1] < 2:
            continue
        made = projection.project(x, columns, method=method, colour=("label",))
        code = [study.table.names.index(name) for name in made.colours["label"]]
        colour = {"name": "label", "values": code, "names": list(study.table.names)}
        xy = {axis: made.xy[:, i].round(4).tolist() for i, axis in enumerate("xy")}
        what = {"arm": arm.name, "method": method.upper(), "point": "a slide: the mean of its rows"}
        found.append({**what, **xy, "colours": [colour]})
    return found


def reliability(study: Study, notes: Sequence[str]) -> list[str]:
    found = []
    for mode, told in MODES.items():
        if arms := [arm.title or arm.name for arm in study.arms if study.modes[arm.name] == mode]:
            found.append(f"{mode.capitalize()}: {told}: {', '.join(arms)}.")
    found += [*notes, *study.notes]
    for (name, way, share), scored in study.scored.items():
        found += [f"{name}, {way} at {tables.percent(share)}: {note}" for note in scored.notes]
    found += [f"{name}, {RETRIEVAL}: {note}" for name, one in study.found.items() for note in one.notes]
    if study.differences:
        made, drawn = len(study.differences), study.differences[0][1].interval.resamples
        if (least := 2 * made / (drawn + 1)) >= 0.05:
            found.append(
                f"{made} differences on {drawn} resamples: after Holm's correction the least p can be {least:.2g}, "
                "whatever the arms are. Compare fewer (--pairs), or resample more (--resamples)."
            )
    if len(set(study.table.cases)) < FEW_CASES:
        found.append(f"{len(set(study.table.cases))} cases are few: intervals over them are rough.")
    return found


def answer(results: Mapping[str, Any]) -> str:
    """The best arms by the first metric, and how many differences stand."""
    task = results["tasks"][0]
    metric = task["metrics"][0]
    ranked = [arm for arm in tables.sorted_arms(results, metric) if arm["metrics"].get(metric["key"])]
    if not ranked:
        return "No figure could be made: see what to trust and what not."
    told = [
        f"{arm['title']} {tables.figure(item['mean'])} {tables.interval(item)}".strip()
        for arm in ranked[:3]
        for item in [arm["metrics"][metric["key"]]]
    ]
    first = f"Best by {metric['title']} ({task['title']}): {'; '.join(told)}."
    rows = results["differences"]
    clear = sum(row["p_holm"] is not None and row["p_holm"] < 0.05 for row in rows)
    return first + (
        f" Of {len(rows)} paired differences, {clear} are below p = 0.05 after Holm's correction." if rows else ""
    )


def pictures_of(study: Study) -> dict[str, tuple[str, np.ndarray]]:
    """ROC of every way with the most labels: {name: (caption, picture)}."""
    share, labels = max(study.draws), study.table.labels
    found: dict[str, tuple[str, np.ndarray]] = {}
    for number, way in enumerate(study.ways):
        scores = {
            label_of(arm, study): scored.stack.mean(0)
            for arm in study.arms
            if (scored := study.scored.get((arm.name, way, share)))
        }
        for i, picture in enumerate(figures.roc_picture(labels, dict(list(scores.items())[:DRAWN]), study.table.names)):
            caption = (
                f"{way_title(way, study)}: ROC of predictions of slides that the fit has not seen, mean over seeds"
            )
            found[f"roc{number}-{i}"] = (caption, picture)
    return found


def predictions(study: Study) -> str:
    """A row a slide; a column an arm, way and share (and class, where there are several): the mean over seeds."""
    table, of_fold = study.table, slide_knn.strata(next(iter(study.draws.values())))
    names = [""] if len(table.names) == 2 else [f" {name}" for name in table.names]
    columns = [f"{arm} {way} {share:g}{n}" for arm, way, share in study.scored for n in names]
    lines: list[list[Any]] = [["slide_id", "case_id", "fold", "label", *columns]]
    means = [scored.stack.mean(0) for scored in study.scored.values()]
    for i, slide in enumerate(table.slides):
        values = [f"{v:.6g}" for mean in means for v in np.atleast_1d(mean[i])]
        lines.append([slide, table.cases[i], int(of_fold[i]), table.names[table.labels[i]], *values])
    return _text(lines)


def folds_table(study: Study) -> str:
    """Which slide is where, as evaluators.mil.read_splits reads it: the draws with the most labels."""
    lines: list[list[Any]] = [["slide_id", "split", "fold"]]
    for draw in study.draws[max(study.draws)]:
        parts = (("train", draw.train), ("val", draw.val), ("test", draw.test))
        lines += [[study.table.slides[row], part, draw.fold] for part, rows in parts for row in rows]
    return _text(lines)


def _text(lines: Sequence[Sequence[Any]]) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows(lines)
    return buffer.getvalue()


def _known(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _ends(found: Interval) -> dict[str, float | None]:
    known = math.isfinite(found.low) and math.isfinite(found.high)
    return {"low": found.low, "high": found.high} if known else {"low": None, "high": None}
