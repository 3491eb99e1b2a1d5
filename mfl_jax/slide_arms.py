"""What `mfl slides` is given as arms: folders of feature files, and runs with the tile set that they embed."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mfl_jax import bags as files
from mfl_jax import trained
from mfl_jax.bags import Bags, Table
from mfl_jax.evaluators.slide_study import SlideArm


@dataclass(frozen=True)
class Asked:
    """One source; those of one name are seeds of one arm."""

    name: str
    path: Path
    tileset: Path | None = None  # that a run embeds


def parse(texts: Sequence[str], tileset: Path | None = None) -> list[Asked]:
    """'name=folder', 'name=run' (of `tileset`) or 'name=run@tileset'; without a name the last part of the path."""
    found = []
    for text in texts:
        name, equals, rest = ("", "", text) if Path(text).is_dir() else text.partition("=")
        rest = rest if equals else text
        path, at, of = (rest, "", "") if Path(rest).is_dir() else rest.rpartition("@")
        path, at, of = (path, at, of) if path else (rest, "", "")
        folder = Path(path)
        if not folder.is_dir():
            raise ValueError(f"{folder} is no folder: an arm is NAME=FOLDER of features, or NAME=RUN@TILESET")
        run = is_run(folder)
        if of and not run:
            raise ValueError(f"{folder} is no run, so that {of} after the @ means nothing")
        if run and not (of or tileset):
            raise ValueError(f"{folder} is a run: say what it embeds, as NAME=RUN@TILESET or with --tileset")
        found.append(Asked(name or folder.resolve().name, folder, Path(of) if of else tileset if run else None))
    return found


def is_run(folder: Path) -> bool:
    return (folder / "config.json").is_file() and (folder / "checkpoints").is_dir()


def seen_cases(asked: Sequence[Asked], given: Mapping[str, Sequence[str]]) -> dict[str, tuple[str, ...] | None]:
    """By arm, the cases that any of its encoders was trained on: a run says so itself, `given` says it of folders (or
    more of runs), and None is what nobody said."""
    if strange := sorted(set(given) - {one.name for one in asked}):
        raise ValueError(f"no such arms: {', '.join(strange)}; there are {', '.join({one.name: 0 for one in asked})}")
    found: dict[str, tuple[str, ...] | None] = {}
    for one in asked:
        own = trained.read_run(one.path)[1].train_cases if one.tileset else _noted(one.path)
        told = tuple(given[one.name]) if one.name in given else None
        before = found.get(one.name, ())
        if (own is None and told is None) or before is None:
            found[one.name] = None
        else:
            found[one.name] = tuple(sorted({*before, *(own or ()), *(told or ())}))
    return found


def _noted(folder: Path) -> tuple[str, ...] | None:
    """What the feature files say of their encoder's cases: the attribute train_cases, cases joined by newlines."""
    import h5py

    found: set[str] = set()
    for path in sorted(files.find_folder(folder).glob("*.h5")):
        with h5py.File(path, "r") as file:
            if "train_cases" not in file.attrs:
                return None
            told = file.attrs["train_cases"]
        text = told.decode() if isinstance(told, bytes) else str(told)
        found |= {case for case in text.split("\n") if case}
    return tuple(sorted(found))


def kept(table: Table, seen: Mapping[str, tuple[str, ...] | None]) -> tuple[Table, tuple[str, ...]]:
    """The slides of cases that no arm has seen, and what to say of it."""
    barred = {case for cases in seen.values() for case in cases or ()}
    rows = [i for i, case in enumerate(table.cases) if case not in barred]
    if not rows:
        raise ValueError(f"every one of the {len(set(table.cases))} cases was seen by some arm: none is held out")

    def take(values: Sequence) -> tuple:
        return tuple(values[i] for i in rows)

    left = len(set(table.cases)) - len({table.cases[i] for i in rows})
    pictures = take(table.pictures) if table.pictures else ()
    some = replace(
        table, slides=take(table.slides), cases=take(table.cases), labels=table.labels[rows], pictures=pictures
    )
    return some, (f"Held out: {left} cases that some encoder was trained on are in no figure.",) if left else ()


def collect(
    asked: Sequence[Asked],
    table: Table,
    seen: Mapping[str, tuple[str, ...] | None],
    *,
    feature: str = "he",
    batch: int = 256,
    mpp: float | None = None,
    instead: Mapping[str, Mapping[str, str]] | None = None,
    skip: Mapping[str, Sequence[str]] | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> tuple[list[SlideArm], dict[str, str]]:
    """The arms, and digests of checkpoints."""
    found: dict[str, list[Bags]] = {}
    what: dict[str, str] = {}
    digests: dict[str, str] = {}
    for one in asked:
        say(f"{one.name}: {one.path}")
        if one.tileset:
            bags, what[one.name], digests[str(one.path)] = _of_run(one, table, feature, batch)
        else:
            bags, what[one.name] = files.read_folder(one.path, table, mpp=mpp), f"features of {one.path.name}"
        found.setdefault(one.name, []).append(bags)
    arms = []
    for name, seeds in found.items():
        if len(widths := {bags.features.shape[1] for bags in seeds}) > 1:
            raise ValueError(f"seeds of arm {name!r} have features of {sorted(widths)} numbers: give them other names")
        told: dict[str, Any] = {"instead": (instead or {}).get(name, {}), "skip": tuple((skip or {}).get(name, ()))}
        arms.append(SlideArm(name, tuple(seeds), seen[name], what=what[name], **told))
    return arms, digests


def _of_run(asked: Asked, table: Table, feature: str, batch: int) -> tuple[Bags, str, str]:
    from input_pipeline.tileset import TileSet
    from mfl_jax import sharding
    from mfl_jax.arms import partners_of_embed
    from mfl_jax.evaluators.embed import embed_set

    assert asked.tileset is not None
    tileset, mesh = TileSet.open(asked.tileset), sharding.make_mesh()
    run = trained.open_run(asked.path, mesh)
    _check_fit(asked, run, tileset)
    seen, across = partners_of_embed(run, feature), mesh.shape["data"]
    rows = -(-min(batch, len(tileset)) // across) * across
    found = embed_set(run.method.embed, run.params, run.extra, tileset, mesh, batch=rows, partners=seen)
    listed = dict(zip(table.slides, table.cases, strict=True))
    if strange := sorted(set(table.slides) - set(map(str, tileset.slides))):
        raise ValueError(f"{asked.tileset} lacks {len(strange)} slides of the table: {', '.join(strange[:5])}")
    slides, cases = (np.asarray(found.columns[name]).astype(str) for name in ("slide", "case"))
    for slide, case in set(zip(slides.tolist(), cases.tolist(), strict=True)):
        if listed.get(slide, case) != case:
            raise ValueError(f"slide {slide!r} is of case {case!r} in the tile set, of {listed[slide]!r} in the table")
    bags = files.from_embedded(found, feature, listed)
    return bags, f"{run.config.method}, {run.step} steps of {run.config.data.batch}", run.digest


def _check_fit(asked: Asked, run: trained.Trained, tileset: Any) -> None:
    size, mpp = run.facts.size, run.facts.mpp
    if size != tileset.spec.size or not math.isclose(mpp, tileset.spec.mpp, rel_tol=0.02):
        raise ValueError(
            f"{asked.path} was trained on tiles of {size} px at {mpp:g} um/px; {asked.tileset} has "
            f"{tileset.spec.size} px at {tileset.spec.mpp:g} um/px"
        )
