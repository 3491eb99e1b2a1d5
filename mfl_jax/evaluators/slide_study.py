"""Arms of slide embeddings against each other: the same folds, shares of labels and seeds for all, paired differences.

An arm is a set of features of every slide; its seeds are sets that differ in nothing else. A way turns them into
predictions: 'knn' and 'linear' on the mean of a slide, or a head of models/mil.py on all of its regions. Every figure
averages the metric over seeds, of pre-training and of the head; predictions are never averaged, so that no way gets an
ensemble.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from mfl_jax import statistics
from mfl_jax.bags import Bags, Table, with_cases
from mfl_jax.evaluators import retrieval, slide_knn
from mfl_jax.evaluators.mil.fit import Fit, Settings, fit_all, pack
from mfl_jax.evaluators.mil.run import probabilities, target_of
from mfl_jax.evaluators.results import class_metrics, mean_score, value_metrics
from mfl_jax.evaluators.slide_knn import Draw
from mfl_jax.evaluators.tasks import LeakError
from mfl_jax.models.mil import make_mil
from mfl_jax.statistics import Difference, Interval

PLAIN = ("knn", "linear")
RETRIEVAL = "retrieval"
METRICS = ("auc", "accuracy", "balanced_accuracy")
RECALLED = (1, 3, 5)
Say = Callable[[str], None]


@dataclass(frozen=True)
class Recipe:
    """How a head is trained, beside its own settings."""

    settings: Settings
    lr: float
    decay: float


USUAL = Recipe(Settings(), 1e-3, 0.0)
RECIPES = {"hipt": Recipe(Settings(epochs=20, patience=20, batch=1), 2e-4, 1e-5)}


@dataclass(frozen=True)
class SlideArm:
    """`instead` {way: head} takes another head in that place, such as DeepMIL on tiles where regions have HIPT's."""

    name: str
    bags: tuple[Bags, ...]  # of each seed
    pretrained: tuple[str, ...] | None  # cases that the encoder has seen; None: not known
    title: str = ""
    kind: str = "ours"  # of report/schema.py
    what: str = ""
    instead: Mapping[str, str] = field(default_factory=dict)
    skip: tuple[str, ...] = ()  # ways, or 'retrieval'


@dataclass(frozen=True)
class Scored:
    """One arm by one way at one share."""

    stack: np.ndarray  # [seeds of the arm * seeds of the head, S] or [.., S, classes]
    metrics: dict[str, Interval]
    seeds: tuple[dict[str, float], ...]  # of the arm
    folds: tuple[float, ...]  # AUC of each that tests both classes, mean over seeds
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Found:
    """Of retrieval: same-label slides of other patients."""

    metrics: dict[str, Interval]
    seeds: tuple[dict[str, float], ...]
    each: dict[str, np.ndarray]  # [seeds, Q]
    cases: np.ndarray  # [Q]
    chance: dict[str, float]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Study:
    table: Table  # sorted by slide
    arms: tuple[SlideArm, ...]  # bags in the order of the table
    ways: tuple[str, ...]
    draws: dict[float, tuple[Draw, ...]]
    scored: dict[tuple[str, str, float], Scored]  # (arm, way, share)
    found: dict[str, Found]
    differences: tuple[tuple[str, Difference], ...]  # key of the metric; p_holm is over all of them
    modes: dict[str, str]  # of the arms
    notes: tuple[str, ...]


def mode(arm: SlideArm, cases: Sequence[str]) -> str:
    if arm.pretrained is None:
        return "unknown"
    return "transductive" if set(arm.pretrained) & set(cases) else "inductive"


def check_leaks(arms: Sequence[SlideArm], cases: Sequence[str], transductive: bool) -> None:
    """Every case is tested in some fold, so none may have been seen in pre-training, unless that is asked for."""
    for arm in arms:
        if (shared := sorted(set(arm.pretrained or ()) & set(cases))) and not transductive:
            raise LeakError(
                f"arm {arm.name!r}: its encoder was trained on {len(shared)} of {len(set(cases))} cases that would be "
                f"tested: {', '.join(shared[:5])}. Evaluate on the others (--held-out), or ask for the result as "
                "transductive (--transductive)"
            )


