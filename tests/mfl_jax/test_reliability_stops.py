"""A SIGTERM that comes in the midst of an evaluation, a refresh or a save, and at no other instant: the run ends well.

The signal is sent from within; the run has more steps than it can do, so that it ends for that reason or not at all.
"""

from pathlib import Path

import pytest

from mfl_jax import metrics
from tests.mfl_jax import processes

pytestmark = pytest.mark.slow
AT, MORE = 4, 3  # the step of the signal; how far the run then goes on
RUN = """
import hashlib, os, signal, sys
from dataclasses import replace
from pathlib import Path
from mfl_jax import checkpoint, methods, preempt, train
from mfl_jax.methods.base import Refresh
from tests.mfl_jax import synthetic, toy
workdir, where, victim, stop_at = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]) or None
preempt.initialize()
import jax

def tell(what):
    if what == where and jax.process_index() == victim and not (workdir / "told").exists():
        (workdir / "told").write_text(what)
        os.kill(os.getpid(), signal.SIGTERM)

def refreshed(state, survey):
    if int(state.step) == 4:
        tell("refresh")
        embed = lambda params, extra, batch: {"he": batch["he"][:, 0, 0]}
        assert len(survey(embed, state.params, state.extra)) == 64
    return state.extra, {"refreshed": 1}

def shown(everything):
    for batch in everything:
        tell("survey")
        yield batch

class Evaluator:
    def due(self, step, end):
        return step == 4
    def __call__(self, method, state):
        tell("eval")
        return {"probe/auc": 0.5}

write_digests = checkpoint.write_digests
def telling(folder):
    if folder.name == "4.part":
        tell("save")
    write_digests(folder)

checkpoint.write_digests = telling
methods.METHODS["toy"] = lambda *made: replace(toy.make(*made), refresh=Refresh(1, 0, refreshed))
train.evaluators.make = lambda *of: (Evaluator(),)
config = toy.config(steps=1_000_000, every=4, log_every=1)
facts = synthetic.facts(config.data)
source = synthetic.Source(facts, hosts=(jax.process_index(), jax.process_count()))
everything = source.everything
source.everything = lambda: shown(everything())
state = train.train(config, workdir, source=source, facts=facts, progress=False, stop_at=stop_at)
digest = hashlib.sha256()
for leaf in jax.tree.leaves(jax.device_get(state)):
    digest.update(leaf.tobytes())
print("ended", int(state.step), digest.hexdigest(), flush=True)
"""


def completed(workdir: Path, where: str, count: int, *, stop_at: int = 0) -> list[str]:
    """What each process says at the end; the victim is the last, and for a save the one that writes."""
    victim = 0 if where == "save" else count - 1
    return processes.completed(RUN, (workdir, where, victim, stop_at), count, MFL_HEARTBEAT_SECONDS="60")


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("where", ["eval", "refresh", "survey", "save"])
def test_told_to_stop_in_the_midst_of_it_all_end_well_and_go_on_as_if_never_told(where, count, tmp_path):
    workdir = tmp_path / "run"
    workdir.mkdir()
    (said,) = set(completed(workdir, where, count))
    assert (workdir / "told").read_text() == where
    stopped = int(said.split()[1])
    assert stopped >= AT
    folder = workdir / "checkpoints"
    assert max(int(path.name) for path in folder.iterdir()) == stopped  # every name is a number: nothing half-written
    rows = [row for row in metrics.read(workdir / "metrics.jsonl") if "note" not in row]
    assert [row["step"] for row in rows if "loss" in row] == list(range(stopped))
    assert [row["step"] for row in rows if "probe/auc" in row] == [AT]

    (ended,) = set(completed(workdir, "nowhere", count, stop_at=stopped + MORE))
    (whole,) = set(completed(tmp_path / "whole", "nowhere", count, stop_at=stopped + MORE))
    assert ended == whole
    assert ended.startswith(f"ended {stopped + MORE} ")
    rows = metrics.read(workdir / "metrics.jsonl")
    assert [row["step"] for row in rows if "probe/auc" in row] == [AT]
