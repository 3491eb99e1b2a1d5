"""A study on disk: results.json, report.html, predictions.csv, folds.csv, maps/."""

import csv
import io
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import mfl_jax
from input_pipeline.files import write_atomically
from mfl_jax import report
from mfl_jax.bags import Bags, with_cases
from mfl_jax.evaluators.mil import figures, maps
from mfl_jax.evaluators.mil.run import Arm, Study, attention, spread, strata
from mfl_jax.statistics import Interval

TITLES = {
    "auc": "AUC",
    "balanced_accuracy": "Balanced accuracy",
    "average_precision": "Average precision",
    "f1": "F1",
    "ece": "Calibration error",
    "c_index": "Concordance",
}
DRAWN = 6  # arms in one plot
FEW = 100  # slides
UNEVEN = 1.2  # times its even share: a class is so much commoner that probabilities say another thing than frequencies


def write(
    folder: str | Path,
    study: Study,
    bags: Mapping[str, Bags],
    *,
    title: str = "Slides from bags of tiles",
    question: str = "Which head on which features predicts the slide?",
    drawn: int = 6,
    origin: str = "image",
    notes: Sequence[str] = (),
    config: Any = None,
) -> Path:
    """The path of report.html. Maps are of the best arm, for `drawn` slides: half of those it is most right about,
    half of those it is most wrong about."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "predictions.csv", predictions(study).encode())
    write_atomically(folder / "folds.csv", folds_table(study).encode())
    pictures = pictures_of(study)
    best = ordered(study)[0]
    kinds, of_maps = draw_maps(
        folder / "maps", study, best, with_cases(bags[best.features], study.table), drawn, origin
    )
    document = results_of(study, best, title, question, config) | {
        "reliability": reliability(study, [*of_maps, *notes])
    }
    document["figures"] = {"pictures": [{"picture": n, "caption": caption} for n, (caption, _) in pictures.items()]}
    shown = {name: picture for name, (_, picture) in pictures.items()}
    if kinds:
        shown_maps = [{"picture": n, "caption": caption} for n, (caption, _) in kinds.items()]
        what = f"Ranks of the tiles' scores by {best.name}, by the fits that did not see the slide."
        document["saliency"] = {"what": what, "pictures": shown_maps}
        shown |= {name: picture for name, (_, picture) in kinds.items()}
    return report.save(folder, document, shown)


def ordered(study: Study) -> list[Arm]:
    """Best first."""

    def value(arm: Arm) -> float:
        found = arm.result.metrics.get(study.metric)
        return found.value if found else -math.inf

    return sorted(study.arms, key=value, reverse=True)


def results_of(study: Study, best: Arm, title: str, question: str, config: Any) -> dict[str, Any]:
    metrics = list(dict.fromkeys(name for arm in study.arms for name in arm.result.metrics))
    chance = {"auc": 0.5, "balanced_accuracy": 1 / len(study.table.names), "c_index": 0.5}
    keys = [
        {"key": m, "title": TITLES[m], "better": "lower" if m == "ece" else "higher"}
        | ({"chance": chance[m]} if m in chance else {})
        for m in metrics
    ]
    tested = best.result
    task = {"name": "slides", "title": "Slides", "what": _task(study), "metrics": keys}
    return {
        "title": title,
        "question": question,
        "answer": answer(study, best),
        "created": time.strftime("%Y-%m-%d %H:%M"),
        "version": mfl_jax.__version__,
        "arms": [_arm(arm) for arm in ordered(study)],
        "intervals": "Intervals are of 95 %, BCa, over resampled cases; p values of paired differences are corrected "
        "by Holm over all pairs. Figures are of the mean over seeds and inner folds; dots are of single seeds.",
        "cohort": {
            "Slides": len(tested.labels),
            "Cases": len(np.unique(tested.cases)),
            "Folds": len(study.folds),
            "Fits": sum(arm.fits for arm in study.arms),
        },
        "tasks": [task],
        "differences": [
            {"a": d.first, "b": d.second, "metric": study.metric, "difference": _known(d.interval.value)}
            | _ends(d.interval)
            | {"p": _known(d.p), "p_holm": _known(d.p_holm)}
            for d in study.differences
        ],
    } | ({"config": config} if config is not None else {})


def _task(study: Study) -> str:
    if study.table.survival:
        return f"Time to event; {int(study.table.labels.sum())} events. Risks are compared within folds."
    counts = np.bincount(study.table.labels, minlength=len(study.table.names))
    return ", ".join(f"{name}: {count}" for name, count in zip(study.table.names, counts, strict=True)) + " slides."


def _known(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _ends(found: Interval) -> dict[str, float | None]:
    known = math.isfinite(found.low) and math.isfinite(found.high)
    return {"low": found.low, "high": found.high} if known else {"low": None, "high": None}


def _arm(arm: Arm) -> dict[str, Any]:
    return {
        "name": arm.name,
        "title": arm.name,
        "kind": "ours",
        "what": f"{arm.head} on {arm.features}: {arm.fits} fits",
        "seeds": [{"seed": i, "metrics": found} for i, found in enumerate(arm.seeds)],
        "metrics": {name: {"mean": _known(m.value)} | _ends(m) for name, m in arm.result.metrics.items()},
        "folds": arm.folds,
        "chosen": arm.chosen,
    }


def answer(study: Study, best: Arm) -> str:
    found = best.result.metrics.get(study.metric)
    if found is None:
        return f"No arm has a value of {TITLES[study.metric]} here. See what to trust and what not."
    first = f"{best.name} has the greatest {TITLES[study.metric]}, {found}, on slides that its fits did not see."
    rivals = [d for d in study.differences if best.name in (d.first, d.second)]
    if not rivals:
        low, mean, high = spread(best, study.metric)
        return f"{first} Over folds it is {mean:.3f}, from {low:.3f} to {high:.3f}."
    ahead = [d for d in rivals if d.p_holm < 0.05]
    return f"{first} It is ahead of {len(ahead)} of {len(rivals)} other arms at p < 0.05 after Holm's correction."


def reliability(study: Study, notes: Sequence[str]) -> list[str]:
    found = [*study.notes, *notes]
    for arm in study.arms:
        found += [f"{arm.name}: {note}" for note in arm.result.notes]
        low, mean, high = spread(arm, study.metric)
        found.append(f"{arm.name}: {TITLES[study.metric]} by fold {mean:.3f}, from {low:.3f} to {high:.3f}.")
    if not study.table.survival:
        found += _of_classes(study.arms[0].result.labels, len(study.table.names))
    if seen := {arm.features for arm in study.arms if arm.result.mode == "transductive"}:
        found.insert(0, f"Transductive: the encoder was trained on cases of this table ({', '.join(sorted(seen))}).")
    return found


def _of_classes(labels: np.ndarray, classes: int) -> list[str]:
    found, share = [], np.bincount(labels.astype(int)).max() / len(labels)
    if share > UNEVEN / classes:
        found.append(
            f"Classes weigh alike in training, and the commonest has {share:.0%} of the slides: probabilities "
            "are as if all classes were equally frequent, and calibration and its error show that as well."
        )
    if len(labels) < FEW:
        found.append(
            "Predictions of all folds are pooled. Of so few slides, those without any signal come out below 0.5."
        )
    return found


def pictures_of(study: Study) -> dict[str, tuple[str, np.ndarray]]:
    """{name: (caption, picture)}"""
    arms = ordered(study)[:DRAWN]
    table, rows = study.table, arms[0].result.ids
    labels, scores = arms[0].result.labels, {arm.name: arm.result.scores for arm in arms}
    found: dict[str, tuple[str, np.ndarray]] = {}
    if table.times is not None:
        of_fold = strata(study.folds, rows)
        for i, arm in enumerate(arms):
            middle = np.array([np.median(arm.result.scores[of_fold == k]) for k in range(len(study.folds))])
            high = arm.result.scores > middle[of_fold]
            picture = figures.survival_picture(table.times[rows], labels, high, arm.name)
            found[f"survival{i}"] = (f"{arm.name}: survival of the halves of lower and higher risk", picture)
        return found
    for i, picture in enumerate(figures.roc_picture(labels, scores, table.names)):
        found[f"roc{i}"] = ("ROC of the out-of-fold predictions", picture)
    picture = figures.calibration_picture(labels, scores, table.names)
    found["calibration"] = ("Calibration: what was said, of classes that weigh alike, and how often it was so", picture)
    for i, arm in enumerate(arms):
        picture = figures.confusion_picture(labels, arm.result.scores, table.names, arm.name)
        found[f"confusion{i}"] = (f"Confusion of {arm.name}", picture)
    return found


def draw_maps(
    folder: Path, study: Study, arm: Arm, bags: Bags, drawn: int, origin: str
) -> tuple[dict[str, tuple[str, np.ndarray]], list[str]]:
    found: dict[str, tuple[str, np.ndarray]] = {}
    notes: list[str] = []
    for row, what in chosen_slides(study, arm, bags, drawn):
        slide = study.table.pictures[row] if study.table.pictures else None
        scores = attention(arm, bags, study.folds, row)
        pictures, more = maps.write_maps(folder, bags, row, scores, slide, origin=origin)
        notes += more
        for kind, picture in pictures.items():
            caption = f"{bags.slides[row]}, {what}" + (
                ": greatest scores above, least below" if kind == "tiles" else ""
            )
            found[f"{kind}{row}"] = (caption, maps.shrunk(picture, 1100 if kind == "tiles" else 480))
    return found, notes


def chosen_slides(study: Study, arm: Arm, bags: Bags, count: int) -> list[tuple[int, str]]:
    """Rows with two tiles or more: the most right and the most wrong (survival: of most and least risk)."""
    rows, labels, scores = arm.result.ids, arm.result.labels, arm.result.scores
    enough = bags.lengths[rows] > 1
    rows, labels, scores = rows[enough], labels[enough], scores[enough]
    if study.table.survival:
        said, texts = -scores, [f"risk {s:.2f}" for s in scores]
    else:
        columns = np.stack([1 - scores, scores], 1) if scores.ndim == 1 else scores
        said = 1 - columns[np.arange(len(rows)), labels]
        texts = [f"{study.table.names[y]}, given {1 - p:.2f}" for y, p in zip(labels, said, strict=True)]
    order = np.argsort(said, kind="stable")
    picked = [*order[: -(-count // 2)], *order[::-1][: count // 2]] if count < len(order) else order
    return [(int(rows[i]), texts[i]) for i in picked]


def predictions(study: Study) -> str:
    table = study.table
    rows = study.arms[0].result.ids
    of_fold = strata(study.folds, rows)
    names = [""] if study.arms[0].result.scores.ndim == 1 else [f" {name}" for name in table.names]
    lines = [["slide_id", "case_id", "fold", *_truth(study), *(f"{arm.name}{n}" for arm in study.arms for n in names)]]
    for i, row in enumerate(rows):
        truth = [table.names[table.labels[row]]] + ([repr(float(table.times[row]))] if table.times is not None else [])
        scores = [f"{v:.6g}" for arm in study.arms for v in np.atleast_1d(arm.result.scores[i])]
        lines.append([table.slides[row], table.cases[row], study.folds[of_fold[i]].name, *truth, *scores])
    return _text(lines)


def _truth(study: Study) -> list[str]:
    return ["event", "time"] if study.table.survival else ["label"]


def folds_table(study: Study) -> str:
    """Which slide is where in which fold, as read_splits reads it: inner folds are made of train."""
    lines = [["slide_id", "split", "fold"]]
    for k, fold in enumerate(study.folds):
        single = len(fold.inner) == 1
        train = fold.inner[0][0] if single else np.unique(np.concatenate(fold.inner[0]))
        parts = (("train", train), ("val", fold.inner[0][1] if single else ()), ("test", fold.test))
        lines += [[study.table.slides[row], part, str(k)] for part, rows in parts for row in rows]
    return _text(lines)


def _text(lines: Sequence[Sequence[str]]) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows(lines)
    return buffer.getvalue()
