"""Processes that are told to stop, or are killed, at instants drawn at random: the same command goes on."""

import contextlib
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mfl_jax import metrics
from tests.mfl_jax import processes as processes_of

pytestmark = pytest.mark.slow
STEPS, STOPS, KILLS = 1000, 20, 50  # a stop takes 20 steps to be heard
RUN = """
import hashlib, os, sys, time
from pathlib import Path
from mfl_jax import methods, preempt, train
from tests.mfl_jax import synthetic, toy
methods.METHODS["toy"] = toy.make
preempt.initialize()
import jax
config = toy.config(steps=1000, every=5)
def slow(step, batch):
    time.sleep(.03)
    return batch
facts = synthetic.facts(config.data)
source = synthetic.Source(facts, change=slow, hosts=(jax.process_index(), jax.process_count()))
state = train.train(config, Path(sys.argv[1]), source=source, facts=facts, progress=False)
digest = hashlib.sha256()
for leaf in jax.tree.leaves(jax.device_get(state)):
    digest.update(leaf.tobytes())
print("ended", int(state.step), digest.hexdigest(), flush=True)
"""


@contextlib.contextmanager
def running(workdir: Path, count: int) -> Iterator[list[subprocess.Popen]]:
    """The processes of a run; they are gone afterwards, whatever happens."""
    processes = start(workdir, count)
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def start(workdir: Path, count: int) -> list[subprocess.Popen]:
    return processes_of.start(RUN, (workdir,), count, MFL_HEARTBEAT_SECONDS="10")


def end(processes: list[subprocess.Popen], timeout: float = 240) -> list[tuple[int, str, str]]:
    """(exit status, last line, errors) of each."""
    told = [process.communicate(timeout=timeout) for process in processes]
    lines = [(out.strip().splitlines() or [""])[-1] for out, _ in told]  # above it, JAX says who is connected
    return [(p.returncode, line, text[1]) for p, line, text in zip(processes, lines, told, strict=True)]


def completed(workdir: Path, count: int = 1) -> list[tuple[int, str, str]]:
    with running(workdir, count) as processes:
        return end(processes)


def lines(workdir: Path) -> int:
    path = workdir / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def reached(workdir: Path, count: int) -> None:
    """Wait until the run has written so many lines."""
    limit = time.time() + 120
    while lines(workdir) < count:
        assert time.time() < limit, "the run does not get going"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> dict[int, str]:
    found = {}
    for count in (1, 2):
        ended = completed(tmp_path_factory.mktemp(f"whole{count}"), count)
        assert [status for status, _, _ in ended] == [0] * count, ended
        assert len({out for _, out, _ in ended}) == 1
        found[count] = ended[0][1]
        assert found[count].startswith(f"ended {STEPS} ")
    return found


def whole(workdir: Path) -> list[int]:
    """The steps that are saved; there is nothing half-written beside them."""
    folder = workdir / "checkpoints"
    names = [path.name for path in folder.iterdir()] if folder.exists() else []
    assert all(name.isdigit() for name in names), names
    return sorted(map(int, names))


@pytest.mark.parametrize("count", [1, 2])
def test_told_to_stop_all_exit_well_with_a_checkpoint_and_go_on(uninterrupted, count, tmp_path):
    draw = random.Random(count)
    for _ in range(STOPS):
        with running(tmp_path, count) as processes:
            reached(tmp_path, lines(tmp_path) + draw.randint(1, 6))
            time.sleep(draw.uniform(0, 0.1))
            processes[draw.randrange(count)].send_signal(signal.SIGTERM)
            ended = end(processes)
        assert [status for status, _, _ in ended] == [0] * count, ended
        steps = {out for _, out, _ in ended}
        assert len(steps) == 1
        assert whole(tmp_path)[-1] == int(steps.pop().split()[1]) < STEPS
    assert completed(tmp_path, count)[0][1] == uninterrupted[count]


def test_told_to_stop_while_it_compiles_it_exits_well(tmp_path):
    with running(tmp_path, 1) as processes:
        limit = time.time() + 60
        while not (tmp_path / "lock.json").exists() and time.time() < limit:
            time.sleep(0.01)
        processes[0].send_signal(signal.SIGTERM)
        ((status, out, errors),) = end(processes)
    assert status == 0, errors
    assert whole(tmp_path) == [int(out.split()[1])]


def test_killed_at_any_instant_the_same_command_goes_on(uninterrupted, tmp_path):
    """Half of them while it trains and saves, half while it starts, restores or compiles: within 4 s, or as soon as it
    has made its next step."""
    draw = random.Random(0)
    for kill in range(KILLS):
        before, until = lines(tmp_path), time.time() + draw.uniform(0, 4)
        with running(tmp_path, 1) as processes:
            if kill % 2:
                reached(tmp_path, before + draw.randint(1, 4))
                time.sleep(draw.uniform(0, 0.2))
            while kill % 2 == 0 and time.time() < until and lines(tmp_path) <= before:
                time.sleep(0.01)
            assert processes[0].poll() is None, "it ended before it could be killed"
        if (tmp_path / "metrics.jsonl").exists():
            metrics.read(tmp_path / "metrics.jsonl")
    ((status, out, errors),) = completed(tmp_path)
    assert (status, out) == (0, uninterrupted[1]), errors
    assert whole(tmp_path)[-1] == STEPS
    assert not (tmp_path / "lock.json").exists()


@pytest.mark.parametrize("victim", [0, 1])
def test_one_of_two_killed_the_other_ends_with_an_error_and_both_go_on(uninterrupted, victim, tmp_path):
    with running(tmp_path, 2) as processes:
        reached(tmp_path, 8)
        processes[victim].kill()
        began = time.time()
        status, _, _ = end(processes)[1 - victim]
    assert status not in (0, None)
    assert time.time() - began < 60
    rows = metrics.read(tmp_path / "metrics.jsonl")
    assert len(rows) >= 8
    assert [row["step"] for row in rows] == list(range(len(rows)))
    ended = completed(tmp_path, 2)
    assert [(status, out) for status, out, _ in ended] == [(0, uninterrupted[2])] * 2, ended
