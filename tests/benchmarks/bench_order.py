"""Index and order of 10^8 tiles: memory, time to open, time to seek, positions a second. Peer: a stored permutation.

Ours keeps no table: an order is a keyed bijection (time per position, no memory), a split is its ranges of ids (16
bytes a slide and 8 more for a group), index and columns are memory maps whose pages the kernel may drop at any time.

For 10^9 tiles nothing changes but the files: 20 bytes a tile of index (shard, offset, length, crc) are 20 GB mapped,
and columns 4 to 8 bytes a tile each. A tile drawn at random touches a page (with read-ahead, 64 KiB) in every column,
so keep index and columns on a local disk, or read with `blocks=(64, 1024)`, where one page serves 64 tiles. 10^9
tiles are about 50,000 slides, half of what the format allows.

    python -m tests.benchmarks.bench_order --tiles 100000000
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from input_pipeline import order
from input_pipeline.tileset.mapped import open_columns, write_columns

SLIDES, BATCH, STEP = 10_000, 1024, 10**6


def resident(kind: str = "RssAnon") -> float:
    """Memory in MiB, now: RssAnon is our own, RssFile is page cache that the kernel takes back when it needs it."""
    (line,) = [text for text in Path("/proc/self/status").read_text().splitlines() if text.startswith(kind)]
    return int(line.split()[1]) / 1024


def timed(run, repeats: int = 5) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def write_index(path: Path, tiles: int) -> None:
    types = {"shard": np.int32, "offset": np.int64, "length": np.int32, "crc": np.uint32}

    def pieces(dtype):
        for start in range(0, tiles, 10**7):
            yield np.zeros(min(10**7, tiles - start), dtype)

    write_columns(path, {name: (np.dtype(t), tiles, pieces(t)) for name, t in types.items()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiles", type=int, default=10**8)
    tiles = parser.parse_args().tiles
    position = STEP * BATCH + np.arange(BATCH)
    many = np.arange(2 * 10**6)
    edges = np.linspace(0, tiles, SLIDES + 1).astype(np.int64)
    orders = {
        "uniform": lambda p: order.uniform(p, 0, tiles),
        "blockwise 64 x 1024": lambda p: order.blockwise(p, 0, tiles, block=64, window=1024),
        "balanced by slide": lambda p: order.balanced(p, 0, edges),
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "index.npz"
        write_index(path, tiles)
        before = resident()
        start = time.perf_counter()
        index = open_columns(path)
        selection = order.Selection.of(np.stack([edges[:-1], edges[1:]], axis=1))
        opened = time.perf_counter() - start
        print(f"index of {tiles:.0e} tiles: opened in {opened * 1e3:.1f} ms, {resident() - before:.1f} MiB resident")
        print(f"{'':22}{'positions/s':>12}{'seek to step 10^6':>19}{'with the index read':>21}")
        for name, ask in orders.items():

            def seek(ask=ask):
                ids = selection.ids(ask(position))
                return [index[k][ids] for k in index]

            rate = len(many) / timed(lambda ask=ask: ask(many))
            alone, read = timed(lambda ask=ask: ask(position)) * 1e3, timed(seek) * 1e3
            print(f"{name:22}{rate:12.2e}{alone:16.2f} ms{read:18.2f} ms")
        print(
            f"after all of it: {resident() - before:.0f} MiB more memory, {resident('RssFile'):.0f} MiB of page cache"
        )
    before = resident()
    start = time.perf_counter()
    stored = np.random.default_rng(0).permutation(tiles)
    print(
        f"peer, a stored permutation (numpy), one an epoch: {time.perf_counter() - start:.1f} s, "
        f"{resident() - before:.0f} MiB for {len(stored):.0e} tiles"
    )


if __name__ == "__main__":
    main()
