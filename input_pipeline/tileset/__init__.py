"""A tile set on disk: a folder of TFRecord shards, one a slide, that TFDS opens too, with an index for random access.

    <name>-tiles-00000.tfrecord, ...   the records      index.npz   shard, offset, length, crc of every record
    manifest.json                      what it is       tiles.npz   one row a tile: slide, case, x, y, mpp, label, ...
    slides/                            one file a slide, from which `finish` makes the rest

Slides are written one by one with `write_slide`, `finish` merges them, `TileSet.open` reads. A tile's id is its row.
"""

import os
import threading
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from input_pipeline.tileset import manifest, tfrecord
from input_pipeline.tileset.manifest import choose_splits
from input_pipeline.tileset.mapped import MappedError, open_columns
from input_pipeline.tileset.merge import column_types, finish
from input_pipeline.tileset.spec import Partner, Record, Spec, TileSetError, decode_payload
from input_pipeline.tileset.writer import INDEX, remove_slide, write_slide, written_slides

__all__ = ["Example", "Partner", "Record", "Spec", "TileSet", "TileSetError", "finish", "remove_slide"]
__all__ += ["choose_splits", "write_slide", "written_slides"]

MAX_OPEN_FILES = 64


class Example(NamedTuple):
    """The stored bytes of one tile, their checksum checked."""

    id: int
    slide: str
    file: str
    offset: int
    payload: bytes


class _Descriptor:
    """An open file that closes when its last user lets go of it, whoever that is."""

    __slots__ = ("number",)

    def __init__(self, path: Path):
        self.number = os.open(path, os.O_RDONLY)

    def read(self, size: int, offset: int) -> bytes:
        return os.pread(self.number, size, offset)  # through a method: `self` keeps the file open meanwhile

    def __del__(self):
        if hasattr(self, "number"):
            os.close(self.number)


class TileSet:
    """Thread-safe, read-only, O(slides) memory: index and columns are memory maps."""

    def __init__(self, root: Path, document: dict, index: dict[str, np.ndarray], tiles: dict[str, np.ndarray]):
        self.root, self.manifest, self.index, self.tiles = root, document, index, tiles
        self.spec = Spec.from_json(document["spec"])
        self.hash: str = document["hash"]
        self.slides: list[str] = [s["slide"] for s in document["slides"]]
        self.cases: list[str] = document["cases"]
        self.splits: dict[str, list[str]] = document["splits"]
        self.first_row = np.cumsum([0, *(s["tiles"] for s in document["slides"])])
        self._shards = {s["shard"]: s for s in document["slides"]}
        self._open: OrderedDict[int, _Descriptor] = OrderedDict()
        self._lock = threading.Lock()

    @staticmethod
    def open(root: str | os.PathLike) -> "TileSet":
        root = Path(root)
        document = manifest.read_manifest(root)
        try:
            index, tiles = open_columns(root / "index.npz"), open_columns(root / "tiles.npz")
        except MappedError as error:
            raise TileSetError(f"{error}; run finish again") from error
        code = np.dtype(np.int32)
        of_tiles: dict[str, np.dtype] = {"slide": code, "case": code} | column_types(document["slides"])
        expected = {"index.npz": {"shard": code} | INDEX, "tiles.npz": of_tiles}
        for (name, types), columns in zip(expected.items(), (index, tiles), strict=True):
            if {k: v.dtype for k, v in columns.items()} != types:
                raise TileSetError(f"{root / name} does not have the columns that the manifest says; run finish again")
            if any(len(v) != document["tiles"] for v in columns.values()):
                raise TileSetError(f"{root / name} does not have the {document['tiles']} rows of the manifest")
        return TileSet(root, document, index, tiles)

    def __reduce__(self) -> tuple:
        """To another process goes the folder, not what is in it."""
        return _open_same, (self.root.absolute(), self.hash)

    def __len__(self) -> int:
        return self.manifest["tiles"]

    def ranges(self, split: str | None = None) -> np.ndarray:
        """int64 [k, 2]: the ids of a split as ranges [start, stop); neighbours are merged, so k <= slides."""
        if split is None:
            return np.array([[0, len(self)]] if len(self) else np.zeros((0, 2)), np.int64)
        if split not in self.splits:
            raise TileSetError(f"there is no split {split!r}; there are {sorted(self.splits)}")
        members = set(self.splits[split])
        found: list[list[int]] = []
        for i, entry in enumerate(self.manifest["slides"]):
            if entry["case"] in members and entry["tiles"]:
                start, stop = int(self.first_row[i]), int(self.first_row[i + 1])
                if found and found[-1][1] == start:
                    found[-1][1] = stop
                else:
                    found.append([start, stop])
        return np.array(found, np.int64).reshape(-1, 2)

    def ids(self, split: str | None = None) -> np.ndarray:
        """Every id of a split, ascending; `ranges` says the same in little memory."""
        return np.concatenate([np.zeros(0, np.int64), *(np.arange(a, b) for a, b in self.ranges(split))])

    def read(self, ids: Iterable[int]) -> list[Example]:
        """The records, in the order asked. A fault raises TileSetError naming file, offset, id and slide."""
        return [self._read(int(i)) for i in ids]

    def _read(self, i: int) -> Example:
        if not 0 <= i < len(self):
            raise TileSetError(f"tile {i} is not one of 0 to {len(self) - 1}", id=i)
        shard, offset, length = (int(self.index[k][i]) for k in ("shard", "offset", "length"))
        entry = self._shards.get(shard, {"slide": "?", "bytes": 0})
        slide, name = entry["slide"], manifest.shard_name(self.spec.name, shard)
        size = tfrecord.HEADER + length + tfrecord.FOOTER
        try:
            if length < 0 or offset < 0 or offset + size > entry["bytes"]:
                raise tfrecord.RecordError(f"the index points to {length} bytes outside the shard")
            payload, crc = tfrecord.check_record(self._descriptor(shard).read(size, offset), length)
            if crc != self.index["crc"][i]:
                raise tfrecord.RecordError("the checksum is not the one in the index: the shard is another one")
        except (tfrecord.RecordError, OSError) as error:
            place = f"{name}, offset {offset}, tile {i}, slide {slide!r}"
            hint = "run verify, and write the slide again"
            raise TileSetError(f"{place}: {error}; {hint}", id=i, slide=slide, file=name, offset=offset) from error
        return Example(i, slide, name, offset, payload)

    def _descriptor(self, shard: int) -> _Descriptor:
        with self._lock:
            found = self._open.pop(shard, None)
            if found is None:
                found = _Descriptor(self.root / manifest.shard_name(self.spec.name, shard))
                if len(self._open) >= MAX_OPEN_FILES:
                    self._open.popitem(last=False)
            self._open[shard] = found
            return found

    def decode(self, example: Example) -> dict[str, np.ndarray | None]:
        """{'he': uint8 [H, W, 3] or a grid, partner: [H, W, C] or [length], None where absent}."""
        try:
            return decode_payload(self.spec, example.payload)
        except TileSetError as error:
            message = f"{example.file}, offset {example.offset}, tile {example.id}, slide {example.slide!r}: {error}"
            where = (example.id, example.slide, example.file, example.offset)
            raise TileSetError(message, *where) from error

    def close(self) -> None:
        with self._lock:
            self._open.clear()

    def __enter__(self) -> "TileSet":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def _open_same(root: Path, digest: str) -> TileSet:
    found = TileSet.open(root)
    if found.hash != digest:
        raise TileSetError(f"{root} was written anew while it was in use: start again")
    return found
