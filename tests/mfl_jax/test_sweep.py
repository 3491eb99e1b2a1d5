"""A sweep goes on where it was, names what failed, and runs nothing that is finished."""

import contextlib
import csv
import sys
import types
from pathlib import Path
from typing import ClassVar

import pytest

from mfl_jax import cli, sweep
from mfl_jax import config as configs
from tests.mfl_jax import synthetic, toy

pytestmark = pytest.mark.usefixtures("toy_method", "compile_cache")
CONFIG = """
from tests.mfl_jax import toy

def get_config(arg=""):
    if arg not in ("", "more"):
        raise ValueError(f"no word {arg!r}")
    return toy.config(steps=4 if arg else 2)

def sweep():
    yield ""
    yield "more"
    yield "toy.noise=0.5,seed=3"
"""
NAMES = ["base", "more", "toy.noise=0.5,seed=3"]


@pytest.fixture(name="spec")
def spec_fixture(tmp_path) -> str:
    (tmp_path / "toys.py").write_text(CONFIG)
    return str(tmp_path / "toys.py")


class Runner:
    """Trains in this process; `fails` names runs that break, `stops` where a run ends early."""

    def __init__(self, fails=(), stops=None):
        self.fails, self.stops, self.ran = fails, stops or {}, []

    def __call__(self, jobs):
        for job in jobs:
            self.ran.append(job.name)
            if job.name in self.fails:
                yield job, "exit status 1: no power"
            else:
                toy.run(configs.load(job.config), job.workdir, stop_at=self.stops.get(job.name))
                yield job, ""


def table(workdir: Path) -> dict[str, dict[str, str]]:
    with open(workdir / "sweep.csv", newline="") as file:
        return {row["run"]: row for row in csv.DictReader(file)}


def test_all_runs_are_done_once_and_the_table_has_their_last_metrics(spec, tmp_path):
    jobs, told, first = sweep.plan(spec, tmp_path / "out"), [], Runner()
    assert [job.name for job in jobs] == NAMES
    assert [sweep.standing(job).strip() for job in jobs] == ["waiting"] * 3
    assert sweep.run(jobs, tmp_path / "out", first, say=told.append) == {}
    assert first.ran == NAMES
    rows = table(tmp_path / "out")
    assert [(r["state"], r["step"], r["total"]) for r in rows.values()] == [
        ("done", "2", "2"),
        ("done", "4", "4"),
        ("done", "2", "2"),
    ]
    last = (tmp_path / "out" / "more" / "metrics.jsonl").read_text().splitlines()[-1]
    assert f'"loss": {rows["more"]["loss"]}' in last
    assert rows["base"]["loss"] != rows["toy.noise=0.5,seed=3"]["loss"]

    again = Runner()
    assert sweep.run(jobs, tmp_path / "out", again, say=told.append) == {}
    assert again.ran == []
    assert told[-1] == "0 of 3 runs to train; each has a log.txt in its folder"
    assert told[-4:-1] == [
        "base: done before, 2 steps",
        "more: done before, 4 steps",
        f"{NAMES[2]}: done before, 2 steps",
    ]


def test_one_that_fails_stops_no_other_and_alone_is_done_again(spec, tmp_path):
    jobs, told = sweep.plan(spec, tmp_path / "out"), []
    failed = sweep.run(jobs, tmp_path / "out", Runner(fails=["base"], stops={"more": 1}), say=told.append)
    assert failed == {"base": "exit status 1: no power", "more": "it stopped at step 1 of 4"}
    rows = table(tmp_path / "out")
    assert [row["state"] for row in rows.values()] == ["failed", "failed", "done"]
    assert rows["base"]["why"] == "exit status 1: no power"
    assert "base: failed: exit status 1: no power" in told
    again = Runner()
    assert sweep.run(jobs, tmp_path / "out", again, say=told.append) == {}
    assert again.ran == ["base", "more"]
    assert [row["state"] for row in table(tmp_path / "out").values()] == ["done"] * 3


