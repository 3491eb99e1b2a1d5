"""Sheets of tiles for the report, and pictures as JPEG of a bounded size."""

import io
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

GAP, FRAME, TITLE, FONT, SIDE = 8, 3, 22, 15, 128
INK, PAPER, NOTHING = (34, 34, 34), (255, 255, 255), (200, 200, 200)
SAME, OTHER = (0, 114, 178), (213, 94, 0)
# dark blue over magenta to pale yellow: rises in lightness, so it reads in grey too
HEAT = np.array([(20, 11, 90), (115, 20, 140), (205, 60, 110), (250, 140, 60), (252, 240, 160)], np.float64)


def jpeg(picture: np.ndarray | bytes, limit: int = 400_000) -> bytes:
    """At most `limit` bytes: quality goes down first, then size. Bytes of a JPEG or PNG that fit already are kept."""
    if isinstance(picture, bytes):
        if len(picture) <= limit and picture.startswith((b"\xff\xd8", b"\x89PNG")):
            return picture
        image = Image.open(io.BytesIO(picture)).convert("RGB")
    else:
        if picture.dtype != np.uint8 or picture.ndim not in (2, 3) or (picture.ndim == 3 and picture.shape[2] != 3):
            raise ValueError(
                f"a picture is {picture.dtype} {list(picture.shape)}; it should be uint8 [height, width, 3]"
            )
        image = Image.fromarray(picture).convert("RGB")
    while True:
        for quality in (88, 78, 65):
            buffer = io.BytesIO()
            image.save(buffer, "JPEG", quality=quality, optimize=True)
            if buffer.tell() <= limit or max(image.size) < 16:
                return buffer.getvalue()
        image = image.resize((max(image.width * 4 // 5, 1), max(image.height * 4 // 5, 1)), Image.Resampling.LANCZOS)


def room(pictures: Iterable[np.ndarray | bytes], total: int) -> int:
    """Bytes that each may take so that all together take `total`: what small ones leave over goes to the large ones."""
    # an array's size is not known before it is written: a good deal more than its JPEG at the best quality
    sizes = sorted(len(p) if isinstance(p, bytes) else p.size // 4 for p in pictures)
    share = total
    for i, size in enumerate(sizes):
        share = total // (len(sizes) - i)
        total -= min(size, share)
    return max(share, 20_000)


def size(picture: bytes) -> tuple[int, int]:
    """Width and height."""
    return Image.open(io.BytesIO(picture)).size


def sheet(
    rows: Sequence[Sequence[np.ndarray | None]],
    *,
    columns: Sequence[str] = (),
    captions: Sequence[Sequence[str]] | None = None,
    frames: Sequence[Sequence[bool | None]] | None = None,
    side: int = SIDE,
) -> np.ndarray:
    """uint8 RGB of rows of RGB pictures (None: a grey field) under their column titles.

    `captions` stand below each picture. `frames`: True is a whole frame, False a broken one in another colour.
    """
    below = TITLE if captions else 0
    top = GAP + (TITLE if columns else 0)
    wide = max(len(row) for row in rows)
    canvas = Image.new("RGB", (GAP + wide * (side + GAP), top + len(rows) * (side + below + GAP)), PAPER)
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=FONT)
    for j, title in enumerate(columns):
        pen.text((GAP + j * (side + GAP), 4), _fit(title, side, font), fill=INK, font=font)
    for i, row in enumerate(rows):
        for j, picture in enumerate(row):
            x, y = GAP + j * (side + GAP), top + i * (side + below + GAP)
            if picture is None:
                pen.rectangle((x, y, x + side - 1, y + side - 1), fill=NOTHING)
                pen.text((x + 6, y + 6), "none", fill=INK, font=font)
            else:
                canvas.paste(Image.fromarray(picture).resize((side, side), Image.Resampling.LANCZOS), (x, y))
            if frames and frames[i][j] is not None:
                _frame(pen, x, y, side, bool(frames[i][j]))
            if captions:
                pen.text((x, y + side + 3), _fit(captions[i][j], side, font), fill=INK, font=font)
    return np.asarray(canvas)


def _frame(pen: ImageDraw.ImageDraw, x: int, y: int, side: int, same: bool) -> None:
    colour, last = SAME if same else OTHER, side - 1
    pen.rectangle((x - FRAME, y - FRAME, x + last + FRAME, y + last + FRAME), outline=colour, width=FRAME)
    if not same:
        for at in range(10, side, 20):
            for box in ((x + at, y - FRAME, x + at + 9, y - 1), (x + at, y + side, x + at + 9, y + last + FRAME)):
                pen.rectangle(box, fill=PAPER)
            for box in ((x - FRAME, y + at, x - 1, y + at + 9), (x + side, y + at, x + last + FRAME, y + at + 9)):
                pen.rectangle(box, fill=PAPER)


def _fit(text: str, width: int, font: ImageFont.ImageFont | ImageFont.FreeTypeFont) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."


def overlay(he: np.ndarray, heat: np.ndarray, truth: np.ndarray | None = None) -> np.ndarray:
    """H&E in grey with `heat` [h, w] (any size; from its least to its greatest value) in colour, and the outline of
    `truth` (bool [h, w]) in white on black."""
    height, width = he.shape[:2]
    level = heat.astype(np.float32) - heat.min()
    level = level / (level.max() or 1)
    level = np.asarray(Image.fromarray(level).resize((width, height), Image.Resampling.BILINEAR))[..., None]
    grey = he.mean(-1, keepdims=True).repeat(3, axis=-1)
    stops = np.linspace(0, 1, len(HEAT))
    colour = np.concatenate([np.interp(level, stops, HEAT[:, c]) for c in range(3)], axis=-1)
    opacity = 0.25 + 0.5 * level
    mixed = grey * (1 - opacity) + colour * opacity
    if truth is not None and truth.any():
        mask = np.asarray(Image.fromarray(truth).resize((width, height), Image.Resampling.NEAREST))
        inner = _edge(mask, max(1, width // 100))
        mixed[_edge(mask, max(2, width // 50))] = 0
        mixed[inner] = 255
    return np.clip(mixed + 0.5, 0, 255).astype(np.uint8)


def _edge(mask: np.ndarray, thickness: int) -> np.ndarray:
    """The pixels of `mask` within `thickness` steps of what is not in it; the border of the picture is no edge."""
    inner = mask.copy()
    for _ in range(thickness):
        padded = np.pad(inner, 1, mode="edge")
        inner = inner & padded[2:, 1:-1] & padded[:-2, 1:-1] & padded[1:-1, 2:] & padded[1:-1, :-2]
    return mask & ~inner


def saliency_sheet(
    he: np.ndarray, heats: Mapping[str, np.ndarray], truth: np.ndarray | None = None, *, side: int = SIDE
) -> np.ndarray:
    """One row a tile: the H&E [n, H, W, 3], then `heats` {arm: [n, h, w]} over it, each with the outline of the truth
    (bool [n, h, w])."""
    rows = []
    for i, tile in enumerate(he):
        outline = truth[i] if truth is not None else None
        rows.append([tile, *(overlay(tile, heat[i], outline) for heat in heats.values())])
    return sheet(rows, columns=["H&E", *heats], side=side)


def neighbours_sheet(
    queries: Sequence[np.ndarray],
    neighbours: Sequence[Sequence[np.ndarray]],
    labels: Sequence[str],
    neighbour_labels: Sequence[Sequence[str]],
    *,
    side: int = SIDE,
) -> np.ndarray:
    """One row a query: it, then its neighbours, nearest first. A neighbour of the query's label has a whole frame, one
    of another label a broken one; the label stands below."""
    rows = [[query, *near] for query, near in zip(queries, neighbours, strict=True)]
    captions = [[label, *near] for label, near in zip(labels, neighbour_labels, strict=True)]
    frames = [[None, *(near == label for near in line)] for label, line in zip(labels, neighbour_labels, strict=True)]
    columns = ["query", *(f"nearest {i + 1}" if not i else str(i + 1) for i in range(max(map(len, neighbours))))]
    return sheet(rows, columns=columns, captions=captions, frames=frames, side=side)
