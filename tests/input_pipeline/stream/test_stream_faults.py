"""Bad tiles are named, or replaced in a way that is the same every time; a reader that stalls ends the process."""

import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from input_pipeline import stream as stream_module
from input_pipeline.order import uniform
from input_pipeline.stream import StreamError, eval_stream, fetching, train_stream
from input_pipeline.stream.watchdog import EXIT_CODE
from input_pipeline.tileset import TileSet, TileSetError, tfrecord
from input_pipeline.tileset import writer as tileset_write
from tests.input_pipeline.stream.fixtures import SPEC, build, toy_fixture  # noqa: F401
from tests.input_pipeline.stream.test_stream import EXECUTORS, assert_same, take
from tests.input_pipeline.test_crew import children

CRC, NO_IMAGE, WRONG_SIZE, WRONG_CHANNELS, NAN = 10, 20, 40, 45, 80
BAD = {CRC, NO_IMAGE, WRONG_SIZE, WRONG_CHANNELS, NAN}
ROOT = Path(__file__).parents[3]


def flip(tileset: TileSet, tile: int) -> None:
    (example,) = tileset.read([tile])
    path = tileset.root / example.file
    data = bytearray(path.read_bytes())
    data[example.offset + 40] ^= 1
    path.write_bytes(data)


@pytest.fixture(scope="session")
def broken(tmp_path_factory):
    """The toy set with one tile of every fault; all but the flipped bit have right checksums."""
    import imagecodecs

    real, count = tileset_write.encode_record, iter(range(10**6))
    png = imagecodecs.png_encode
    he = {
        NO_IMAGE: b"\x89PNG and then nothing",
        WRONG_SIZE: png(np.zeros((15, 16, 3), np.uint8)),
        WRONG_CHANNELS: png(np.zeros((16, 16, 4), np.uint8)),
    }

    def encode(spec, slide_id, case_id, record):
        tile, payload = next(count), real(spec, slide_id, case_id, record)
        features = tfrecord.decode_example(payload)
        if tile in he:
            features["he"] = [he[tile]]
        if tile == NAN:
            features["counts"] = np.array([1, 2, np.nan, 4, 5], np.float32)
        return tfrecord.encode_example(features) if tile in BAD else payload

    root = tmp_path_factory.mktemp("broken") / "set"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tileset_write, "encode_record", encode)
        truth = build(root)
    flip(truth.tileset(), CRC)
    return truth


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("tile", sorted(BAD))
def test_raise_names_file_offset_id_and_slide(broken, executor, tile):
    tileset = broken.tileset()
    (position,) = np.flatnonzero(tileset.ids("train")[uniform(np.arange(90), 3, 90)] == tile)
    stream = train_stream(tileset, batch=1, seed=3, executor=executor, prefetch=0, start_step=int(position))
    with stream, pytest.raises(TileSetError) as caught:
        next(stream)
    slide = tileset.slides[broken.slide[tile]]
    message = str(caught.value)
    offset = int(tileset.index["offset"][tile])
    for part in (f"tile {tile}", f"slide {slide!r}", f"offset {offset}", ".tfrecord"):
        assert part in message
    assert caught.value.id == tile


def test_replace_changes_the_bad_rows_alone_and_always_alike(broken, toy, monkeypatch):
    monkeypatch.setattr(stream_module, "BAD_ALLOWED", 1000)
    options = {"batch": 30, "near_um": 15, "far_um": 25}
    clean = take(toy.tileset(), 6, **options)
    with train_stream(broken.tileset(), seed=3, executor="threads", threads=8, on_bad="replace", **options) as stream:
        repaired = [next(stream) for _ in range(6)]
        assert set(stream.bad) == BAD
        assert all(f"tile {tile}," in reason for tile, reason in stream.bad.items())
        bad_image = list(BAD - {NAN})
        for beside in ("near", "far"):
            assert not any(np.isin(b[f"{beside}_id"][b[f"{beside}_mask"]], bad_image).any() for b in repaired)
    again = take(broken.tileset(), 6, on_bad="replace", executor="tfdata", threads=1, prefetch=0, **options)
    assert_same(repaired, again)
    for before, after in zip(clean, repaired, strict=True):
        same = ~np.isin(before["id"], list(BAD))
        np.testing.assert_array_equal(before["id"][same], after["id"][same])
        assert not np.isin(after["id"], list(BAD)).any()
        np.testing.assert_array_equal(after["he"], toy.he[after["id"]])
        np.testing.assert_array_equal(after["if"], toy.partners["if"][after["id"]])
        np.testing.assert_array_equal(after["label"], toy.label[after["id"]])
        untouched = same & ~np.isin(before["near_id"], list(BAD))
        np.testing.assert_array_equal(before["near_id"][untouched], after["near_id"][untouched])


