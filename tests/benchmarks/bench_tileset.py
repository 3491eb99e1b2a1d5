"""Tile sets: writing, random reads, and the cost of an index of 10^8 rows.

    python tests/benchmarks/bench_tileset.py [--tiles 2000] [--rows 1e8] [--folder .]

Peers, measured in the same run: tf.data reading the same shards in order (a TFRecord file has no random access), the
bare decode of the same bytes, and numpy loading the same index. An index of 10^8 rows takes 4.4 GB of disk.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import imagecodecs
import numpy as np

from input_pipeline.tileset import Partner, Record, Spec, TileSet, finish, manifest, tfrecord, write_slide
from input_pipeline.tileset.mapped import write_columns

SIZE = 256


def timed(work: Callable[[], object], repeats: int = 3) -> float:
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
    return best


def records(tiles: int) -> list[Record]:
    rng = np.random.default_rng(0)
    coarse = rng.normal(size=(32, SIZE // 8, SIZE // 8, 3)).repeat(8, axis=1).repeat(8, axis=2)
    pixels = np.clip(190 + 25 * coarse + rng.normal(size=(32, SIZE, SIZE, 3)) * 6, 0, 255).astype(np.uint8)
    nuclei = rng.integers(0, 60, (32, SIZE // 16, SIZE // 16)).repeat(16, axis=1).repeat(16, axis=2).astype(np.uint16)
    return [Record(pixels[i % 32], {"nuclei": nuclei[i % 32]}, float(i), 0.0, 0.5) for i in range(tiles)]


def line(what: str, ours: float, peer: float | None = None, peer_is: str = "") -> None:
    ratio = f"{ours / peer:>8.2f}" if peer else f"{'-':>8}"
    shown = f"{peer:>14,.0f}" if peer else f"{'-':>14}"
    print(f"{what:<44}{ours:>12,.0f}{shown}{ratio}   {peer_is}")


def small_set(root: Path, tiles: int) -> None:
    spec = Spec("bench", SIZE, 0.5, jpeg_quality=85, partners=(Partner("nuclei", "map", dtype="uint16"),))
    rows = records(tiles)
    whole = timed(lambda: write_slide(root, spec, "s", "c", rows))
    options = {"level": 85, "subsampling": "420"}
    png = {"level": 1, "strategy": 3, "filter": 16}

    def encode_alone() -> None:
        for r in rows:
            imagecodecs.jpeg8_encode(r.he, **options)
            imagecodecs.png_encode(r.partners["nuclei"], **png)

    encode = timed(encode_alone)
    finish(root, spec)
    tileset = TileSet.open(root)
    size = tileset.manifest["slides"][0]["bytes"] / tiles / 1024
    print(f"{tiles} tiles of {SIZE} px, {size:.0f} KiB each{'':<14}{'ours, 1/s':>14}{'peer, 1/s':>14}{'ratio':>8}")
    line("write_slide, encoding included", tiles / whole, tiles / encode, "encoding alone")
    line("write_slide, encoding taken off", tiles / max(whole - encode, 1e-9))
    ids = np.random.default_rng(0).integers(0, tiles, min(1000, tiles))
    read = timed(lambda: tileset.read(ids))
    line(
        f"read {len(ids)} random ids, checksums checked", len(ids) / read, sequential(root, tiles), "tf.data, in order"
    )
    examples = tileset.read(ids)
    raw = [tfrecord.decode_example(e.payload) for e in examples]
    decode = timed(lambda: [tileset.decode(e) for e in examples])
    bare = timed(lambda: [(imagecodecs.jpeg8_decode(f["he"][0]), imagecodecs.png_decode(f["nuclei"][0])) for f in raw])
    line("decode", len(ids) / decode, len(ids) / bare, "bare decode of the same bytes")


def sequential(root: Path, tiles: int) -> float | None:
    try:
        import tensorflow as tf
    except ImportError:
        return None
    files = sorted(str(p) for p in root.glob("*.tfrecord"))
    return tiles / timed(lambda: [raw.numpy() for raw in tf.data.TFRecordDataset(files)])


def synthetic(root: Path, rows: int, slides: int = 10_000) -> None:
    """Index and columns as large as those of a real set, and a manifest that fits; the shards do not exist."""
    spec, each = Spec("synthetic", SIZE, 0.5), rows // slides
    i8, i4, f4 = np.dtype(np.int64), np.dtype(np.int32), np.dtype(np.float32)
    offset = np.arange(each, dtype=i8) * 20_016

    def pieces(of: Callable[[int], np.ndarray]) -> Iterator[np.ndarray]:
        return (of(s) for s in range(slides))

    def full(dtype: np.dtype, value: Callable[[int], float]) -> Callable[[int], np.ndarray]:
        return lambda s: np.full(each, value(s), dtype)

    def column(dtype: np.dtype, of: Callable[[int], np.ndarray]) -> tuple[np.dtype, int, Iterator[np.ndarray]]:
        return dtype, each * slides, pieces(of)

    root.mkdir(exist_ok=True)
    index = {"shard": column(i4, full(i4, int)), "offset": column(i8, lambda s: offset)}
    index |= {"length": column(i4, full(i4, lambda s: 20_000)), "crc": column(np.dtype(np.uint32), full(i4, abs))}
    write_columns(root / "index.npz", index)
    tiles = {name: column(i4, full(i4, int)) for name in ("slide", "case", "label")}
    tiles |= {name: column(f4, full(f4, float)) for name in ("x", "y", "mpp")}
    write_columns(root / "tiles.npz", tiles)
    same = {"tiles": each, "bytes": each * 20_016, "digest": "", "source": {}, "columns": ["label", "mpp", "x", "y"]}
    entries = [{"shard": s, "slide": f"s{s}", "case": f"c{s}"} | same for s in range(slides)]
    cases = [e["case"] for e in entries]
    document = {"format": manifest.FORMAT, "version": manifest.VERSION, "complete": True, "spec": spec.to_json()}
    document |= {"slides": entries, "cases": cases, "splits": {"train": cases[:-1], "test": cases[-1:]}}
    document |= {"tiles": each * slides}
    document = json.loads(json.dumps(document))
    document["hash"] = manifest.content_hash(document)
    (root / "slides").mkdir(exist_ok=True)
    manifest.write_manifest(root, document)


_MEASURE = """
import json, sys, time
from pathlib import Path
import numpy as np
from input_pipeline.tileset import TileSet
def rss():
    return int([l for l in open("/proc/self/status") if l.startswith("VmRSS")][0].split()[1]) / 1024
