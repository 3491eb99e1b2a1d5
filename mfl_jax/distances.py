"""What an evaluation finds in the distances between features: tiles of a kind in other cases, kinds of tile that lie
together, near tiles and far ones of a slide, and how well a slide can be told from its tiles."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from mfl_jax import findings
from mfl_jax.evaluators import batch_effect, clusters, retrieval
from mfl_jax.evaluators.results import Result, compare, mean_score
from mfl_jax.evaluators.tasks import Task, split_rows
from mfl_jax.findings import TITLES, ArmRuns, Asked, Found

RETRIEVED = ("map", "recall_1", "recall_5", "recall_10", "ndcg")


def retrieved(task: Task, arms: Sequence[ArmRuns], asked: Asked, found: Found) -> None:
    prefix, chances = f"{task.name}/retrieval", {}
    results: dict[str, list[Result]] = {}
    for arm in arms:
        asked.say(f"retrieval in other {asked.across}s, {task.name}: {arm.title}")
        given = (asked.columns, asked.splits, task)
        each = [retrieval.evaluate(run.features, *given, across=asked.across, **asked.of(run)) for run in arm.seeds]
        for number, one in enumerate(each):
            findings.of_seed(found, arm, number, prefix, one.metrics, one.notes)
        chances = each[0].chance
        findings.add(found, arm, prefix, retrieval.over_seeds(each, **asked.drawn()), ())
        results[arm.name] = [retrieval.as_result(one, "map") for one in each]
    rows = []
    for name in RETRIEVED:
        chance = {"chance": chances[name]} if name in chances else {}
        rows.append({"key": f"{prefix}/{name}", "title": TITLES[name]} | chance)
        if any(f"{prefix}/positive_{name}" in found.metrics[arm.name] for arm in arms):
            rows.append({"key": f"{prefix}/positive_{name}", "title": f"{TITLES[name]}, class 1"})
    asking = "" if task.asking is None else f", asked by class {task.asking} alone"
    title = f"{task.name}, found in other {asked.across}s{asking}"
    found.tasks.append({"name": prefix, "title": title, "metrics": rows})
    paired = lambda results, pairs: compare(results, mean_score, pairs, **asked.drawn())  # noqa: E731
    findings.differences(results, "map", prefix, asked.pairs, asked, found, paired)


def clustered(task: Task, arms: Sequence[ArmRuns], asked: Asked, found: Found) -> None:
    prefix, chances = f"{task.name}/clusters", {}
    results: dict[str, list[clusters.Agreement]] = {}
    tested = int(split_rows(asked.columns, asked.splits, task.read(asked.columns)[1])["test"].sum())
    if tested < clusters.K:
        found.notes[f"no clusters of {task.name}: {tested} test tiles have a class, for {clusters.K} clusters"] = None
        return
    for arm in arms:
        asked.say(f"kinds of tile, {task.name}: {arm.title}")
        given = (asked.columns, asked.splits, task)
        each = [clusters.evaluate(run.features, *given, **asked.of(run)) for run in arm.seeds]
        for number, one in enumerate(each):
            findings.of_seed(found, arm, number, prefix, one.metrics, one.notes)
        chances = each[0].chance
        findings.add(found, arm, prefix, clusters.over_seeds(each), ())
        results[arm.name] = each
    rows = []
    for name in clusters.MEASURES:
        chance = {"chance": chances[name]} if name in chances else {}
        rows.append({"key": f"{prefix}/{name}", "title": TITLES[name]} | chance)
    what = (
        f"k-means of the test tiles, k = {clusters.K}, told nothing, beside what they are. Intervals and p values are "
        "by leaving out a case at a time: in resamples, tiles that are drawn twice would agree with themselves."
    )
    found.tasks.append({"name": prefix, "title": f"{task.name}, as clusters", "what": what, "metrics": rows})
    findings.differences(results, "ari", prefix, asked.pairs, asked, found, clusters.compare)


def ratios(arms: Sequence[ArmRuns], asked: Asked, limits: tuple[float, float], found: Found) -> None:
    rows = np.isin(asked.columns["case"], list(asked.splits["test"]))
    columns = {name: values[rows] for name, values in asked.columns.items()}
    options: dict[str, Any] = {"near_um": limits[0], "far_um": limits[1], "seed": asked.seed}
    for arm in arms:
        asked.say(f"distances along a slide: {arm.title}")
        features = [run.features[rows] for run in arm.seeds]
        ratios, notes = retrieval.distance_ratio(features, columns, **options, resamples=asked.resamples)
        for number, one in enumerate(features):
            alone, _ = retrieval.distance_ratio(one, columns, **options, resamples=0)
            found.seeds[arm.name][number] |= {
                f"addr/{m.removeprefix('addr_')}": findings.finite(i.value) for m, i in alone.items()
            }
        findings.add(found, arm, "addr", {name.removeprefix("addr_"): ratio for name, ratio in ratios.items()}, notes)
    what = f"Mean distance of tiles more than {limits[1]:g} um apart over that of tiles within {limits[0]:g} um."
    shown = [{"key": f"addr/{name}", "title": TITLES[f"addr_{name}"], "chance": 1.0} for name in ("global", "local")]
    found.tasks.append({"name": "addr", "title": "Far over near (ADDR)", "what": what, "metrics": shown})


def of_slides(arms: Sequence[ArmRuns], asked: Asked, found: Found) -> None:
    """Of several seeds the mean, without an interval: its scores are of different neighbours."""
    titles = {"nearest": "Slide of the nearest tile", "linear": "Linear probe", "silhouette": "Silhouette"}
    chances: dict[str, float] = {}
    for arm in arms:
        asked.say(f"batch effect: {arm.title}")
        options: dict[str, Any] = {"linear": asked.slide_probe, **asked.drawn()}
        each = [batch_effect.measure(run.features, asked.columns, **options) for run in arm.seeds]
        for number, one in enumerate(each):
            findings.of_seed(found, arm, number, "batch_effect", one.metrics, one.notes)
            chances |= one.chance
        for name, interval in each[0].metrics.items():
            mean = findings.finite(float(np.mean([one.metrics[name].value for one in each])))
            shown = findings.document_of(interval) if len(each) == 1 else {"mean": mean}
            found.metrics[arm.name][f"batch_effect/{name}"] = shown
    rows = []
    for name, title in titles.items():
        if name == "linear" and not asked.slide_probe:
            continue
        row = {"key": f"batch_effect/{name}", "title": title, "better": "lower"}
        rows.append(row | ({"chance": chances[name]} if name in chances else {}))
    what = "How well do the features name the slide? What names it (stain, scanner) may stand in for what is asked."
    found.tasks.append({"name": "batch_effect", "title": "Batch effect", "what": what, "metrics": rows})
