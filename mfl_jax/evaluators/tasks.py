"""What is asked of frozen features, on which cases: targets, splits of cases, draws for fits, and refusal of leaks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np


class LeakError(ValueError):
    """Cases on two sides of a comparison that must not share any."""


@dataclass(frozen=True)
class Task:
    """A column of the tile set as a target. With a threshold, above it is class 1 of 2; without, an integer column is
    classes and `regression` takes numbers as they are. Unknown (nan, negative classes) and excluded ones are left out.
    """

    name: str
    target: str = "label"
    threshold: float | None = None
    regression: bool = False
    exclude: tuple[float, ...] = ()
    asking: int | None = None  # of retrieval: tiles of this class alone ask, and all may answer

    def read(self, columns: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """-> target [N] (int classes, or float), known [N]."""
        if self.target not in columns:
            raise ValueError(f"task {self.name!r}: there is no column {self.target!r}; there are {sorted(columns)}")
        values = np.asarray(columns[self.target])
        if values.dtype.kind not in "iufb":
            raise ValueError(f"task {self.name!r}: column {self.target!r} is {values.dtype}, not numbers")
        numbers = values.astype(np.float64)
        known = np.isfinite(numbers) & ~np.isin(numbers, self.exclude)
        if self.regression:
            if self.threshold is not None:
                raise ValueError(f"task {self.name!r}: a regression has no threshold")
            return np.where(known, numbers, 0.0), known
        if self.threshold is not None:
            return np.where(known, numbers > self.threshold, 0).astype(np.int64), known
        known &= numbers >= 0
        if (numbers[known] % 1).any():
            raise ValueError(f"task {self.name!r}: column {self.target!r} is not whole numbers; give a threshold")
        return np.where(known, numbers, 0).astype(np.int64), known


@dataclass(frozen=True)
class Draw:
    """One choice of a penalty and the fit that is reported: each pair is (rows to fit, rows to choose by)."""

    name: str
    pairs: tuple[tuple[np.ndarray, np.ndarray], ...]  # bool [N] each
    final: np.ndarray  # bool [N]: the fit with the chosen penalty


def check_overlap(
    splits: Mapping[str, Sequence], pretrained: Sequence = (), *, transductive: bool = False
) -> tuple[str, ...]:
    """Notes on what cases are shared, where it is allowed; LeakError where it is not.

    train, val and test never share a case. Cases of pre-training in val or test are refused unless the result is asked
    for as transductive; that the probe is fitted on cases of pre-training is as it should be.
    """
    for required in ("train", "test"):
        if not len(splits.get(required, ())):
            raise ValueError(
                f"split {required!r} has no cases; the splits are { ({k: len(v) for k, v in splits.items()}) }"
            )
    names = [n for n in ("train", "val", "test") if len(splits.get(n, ()))]
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            if shared := set(splits[first]) & set(splits[second]):
                raise LeakError(f"cases in both {first} and {second}: {_some(shared)}. A case belongs to one split")
    held_out = {case for n in names if n != "train" for case in splits[n]}
    if shared := set(pretrained) & held_out:
        if not transductive:
            raise LeakError(
                f"cases of pre-training are in the validation or test split: {_some(shared)}. Pre-train without them, "
                "or ask for the result as transductive"
            )
        return (f"transductive: the encoder has seen {len(shared)} of {len(held_out)} validation and test cases",)
    return ()


def _some(cases: set) -> str:
    listed = sorted(map(str, cases))
    return ", ".join(listed[:10]) + (f" and {len(listed) - 10} more" if len(listed) > 10 else "")


def split_rows(
    columns: Mapping[str, np.ndarray], splits: Mapping[str, Sequence], known: np.ndarray
) -> dict[str, np.ndarray]:
    """bool [N] per split; ValueError where train or test has no row with a known target."""
    cases = np.asarray(columns["case"])
    rows = {name: np.isin(cases, np.asarray(list(splits.get(name, ())), cases.dtype)) & known for name in SPLITS}
    for name in ("train", "test"):
        if not rows[name].any():
            raise ValueError(f"no example of split {name!r} has a known target")
    return rows


SPLITS = ("train", "val", "test")


def nested_draw(
    cases: np.ndarray, train: np.ndarray, val: np.ndarray, *, folds: int, seed: int, refit: bool = False
) -> Draw:
    """By the validation split where there is one, else by case-wise folds of train, then fitted on all of train."""
    if val.any():
        return Draw("all", ((train, val),), train | val if refit else train)
    names = np.unique(cases[train])
    if len(names) < 2:
        raise ValueError("to choose a penalty there must be a validation split, or at least 2 training cases")
    count = min(folds, len(names))
    fold = np.random.default_rng(seed).permutation(len(names)) % count
    of_row = fold[np.clip(np.searchsorted(names, cases), 0, len(names) - 1)]
    return Draw("all", tuple((train & (of_row != k), train & (of_row == k)) for k in range(count)), train)


def masks_of(draws: Sequence[Draw]) -> tuple[np.ndarray, np.ndarray, list[tuple[list[int], int]]]:
    """All fits of all draws: [J, N] to fit, [J, N] to choose by, and per draw its pairs' numbers and its final's."""
    fit: list[np.ndarray] = []
    choose: list[np.ndarray] = []
    places = []
    for draw in draws:
        start = len(fit)
        for train, val in draw.pairs:
            fit.append(train)
            choose.append(val)
        if draw.final is draw.pairs[0][0]:
            final = start
        else:
            final = len(fit)
            fit.append(draw.final)
            choose.append(np.zeros_like(draw.final))
        places.append((list(range(start, start + len(draw.pairs))), final))
    return np.stack(fit), np.stack(choose), places
