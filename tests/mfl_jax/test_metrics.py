import json
import sys

import jax.numpy as jnp
import pytest

from mfl_jax.metrics import Metrics, read


def test_lines_are_there_as_soon_as_they_are_written(tmp_path):
    metrics = Metrics(tmp_path)
    metrics.write(3, {"loss": jnp.float32(0.5), "bad": float("nan")})
    metrics.note(3, ids=[1, 2])
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"step": 3, "loss": 0.5, "bad": "nan"},
        {"step": 3, "note": {"ids": [1, 2]}},
    ]
    metrics.close()


def test_half_a_line_of_a_killed_process_spoils_nothing(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    metrics = Metrics(tmp_path)
    metrics.write(2, {"loss": 1})
    metrics.close()
    assert read(path) == [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}]


def test_other_processes_write_files_of_their_own(tmp_path):
    for process in (0, 1):
        metrics = Metrics(tmp_path, process=process)
        metrics.note(process, ids=[process])
        metrics.close()
    assert read(tmp_path / "metrics.jsonl") == [{"step": 0, "note": {"ids": [0]}}]
    assert read(tmp_path / "metrics-1.jsonl") == [{"step": 1, "note": {"ids": [1]}}]


def test_a_writer_is_known_and_installed_or_refused_with_the_way_out(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="tensorboard, wandb"):
        Metrics(tmp_path, ("tensorbord",))
    for name, module in (("tensorboard", "tensorboardX"), ("wandb", "wandb")):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(ValueError, match=f"pip install {module}"):
            Metrics(tmp_path, (name,))


def test_a_writer_gets_what_the_file_gets(tmp_path, monkeypatch):
    class Writer:
        def __init__(self, folder):
            self.seen = Writer.seen = []

        def add_scalar(self, *arguments):
            self.seen.append(arguments)

        def flush(self):
            self.seen.append("flushed")

        def close(self):
            self.seen.append("closed")

    monkeypatch.setitem(sys.modules, "tensorboardX", type(sys)("tensorboardX"))
    sys.modules["tensorboardX"].SummaryWriter = Writer
    metrics = Metrics(tmp_path, ("tensorboard",))
    metrics.write(1, {"loss": 2})
    metrics.close()
    assert Writer.seen == [("loss", 2.0, 1), "flushed", "closed"]


def test_two_folders_of_one_name_are_two_runs_of_wandb_and_one_resumed_is_one(tmp_path, monkeypatch):
    made = []

    class Run:
        def __init__(self, **options):
            self.told = options
            made.append(self)

        def log(self, values, step):
            self.told["logged"] = (step, values)

        def finish(self):
            self.told["finished"] = True

    monkeypatch.setitem(sys.modules, "wandb", type(sys)("wandb"))
    sys.modules["wandb"].init = Run
    for folder in ("a/mfl", "b/mfl", "a/mfl"):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        metrics = Metrics(tmp_path / folder, ("wandb",), {"seed": 1})
        metrics.write(3, {"loss": 2})
        metrics.close()
    first, second, again = (run.told for run in made)
    assert first["id"] == again["id"] != second["id"]
    told = {"name": "mfl", "resume": "allow", "config": {"seed": 1}, "logged": (3, {"loss": 2.0}), "finished": True}
    assert {name: first[name] for name in told} == told
