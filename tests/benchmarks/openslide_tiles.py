"""Tiles as one reads them with OpenSlide for PyTorch; in a file of its own, for DataLoader's processes import it."""

import numpy as np
import openslide


class Tiles:
    def __init__(self, places: list[tuple[str, int, int]], size: int):
        self.places, self.size = places, size
        self.open: dict[str, openslide.OpenSlide] = {}

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, i: int) -> np.ndarray:
        path, x, y = self.places[i]
        if path not in self.open:
            self.open[path] = openslide.OpenSlide(path)
        return np.array(self.open[path].read_region((x, y), 0, (self.size, self.size)).convert("RGB"))
