"""The one unit of scale: micrometres per pixel of level 0, where it comes from, and whether it can be believed.

The order is: what the user says, the vendor's key, OME, a comment, the TIFF resolution, the user's default. A value
that somebody wrote on purpose and that is absurd stops the search with a refusal, for a tenfold error goes unnoticed
everywhere else. TIFF resolutions are mostly an untouched 72 dpi, so an absurd one only gives way to the default.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from input_pipeline.slides.errors import SlideError

LOWEST, HIGHEST = 0.05, 10.0
ANISOTROPY = 0.02
WAY_OUT = "give it in the cohort's column mpp_he or mpp_<partner>, with --default-mpp, or as mpp= or default_mpp="

UM_PER_UNIT = {
    "m": 1e6, "dm": 1e5, "cm": 1e4, "mm": 1e3, "um": 1.0, "\u00b5m": 1.0, "\u03bcm": 1.0, "nm": 1e-3, "pm": 1e-6,
    "inch": 25400.0, "in": 25400.0, "mil": 25.4, "micron": 1.0, "\u00c5": 1e-4,
}  # fmt: skip


@dataclass(frozen=True)
class Candidate:
    """What a file says of its scale, x and y; `where` names the field in messages."""

    source: str  # 'vendor' | 'ome' | 'comment' | 'tiff'
    x: float
    y: float
    where: str


@dataclass(frozen=True)
class Scale:
    """`mpp` None means unknown, and then `reason` says why."""

    mpp: float | None
    source: str | None
    reason: str = ""


def resolve(candidates: Sequence[Candidate], user: float | None = None, default: float | None = None) -> Scale:
    """A file's absurd value leaves the scale unknown (with the reason); a user's absurd value is an error at once."""
    if user is not None:
        return Scale(_given(user, "mpp"), "user")
    fallback = None if default is None else _given(default, "default_mpp")
    reason = "nothing in the file says how many micrometres a pixel has"
    for source in ("vendor", "ome", "comment", "tiff"):
        for candidate in (c for c in candidates if c.source == source):
            fault = _fault(candidate)
            if not fault:
                return Scale((candidate.x + candidate.y) / 2, source)
            reason = f"{candidate.where} says {candidate.x:.6g} x {candidate.y:.6g} um per pixel, {fault}"
            if source != "tiff":
                return Scale(None, None, reason)
    if fallback is not None:
        return Scale(fallback, "default")
    return Scale(None, None, reason)


def _given(value: float, name: str) -> float:
    if not math.isfinite(value) or not LOWEST <= value <= HIGHEST:
        raise SlideError(f"{name} is the um per pixel of level 0, {LOWEST} to {HIGHEST}, not {value!r}")
    return float(value)


def _fault(candidate: Candidate) -> str:
    x, y = candidate.x, candidate.y
    if not (math.isfinite(x) and math.isfinite(y) and min(x, y) >= LOWEST and max(x, y) <= HIGHEST):
        return f"outside {LOWEST} to {HIGHEST}"
    if abs(x - y) > ANISOTROPY * min(x, y):
        return f"and x and y differ by more than {ANISOTROPY:.0%}"
    return ""


def aperio(description: str) -> list[Candidate]:
    """`Aperio ...|AppMag = 20|MPP = 0.4990`."""
    value = _number(aperio_fields(description).get("MPP"))
    return [] if value is None else [Candidate("vendor", value, value, "the Aperio key MPP")]


def aperio_fields(description: str) -> dict[str, str]:
    pairs = (item.split("=", 1) for item in description.split("|")[1:] if "=" in item)
    return {key.strip(): value.strip() for key, value in pairs}


_COMMENT = re.compile(
    r"(?:\bmpp(?:[-_ ]?[xy])?|microns?[ _]*per[ _]*pixel|um/px|\u00b5m/px)"
    r"[\"']?\s*[:=]\s*[\"']?([0-9]*\.?[0-9]+(?:e[-+]?\d+)?)",
    re.IGNORECASE,
)


def comment(text: str) -> list[Candidate]:
    """`mpp = 0.25`, `MicronsPerPixel: 0.25` and the like in free text; two values at most: x, then y."""
    values = [float(value) for value in _COMMENT.findall(text[:100_000])][:2]
    return [Candidate("comment", values[0], values[-1], "the image description")] if values else []


def tiff_resolution(x: object, y: object, unit: int | None) -> list[Candidate]:
    """Rational pixels per inch (unit 2) or centimetre (3); without a unit (1) it is an aspect ratio, no scale."""
    um = {2: 25400.0, 3: 10000.0}.get(2 if unit is None else unit)
    per_x, per_y = _rational(x), _rational(y)
    if um is None or not per_x or not per_y:
        return []
    return [Candidate("tiff", um / per_x, um / per_y, "the TIFF resolution")]


def imagej(description: str, x: object, y: object) -> list[Candidate]:
    """ImageJ keeps pixels per unit in the TIFF resolution and the unit in the description."""
    unit = re.search(r"^unit=(.*)$", description, re.MULTILINE)
    if not description.startswith("ImageJ=") or unit is None:
        return []
    um = UM_PER_UNIT.get(unit[1].strip().replace("\\u00B5", "\u00b5"))
    per_x, per_y = _rational(x), _rational(y)
    if um is None or not per_x or not per_y:
        return []
    return [Candidate("comment", um / per_x, um / per_y, f"the ImageJ resolution, unit {unit[1].strip()}")]


def physical(source: str, where: str, x: object, y: object, unit_x: str = "um", unit_y: str = "um") -> list[Candidate]:
    """A length per pixel with units; an unknown unit (`pixel`, `reference frame`) says nothing."""
    value_x, value_y = _number(x), _number(y if y is not None else x)
    um_x, um_y = UM_PER_UNIT.get(unit_x), UM_PER_UNIT.get(unit_y)
    if value_x is None or value_y is None or um_x is None or um_y is None:
        return []
    return [Candidate(source, value_x * um_x, value_y * um_y, where)]


def _number(value: object) -> float | None:
    try:
        number = float(str(value).strip())
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _rational(value: object) -> float | None:
    if isinstance(value, tuple) and len(value) == 2:
        return value[0] / value[1] if value[1] else None
    return _number(value)
