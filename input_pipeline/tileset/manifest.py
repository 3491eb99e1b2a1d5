"""manifest.json: what a tile set is, written last, so a set without a complete manifest is not finished.

It ends in a checksum of itself: splits and names change through `finish`, never by hand.
"""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from input_pipeline.files import write_json
from input_pipeline.tileset.spec import Spec, TileSetError, check_name, check_text_id, json_sha256

FORMAT = "mfl-tileset"
VERSION = 1
TFDS_SPLIT = "tiles"  # 'all' is TFDS's word for every split together, so it opens these shards too
MAX_SLIDES = 99_999  # five digits: more would rename every shard
LAYOUT = (
    "One TFRecord shard per slide. Images of 1 or 3 channels are plain JPEG or PNG; any other number of channels is "
    "stored as that many planes, one below another, in one grey image. Label maps are 16-bit PNG. Vectors are float32 "
    "lists. An absent partner is an empty list. Splits are lists of cases."
)
GRIDS = (
    " The main record is no image but a grid of tile features, float16, little endian, [rows, columns, channels]; its "
    "last channel is 1 where a tile is and 0 where none is."
)
ALL_TRAIN = {"train": 1.0}
Splits = dict[str, list[str]]


@dataclass(frozen=True)
class Assignment:
    """Which split every case belongs to, and how the next new case finds its own. A case need not be in the set."""

    names: tuple[str, ...]
    of: Mapping[str, str | None]  # None: in no split, on purpose
    shares: Mapping[str, float] | None = None  # as drawn; None: someone made the lists
    seed: int = 0

    def splits(self, cases: Iterable[str]) -> Splits:
        found: Splits = {name: [] for name in self.names}
        for case in sorted(set(cases)):
            if (split := self.of.get(case)) is not None:
                found[split].append(case)
        return found

    def rule(self, cases: Iterable[str]) -> dict[str, Any]:
        """What a set of these cases keeps of it beside its splits: a case that comes back finds its old split."""
        absent = {case: self.of[case] for case in sorted(self.of.keys() - set(cases))}
        return {"shares": None if self.shares is None else dict(self.shares), "seed": self.seed, "absent": absent}


def shard_name(name: str, slot: int) -> str:
    return f"{name}-{TFDS_SPLIT}-{slot:05d}.tfrecord"


def write_manifest(root: Path, document: dict[str, Any]) -> None:
    """Twice: the copy among the slides is what `finish` goes by when the manifest was edited, damaged or lost."""
    document = {k: v for k, v in document.items() if k != "sum"}
    write_json(root / "slides" / "manifest.json", document | {"sum": json_sha256(document)})
    write_json(root / "manifest.json", document | {"sum": json_sha256(document)})


def content_hash(document: Mapping[str, Any]) -> str:
    """The hash of a whole set: its specification, every slide's digest in order, the splits."""
    slides = [[s["slide"], s["case"], s["shard"], s["digest"]] for s in document["slides"]]
    return json_sha256([VERSION, document["spec"], slides, document["splits"]])


def read_manifest(root: str | os.PathLike, incomplete: bool = False) -> dict[str, Any]:
    """The manifest, checked; TileSetError says what is wrong and the way out."""
    path = Path(root) / "manifest.json"
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        check_manifest(document)
    except FileNotFoundError:
        raise TileSetError(f"{root} is not a finished tile set: it has no manifest.json; run finish") from None
    except (ValueError, RecursionError, OSError) as error:
        raise TileSetError(f"{path} is not a manifest that this version reads: {error}", file=str(path)) from error
    if not document["complete"] and not incomplete:
        raise TileSetError(f"{root}: finish was interrupted; run it again", file=str(path))
    return document


def last_manifest(root: Path) -> dict[str, Any] | None:
    """What the last `finish` knew, whole or interrupted; None for a set that never was finished."""
    faults = []
    for folder in (root, root / "slides"):
        if (folder / "manifest.json").exists():
            try:
                return read_manifest(folder, incomplete=True)
            except TileSetError as error:
                faults.append(error)
    shards = sorted(p.name for p in root.glob(f"*-{TFDS_SPLIT}-*.tfrecord"))
    if faults or shards:
        raise faults[0] if faults else TileSetError(f"{root} has shards ({shards[0]}, ...) but no manifest.json")
    return None


