"""Writing into a folder that may hold a set already: what is refused, what stays, and what goes, aloud."""

import os
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from input_pipeline.tileset.manifest import Assignment, last_manifest
from input_pipeline.tileset.merge import finish
from input_pipeline.tileset.spec import Spec, TileSetError
from input_pipeline.tileset.writer import remove_slide, written_slides


def previous(
    root: str | os.PathLike, spec: Spec, slides: Collection[str]
) -> tuple[dict[str, Any] | None, dict[str, dict[str, Any]]]:
    """Manifest (None: there is none yet) and written slides of the set in `root` that `spec` and `slides` make again.

    Refused is a folder that holds anything else: another name, another importer, or none of the slides.
    """
    root = Path(root)
    way_out = "give another folder, or delete this one"
    if (root / "cohort.json").exists():
        raise TileSetError(f"{root} is a folder that mfl tile wrote; {way_out}")
    old = last_manifest(root)
    for what, before, now in _identity(old, spec) if old else ():
        if before != now:
            raise TileSetError(f"{root} holds a set of {what} {before!r}, this one is of {what} {now!r}; {way_out}")
    written = written_slides(root)
    if written and not written.keys() & set(slides):
        first = next(iter(written))
        raise TileSetError(
            f"{root} holds a set of {len(written)} other slides ({first!r}, ...), none of which is wanted; {way_out}"
        )
    return old, written


def _identity(old: Mapping[str, Any], spec: Spec) -> list[tuple[str, str, str]]:
    importer = [str(params.get("importer", "pack")) for params in (old["spec"]["params"], spec.params)]
    return [("name", old["spec"]["name"], spec.name), ("importer", importer[0], importer[1])]


def finish_again(
    root: str | os.PathLike,
    spec: Spec,
    wanted: Mapping[str, str],
    failed: Collection[str],
    assignment: Assignment,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """`finish` for `wanted` (slide -> case): other slides leave the set. A slide that failed keeps its tiles of an
    earlier run where these are of the same case and specification. {} when there is nothing to finish.
    """
    root = Path(root)
    written = written_slides(root)
    if not any(meta["spec_sha256"] == spec.sha256 for meta in written.values()):
        say(f"no slide was written: {root} stays as it was" if written else f"no slide was written to {root}")
        return {}
    for slide, meta in written.items():
        if slide not in wanted:
            say(f"{slide} is no longer in the cohort: removed from the set")
            remove_slide(root, slide)
        elif slide in failed and (meta["spec_sha256"], meta["case"]) == (spec.sha256, wanted[slide]):
            say(f"{slide}: its {meta['tiles']} tiles of an earlier run stay in the set")
        elif slide in failed:
            say(f"{slide} is removed from the set: its tiles are of other parameters, or of another case")
            remove_slide(root, slide)
    return finish(root, spec, assignment)


def tell_splits(old: Mapping[str, Any] | None, new: Mapping[str, Any], say: Callable[[str], None]) -> dict[str, int]:
    """Cases in each split; aloud: a case that changed its split, new cases, a split without any."""
    now, before = (
        {case: name for name, members in (doc or {}).get("splits", {}).items() for case in members}
        for doc in (new, old)
    )
    moved = [case for case in now.keys() & before.keys() if now[case] != before[case]]
    if moved:
        first = min(moved)
        say(f"{len(moved)} of {len(now)} cases change their split, as was asked for "
            f"(first: {first!r} from {before[first]!r} to {now[first]!r})")  # fmt: skip
    if old and (added := sorted(now.keys() - before.keys())):
        listed = ", ".join(f"{case} {now[case]}" for case in added[:10]) + ", ..." * (len(added) > 10)
        say(f"{len(added)} cases join a split: {listed}")
    counts = {name: len(members) for name, members in new["splits"].items()}
    for name, count in counts.items():
        if not count:
            say(f"split {name!r} is empty: there are {len(new['cases'])} cases")
    return counts
