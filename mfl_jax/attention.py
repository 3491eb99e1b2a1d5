"""A picture of what the CLS token of a trained transformer attends to, head by head: of tiles, or of regions."""

from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
from PIL import Image

from input_pipeline.cohort import Slide
from input_pipeline.files import save_picture
from input_pipeline.show import ABSENT, Axes
from input_pipeline.slides.reader import SlideError, open_slide
from input_pipeline.tileset import TileSet
from mfl_jax import models
from mfl_jax.contact_sheet import picture, undo_normalise
from mfl_jax.encoder import part_of, view_of
from mfl_jax.evaluators.mil.maps import coloured
from mfl_jax.methods.towers import compute_dtype
from mfl_jax.report.pictures import SIDE, overlay, sheet
from mfl_jax.trained import Trained, check_tiles, open_run

REGION_SIDE = 192  # px at which a region is drawn


def of_run(
    workdir: str | Path,
    tileset: TileSet,
    path: str | Path,
    *,
    rows: int = 4,
    split: str = "",
    seed: int = 0,
    slides: Mapping[str, Slide] | None = None,
) -> Path:
    """A sheet of a few tiles or regions, each as the network sees it, with the mean over heads and every head of the
    last block. Regions are drawn in the principal components of their tiles' features, or, where `slides` has their
    slide, as H&E; cells without a tile are left grey.

    Each map goes from its own least to its own greatest share, so that a head which looks everywhere alike is seen to
    do so by its grain alone; the greatest share stands below it, beside what an even one would be.
    """
    run = open_run(workdir)
    check_tiles(workdir, run.facts, tileset.spec)
    grid = tileset.spec.he_kind == "grid"
    if slides is not None and not grid:
        raise ValueError(f"slides are to draw regions over; {tileset.root} holds tiles, which are pictures themselves")
    if Path(path).suffix not in (".png", ".jpg"):
        raise ValueError(f"a picture is a .png or a .jpg, not {str(path)!r}")
    ids = tileset.ids(split or None)
    if not 0 < rows <= len(ids):
        raise ValueError(f"--rows is {rows}; there are 1 to {len(ids)} {'regions' if grid else 'tiles'} to draw")
    chosen = np.sort(np.random.default_rng(seed).permutation(ids)[:rows])
    he = np.stack([np.asarray(tileset.decode(example)["he"]) for example in tileset.read(chosen.tolist())])
    seen, heads = attended(run, he)
    maps = np.concatenate([heads.mean(1, keepdims=True), heads], 1)
    if grid:
        stored = None if slides is None else of_slides(run, tileset, chosen, slides, seen.shape[1])
        pictures = _over_regions(seen, maps, stored)
    else:
        view = view_of(run)
        tiles = [picture(undo_normalise(tile, view), view, view) for tile in seen]
        pictures = [[t, *(overlay(t, h) for h in each)] for t, each in zip(tiles, maps, strict=True)]
    there = seen[..., -1] > 0.5 if grid else np.ones((len(maps), *maps.shape[2:]), bool)
    captions = [
        [f"even: {1 / max(t.sum(), 1):.2%}", *(f"up to {h.max():.2%}" for h in each)]
        for t, each in zip(there, maps, strict=True)
    ]
    columns = ["as seen" if slides is None else "H&E", "mean", *(f"head {n + 1}" for n in range(heads.shape[1]))]
    save_picture(path, sheet(pictures, columns=columns, captions=captions, side=REGION_SIDE if grid else SIDE))
    return Path(path)


def attended(run: Trained, he: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(what the network sees, attention [B, heads, h, w]) of tiles uint8 [B, H, W, 3] or regions [B, H, W, D + 1]."""
    model, view, dtype = models.make(run.config.encoder), view_of(run), compute_dtype(run.config.dtype)
    attend = model.attention
    if attend is None:
        raise ValueError(
            f"{run.path} has the encoder {run.config.encoder!r}, which has no attention: it takes a ViT over tiles, or "
            "a grid_vit over regions"
        )
    params, _ = jax.device_get(part_of(run))  # a few tiles: every device would make the same of them
    seen = jax.jit(lambda images: view(jax.random.key(0), images))(he)
    maps = jax.jit(lambda params, x: attend(params, x, dtype=dtype))(params, seen)
    return np.asarray(seen), np.asarray(maps)


def _over_regions(seen: np.ndarray, maps: np.ndarray, stored: list[np.ndarray] | None) -> list[list[np.ndarray]]:
    """Rows of pictures; `stored` are the regions as H&E."""
    if stored is None:
        axes = Axes.of(seen)
        first = [_large(axes.colours(grid)) for grid in seen]
    rows = []
    for number, (grid, each) in enumerate(zip(seen, maps, strict=True)):
        he, there = None if stored is None else stored[number], grid[..., -1] > 0.5
        rows.append([first[number] if he is None else he, *(_cells(heat, there, he) for heat in each)])
    return rows


def _cells(heat: np.ndarray, there: np.ndarray, he: np.ndarray | None) -> np.ndarray:
    """Cells in colour, from the least to the greatest of those that are there; over the H&E, where that is known."""
    low, high = (heat[there].min(), heat[there].max()) if there.any() else (0.0, 0.0)
    level = _large(np.where(there, (heat - low) / ((high - low) or 1), np.nan).astype(np.float32))
    if he is None:
        return np.where(np.isnan(level)[..., None], np.uint8(ABSENT), coloured(level))
    grey = he.mean(-1, keepdims=True).repeat(3, -1).astype(np.uint8)
    return np.where(np.isnan(level)[..., None], grey, overlay(he, np.nan_to_num(level)))


def _large(cells: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(cells).resize((REGION_SIDE, REGION_SIDE), Image.Resampling.NEAREST))


def of_slides(
    run: Trained, tileset: TileSet, regions: np.ndarray, slides: Mapping[str, Slide], cells: int
) -> list[np.ndarray]:
    """uint8 RGB of what the network sees of each region: the `cells` x `cells` in its middle."""
    view, spec = view_of(run), tileset.spec
    if [call.name for call in view.calls] != ["centre"]:
        raise ValueError(
            f"{run.path} evaluates with the view {str(view)!r}; where that lies on a slide is known of 'centre' alone: "
            "leave --slides out"
        )
    names, pictures = [tileset.slides[tileset.tiles["slide"][i]] for i in regions], []
    if missing := sorted(set(names) - set(slides)):
        raise ValueError(f"--slides does not list {', '.join(missing)}, which {tileset.root} holds regions of")
    for i, name in zip(regions, names, strict=True):
        x, y, mpp = (float(tileset.tiles[column][i]) for column in ("x", "y", "mpp"))
        before, side = (spec.size - cells) // 2 * spec.mpp, cells * spec.mpp  # um
        with open_slide(slides[name].he, mpp=mpp) as slide:  # that by which the tiles were cut
            if not slide.is_rgb:
                raise SlideError(f"{slide.path}: RGB is expected")
            left, top = x + before / mpp, y + before / mpp
            pictures.append(slide.read_region(left, top, REGION_SIDE, REGION_SIDE, side / REGION_SIDE)[..., :3])
    return pictures
