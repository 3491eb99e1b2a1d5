"""Tiles near another tile: same slide, at a distance in micrometres, found when asked for.

Nothing is built, and one byte a slide is kept: the rows of a slide are contiguous, and where they run from top to
bottom (as those of a tile grid do) only the band within reach is looked at.
"""

import numpy as np

from input_pipeline.order import below
from input_pipeline.tileset import TileSet

SLACK_UM = 0.01  # so that a radius equal to the step of a grid reaches the next tile, whatever the rounding


class Neighbours:
    """Tiles whose distance lies in (low, high] um; low > 0 gives far tiles, of all the slide where high is infinite."""

    def __init__(self, tileset: TileSet, high_um: float, low_um: float = 0.0):
        if not (0 <= low_um < high_um and (low_um or np.isfinite(high_um))):
            raise ValueError(f"a distance in um is finite and positive, from low to high; it is {low_um} to {high_um}")
        if missing := {"x", "y", "mpp"} - set(tileset.tiles):
            raise ValueError(f"near and far tiles need the columns x, y and mpp; the tile set has no {sorted(missing)}")
        self._made_of = (tileset, high_um, low_um)
        self._x, self._y, self._mpp = (tileset.tiles[k] for k in ("x", "y", "mpp"))
        self._first_row = np.asarray(tileset.first_row)
        self._low = low_um + SLACK_UM if low_um else 0.0
        self._high = high_um + SLACK_UM
        self._top_down = np.zeros(len(self._first_row) - 1, np.int8)  # 0 not yet known, 1 yes, 2 no

    def __reduce__(self) -> tuple:
        return Neighbours, self._made_of

    def of(self, tile: int) -> np.ndarray:
        """Ids within reach, ascending, without the tile itself."""
        slide = int(np.searchsorted(self._first_row, tile, side="right")) - 1
        start, stop = self._first_row[slide], self._first_row[slide + 1]
        x, y, mpp = (float(column[tile]) for column in (self._x, self._y, self._mpp))
        if not (np.isfinite([x, y, mpp]).all() and mpp > 0):
            raise ValueError(
                f"tile {tile} has no place on its slide (x {x}, y {y}, mpp {mpp}): near_um and far_um cannot be used"
            )
        low, high = self._low / mpp, self._high / mpp
        if self._is_top_down(slide):
            column = self._y[start:stop]
            band = np.searchsorted(column, [y - high - 1, y + high + 1])  # float32 rounding is below one px
            start, stop = start + band[0], start + band[1]
        squared = (self._x[start:stop] - x) ** 2.0 + (self._y[start:stop] - y) ** 2.0
        found = start + np.flatnonzero((squared <= high * high) & (squared > low * low))
        return found[found != tile]

    def draw(self, tiles: np.ndarray, draws: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """One neighbour for each tile by a 64-bit draw, and whether it has any; if not, it is paired with itself."""
        chosen = np.array(tiles, np.int64)
        alone = np.zeros(len(chosen), np.bool_)
        for i, tile in enumerate(chosen.tolist()):
            near = self.of(tile)
            alone[i] = not len(near)
            if len(near):
                chosen[i] = near[below(draws[i], len(near))]
        return chosen, ~alone

    def _is_top_down(self, slide: int) -> bool:
        if not self._top_down[slide]:
            y = self._y[self._first_row[slide] : self._first_row[slide + 1]]
            self._top_down[slide] = 1 if (y[1:] >= y[:-1]).all() else 2
        return self._top_down[slide] == 1
