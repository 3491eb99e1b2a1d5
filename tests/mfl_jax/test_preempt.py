"""One run a folder; a SIGTERM is heard. With processes that are really killed: test_killed.py, in the slow tier."""

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from mfl_jax import preempt
from mfl_jax.preempt import WorkdirBusy, locked

ROOT = Path(__file__).parents[2]


def write(workdir: Path, **changes) -> None:
    mine = {"host": socket.gethostname(), "pid": os.getpid(), "started": time.time() - 600, "process": 1.0}
    (workdir / "lock.json").write_text(json.dumps(mine | changes))


def test_a_folder_in_use_is_refused_naming_host_pid_and_age(tmp_path):
    with locked(tmp_path):
        with pytest.raises(WorkdirBusy, match=f"host {socket.gethostname()}, pid {os.getpid()}, since 0 min"):
            locked(tmp_path).__enter__()
        assert (tmp_path / "lock.json").exists()  # the refused one has not taken it away
    assert not (tmp_path / "lock.json").exists()
    with locked(tmp_path):
        pass


def test_the_lock_goes_when_the_run_fails(tmp_path):
    with pytest.raises(KeyError), locked(tmp_path):
        raise KeyError
    assert not (tmp_path / "lock.json").exists()


def gone() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_lock_whose_process_is_gone_is_taken_over(tmp_path, caplog):
    for stale in ({"pid": gone()}, {"pid": os.getpid(), "process": 1.0}):  # the second: its number is in use again
        write(tmp_path, **stale)
        with locked(tmp_path):
            assert json.loads((tmp_path / "lock.json").read_text())["pid"] == os.getpid()
    assert "taking over" in caplog.text


def test_a_lock_of_another_machine_is_never_taken_over(tmp_path):
    write(tmp_path, host="elsewhere", pid=gone())
    with pytest.raises(WorkdirBusy, match=r"host elsewhere, pid \d+, since 10 min.*remove"), locked(tmp_path):
        pass


def test_a_lock_that_cannot_be_read_is_taken_over_once_it_is_old(tmp_path):
    path = tmp_path / "lock.json"
    path.write_text('{"host": ')
    with pytest.raises(WorkdirBusy, match="just now"), locked(tmp_path):
        pass
    os.utime(path, (time.time() - 60, time.time() - 60))
    with locked(tmp_path):
        pass


def try_it(workdir: Path, results, over) -> None:
    try:
        with locked(workdir):
            results.put("in")
            over.wait(60)
    except WorkdirBusy:
        results.put("refused")


def test_of_many_that_find_a_stale_lock_one_gets_it(tmp_path):
    write(tmp_path, pid=gone())
    spawn = multiprocessing.get_context("spawn")
    results, over = spawn.Queue(), spawn.Event()
    processes = [spawn.Process(target=try_it, args=(tmp_path, results, over)) for _ in range(3)]
    for process in processes:
        process.start()
    found = sorted(results.get(timeout=60) for _ in processes)
    over.set()
    for process in processes:
        process.join()
    assert found == ["in", "refused", "refused"]


ASKED = """
import os, signal, sys, time
import jax
if sys.argv[1] == "late":
    jax.devices()  # as in a notebook: jax.distributed cannot start any more
from mfl_jax import preempt
preempt.initialize()
preempt.initialize()
assert jax.distributed.is_initialized() == (sys.argv[1] == "first")
assert not any(preempt.asked_to_stop() for _ in range(3))
os.kill(os.getpid(), signal.SIGTERM)
for _ in range(200):
    if preempt.asked_to_stop():
        break
    time.sleep(.02)
else:
    sys.exit(3)
assert preempt.asked_to_stop()  # and from then on
sys.exit(0)
"""


@pytest.mark.parametrize("when", ["first", "late"])
def test_a_sigterm_is_heard_whether_jax_was_used_before_or_not(when):
    assert subprocess.run([sys.executable, "-c", ASKED, when], cwd=ROOT).returncode == 0


def test_a_handler_of_our_own_needs_the_main_thread(caplog):
    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=preempt._listen)
    thread.start()
    thread.join()
    assert "without a save" in caplog.text
    assert signal.getsignal(signal.SIGTERM) is before