def test_a_run_of_another_config_in_the_folder_is_no_finished_one(spec, tmp_path):
    toy.run(toy.config(steps=2, optim__lr=0.5), tmp_path / "out" / "base")
    jobs, runner = sweep.plan(spec, tmp_path / "out"), Runner()
    assert [sweep.standing(job).strip() for job in jobs] == ["changed", "waiting", "waiting"]
    failed = sweep.run(jobs, tmp_path / "out", runner, say=lambda line: None)
    assert "optim.lr: 0.5 -> 0.01" in failed["base"]
    assert runner.ran == NAMES[1:]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def get_config(arg=''): ...", "no function sweep"),
        (CONFIG.replace('yield "more"', 'yield "mroe"'), "the run 'mroe' of the sweep cannot be: no word 'mroe'"),
        (CONFIG.replace('yield "more"', 'yield "toy.noice=1"'), "cannot be: .*toy.noice.*toy.noise"),
        (CONFIG.replace('yield "more"', 'yield ""'), "yields '' twice"),
    ],
)
def test_what_cannot_be_is_said_before_any_run(text, message, tmp_path):
    (tmp_path / "toys.py").write_text(text)
    with pytest.raises(ValueError, match=message):
        sweep.plan(str(tmp_path / "toys.py"), tmp_path / "out")


@pytest.mark.parametrize("path", sorted(synthetic.CONFIGS.glob("*.py")), ids=lambda path: path.stem)
def test_every_sweep_of_a_config_can_be(path):
    if path.stem in ("__init__", "common"):
        return
    jobs = sweep.plan(f"{path}:phantom", Path("nowhere"))
    assert len(jobs) > 1
    assert len({configs.to_json(configs.load(job.config)) for job in jobs}) == len(jobs), "two runs are the same"


def test_a_name_is_the_entry_where_a_folder_can_have_it():
    assert sweep.slug("seed=3,mfl.temperature=0.05") == "seed=3,mfl.temperature=0.05"
    odd = [sweep.slug(text) for text in ("views.he='a/b'", "views.he='a|b'", "..", "x" * 200)]
    assert len(set(odd)) == 4
    assert all(0 < len(name) <= 80 and not set(name) & set("/\\'| ") and name[0] != "." for name in odd)