def check_manifest(document: Any) -> None:
    """Every field of the right type, every count in agreement, and the checksum right."""
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise TileSetError(f"it does not say format {FORMAT!r}")
    if document.get("version") != VERSION:
        raise TileSetError(
            f"it has version {document.get('version')!r}, this program reads version {VERSION}; update it"
        )
    types = {"complete": bool, "spec": dict, "slides": list, "cases": list, "splits": dict, "tiles": int, "hash": str}
    for key, kind in types.items():
        if not isinstance(document.get(key), kind):
            raise TileSetError(f"{key!r} is missing or not of type {kind.__name__}")
    body = {k: v for k, v in document.items() if k != "sum"}
    if document.get("sum") != json_sha256(body):
        raise TileSetError(
            "its checksum is wrong: it was edited or damaged; finish restores it (splits change through finish alone)"
        )
    Spec.from_json(document["spec"])
    if not _texts(document["cases"]):
        raise TileSetError("cases are not a list of names")
    _check_slides(document)
    check_splits(document["splits"], document["cases"])
    _check_rule(document)
    if document["hash"] != content_hash(document):
        raise TileSetError("the hash of the set is not that of its slides and splits; finish restores it")


def _check_slides(document: dict[str, Any]) -> None:
    cases = set(document["cases"])
    types = {"slide": str, "case": str, "shard": int, "tiles": int, "bytes": int, "digest": str, "columns": list}
    for entry in document["slides"]:
        if not isinstance(entry, dict) or any(not isinstance(entry.get(k), t) for k, t in types.items()):
            raise TileSetError(f"a slide is not as it should be: {str(entry)[:200]}")
        check_text_id(entry["slide"], "slide_id")
        if not _texts(entry["columns"]):
            raise TileSetError(f"slide {entry['slide']!r} has columns that are no names")
        if entry["case"] not in cases:
            raise TileSetError(f"slide {entry['slide']!r} has a case that is not listed: {entry['case']!r}")
        if not 0 <= entry["shard"] < MAX_SLIDES or not 0 <= entry["tiles"] < 2**40 or not 0 <= entry["bytes"] < 2**60:
            raise TileSetError(f"slide {entry['slide']!r} has a negative or too large number")
    if document["tiles"] != sum(s["tiles"] for s in document["slides"]):
        raise TileSetError(f"{document['tiles']} tiles are announced, the slides have another sum")
    for key in ("slide", "shard"):
        values = [s[key] for s in document["slides"]]
        if len(set(values)) != len(values):
            raise TileSetError(f"two slides have the same {key}")


def _check_rule(document: dict[str, Any]) -> None:
    rule, names = document.get("split_rule", {"shares": None, "seed": 0, "absent": {}}), set(document["splits"])
    if not isinstance(rule, dict) or not isinstance(rule.get("absent"), dict) or type(rule.get("seed")) is not int:
        raise TileSetError(f"split_rule is not as it should be: {str(rule)[:200]}")
    if rule["seed"] < 0 or any(s is not None and s not in [*names] for s in rule["absent"].values()):
        raise TileSetError("split_rule has a negative seed, or a case of a split that is not there")
    if (shares := rule.get("shares")) is not None:
        if not isinstance(shares, dict) or shares.keys() != names:
            raise TileSetError("split_rule has shares of other splits than there are")
        check_shares(shares)


def _texts(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(text, str) for text in value)


def check_splits(splits: Any, cases: Iterable[str]) -> Splits:
    """{split: cases}: known cases, each in one split at most."""
    known, seen = set(cases), dict[str, str]()
    if not isinstance(splits, Mapping):
        raise TileSetError(f"splits are a dict of lists of cases, not {type(splits).__name__}")
    for name, members in splits.items():
        check_name(name, "a split", reserved={"all"})
        if not _texts(members):
            raise TileSetError(f"split {name!r} is a list of case ids, not {str(members)[:80]!r}")
        for case in members:
            if case not in known:
                raise TileSetError(f"split {name!r} has case {case!r}, which no slide has; is it a slide id?")
            if case in seen:
                raise TileSetError(
                    f"case {case!r} is in split {seen[case]!r} and in {name!r}: a patient is in one split"
                )
            seen[case] = name
    return {name: sorted(members) for name, members in splits.items()}


