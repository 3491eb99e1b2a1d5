"""What `mfl slides` is given as arms: folders of feature files, runs with the tile set that they embed, tile sets."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from input_pipeline.files import read_json
from mfl_jax import bags as files
from mfl_jax import sharding, store, trained
from mfl_jax.bags import Bags, Table
from mfl_jax.config import flatten
from mfl_jax.evaluators.embed import Embedded, colour_statistics, embed_set, mean_of_tiles
from mfl_jax.evaluators.slide_study import SlideArm


@dataclass(frozen=True)
class Asked:
    """One source; those of one name are seeds of one arm."""

    name: str
    path: Path
    tileset: Path | None = None  # that a run embeds


def parse(texts: Sequence[str], tileset: Path | None = None) -> list[Asked]:
    """'name=folder', 'name=tileset', 'name=run' (of `tileset`) or 'name=run@tileset'; without a name, the last part of
    the path."""
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


def is_set(folder: Path) -> bool:
    return (folder / "manifest.json").is_file()


def seen_cases(asked: Sequence[Asked], given: Mapping[str, Sequence[str]]) -> dict[str, tuple[str, ...] | None]:
    """By arm, the cases that any of its encoders was trained on, and None where nobody says. A run and the files of
    `mfl extract` say so themselves; `given` says it of others, or of more."""
    if strange := sorted(set(given) - {one.name for one in asked}):
        raise ValueError(f"no such arms: {', '.join(strange)}; there are {', '.join({one.name: 0 for one in asked})}")
    found: dict[str, tuple[str, ...] | None] = {}
    for one in asked:
        own = _told(one)
        told: list[tuple[str, ...] | None] = [(*(own or ()), *given[one.name]) if one.name in given else own]
        if one.tileset:
            told.append(trained.read_run(one.path)[1].train_cases)
        told.append(found.get(one.name, ()))
        known = [cases for cases in told if cases is not None]
        found[one.name] = tuple(sorted({c for cases in known for c in cases})) if len(known) == len(told) else None
    return found


def _told(one: Asked) -> tuple[str, ...] | None:
    """Cases that lie behind what an arm is made of, beside those of its own run."""
    if one.tileset or is_set(one.path):
        return _behind(one.tileset or one.path)
    return store.trained_cases(files.find_folder(one.path))


def _behind(path: Path) -> tuple[str, ...] | None:
    """Of a set of regions, the cases that the encoder of its tiles was trained on. Images have none behind them."""
    spec = read_json(path / "manifest.json", "the manifest of a tile set")["spec"]
    if spec.get("he_kind", "image") == "image":
        return ()
    told = spec["params"].get("train_cases")
    return None if told is None else tuple(map(str, told))


def kept(table: Table, seen: Mapping[str, tuple[str, ...] | None]) -> tuple[Table, tuple[str, ...]]:
    """The slides of cases that no arm has seen, and what to say of it."""
    barred = {case for cases in seen.values() for case in cases or ()}
    open_cases = [case for case in table.cases if case not in barred]
    if not open_cases:
        raise ValueError(f"every one of the {len(set(table.cases))} cases was seen by some arm: none is held out")
    left = len(set(table.cases) & barred)
    said = (f"Held out: {left} cases that some encoder was trained on are in no figure.",) if left else ()
    return files.of_cases(table, open_cases), said


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
    first: dict[str, trained.Trained] = {}
    for one in asked:
        say(f"{one.name}: {one.path}")
        if one.tileset:
            run = trained.open_run(one.path, sharding.make_mesh())
            like = first.setdefault(one.name, run)
            bags, digests[str(one.path)] = _of_run(one, run, like, table, feature, batch), run.digest
            what[one.name] = f"{run.config.method}, {run.step} steps of {run.config.data.batch}"
        elif is_set(one.path):
            bags, what[one.name] = of_set(one.path, table, batch)
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


def _of_run(asked: Asked, run: trained.Trained, like: trained.Trained, table: Table, feature: str, batch: int) -> Bags:
    """`like` is the first seed of the arm: where they differ in the seed alone, they share its program."""
    from input_pipeline.tileset import TileSet
    from mfl_jax.arms import partners_of_embed

    assert asked.tileset is not None
    tileset = TileSet.open(asked.tileset)
    trained.check_tiles(asked.path, run.facts, tileset.spec)
    seen = partners_of_embed(run, feature)
    configs = [flatten(one.config) | {"seed": 0} for one in (run, like)]
    embed = like.method.embed if configs[0] == configs[1] else run.method.embed
    found = embed_set(embed, run.params, run.extra, tileset, sharding.make_mesh(), batch=batch, partners=seen)
    return bags_of(found, feature, table, asked.tileset)


def of_set(path: Path, table: Table, batch: int = 256) -> tuple[Bags, str]:
    """A tile set without any run: statistics of the colours of its tiles; of regions the mean of their tiles."""
    from input_pipeline.tileset import TileSet

    tileset, embed, what = (
        TileSet.open(path),
        colour_statistics,
        "mean, spread and percentiles of the colours of a tile",
    )
    if tileset.spec.he_kind == "grid":
        embed, what = mean_of_tiles, "the features of a region's tiles, averaged"
    found = embed_set(embed, {}, {}, tileset, sharding.make_mesh(), batch=batch)
    return bags_of(found, "he", table, path), what


def bags_of(found: Embedded, feature: str, table: Table, where: Path) -> Bags:
    """By slide of the table; a slide that is in it and has nothing in the set is a bag of none."""
    listed = dict(zip(table.slides, table.cases, strict=True))
    slides, cases = (np.asarray(found.columns[name]).astype(str).tolist() for name in ("slide", "case"))
    for slide, case in sorted(set(zip(slides, cases, strict=True))):
        if listed.get(slide, case) != case:
            raise ValueError(f"slide {slide!r} is of case {case!r} in {where}, and of {listed[slide]!r} in the table")
    if not set(slides) & set(listed):
        raise ValueError(f"{where} has no slide of the table; it has {', '.join(sorted(set(slides))[:5])} ...")
    return files.from_embedded(found, feature, listed)
