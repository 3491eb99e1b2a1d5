"""`mfl sweep`: the runs that sweep() of a config lists, one folder each, here or on Slurm; run again, it goes on.

A run is trained in a process of its own, so that one which fails or is killed stops no other.
"""

import csv
import hashlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from input_pipeline.files import only_one, whole
from mfl_jax import config as configs
from mfl_jax import data, metrics, train, trained
from mfl_jax.process import DEVICES
from mfl_jax.trained import RunError

TRAIN = "import sys; from mfl_jax.cli import command; sys.exit(command())"
LOG_LINES = 3
ONE_THREAD = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"


@dataclass(frozen=True)
class Job:
    name: str  # of the folder
    config: str  # as mfl train takes it
    workdir: Path

    @property
    def log(self) -> Path:
        return self.workdir / "log.txt"


Ended = Iterator[tuple[Job, str]]  # runs as they end, with what went wrong ('' where nothing did)
Submit = Callable[[Sequence[Job]], Ended]


def plan(spec: str, workdir: Path) -> list[Job]:
    """Every run of the sweep; each config is loaded now, so that a word which does not exist is said before any run."""
    path, _, given = spec.partition(":")
    module = configs.module(path)
    if not hasattr(module, "sweep"):
        raise ValueError(f"{path} has no function sweep(), which yields what follows the colon, one text a run")
    jobs: dict[str, Job] = {}
    for entry in module.sweep():
        full = ",".join(part for part in (given, entry) if part)
        try:
            configs.load(f"{path}:{full}")
        except ValueError as error:
            raise ValueError(f"the run {entry!r} of the sweep cannot be: {error}") from error
        name = slug(entry)
        if name in jobs:
            raise ValueError(f"sweep() of {path} yields {entry!r} twice")
        jobs[name] = Job(name, f"{path}:{full}", workdir / name)
    if not jobs:
        raise ValueError(f"sweep() of {path} yields nothing")
    return list(jobs.values())


def slug(entry: str) -> str:
    """The name of a folder: the entry itself where it can be one."""
    if not entry:
        return "base"
    plain = re.sub(r"[^A-Za-z0-9._=,+-]+", "_", entry).strip("._")
    if plain == entry and len(plain) <= 80:
        return plain
    return f"{plain[:60]}-{hashlib.sha256(entry.encode()).hexdigest()[:8]}"


def steps(job: Job) -> tuple[int, int]:
    """(step of the newest checkpoint, steps in all); zeros where the run has not begun.

    ValueError where what lies in the folder was started with another config, as mfl train has it.
    """
    try:
        config, facts = trained.read_run(job.workdir)
    except RunError:
        return 0, 0
    train.check_unchanged(configs.load(job.config), job.workdir)
    total = data.total_steps(configs.Reading(config).total, config.data.batch, facts.examples)
    return max((int(p.name) for p in (job.workdir / "checkpoints").iterdir() if p.name.isdigit()), default=0), total


def standing(job: Job) -> str:
    try:
        step, total = steps(job)
    except ValueError:
        return "changed "
    return "waiting " if not total else "done    " if step >= total else f"{step}/{total}"


def run(jobs: Sequence[Job], workdir: Path, submit: Submit, *, say: Callable[[str], None]) -> dict[str, str]:
    """Trains what is not finished. -> failed runs and why; sweep.csv says how each stands, and is kept up to date."""
    faults: dict[str, str] = {}
    open_jobs = []
    with only_one(workdir):
        for job in jobs:
            try:
                step, total = steps(job)
            except ValueError as error:
                faults[job.name] = str(error)
                continue
            if total and step >= total:
                say(f"{job.name}: done before, {total} steps")
            else:
                open_jobs.append(job)
        write_table(jobs, workdir, faults)
        say(f"{len(open_jobs)} of {len(jobs)} runs to train; each has a log.txt in its folder")
        for job, fault in submit(open_jobs):
            fault = fault or _unfinished(job)
            faults |= {job.name: fault} if fault else {}
            write_table(jobs, workdir, faults)
            say(f"{job.name}: {'failed: ' + fault if fault else 'done'}")
    return faults


def _unfinished(job: Job) -> str:
    step, total = steps(job)
    return "" if total and step >= total else f"it stopped at step {step} of {total or 'those it was to take'}"