def check_shares(shares: Mapping[str, Any]) -> None:
    numbers = [v for v in shares.values() if isinstance(v, int | float) and not isinstance(v, bool)]
    if len(numbers) != len(shares):
        raise TileSetError(f"splits are all case lists or all shares, not both: {dict(shares)}")
    if not numbers or not min(numbers) >= 0 or not abs(sum(numbers) - 1) <= 1e-6:
        raise TileSetError(f"shares of splits are not negative and sum to 1, not {dict(shares)}")
    for name in shares:
        check_name(name, "a split", reserved={"all"})


def choose_splits(
    splits: Mapping[str, Sequence[str]] | Mapping[str, float] | None,
    cases: Sequence[str],
    labels: Sequence[int | str],
    old: Mapping[str, Any] | None = None,
    *,
    seed: int = 0,
    default: Mapping[str, float] = ALL_TRAIN,
) -> Assignment:
    """A split for every case, from case lists, from shares, or from what the manifest `old` has.

    A case never changes its split by itself: with None, or with the shares and seed that drew the splits there are, all
    stay where they were and new cases go to the split that is furthest behind its share (of lists: the share it has).
    Other shares draw anew, lists are taken as they are. `default` are the shares of a set that has no splits yet.
    `cases` may repeat (one entry a slide); a case is stratified by the smallest of its labels.
    """
    before = None if old is None else _assigned(old)
    if splits is None:
        return _extended(before or Assignment(tuple(default), {}, default, seed), cases, labels)
    if any(isinstance(share, int | float) for share in splits.values()):
        check_shares(splits)
        shares = {name: float(share) for name, share in splits.items()}  # type: ignore[arg-type]
        same = before is not None and before.shares == shares and before.seed == seed
        start = before if before is not None and same else Assignment(tuple(shares), {}, shares, seed)
        return _extended(start, cases, labels)
    lists = check_splits(splits, cases)
    of = dict.fromkeys(cases) | {case: name for name, members in lists.items() for case in members}
    return Assignment(tuple(lists), of, None, seed)


def _assigned(document: Mapping[str, Any]) -> Assignment:
    rule = document.get("split_rule", {"shares": None, "seed": 0, "absent": {}})
    of: dict[str, str | None] = dict.fromkeys(document["cases"]) | dict(rule["absent"])
    of |= {case: name for name, members in document["splits"].items() for case in members}
    return Assignment(tuple(document["splits"]), of, rule["shares"], rule["seed"])


def split_cases(
    cases: Sequence[str], labels: Sequence[int | str], fractions: Mapping[str, float], seed: int = 0
) -> Splits:
    """Split cases at random, stratified by label; the same input in any order gives the same splits."""
    check_shares(fractions)
    return _extended(Assignment(tuple(fractions), {}, fractions, seed), cases, labels).splits(cases)


def _extended(start: Assignment, cases: Sequence[str], labels: Sequence[int | str]) -> Assignment:
    """Deal the new cases out, label by label: whoever is furthest behind its share gets the next, over all labels."""
    stratum: dict[str, int | str] = {}
    for case, label in sorted(zip(cases, labels, strict=True), key=lambda pair: (pair[0], str(pair[1]))):
        stratum.setdefault(case, label)
    counts = np.array([len(members) for members in start.splits(stratum).values()])
    if not start.names:
        return Assignment((), dict.fromkeys(stratum) | dict(start.of), start.shares, start.seed)
    share_of = start.shares or dict(zip(start.names, counts / max(counts.sum(), 1), strict=True))
    shares = np.array([share_of[name] for name in start.names])
    rng, of = np.random.default_rng(start.seed), dict(start.of)
    new = [case for case in stratum if case not in of]
    for label in sorted({stratum[case] for case in new}, key=str):
        members = sorted(case for case in new if stratum[case] == label)
        for index in rng.permutation(len(members)):
            to = int(np.argmax(shares * (counts.sum() + 1) - counts))
            counts[to] += 1
            of[members[index]] = start.names[to]
    return Assignment(start.names, of, start.shares, start.seed)