def study(
    arms: Sequence[SlideArm],
    table: Table,
    ways: Sequence[str] = (*PLAIN, "hipt"),
    *,
    folds: int = slide_knn.FOLDS,
    shares: Sequence[float] = (1.0, 0.25),
    k: int = slide_knn.K,
    distance: str = "euclidean",
    head_seeds: int = 1,
    epochs: int | None = None,
    retrieve: bool = True,
    pairs: Sequence[tuple[str, str]] | None = None,
    transductive: bool = False,
    resamples: int = 2000,
    seed: int = 0,
    say: Say = lambda line: None,
) -> Study:
    """`epochs` is in place of what the recipe of a head has. `pairs` are arms whose differences are wanted (all pairs
    where it is None). LeakError where an arm was trained on cases of the table, unless `transductive`, which marks it.
    """
    _check(arms, ways, table, pairs, head_seeds)
    check_leaks(arms, table.cases, transductive)
    order = sorted(range(len(table.slides)), key=lambda i: table.slides[i])
    table = _reordered(table, order)
    arms = tuple(replace(arm, bags=tuple(with_cases(bags, table) for bags in arm.bags)) for arm in arms)
    draws = slide_knn.plan(table, folds=folds, shares=shares, seed=seed)
    options: dict[str, Any] = {"resamples": resamples, "seed": seed}
    scored: dict[tuple[str, str, float], Scored] = {}
    of_mean = {arm.name: [slide_knn.means(bags) for bags in arm.bags] for arm in arms}
    for way in ways:
        able = [arm for arm in arms if way not in arm.skip]
        say(f"{way}: {len(able)} arms, {folds} folds")
        if way in PLAIN:
            stacks = {
                (arm.name, share): np.stack(
                    [_plain(way, x, table, draws[share], k, distance) for x in of_mean[arm.name]]
                )
                for arm in able
                for share in shares
            }
        else:
            stacks = _heads(way, able, table, draws, head_seeds, epochs, seed)
        for (name, share), stack in stacks.items():
            repeats = 1 if way in PLAIN else head_seeds
            scored[name, way, share] = _scored(stack, repeats, table, draws[share], options)
    found = {}
    for arm in (arm for arm in arms if retrieve and RETRIEVAL not in arm.skip):
        found[arm.name] = _retrieved(of_mean[arm.name], table, options)
    notes = {f"{arm.name}: {note}": None for arm in arms for bags in arm.bags for note in bags.notes}
    if "knn" in ways:
        notes |= {
            f"{share:.0%} of the labels are {least} slides in some fold, hardly more than the {k} that vote": None
            for share, of_share in draws.items()
            if (least := min(len(draw.train) for draw in of_share)) < 2 * k
        }
    differences = _differences(arms, ways, tuple(shares), scored, found, table, draws, pairs, options)
    modes = {arm.name: mode(arm, table.cases) for arm in arms}
    return Study(table, arms, tuple(ways), draws, scored, found, differences, modes, tuple(notes))


def _check(
    arms: Sequence[SlideArm],
    ways: Sequence[str],
    table: Table,
    pairs: Sequence[tuple[str, str]] | None,
    head_seeds: int,
) -> None:
    names = [arm.name for arm in arms]
    if not names or len(set(names)) < len(names) or not all(arm.bags for arm in arms):
        raise ValueError(f"there is at least one arm, each with features and a name of its own; seen {names}")
    if len(set(ways)) < len(ways):
        raise ValueError(f"each way comes once, not {list(ways)}")
    for way in {*ways, *(head for arm in arms for head in arm.instead.values())} - {*PLAIN}:
        make_mil(way)
    if table.survival:
        raise ValueError("slides are told apart by classes here; for survival there is mfl mil")
    if head_seeds < 1:
        raise ValueError(f"head_seeds is {head_seeds}; a head is trained at least once")
    if missing := sorted({name for pair in pairs or () for name in pair} - set(names)):
        raise ValueError(f"no such arms: {', '.join(missing)}; there are {', '.join(names)}")


