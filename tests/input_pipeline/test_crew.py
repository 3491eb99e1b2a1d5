"""Memory that is used again, and processes that fill it: what comes back, what goes wrong, and that all of them end."""

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pytest

from input_pipeline.crew import Crew, CrewError, Shelf
from input_pipeline.tileset import TileSetError

ROOT = Path(__file__).parents[2]
LAYOUT = {"flags": ((3,), "bool"), "pixels": ((4, 5), "uint16"), "one": ((), "float32")}


class Odd(Exception):  # noqa: N818
    """As many are: pickled with a message that it cannot be made of again."""

    def __init__(self, file, why):
        super().__init__(f"{file}: {why}")


def work(arrays, what, value=0):
    """Done in a process of the crew."""
    if what == "write":
        arrays["pixels"][:] = value
        arrays["flags"][:] = (True, False, value > 7)
        return os.getpid()
    if what == "raise":
        raise TileSetError("a tile is bad", id=7, slide="s1")
    if what == "odd":
        raise Odd("tile.png", "why")
    if what == "answer":
        return lambda: None
    if what == "sleep":
        time.sleep(value)
    if what == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    return os.environ["OMP_NUM_THREADS"]


@pytest.fixture
def crew():
    made = Crew(work, Shelf(LAYOUT, 3, shared=True))
    yield made
    made.close()


def children():
    return [p for p in psutil.Process().children() if "crew" in " ".join(p.cmdline())]


def test_arrays_are_aligned_do_not_overlap_and_keep_what_was_written():
    shelf = Shelf(LAYOUT, 3)
    sets = [shelf.arrays(place) for place in range(3)]
    for place, arrays in enumerate(sets):
        assert {n: (a.shape, a.dtype) for n, a in arrays.items()} == {
            n: (shape, np.dtype(dtype)) for n, (shape, dtype) in LAYOUT.items()
        }
        assert all(a.ctypes.data % 64 == 0 for a in arrays.values())
        for name, array in arrays.items():
            array[...] = place + len(name)
    for place, arrays in enumerate(sets):
        assert all((shelf.arrays(place)[n] == a).all() for n, a in arrays.items())
        assert (arrays["pixels"] == place + 6).all()


def test_a_place_that_is_lent_is_free_when_nothing_looks_at_it():
    shelf = Shelf(LAYOUT, 1, lent=1)
    lent = shelf.lend(shelf.take())
    lent["pixels"][:] = 3
    row = lent["pixels"].reshape(-1)[2:4]
    del lent
    gc.collect()
    with pytest.raises(RuntimeError, match="all 1 places are taken"):
        shelf.take()
    assert row.tolist() == [3, 3]
    del row
    gc.collect()
    assert shelf.take() == 0


def test_who_keeps_many_sets_is_given_copies():
    shelf, kept = Shelf(LAYOUT, 3, lent=2), []
    for value in range(20):
        place = shelf.take()
        shelf.arrays(place)["pixels"][:] = value
        kept.append(shelf.lend(place))
    assert [int(k["pixels"][0, 0]) for k in kept] == list(range(20))
    del kept[:2]
    gc.collect()
    assert len({shelf.take(), shelf.take(), shelf.take()}) == 3


def test_processes_fill_what_this_one_sees_as_many_as_ask(crew):
    assert not children()
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda n: crew.do(n % 3, "write", n), range(30)))
    assert 1 <= len(set(found)) <= 3
    assert {p.pid for p in children()} >= set(found)
    assert os.getpid() not in found
    assert crew.do(1, "write", 5) in found
    arrays = crew._shelf.arrays(1)
    assert (arrays["pixels"] == 5).all()
    assert arrays["flags"].tolist() == [True, False, False]
    assert crew.do(0, "threads") == "1"


