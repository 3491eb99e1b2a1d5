"""Evaluation of a method's features on H&E alone, during training (`make`) and after it (`evaluate` and the modules).

Figures are of held-out cases (but batch_effect, which asks for no label), with intervals over cases. In a config:

    evals.probe = {kind: 'probe', every: 500, tileset: 'demo/set', batch: 256, feature: 'he', partners: (),
                   target: 'positive', threshold: 0.5, regression: False, pretrained: 'train', transductive: False,
                   resamples: 500}

kind is one of KINDS; `pretrained` names the split of that tile set which the encoder is trained on ('' for none). The
cases that the run is trained on are known without it, and count as well.
'decode' takes `decoded` (partners) instead of target, threshold and regression; 'batch_effect' takes none of these, nor
pretrained and transductive; 'distance_ratio' takes `near_um` and `far_um` in their place. `partners` are those that
`embed` itself needs: none, but for an upper bound.
"""

import difflib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from mfl_jax.evaluators import batch_effect, clusters, decode, few_label, knn, paper_head, probe, retrieval
from mfl_jax.evaluators.embed import Embedded, embed_pass, embed_set
from mfl_jax.evaluators.results import Result, compare, floats
from mfl_jax.evaluators.tasks import LeakError, Task, check_overlap, split_rows

if TYPE_CHECKING:
    from input_pipeline.tileset import TileSet
    from mfl_jax.data import Facts
    from mfl_jax.methods.base import Method
    from mfl_jax.step import State

__all__ = ["Embedded", "Evaluator", "LeakError", "Result", "Task"]
__all__ += ["compare", "embed_pass", "embed_set", "evaluate", "make", "score"]

evaluate, score = probe.evaluate, probe.score
log = logging.getLogger(__name__)
Run = Callable[["Method", "State"], dict[str, float]]


class EvaluatorError(RuntimeError):
    """An evaluation failed; the message has the evaluator's name and the step."""


@dataclass(frozen=True)
class Evaluator:
    name: str
    every: int
    run: Run

    def due(self, step: int, end: int) -> bool:
        """At multiples of `every` (never, for 0) and at the end."""
        return step == end or (self.every > 0 and step % self.every == 0)

    def __call__(self, method: "Method", state: "State") -> dict[str, float]:
        try:
            return self.run(method, state)
        except Exception as error:
            step = int(jax.device_get(state.step))
            raise EvaluatorError(f"evaluator {self.name!r} failed at step {step}: {error}") from error


class Pass:
    """The features of one tile set, computed once a state for all evaluators that ask for them."""

    def __init__(
        self,
        tileset: "TileSet",
        batch: int,
        partners: tuple[str, ...],
        mesh: jax.sharding.Mesh,
        trained: tuple[str, ...] = (),
    ):
        self.tileset, self._batch, self._partners, self._mesh = tileset, batch, partners, mesh
        self.trained = trained  # cases that the encoder is trained on, of whatever tile set
        self._of: tuple[Any, ...] = ()
        self._found: Embedded | None = None
        self._summaries: dict[tuple[str, ...], dict[str, np.ndarray]] = {}

    def __call__(self, method: "Method", state: "State") -> Embedded:
        asked = (method, state.params, state.extra)
        if self._found is None or any(a is not b for a, b in zip(self._of, asked, strict=True)):
            options: dict[str, Any] = {"batch": self._batch, "partners": self._partners}
            self._found = embed_set(method.embed, state.params, state.extra, self.tileset, self._mesh, **options)
            self._of = asked
        return self._found

    def summaries(self, names: tuple[str, ...]) -> dict[str, np.ndarray]:
        """Of the partners; they do not depend on the method, and are read once."""
        if names not in self._summaries:
            self._summaries[names] = decode.summaries(self.tileset, names, batch=self._batch)
        return self._summaries[names]


def make(reading: Any, facts: "Facts", mesh: jax.sharding.Mesh) -> tuple[Evaluator, ...]:
    """Of the `evals` part of a config. Whatever is wrong with it, leaks of cases too, is said now and not at a step."""
    from mfl_jax import data

    passes: dict[tuple, Pass] = {}
    sets: dict[str, TileSet] = {}
    made = []
    for name, part in reading.items():
        kind = part.kind
        if kind not in KINDS:
            near = difflib.get_close_matches(str(kind), KINDS, n=1)
            raise ValueError(
                f"evals.{name}.kind is {kind!r}; there are {', '.join(KINDS)}"
                + (f"; did you mean {near[0]!r}?" if near else "")
            )
        if part.tileset not in sets:
            sets[part.tileset] = data.open_set(part.tileset)
        tileset, partners = sets[part.tileset], tuple(part.partners)
        if (has := data.of_spec(tileset.spec)) != (wants := data.of_facts(facts)):
            told = f"{data.in_words(*has)}; the encoder is trained on {data.in_words(*wants)}"
            raise ValueError(f"evals.{name}.tileset has {told}")
        key = (part.tileset, part.batch, partners)
        passes.setdefault(key, Pass(tileset, part.batch, partners, mesh, facts.train_cases))
        try:
            run = KINDS[kind](name, part, passes[key])
        except ValueError as error:
            raise type(error)(f"evals.{name}: {error}") from error
        made.append(Evaluator(name, part.every, run))
    return tuple(made)


