"""Slides of public cohorts that are known to be bad, and why; used where a cohort is read on request (--exclude)."""

import difflib
import re
from collections.abc import Sequence

from input_pipeline.table import read_rows

KNOWN: dict[str, dict[str, str]] = {
    "camelyon16": {
        "normal_086": "it was put among the normal slides and shows a tumour",
        "test_049": "it is a duplicate of another slide",
        "test_114": "its tumour is not exhaustively annotated",
    }
}


def excluded(which: str, slides: Sequence[str]) -> dict[str, str]:
    """{slide of `slides`: why it is to be left out}. `which` is a name of KNOWN, or a CSV of slide_id and why."""
    names = {_plain(slide): slide for slide in slides}
    return {names[key]: why for name, why in _listed(which).items() if (key := _plain(name)) in names}


def _listed(which: str) -> dict[str, str]:
    if which in KNOWN:
        return KNOWN[which]
    if not which.lower().endswith((".csv", ".tsv")):
        near = difflib.get_close_matches(which.lower(), KNOWN, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"slides to exclude are {', '.join(KNOWN)}, or a CSV (slide_id, why), not {which!r}{hint}")
    header, rows = read_rows(which, ("slide_id",))
    return {row["slide_id"]: (row["why"] if "why" in header else "") or f"{which} lists it" for _, row in rows}


def _plain(name: str) -> str:
    """Normal_86 and normal_086 are one slide: published lists differ in how they write it."""
    return re.sub(r"\d+", lambda number: str(int(number[0])), name.lower())