def test_a_dry_run_says_what_it_would_do_and_does_nothing(spec, tmp_path, capsys):
    out = tmp_path / "out"
    assert cli.main(["sweep", "--config", spec, "--workdir", str(out), "--dry-run"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed] == ["waiting"] * 3
    assert printed[1].endswith(f"mfl train --config {spec}:more --workdir {out / 'more'}")
    assert not out.exists()


def test_a_run_in_a_process_of_its_own_fails_with_its_last_words(spec, tmp_path, capsys):
    """Its tile set is nowhere, so it ends with status 2."""
    Path(spec).write_text(CONFIG.replace('    yield "more"\n    yield "toy.noise=0.5,seed=3"\n', ""))
    out = tmp_path / "out"
    assert cli.main(["sweep", "--config", spec, "--workdir", str(out)]) == 1
    printed = capsys.readouterr()
    assert "mfl sweep: base failed: exit status 2: " in printed.err
    assert "nowhere is not a finished tile set" in printed.err
    assert "0 of 1 runs are done" in printed.out
    assert "nowhere is not a finished tile set" in (out / "base" / "log.txt").read_text()


def test_a_signal_is_handed_on_and_waited_for(spec, tmp_path, monkeypatch):
    """So that the run can save before the sweep is gone."""
    said = []

    class Process:
        def __init__(self, command, stdout, stderr, env):
            said.append(command[3:])

        def poll(self):
            said.append("poll")
            raise KeyboardInterrupt

        def wait(self):
            said.append("wait")

        def terminate(self):
            said.append("terminate")

    monkeypatch.setattr(sweep.subprocess, "Popen", Process)
    jobs = sweep.plan(spec, tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        sweep.run(jobs, tmp_path / "out", sweep.local, say=lambda line: None)
    command = ["train", "--config", f"{spec}:", "--workdir", str(tmp_path / "out" / "base"), "--quiet"]
    assert said == [command, "poll", "terminate", "wait"]


def fake_submitit(monkeypatch) -> dict:
    seen: dict = {"jobs": []}

    class Ticket:
        job_id = "17"

        def __init__(self, function, job):
            self.function, self.job = function, job

        def result(self):
            if self.job.name == "more":
                raise RuntimeError("the node\nwas lost")
            return self.function(self.job)

    class Executor:
        def __init__(self, folder, cluster=None):
            seen["folder"] = folder

        def update_parameters(self, **given):
            seen["given"] = given

        def batch(self):
            return contextlib.nullcontext()

        def submit(self, function, job):
            seen["jobs"].append(job.name)
            return Ticket(function, job)

    monkeypatch.setitem(sys.modules, "submitit", types.SimpleNamespace(AutoExecutor=Executor))
    return seen


def test_slurm_gets_every_run_at_once_and_a_lost_job_stops_no_other(spec, tmp_path, monkeypatch):
    seen = fake_submitit(monkeypatch)

    def train_here(job):
        assert seen["jobs"] == NAMES, "submitted one by one"
        toy.run(configs.load(job.config), job.workdir)
        return ""

    monkeypatch.setattr(sweep, "train_apart", train_here)
    submit = sweep.slurm(tmp_path, "slurm_partition=gpu, timeout_min=720")
    failed = sweep.run(sweep.plan(spec, tmp_path), tmp_path, submit, say=lambda line: None)
    assert failed == {"more": "job 17: RuntimeError: was lost"}
    assert seen["given"] == {"slurm_partition": "gpu", "timeout_min": 720}
    assert seen["folder"] == tmp_path / "slurm"
    with pytest.raises(ValueError, match="'timeout_min' has no value"):
        sweep.slurm(tmp_path, "timeout_min")


def test_without_submitit_the_way_out_is_said(spec, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "submitit", None)
    assert cli.main(["sweep", "--config", spec, "--workdir", str(tmp_path / "out"), "--runner", "slurm"]) == 2
    assert "pip install 'mfl_jax[slurm]'" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # it leaves its own logs open
@pytest.mark.parametrize("cluster", ["debug", pytest.param("local", marks=pytest.mark.slow)])
def test_with_submitit_itself(cluster, spec, tmp_path):
    pytest.importorskip("submitit")
    submit = sweep.slurm(tmp_path, cluster=cluster)
    jobs = sweep.plan(spec, tmp_path)[:1]
    (ended,) = submit(jobs)
    assert ended[0] == jobs[0]
    assert "nowhere is not a finished tile set" in ended[1]


class Sleeper:
    """As a process that runs for some polls."""

    alive: ClassVar[list["Sleeper"]] = []

    def __init__(self, polls: int, code: int):
        self.polls, self.code, self.returncode, self.told = polls, code, None, False
        self.alive.append(self)

    def poll(self):
        self.polls -= 1
        if self.polls <= 0 and self.returncode is None:
            self.returncode = self.code
            self.alive.remove(self)
        return self.returncode

    def terminate(self):
        self.told = True

    def wait(self):
        assert self.told


def test_side_by_side_runs_no_more_than_asked_and_names_the_one_that_failed(tmp_path, monkeypatch):
    lengths, most, environments = {"a": 3, "b": 1, "c": 2, "d": 1, "e": 1}, [], []

    def start(job, environment):
        job.workdir.mkdir(parents=True)
        job.log.write_text("it was so\n")
        environments.append(environment)
        started = Sleeper(lengths[job.name], 7 if job.name == "c" else 0)
        most.append(len(Sleeper.alive))
        return started

    monkeypatch.setattr(sweep, "_start", start)
    monkeypatch.setattr(sweep.time, "sleep", lambda seconds: None)
    jobs = [sweep.Job(name, "x.py", tmp_path / name) for name in "abcd"]
    ended = {job.name: fault for job, fault in sweep.local(jobs, 2, {"CACHE": "here"})}
    assert set(ended) == set("abcd")
    assert max(most) == 2
    assert [name for name, fault in ended.items() if fault] == ["c"]
    assert "exit status 7: it was so" in ended["c"]
    assert all("intra_op_parallelism_threads=1" in e["XLA_FLAGS"] for e in environments)
    assert all((e["CACHE"], e["XLA_PYTHON_CLIENT_PREALLOCATE"]) == ("here", "false") for e in environments)
    environments.clear()
    assert len(list(sweep.local([sweep.Job("e", "x.py", tmp_path / "e")], 1, {"CACHE": "here"}))) == 1
    assert environments == [{"CACHE": "here"}]  # alone, a run has the machine as it is


def test_who_stops_the_sweep_stops_its_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "_start", lambda job, environment: Sleeper(1 if job.name == "a" else 10**6, 0))
    ended = sweep.local([sweep.Job(name, "x.py", tmp_path / name) for name in "abc"], 3)
    assert next(ended)[0].name == "a"
    ended.close()
    assert [sleeper.told for sleeper in Sleeper.alive] == [True, True]
    Sleeper.alive.clear()