def _asked(part: Any, source: Pass) -> tuple[Task, dict[str, Any]]:
    """The task, and what all evaluations of one take; columns and cases are looked at without reading a tile."""
    task, tileset = Task(part.target, part.target, part.threshold, part.regression), source.tileset
    options = _options(part, source)
    columns = {"case": np.array(tileset.cases)[tileset.tiles["case"]]}
    columns |= {task.target: tileset.tiles[task.target]} if task.target in tileset.tiles else {}
    split_rows(columns, tileset.splits, task.read(columns)[1])
    return task, options


def _options(part: Any, source: Pass) -> dict[str, Any]:
    tileset = source.tileset
    if part.pretrained and part.pretrained not in tileset.splits:
        raise ValueError(f"pretrained is {part.pretrained!r}; the tile set has the splits {sorted(tileset.splits)}")
    named = tileset.splits[part.pretrained] if part.pretrained else ()
    pretrained = tuple(dict.fromkeys((*named, *source.trained)))
    check_overlap(tileset.splits, pretrained, transductive=part.transductive)
    return {"pretrained": pretrained, "transductive": part.transductive, "resamples": part.resamples}


def _features(found: Embedded, feature: str) -> np.ndarray:
    if feature not in found.features:
        raise ValueError(f"the method has no features {feature!r}; it has {sorted(found.features)}")
    return found.features[feature]


def _mode(name: str, mode: str) -> dict[str, float]:
    """A figure of cases that pre-training has seen is marked beside itself, in every log."""
    return {f"{name}/transductive": 1.0} if mode == "transductive" else {}


def _of_task(function: Callable[..., Any]) -> Callable[[str, Any, Pass], Run]:
    def build(name: str, part: Any, source: Pass) -> Run:
        task, options = _asked(part, source)
        feature, splits = part.feature, source.tileset.splits

        def run(method: "Method", state: "State") -> dict[str, float]:
            found = source(method, state)
            result = function(_features(found, feature), found.columns, splits, task, **options)
            for note in result.notes:
                log.info("%s: %s", name, note)
            return result.floats(name) | _mode(name, result.mode)

        return run

    return build


def _of_classes(function: Callable[..., Any]) -> Callable[[str, Any, Pass], Run]:
    def build(name: str, part: Any, source: Pass) -> Run:
        if part.regression:
            raise ValueError(f"{part.kind} needs classes: give a threshold in place of regression=True")
        return _of_task(function)(name, part, source)

    return build


def _decode(name: str, part: Any, source: Pass) -> Run:
    """Keys of its own: `decoded`, the partners whose summaries are predicted; no target."""
    tileset, feature, wanted = source.tileset, part.feature, tuple(part.decoded)
    decode.check_partners(wanted, tileset)
    options = _options(part, source)

    def run(method: "Method", state: "State") -> dict[str, float]:
        found = source(method, state)
        targets, splits = source.summaries(wanted), tileset.splits
        decoded = decode.decode(_features(found, feature), targets, found.columns, splits, **options)
        return decoded.floats(name) | _mode(name, decoded.mode)

    return run


def _batch_effect(name: str, part: Any, source: Pass) -> Run:
    """Keys of its own: none but feature and resamples; no target."""
    feature, resamples = part.feature, part.resamples

    def run(method: "Method", state: "State") -> dict[str, float]:
        found = source(method, state)
        return batch_effect.measure(_features(found, feature), found.columns, resamples=resamples).floats(name)

    return run


def _distance_ratio(name: str, part: Any, source: Pass) -> Run:
    """Keys of its own: near_um and far_um; no target."""
    feature, near_um, far_um = part.feature, part.near_um, part.far_um
    retrieval.check_limits(near_um, far_um)
    options, test = _options(part, source), list(source.tileset.splits["test"])
    mode = "transductive" if set(options["pretrained"]) & set(test) else "inductive"

    def run(method: "Method", state: "State") -> dict[str, float]:
        found = source(method, state)
        rows = np.isin(found.columns["case"], test)
        columns = {column: values[rows] for column, values in found.columns.items()}
        limits = {"near_um": near_um, "far_um": far_um, "resamples": options["resamples"]}
        metrics, notes = retrieval.distance_ratio(_features(found, feature)[rows], columns, **limits)
        for note in notes:
            log.info("%s: %s", name, note)
        return floats(metrics, name) | _mode(name, mode)

    return run


KINDS: dict[str, Callable[[str, Any, Pass], Run]] = {
    "probe": _of_task(probe.evaluate),
    "knn": _of_classes(knn.evaluate),
    "few_label": _of_classes(few_label.curve),
    "paper_head": _of_classes(paper_head.evaluate),
    "decode": _decode,
    "batch_effect": _batch_effect,
    "retrieval": _of_classes(retrieval.evaluate),
    "clusters": _of_classes(clusters.evaluate),
    "distance_ratio": _distance_ratio,
}