def test_replacement_is_the_same_after_a_restart(broken):
    whole = take(broken.tileset(), 9, on_bad="replace", partners=())
    assert_same(whole[5:], take(broken.tileset(), 4, on_bad="replace", partners=(), start_step=5))


def test_too_many_bad_tiles_stop_the_stream(broken):
    with train_stream(broken.tileset(), batch=30, seed=3, executor="threads", on_bad="replace") as stream:
        with pytest.raises(StreamError, match=r"11 of \d+ examples were bad, more than 0.1% and 10"):
            list(stream)
        assert stream.bad_count == 11
        assert 2 * 90 <= stream.seen <= 3 * 90
        with pytest.raises(StreamError, match="closed"):
            next(stream)


def test_a_thousandth_is_tolerated_for_ever(broken, monkeypatch):
    monkeypatch.setattr(stream_module, "BAD_SHARE", 5 / 90)
    monkeypatch.setattr(stream_module, "BAD_ALLOWED", 5)
    take(broken.tileset(), 30, batch=90, on_bad="replace", partners=("counts",))


def test_a_missing_partner_is_a_mask_or_a_fault(toy):
    tileset = toy.tileset()
    absent = np.flatnonzero(~toy.present["nuclei"])
    with eval_stream(tileset, batch=113, executor="threads") as stream:
        (batch,) = stream
    np.testing.assert_array_equal(np.flatnonzero(~batch["nuclei_mask"]), absent)
    assert not batch["nuclei"][absent].any()
    stream = eval_stream(tileset, batch=113, executor="threads", require=("nuclei",))
    with stream, pytest.raises(TileSetError, match="it has no nuclei, which the stream requires"):
        next(stream)
    with train_stream(tileset, batch=10, seed=0, executor="threads", require=("nuclei",), on_bad="replace") as stream:
        batch = next(stream)
        assert batch["nuclei_mask"].all()
        assert set(stream.bad) <= set(absent.tolist())


def test_evaluation_masks_bad_tiles(broken):
    with eval_stream(broken.tileset(), batch=20, executor="threads", on_bad="mask") as stream:
        batches = list(stream)
    ids, mask = (np.concatenate([b[k] for b in batches]) for k in ("id", "mask"))
    assert set(range(113)) - set(ids.tolist()) == BAD == set(stream.bad)
    np.testing.assert_array_equal(np.flatnonzero(~mask), [*sorted(BAD), *range(113, 120)])
    for batch in batches:
        assert not batch["he"][~batch["mask"]].any()


def test_a_missing_or_cut_shard_is_named(toy, tmp_path):
    root = tmp_path / "set"
    shutil.copytree(toy.root, root)
    tileset = TileSet.open(root)
    (example,) = tileset.read([8])
    path = root / example.file
    os.truncate(path, path.stat().st_size - 100)
    stream = eval_stream(TileSet.open(root), batch=113, executor="threads")
    with stream, pytest.raises(TileSetError, match=example.file):
        next(stream)
    path.unlink()
    stream = eval_stream(TileSet.open(root), batch=113, executor="threads")
    with stream, pytest.raises(TileSetError, match=r"tile 7, slide 's1': .*No such file"):
        next(stream)


