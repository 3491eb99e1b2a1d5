import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from input_pipeline import pool


def square_or_fail(item: int) -> int:
    if item == 3:
        raise ValueError("three is bad")
    if item == 4:
        return {}["missing"]
    return item * item


def die_on_five(item: int) -> int:
    if item == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return item


def environment(item: int) -> str | None:
    return os.environ.get("OMP_NUM_THREADS")


def say_where_and_sleep(folder: str) -> None:
    Path(folder, str(os.getpid())).touch()
    time.sleep(120)


def work(folder: str) -> None:
    list(pool.run(say_where_and_sleep, [folder] * 6, workers=2, progress=False))


def is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_processes_end_with_the_one_that_started_them(tmp_path, how):
    script = f"from tests.input_pipeline.test_pool import work; work({str(tmp_path)!r})"
    with subprocess.Popen([sys.executable, "-c", script], cwd=Path(__file__).parents[2], stderr=-1) as process:
        wait_for(lambda: len(list(tmp_path.iterdir())) == 2)
        started = [int(p.name) for p in tmp_path.iterdir()]
        assert all(map(is_alive, started))
        process.send_signal(how)
        process.communicate(timeout=20)
    wait_for(lambda: not any(map(is_alive, started)))
    assert len(list(tmp_path.iterdir())) == 2  # nothing of what was queued has been begun


def wait_for(condition, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("workers", [0, 2])
def test_every_item_has_an_outcome_and_errors_say_why(workers):
    outcomes = {o.item: o for o in pool.run(square_or_fail, range(6), workers=workers, progress=False)}
    assert {i: o.value for i, o in outcomes.items() if o.error is None} == {0: 0, 1: 1, 2: 4, 5: 25}
    assert outcomes[3].error == "three is bad"
    assert outcomes[4].error.startswith("KeyError: 'missing' (square_or_fail, line ")


def test_a_process_that_dies_is_blamed_and_the_others_are_done():
    outcomes = {o.item: o for o in pool.run(die_on_five, range(10), workers=2, progress=False)}
    assert sorted(outcomes) == list(range(10))
    assert "died" in outcomes[5].error
    assert all(o.value == i for i, o in outcomes.items() if i != 5)


def test_more_items_than_one_pool_serves(monkeypatch):
    monkeypatch.setattr(pool, "SLIDES_PER_POOL", 2)
    outcomes = list(pool.run(square_or_fail, [0, 1, 2, 5, 6], workers=1, progress=False))
    assert sorted(o.value for o in outcomes) == [0, 1, 4, 25, 36]


def test_processes_use_one_thread_each_and_the_environment_is_put_back(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    outcomes = list(pool.run(environment, [0], workers=1, progress=False))
    assert outcomes[0].value == "1"
    assert "OMP_NUM_THREADS" not in os.environ


@pytest.mark.parametrize(
    ("options", "message"), [({"runner": "cloud"}, "local, beam"), ({"workers": -1}, "0 .this process.")]
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        list(pool.run(square_or_fail, [1], **options))


def test_beam_gives_the_same_outcomes():
    pytest.importorskip("apache_beam", reason="Apache Beam is not installed (extra 'beam')")
    outcomes = {o.item: o for o in pool.run(square_or_fail, [1, 2, 3], runner="beam", progress=False)}
    assert (outcomes[1].value, outcomes[2].value, outcomes[3].error) == (1, 4, "three is bad")
