"""One slide: its layout, its cells, its look, and any of its stains as pixels."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from ..slides.transform import Displacement, Transform
from . import layout as lay
from . import stains
from .cells import Cells, draw_cells
from .layout import Layout, draw_layout
from .look import Look, draw_look
from .render import BLOCK, Canvas, canvas_fields, draw_textures, place

STAINS = {"if": stains.draw_if, "ihc": stains.draw_ihc}


@dataclass(frozen=True)
class Slide:
    """Everything known about a slide before a pixel is drawn. `subtype` and `lesion` are its labels."""

    key: tuple[int, int, int]  # seed, case, slide
    size: int
    mpp: float
    subtype: int
    lesion: bool
    layout: Layout
    cells: Cells
    look: Look

    @property
    def canvas(self) -> Canvas:
        return Canvas(self.size, self.size, self.mpp)

    def rng(self, what: int) -> np.random.Generator:
        return np.random.default_rng([*self.key, what])


def look_of(key: tuple[int, int, int], artefact_chance: float = 0.12) -> Look:
    """Of the H&E of a slide, by its seed, case and number, before anything else of it is drawn."""
    return draw_look(np.random.default_rng([*key, 1]), artefact_chance)


def draw_slide(
    seed: int = 0,
    case: int = 0,
    slide: int = 0,
    *,
    size: int = 1024,
    mpp: float = 0.5,
    subtype: int = 0,
    lesion: bool = False,
    tissue: str = "mixed",
    artefact_chance: float = 0.12,
) -> Slide:
    """A pure function of its arguments; pixels follow from `paint` and its kind."""
    key = (seed, case, slide)
    look = look_of(key, artefact_chance)
    rng = np.random.default_rng([*key, 2])
    layout = draw_layout(rng, size * mpp, subtype=subtype, lesion=lesion, tissue=tissue, fibre=look.fibre_angle)
    cells = draw_cells(np.random.default_rng([*key, 3]), layout, look.crowding)
    return Slide(key, size, mpp, subtype, lesion, layout, cells, look)


def _displacement(rng: np.random.Generator, size_um: float, largest: float) -> Displacement:
    nodes = 7
    spacing = size_um / (nodes - 3)
    values = rng.standard_normal((nodes, nodes, 2))
    field = Displacement((-spacing, -spacing), (spacing, spacing), values)
    x = np.linspace(0, size_um, 60)
    reach = np.linalg.norm(field(np.stack(np.meshgrid(x, x), -1).reshape(-1, 2)), axis=-1).max()
    amplitude = min(largest, 0.06 * spacing) * rng.uniform(0.5, 1.0)
    return replace(field, values=np.round(values * amplitude / reach, 4))


def draw_partner(slide: Slide, name: str, *, deformation: float = 15.0) -> tuple[Canvas, Look]:
    """Its own pixel size, look and place on the glass: any rotation, a shift, a scale, a deformation of up to 15 um."""
    rng = slide.rng(10 + sorted(STAINS).index(name))
    size_um = slide.size * slide.mpp
    turn, scale = rng.uniform(0, 2 * np.pi), rng.uniform(0.97, 1.03)
    mpp = round(slide.mpp * rng.uniform(0.9, 1.3), 4)
    linear = scale * np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    field = _displacement(rng, size_um, deformation)
    tissue = lay.node_points(len(slide.layout.region))[slide.layout.region != lay.BACKGROUND]
    moved = (tissue + field(tissue)) @ linear.T
    margin = rng.uniform(0.02, 0.12, (2, 2)) * size_um
    low, high = moved.min(0) - margin[0], moved.max(0) + margin[1]
    info = {"made": "phantom", "rotation_degrees": round(float(np.degrees(turn)), 3), "scale": round(float(scale), 5)}
    transform = Transform(np.column_stack([linear, -low]), field, info)
    width, height = (int(v) for v in np.ceil((high - low) / mpp))
    return Canvas(width, height, mpp, transform), draw_look(rng)


def windows(canvas: Canvas) -> Iterator[tuple[int, int, int, int]]:
    for y in range(0, canvas.height, BLOCK):
        for x in range(0, canvas.width, BLOCK):
            yield x, y, min(x + BLOCK, canvas.width), min(y + BLOCK, canvas.height)


def painter(slide: Slide, stain: str, canvas: Canvas, look: Look) -> Callable[[tuple[int, int, int, int]], np.ndarray]:
    """window (x0, y0, x1, y1) in pixels of the canvas -> its pixels; `stain` is 'he', 'if' or 'ihc'."""
    placed = place(slide.cells, canvas)
    fields = canvas_fields(slide.layout, slide.cells, look, canvas)
    textures = draw_textures(look, canvas.mpp)
    draw = stains.draw_he if stain == "he" else STAINS[stain]
    return lambda window: draw(placed, fields, look, textures, canvas, window)


def paint(slide: Slide, stain: str = "he") -> np.ndarray:
    """The whole slide in memory: uint8 [h, w, 3], or uint16 [channels, h, w] of fluorescence."""
    canvas, look = (slide.canvas, slide.look) if stain == "he" else draw_partner(slide, stain)
    draw = painter(slide, stain, canvas, look)
    out: np.ndarray | None = None
    for x0, y0, x1, y1 in windows(canvas):
        block = draw((x0, y0, x1, y1))
        if stain == "if":
            out = np.empty((len(block), canvas.height, canvas.width), block.dtype) if out is None else out
            out[:, y0:y1, x0:x1] = block
        else:
            out = np.empty((canvas.height, canvas.width, 3), block.dtype) if out is None else out
            out[y0:y1, x0:x1] = block
    assert out is not None
    return out


def paint_nuclei(slide: Slide) -> np.ndarray:
    """uint16 [2, h, w]: the number of the nucleus (cell id + 1; ids past 65,535 start again at 1), and its type + 1."""
    number = np.arange(len(slide.cells))
    placed = place(replace(slide.cells, seed=number + 1), slide.canvas)
    out = np.zeros((2, slide.size, slide.size), np.uint16)
    kinds = np.concatenate([[0], slide.cells.type + 1]).astype(np.uint16)
    for window in windows(slide.canvas):
        x0, y0, x1, y1 = window
        found = stains.draw_nuclei(placed, window).astype(np.int64)
        out[0, y0:y1, x0:x1] = np.where(found > 0, (found - 1) % 65535 + 1, 0)
        out[1, y0:y1, x0:x1] = kinds[found]
    return out