SCRIPT = """
import functools, sys, time
from pathlib import Path
from input_pipeline.stream import batches, train_stream
from input_pipeline.tileset import TileSet
from tests.input_pipeline.stream import test_stream_faults as faults

stalled = Path({stalled!r})
batches.fetch = functools.partial(faults.slow, stalled, {healthy})
batches.fetch_apart = functools.partial(faults.slow_apart, stalled, {healthy})
options = dict(executor={executor!r}, threads=4, prefetch=4, stall_timeout={timeout})
stream = train_stream(TileSet.open({root!r}), batch=8, seed=0, **options)
for _ in range(3):
    next(stream)
{end}
"""


def slow(stalled, healthy, plan, number, batch):
    """Batches beyond the first `healthy` hang, and say so."""
    if number >= healthy:
        stalled.touch()
        time.sleep(1e6)
    time.sleep(0.016)
    fetching.fetch(plan, number, batch)


def slow_apart(stalled, healthy, plan, batch, number):
    slow(stalled, healthy, plan, number, batch)
    return {}


@pytest.fixture
def run(toy, tmp_path):
    def run(executor, end, timeout=300.0, healthy=10**9):
        options = {"stalled": str(tmp_path / "stalled"), "healthy": healthy, "timeout": timeout}
        script = SCRIPT.format(root=str(toy.root), executor=executor, end=end, **options)
        return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, timeout=60)

    return run


ENDINGS = {
    "end of the program": ("", 0),
    "sys.exit": ("sys.exit(0)", 0),
    "exception": ("raise RuntimeError('mine')", 1),
    "interrupt": ("import os, signal; os.kill(os.getpid(), signal.SIGINT); time.sleep(5)", -2),
    "interrupt inside next": (
        """import os, signal, threading
threading.Timer(.3, os.kill, (os.getpid(), signal.SIGINT)).start()
while True: next(stream)""",
        -2,
    ),
    "close": ("stream.close()", 0),
}
HANGS = "while not stalled.exists(): time.sleep(.01)\n"
STALLS = {"in a batch": "while True: next(stream)", "at exit": HANGS + "raise RuntimeError('leaving')"}


def by_cost(names, cheap):
    """Every name with every executor; each import of tensorflow takes seconds, so most of those are slow tests."""
    dear = [pytest.param("tfdata", n, marks=() if n in cheap else pytest.mark.slow) for n in names]
    return [pytest.param(executor, n) for executor in ("threads", "processes") for n in names] + dear


@pytest.mark.parametrize(("executor", "ending"), by_cost(ENDINGS, ["end of the program", "interrupt inside next"]))
def test_the_process_ends_with_a_stream_open(run, executor, ending):
    end, code = ENDINGS[ending]
    done = run(executor, end)
    assert done.returncode == code, done.stderr[-2000:]


@pytest.mark.parametrize(("executor", "waiting"), by_cost(STALLS, ["in a batch"]))
def test_a_stalled_reader_ends_the_process_with_every_stack(run, executor, waiting):
    done = run(executor, STALLS[waiting], timeout=4, healthy=5)
    assert done.returncode == EXIT_CODE, done.stderr[-2000:]
    assert ("leaving" in done.stderr) == (waiting == "at exit")
    assert "gave nothing for 4 s (stall_timeout)" in done.stderr
    assert "in slow" in done.stderr
    assert "Thread 0x" in done.stderr


def test_a_slow_consumer_is_not_a_stalled_reader(run):
    done = run("threads", "time.sleep(2); next(stream); print('alive')", timeout=0.5)
    assert done.stdout.strip() == "alive", done.stderr[-2000:]
    assert done.returncode == 0


def test_the_toy_spec_has_every_kind_of_partner():
    assert {p.kind for p in SPEC.partners} == {"image", "map", "vector"}


def test_closed_by_another_thread_it_lets_go_of_its_processes(toy):
    stream = train_stream(toy.tileset(), batch=8, seed=0, executor="processes", threads=2)
    caught = []

    def consume():
        try:
            while True:
                next(stream)
        except StreamError as error:
            caught.append(str(error))

    consumer = threading.Thread(target=consume)
    consumer.start()
    while not stream.step:
        time.sleep(0.01)
    readers = children()
    assert readers
    stream.close()
    consumer.join(30)
    assert "closed" in caught[0]
    assert not psutil.wait_procs(readers, timeout=10)[1]