def _reordered(table: Table, order: Sequence[int]) -> Table:
    def take(values: Sequence) -> tuple:
        return tuple(values[i] for i in order)

    pictures = take(table.pictures) if table.pictures else ()
    return replace(
        table, slides=take(table.slides), cases=take(table.cases), labels=table.labels[list(order)], pictures=pictures
    )


def _plain(way: str, x: np.ndarray, table: Table, draws: Sequence[Draw], k: int, distance: str) -> np.ndarray:
    classes = len(table.names)
    if way == "knn":
        return slide_knn.knn(x, table.labels, draws, classes, k=k, distance=distance)
    return slide_knn.linear(x, table.labels, draws, classes)[0]


def recipe(head: str, epochs: int | None = None) -> Recipe:
    found = RECIPES.get(head.partition(",")[0], USUAL)
    if epochs is None:
        return found
    return replace(
        found, settings=replace(found.settings, epochs=epochs, patience=min(found.settings.patience, epochs))
    )


def _heads(
    way: str,
    arms: Sequence[SlideArm],
    table: Table,
    draws: Mapping[float, Sequence[Draw]],
    head_seeds: int,
    epochs: int | None,
    seed: int,
) -> dict[tuple[str, float], np.ndarray]:
    """Arms of one head and width are one program: their slides lie end to end, and each fit knows its own."""
    together: dict[tuple[str, int], list[SlideArm]] = {}
    for arm in arms:
        together.setdefault((arm.instead.get(way, way), arm.bags[0].features.shape[1]), []).append(arm)
    found: dict[tuple[str, float], np.ndarray] = {}
    for (head, _), members in together.items():
        found |= _one_head(head, members, table, draws, head_seeds, recipe(head, epochs), seed)
    return found


def _one_head(
    head: str,
    arms: Sequence[SlideArm],
    table: Table,
    draws: Mapping[float, Sequence[Draw]],
    head_seeds: int,
    chosen: Recipe,
    seed: int,
) -> dict[tuple[str, float], np.ndarray]:
    sets = [(arm, number, bags) for arm in arms for number, bags in enumerate(arm.bags)]
    slides = len(table.slides)
    features = np.concatenate([bags.features for *_, bags in sets])
    starts = np.cumsum([0, *(len(bags.features) for *_, bags in sets[:-1])])
    offsets = [bags.offsets[1:] + start for start, (*_, bags) in zip(starts, sets, strict=True)]
    target = target_of(replace(table, labels=np.tile(table.labels, len(sets))))
    places, fits = [], []
    for place, (arm, number, _) in enumerate(sets):
        for share, of_share in draws.items():
            for draw in of_share:
                for s in range(head_seeds):
                    key = np.random.SeedSequence([seed, draw.fold, round(1000 * share), s, number])
                    start = int(key.generate_state(1)[0])
                    train, val, test = (part + place * slides for part in (draw.train, draw.val, draw.test))
                    fits.append(Fit(train, val, test, start, chosen.lr, chosen.decay))
                    places.append((arm.name, share, number * head_seeds + s, draw))
    packed = pack(features, np.concatenate([[0], *offsets]))
    fitted = fit_all(head, packed, target, fits, chosen.settings)
    if not np.isfinite(fitted.losses).all():
        raise ValueError(f"head {head!r}: some fit's loss was never finite: scale the features")
    shape = (slides,) if target.outputs == 1 else (slides, target.outputs)
    found = {(arm.name, share): np.zeros((len(arm.bags) * head_seeds, *shape)) for arm in arms for share in draws}
    for (name, share, row, draw), logits in zip(places, fitted.logits, strict=True):
        found[name, share][row, draw.test] = probabilities(logits, target.kind)
    return found


def metrics_of(draws: Sequence[Draw]) -> dict[str, Any]:
    """The AUC compares slides that one fold tests: fits of different folds need not agree in scale."""
    return {name: name for name in METRICS} | {"auc": statistics.auc_within(slide_knn.strata(draws))}


