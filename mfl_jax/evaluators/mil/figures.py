"""Curves of out-of-fold predictions as pictures: ROC, calibration, confusion, survival of two halves."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mfl_jax.statistics import confusion

SIDE, LEFT, BOTTOM, TOP, RIGHT, SCALE = 420, 52, 46, 30, 14, 2
INK, SOFT, PAPER = (34, 34, 34), (205, 205, 205), (255, 255, 255)
COLOURS = ((0, 114, 178), (213, 94, 0), (0, 158, 115), (204, 121, 167), (86, 180, 233), (230, 159, 0), (90, 90, 90))
Line = tuple[str, np.ndarray, np.ndarray]  # name, x, y


def roc(positive: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """False and true positive rates at every distinct score, from (0, 0) to (1, 1)."""
    order = np.argsort(-scores, kind="stable")
    ends = np.flatnonzero(np.append(np.diff(scores[order]) != 0, True))
    hits, misses = np.cumsum(positive[order])[ends], np.cumsum(~positive[order])[ends]
    return np.append(0, misses / max(misses[-1], 1)), np.append(0, hits / max(hits[-1], 1))


def calibration(right: np.ndarray, said: np.ndarray, bins: int = 8) -> tuple[np.ndarray, np.ndarray]:
    """Mean of what was said and share that was right, in bins of about equal counts; fewer bins than 8 where a bin
    would hold less than five."""
    groups = np.array_split(np.argsort(said, kind="stable"), max(1, min(bins, len(said) // 5)))
    return np.array([said[g].mean() for g in groups]), np.array([right[g].mean() for g in groups])


def kaplan_meier(times: np.ndarray, events: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Steps of the share that survives, beginning at (0, 1)."""
    at = np.unique(times)
    left = np.array([(times >= t).sum() for t in at])
    died = np.array([((times == t) & (events == 1)).sum() for t in at])
    share = np.append(1.0, np.cumprod(1 - died / left))
    return np.repeat(np.append(0.0, at), 2)[1:], np.repeat(share, 2)[:-1]


def plot(
    lines: Sequence[Line],
    title: str,
    x_title: str,
    y_title: str,
    *,
    diagonal: bool = False,
    dots: bool = False,
    x_end: float = 1.0,
) -> np.ndarray:
    """uint8 RGB; y runs from 0 to 1."""
    size = SIDE * SCALE
    canvas = Image.new("RGB", (size, size), PAPER)
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=13 * SCALE)
    width, height = SIDE - LEFT - RIGHT, SIDE - TOP - BOTTOM

    def place(x: float, y: float) -> tuple[float, float]:
        return SCALE * (LEFT + width * x / x_end), SCALE * (TOP + height * (1 - y))

    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        pen.line([place(0, share), place(x_end, share)], fill=SOFT, width=SCALE)
        pen.line([place(share * x_end, 0), place(share * x_end, 1)], fill=SOFT, width=SCALE)
        x, y = place(share * x_end, 0)
        pen.text((x, y + 4 * SCALE), f"{share * x_end:.4g}", fill=INK, font=font, anchor="ma")
        x, y = place(0, share)
        pen.text((x - 5 * SCALE, y), f"{share:g}", fill=INK, font=font, anchor="rm")
    if diagonal:
        pen.line([place(0, 0), place(1, 1)], fill=(150, 150, 150), width=SCALE)
    for i, (name, xs, ys) in enumerate(lines):
        colour, points = COLOURS[i % len(COLOURS)], [place(float(x), float(y)) for x, y in zip(xs, ys, strict=True)]
        pen.line(points, fill=colour, width=2 * SCALE, joint="curve")
        for x, y in points if dots else ():
            r = 3.5 * SCALE
            pen.ellipse((x - r, y - r, x + r, y + r), fill=colour)
        at = (SCALE * (SIDE - RIGHT - 6), SCALE * (SIDE - BOTTOM - 8 - 17 * (len(lines) - 1 - i)))
        pen.text(at, name, fill=colour, font=font, anchor="rs", stroke_width=2 * SCALE, stroke_fill=PAPER)
    pen.text((SCALE * LEFT, SCALE * 6), title, fill=INK, font=font)
    pen.text((SCALE * (LEFT + width / 2), SCALE * (SIDE - 20)), x_title, fill=INK, font=font, anchor="ma")
    upright = Image.new("RGB", (size, 18 * SCALE), PAPER)
    ImageDraw.Draw(upright).text((SCALE * (BOTTOM + height / 2), 2 * SCALE), y_title, fill=INK, font=font, anchor="ma")
    canvas.paste(upright.rotate(90, expand=True).crop((0, 0, 18 * SCALE, size)), (0, 0))
    return np.asarray(canvas.resize((SIDE, SIDE), Image.Resampling.LANCZOS))


