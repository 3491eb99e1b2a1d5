"""A picture of what the CLS token of a trained transformer attends to, tile by tile and head by head."""

from pathlib import Path

import jax
import numpy as np

from input_pipeline.files import save_picture
from input_pipeline.tileset import TileSet
from mfl_jax import models
from mfl_jax.contact_sheet import picture, undo_normalise
from mfl_jax.encoder import part_of, view_of
from mfl_jax.methods.towers import compute_dtype
from mfl_jax.report.pictures import overlay, sheet
from mfl_jax.trained import Trained, check_tiles, open_run


def of_run(
    workdir: str | Path, tileset: TileSet, path: str | Path, *, rows: int = 4, split: str = "", seed: int = 0
) -> Path:
    """A sheet of a few tiles, each as the network sees it, with the mean over heads and every head of the last block.

    Each map goes from its own least to its own greatest share, so that a head which looks everywhere alike is seen to
    do so by its grain alone; the greatest share stands below it, beside what an even one would be.
    """
    run = open_run(workdir)
    if run.facts.modalities["he"].kind != "image":
        raise ValueError(f"{workdir} was trained on regions: a sheet of attention is of tiles")
    check_tiles(workdir, run.facts, tileset.spec)
    if Path(path).suffix not in (".png", ".jpg"):
        raise ValueError(f"a picture is a .png or a .jpg, not {str(path)!r}")
    ids = tileset.ids(split or None)
    if not 0 < rows <= len(ids):
        raise ValueError(f"--rows is {rows}; there are 1 to {len(ids)} tiles to draw")
    chosen = np.sort(np.random.default_rng(seed).permutation(ids)[:rows])
    tiles = [np.asarray(tileset.decode(example)["he"]) for example in tileset.read(chosen.tolist())]
    seen, maps = of_tiles(run, np.stack(tiles))
    heads, even = maps.shape[1], 1 / maps[0, 0].size
    pictures, captions = [], []
    for tile, each in zip(seen, maps, strict=True):
        shown = [each.mean(0), *each]
        pictures.append([tile, *(overlay(tile, heat) for heat in shown)])
        captions.append([f"even: {even:.1%}", *(f"up to {heat.max():.1%}" for heat in shown)])
    columns = ["as seen", "mean", *(f"head {n + 1}" for n in range(heads))]
    save_picture(path, sheet(pictures, columns=columns, captions=captions))
    return Path(path)


def of_tiles(run: Trained, he: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(uint8 RGB as the network sees it, attention [B, heads, h, w]) of tiles uint8 [B, H, W, 3]."""
    model, view, dtype = models.make(run.config.encoder), view_of(run), compute_dtype(run.config.dtype)
    attend = model.attention
    if attend is None:
        raise ValueError(
            f"{run.path} has the encoder {run.config.encoder!r}, which has no attention: it takes a ViT over tiles"
        )
    params, _ = part_of(run)
    seen = jax.jit(lambda images: view(jax.random.key(0), images))(he)
    maps = jax.jit(lambda params, x: attend(params, x, dtype=dtype))(params, seen)
    shown = [picture(undo_normalise(np.asarray(tile), view), view, view) for tile in seen]
    return np.stack(shown), np.asarray(maps)