root, how = Path(sys.argv[1]), sys.argv[2]
before, start = rss(), time.perf_counter()
if how == "ours":
    tileset = TileSet.open(root)
    rows = [int(tileset.index["offset"][i]) for i in np.random.default_rng(0).integers(0, len(tileset), 256)]
else:
    json.loads((root / "manifest.json").read_text())
    loaded = [dict(np.load(root / name)) for name in ("index.npz", "tiles.npz")]
print(json.dumps([time.perf_counter() - start, rss() - before]))
"""


def large_index(root: Path, rows: int) -> None:
    synthetic(root, rows)
    found = {}
    for how in ("ours", "numpy"):
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
        command = [sys.executable, "-c", _MEASURE, str(root), how]
        result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        found[how] = json.loads(result.stdout) if result.returncode == 0 else None
    size = sum((root / name).stat().st_size for name in ("index.npz", "tiles.npz")) / 1e9
    print(f"\nopen an index of {rows:,} rows in 10,000 slides ({size:.1f} GB) and look up 256")
    for how, measured in found.items():
        what = {"ours": "TileSet.open", "numpy": "np.load of the same files"}[how]
        print(
            f"{what:<44}" + ("out of memory" if measured is None else f"{measured[0]:>9.2f} s{measured[1]:>12,.0f} MiB")
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiles", type=int, default=2000)
    parser.add_argument("--rows", type=float, default=1e7)
    parser.add_argument("--folder", default=None, help="where to put the temporary files")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        small_set(Path(folder) / "small", options.tiles)
        large_index(Path(folder) / "large", int(options.rows))


if __name__ == "__main__":
    main()