def roc_picture(labels: np.ndarray, arms: dict[str, np.ndarray], names: Sequence[str]) -> list[np.ndarray]:
    """One picture of all arms for two classes; one an arm, with a line a class, for more."""
    axes = ("false positive rate", "true positive rate")
    if len(names) == 2:
        lines = [(name, *roc(labels == 1, scores)) for name, scores in arms.items()]
        return [plot(lines, f"ROC, {names[1]} against {names[0]}", *axes, diagonal=True)]
    return [
        plot(
            [(str(names[k]), *roc(labels == k, scores[:, k])) for k in range(len(names))],
            f"ROC, {arm}, each against the rest",
            *axes,
            diagonal=True,
        )
        for arm, scores in arms.items()
    ]


def calibration_picture(labels: np.ndarray, arms: dict[str, np.ndarray], names: Sequence[str]) -> np.ndarray:
    lines = []
    for arm, scores in arms.items():
        right, said = (labels == 1, scores) if scores.ndim == 1 else (scores.argmax(1) == labels, scores.max(1))
        lines.append((arm, *calibration(right, said)))
    what = f"probability of {names[1]}" if len(names) == 2 else "probability of the likeliest class"
    return plot(lines, "Calibration", what, "share of slides", diagonal=True, dots=True)


def survival_picture(times: np.ndarray, events: np.ndarray, high: np.ndarray, arm: str) -> np.ndarray:
    lines = [
        (f"{name} ({int(rows.sum())} slides)", *kaplan_meier(times[rows], events[rows]))
        for name, rows in (("risk below the median of its fold", ~high), ("above", high))
        if rows.any()
    ]
    return plot(lines, f"Kaplan-Meier, {arm}", "time", "share without event", x_end=float(times.max()))


def confusion_picture(labels: np.ndarray, scores: np.ndarray, names: Sequence[str], arm: str) -> np.ndarray:
    table = confusion(labels, scores, np.ones((1, len(labels))))[0]
    share = table / np.maximum(table.sum(1, keepdims=True), 1)
    cell, left, top = 84, 110, 62
    font, title = ImageFont.load_default(size=14), f"{arm}: true class (rows), predicted (columns)"
    width = max(left + cell * len(names), 8 + round(font.getlength(title)))
    canvas = Image.new("RGB", (width + 12, top + cell * len(names) + 12), PAPER)
    pen = ImageDraw.Draw(canvas)
    pen.text((8, 6), title, fill=INK, font=font)
    for i, name in enumerate(names):
        pen.text((left + cell * (i + 0.5), top - 8), str(name)[:10], fill=INK, font=font, anchor="ms")
        pen.text((left - 8, top + cell * (i + 0.5)), str(name)[:12], fill=INK, font=font, anchor="rm")
        for j in range(len(names)):
            x, y, level = left + cell * j, top + cell * i, float(share[i, j])
            shade = tuple(int(255 - level * (255 - c)) for c in COLOURS[0])
            pen.rectangle((x, y, x + cell - 2, y + cell - 2), fill=shade)
            text = f"{int(table[i, j])}\n{level:.0%}"
            ink = PAPER if level > 0.5 else INK
            pen.multiline_text((x + cell / 2, y + cell / 2), text, fill=ink, font=font, anchor="mm", align="center")
    return np.asarray(canvas)