def test_errors_are_raised_here_as_they_are_and_say_where(crew):
    with pytest.raises(TileSetError, match=r"^a tile is bad") as caught:
        crew.do(0, "raise")
    assert (caught.value.id, caught.value.slide) == (7, "s1")
    assert "in work" in caught.value.__notes__[0]
    with pytest.raises(RuntimeError, match=r"an answer that cannot be sent: <function"):
        crew.do(0, "answer")
    with pytest.raises(RuntimeError, match=r"an answer that cannot be sent: Odd\('tile.png: why'\)"):
        crew.do(0, "odd")
    first = crew.do(0, "write", 1)
    assert crew.do(0, "write", 2) == first, "an error costs no process"
    assert len(children()) == 1


def test_a_process_that_dies_is_an_error_and_the_next_task_has_another(crew):
    before = crew.do(0, "write", 1)
    with pytest.raises(CrewError, match=r"ended by signal 9 \(SIGKILL\): out of memory, or a crash in a codec"):
        crew.do(0, "die")
    assert crew.do(0, "write", 2) != before


def test_one_that_died_idle_costs_nobody_a_task(crew):
    before = crew.do(0, "write", 1)
    os.kill(before, signal.SIGKILL)
    time.sleep(0.2)
    assert crew.do(0, "write", 2) != before


def test_told_to_end_with_all_of_a_job_they_serve_who_asks_until_that_ends(crew):
    """Slurm and systemd tell every process of a job; the run wants a few batches more before it saves."""
    before = crew.do(0, "write", 1)
    os.kill(before, signal.SIGTERM)
    time.sleep(0.2)
    assert crew.do(0, "write", 2) == before


def test_places_that_come_back_in_the_midst_of_anything_block_nothing():
    """Sets in cycles are given back by the garbage collector, which from Python 3.12 on may run between any two lines:
    a lock that is held there would be waited for by its own thread."""
    shelf, ended = Shelf({"x": ((4,), "int32")}, 40, lent=8), []

    def keep_taking():
        for _ in range(4000):
            holder = [shelf.lend(shelf.take())]
            holder.append(holder)
        ended.append(True)

    threads = [threading.Thread(target=keep_taking, daemon=True) for _ in range(4)]
    before = gc.get_threshold()
    gc.set_threshold(20)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    finally:
        gc.set_threshold(*before)
    assert len(ended) == 4


def test_work_that_does_not_reach_the_process_is_said_to_whoever_asks():
    found = Crew(work, Shelf(LAYOUT, 1, shared=True))
    found._work = b"not a pickle"
    with pytest.raises(RuntimeError, match="the work did not reach the process"):
        found.do(0, "write")
    found.close()
    with pytest.raises(RuntimeError, match="the crew is closed"):
        found.do(0, "write")


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="counts open files where the system lists them")
def test_closed_it_leaves_no_process_and_no_file():
    gc.collect()
    files = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        made = Crew(work, Shelf(LAYOUT, 2, shared=True))
        made.do(0, "write", 1)
        made.close()
        del made
    gc.collect()
    assert not children()
    assert len(os.listdir("/proc/self/fd")) == files


def test_processes_end_with_the_one_that_started_them():
    """Killed in the middle of a task, which would go on for long."""
    script = """
import threading, time
from input_pipeline.crew import Crew, Shelf
from tests.input_pipeline.test_crew import LAYOUT, work
crew = Crew(work, Shelf(LAYOUT, 2, shared=True))
print(crew.do(0, "write", 1), flush=True)
threading.Thread(target=crew.do, args=(1, "sleep", 300), daemon=True).start()
time.sleep(300)
"""
    with subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True) as parent:
        child = psutil.Process(int(parent.stdout.readline()))
        time.sleep(0.3)
        parent.kill()
    psutil.wait_procs([child], timeout=10)
    assert not child.is_running()


def test_asked_what_they_do_they_say_it():
    script = """
import threading, time
from input_pipeline.crew import Crew, Shelf
from tests.input_pipeline.test_crew import LAYOUT, work
crew = Crew(work, Shelf(LAYOUT, 1, shared=True))
crew.do(0, "write", 1)
threading.Timer(0.3, crew.dump).start()
crew.do(0, "sleep", 1)
crew.close()
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    assert "in work" in done.stderr