def _scored(stack: np.ndarray, repeats: int, table: Table, draws: Sequence[Draw], options: Mapping[str, int]) -> Scored:
    cases, asked = np.asarray(table.cases), metrics_of(draws)
    metrics, notes = class_metrics(table.labels, stack, cases, asked, **options)
    seeds = []
    for start in range(0, len(stack), repeats):
        part, _ = class_metrics(table.labels, stack[start : start + repeats], cases, asked, resamples=0)
        seeds.append({name: interval.value for name, interval in part.items()})
    folds = []
    for draw in draws:
        try:
            folds.append(statistics.measure("auc", table.labels[draw.test], stack[:, draw.test]))
        except ValueError:
            continue  # a fold that tests one class has no AUC of its own; its cases are in the others' figures
    return Scored(stack, metrics, tuple(seeds), tuple(folds), notes)


def _retrieved(of_mean: Sequence[np.ndarray], table: Table, options: Mapping[str, int]) -> Found:
    group, asked = np.unique(table.cases, return_inverse=True)[1], np.arange(len(table.slides))
    parts = [retrieval.answers(x, table.labels, group, asked, RECALLED, len(asked)) for x in of_mean]
    _, there, chance = parts[0]
    if not there.any():
        return Found(
            {}, tuple({} for _ in of_mean), {}, np.array([]), {}, ("no slide has one of its label in another case",)
        )
    each = {name: np.stack([part[0][name] for part in parts]) for name in parts[0][0]}
    cases = np.asarray(table.cases)[there]
    metrics: dict[str, Interval] = {}
    notes: tuple[str, ...] = ()
    for name, values in each.items():
        part, more = value_metrics(values[0], values, cases, {name: mean_score}, **options)
        metrics, notes = metrics | part, notes + more
    if not there.all():
        notes += (f"{int((~there).sum())} slides have no slide of their label in another case",)
    seeds = tuple({name: float(values[i].mean()) for name, values in each.items()} for i in range(len(of_mean)))
    return Found(metrics, seeds, each, cases, chance, notes)


def key(way: str, share: float, metric: str) -> str:
    return f"{way}/{share:g}/{metric}"


def _differences(
    arms: Sequence[SlideArm],
    ways: Sequence[str],
    shares: Sequence[float],
    scored: Mapping[tuple[str, str, float], Scored],
    found: Mapping[str, Found],
    table: Table,
    draws: Mapping[float, Sequence[Draw]],
    pairs: Sequence[tuple[str, str]] | None,
    options: dict[str, Any],
) -> tuple[tuple[str, Difference], ...]:
    names, cases = [arm.name for arm in arms], np.asarray(table.cases)
    pairs = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]] if pairs is None else list(pairs)
    made: list[tuple[str, Difference]] = []
    for way in ways:
        for share in shares:
            stacks = {name: scored[name, way, share].stack for name in names if (name, way, share) in scored}
            metric = metrics_of(draws[share])["auc"]
            asked = [pair for pair in pairs if set(pair) <= set(stacks)]
            for d in statistics.compare(metric, table.labels, stacks, cases, pairs=asked, **options) if asked else ():
                made.append((key(way, share, "auc"), d))
    each = {name: one.each["map"] for name, one in found.items() if one.each}
    if asked := [pair for pair in pairs if set(pair) <= set(each)]:
        of_query = next(one.cases for one in found.values() if one.each)
        none = np.zeros(len(of_query), int)
        for d in statistics.compare(mean_score, none, each, of_query, pairs=asked, **options):
            made.append((f"{RETRIEVAL}/map", d))
    corrected = statistics.holm([d.p for _, d in made]) if made else ()
    return tuple((k, replace(d, p_holm=float(p))) for (k, d), p in zip(made, corrected, strict=True))


def spread(folds: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation over folds, as papers report them; nan where there are none."""
    if not folds:
        return math.nan, math.nan
    return float(np.mean(folds)), float(np.std(folds, ddof=1)) if len(folds) > 1 else math.nan
