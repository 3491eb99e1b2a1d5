"""What a set has in common, told from a cohort: how a partner is stored, which classes labels are."""

import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from input_pipeline.cohort import Slide
from input_pipeline.slides.reader import open_slide
from input_pipeline.tileset import Partner

ENCODINGS = {"uint8": "jpeg", "uint16": "png"}


def partner_like(path: str | os.PathLike, name: str, kind: str, *, lossless: bool = False) -> Partner:
    """Channels, dtype and channel names as the file has them; 8-bit images as JPEG, or PNG where `lossless`."""
    with open_slide(path) as slide:
        dtype, channels, names = slide.dtype.name, slide.channels, slide.channel_names
    if kind == "map":
        return Partner(name, "map", channels, "uint16", "png", names)
    if dtype not in ENCODINGS:
        raise ValueError(f"{path}: pixels are {dtype}; a partner image has {' or '.join(ENCODINGS)}")
    return Partner(name, "image", channels, dtype, "png" if lossless else ENCODINGS[dtype], names)


def number(text: str) -> float | None:
    """None for what is no finite number."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def classes(values: Iterable[str]) -> tuple[str, ...]:
    """Each value once: numbers by size, then texts by alphabet."""
    found = [(math.inf if (n := number(text)) is None else n, text) for text in {*values}]
    return tuple(text for _, text in sorted(found))


@dataclass(frozen=True)
class Labels:
    """Classes over the whole cohort: `label` becomes its class, `label_x` a column of numbers or of classes."""

    names: tuple[str, ...]
    classes: dict[str, tuple[str, ...]]  # label_x -> names, empty where the values are numbers

    @staticmethod
    def of(slides: Sequence[Slide]) -> "Labels":
        columns = sorted({name for s in slides for name in s.labels})
        values = {name: {s.labels[name] for s in slides if s.labels.get(name)} for name in columns}
        numeric = {name for name in columns if name != "label" and all(number(v) is not None for v in values[name])}
        found = {name: () if name in numeric else classes(values[name]) for name in columns}
        return Labels(found.pop("label", ()), found)

    def label(self, slide: Slide) -> int:
        value = slide.labels.get("label", "")
        return self.names.index(value) if value else -1

    def columns(self, slide: Slide) -> dict[str, float]:
        return {name: self._value(name, slide.labels.get(name, "")) for name in self.classes}

    def _value(self, name: str, value: str) -> float:
        if not value:
            return math.nan
        return float(self.classes[name].index(value)) if self.classes[name] else float(value)