def local(jobs: Sequence[Job], side_by_side: int = 1, environment: Mapping[str, str] = {}) -> Ended:
    """So many at a time, each then with one thread of its own: two runs on two cores take two thirds of the time that
    they take one after the other. On an accelerator they share its memory, and no run takes more than it needs."""
    waiting, running = list(jobs), dict[Job, subprocess.Popen]()
    limit = dict(environment)
    if side_by_side > 1:
        limit |= {
            DEVICES: "1",
            "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {ONE_THREAD}",
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        }
    try:
        while waiting or running:
            while waiting and len(running) < side_by_side:
                job = waiting.pop(0)
                running[job] = _start(job, limit)
            for job in [job for job, process in running.items() if process.poll() is not None]:
                yield job, _fault(job, running.pop(job).returncode)
            time.sleep(0.1)
    finally:
        for process in running.values():
            process.terminate()  # it saves, and ends
        for process in running.values():
            process.wait()


def train_apart(job: Job) -> str:
    """mfl train in a process of its own, its words in log.txt. -> '' or the last of them; a signal is handed on."""
    return next(iter(local([job])))[1]


def _start(job: Job, environment: Mapping[str, str]) -> subprocess.Popen:
    job.workdir.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-c", TRAIN, "train", "--config", job.config, "--workdir", str(job.workdir), "--quiet"]
    with open(job.log, "a", encoding="utf-8") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, **environment})


def _fault(job: Job, code: int) -> str:
    if not code:
        return ""
    lines = [line for line in job.log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return f"exit status {code}: {' | '.join(lines[-LOG_LINES:])} (all of it: {job.log})"


def slurm(workdir: Path, options: str = "", cluster: str | None = None) -> Submit:
    """One job a run through submitit, all submitted at once and waited for; `options` as 'timeout_min=720,...'."""
    executor = make_executor(workdir / "slurm", options, cluster)

    def submit(jobs: Sequence[Job]) -> Ended:
        if not jobs:
            return
        with executor.batch():
            submitted = [(job, executor.submit(train_apart, job)) for job in jobs]
        for job, ticket in submitted:
            try:
                fault = ticket.result()
            except Exception as error:  # whatever Slurm did to it: the others go on
                fault = (
                    f"job {ticket.job_id}: {type(error).__name__}: {str(error).splitlines()[-1] if str(error) else ''}"
                )
            yield job, fault

    return submit


def make_executor(folder: Path, options: str, cluster: str | None = None) -> Any:
    try:
        import submitit
    except ImportError as error:
        raise ValueError("--runner slurm needs submitit: pip install 'mfl_jax[slurm]'") from error
    pairs = [part.partition("=") for part in options.split(",") if part.strip()]
    if wrong := [name for name, equals, _ in pairs if not equals]:
        raise ValueError(f"--slurm is name=value,name=value; {wrong[0]!r} has no value")
    executor = submitit.AutoExecutor(folder=folder, cluster=cluster)
    executor.update_parameters(**{name.strip(): int(v) if v.strip().isdigit() else v.strip() for name, _, v in pairs})
    return executor


def write_table(jobs: Sequence[Job], workdir: Path, faults: Mapping[str, str]) -> None:
    """sweep.csv: how every run stands, and the last value of each of its metrics."""
    rows = []
    for job in jobs:
        row: dict[str, Any] = {"run": job.name, "config": job.config, "state": "", "step": "", "total": ""}
        if job.name in faults:
            row |= {"state": "failed", "why": faults[job.name]}
        else:
            step, total = steps(job)
            state = "waiting" if not total else "done" if step >= total else "begun"
            row |= {"state": state, "step": step, "total": total}
        rows.append(row | _last(job.workdir / "metrics.jsonl"))
    names = dict.fromkeys(("run", "config", "state", "step", "total", "why", *(name for row in rows for name in row)))
    with whole(workdir / "sweep.csv") as part, open(part, "w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, list(names), restval="")
        table.writeheader()
        table.writerows(rows)


def _last(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for row in metrics.read(path) if path.is_file() else []:
        found |= {} if "note" in row else {name: value for name, value in row.items() if name != "step"}
    return found
