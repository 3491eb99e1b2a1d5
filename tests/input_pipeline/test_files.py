import json
import math
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from input_pipeline import files


def picture() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)


def test_a_picture_is_written_in_the_format_of_its_name(tmp_path):
    files.save_picture(tmp_path / "a.png", picture())
    with Image.open(tmp_path / "a.png") as image:
        np.testing.assert_array_equal(np.asarray(image), picture())
    files.save_picture(tmp_path / "a.jpg", np.full((8, 8, 3), (200, 30, 90), np.uint8))
    with Image.open(tmp_path / "a.jpg") as image:
        assert image.format == "JPEG"
        assert np.abs(np.asarray(image)[4, 4].astype(int) - (200, 30, 90)).max() < 8


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    files.write_json(path, {"n": 1})

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(files.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        files.write_json(path, {"n": 2})
    assert files.read_json(path, "a test") == {"n": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_document_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"there is no .*a\.json \(made by a test\)"):
        files.read_json(tmp_path / "a.json", "made by a test")
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(ValueError, match="not readable"):
        files.read_json(tmp_path / "a.json", "made by a test")


def test_documents_are_json_that_every_reader_takes_or_are_refused(tmp_path):
    path = tmp_path / "a.json"
    files.write_json(path, {"error": math.inf, "list": [1.5, (-math.inf, float("nan"))], "text": "inf"})

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    found = json.loads(path.read_text(), parse_constant=refuse)
    assert found == {"error": None, "list": [1.5, [None, None]], "text": "inf"}
    with pytest.raises(TypeError, match="not JSON serializable"):
        files.write_json(path, {"path": Path("a")})


def held_by(host: str, pid: int, started: float) -> str:
    return json.dumps({"host": host, "pid": pid, "started": started})


def test_a_folder_is_worked_in_by_one_run_at_a_time(tmp_path):
    folder = tmp_path / "new" / "out"
    with files.only_one(folder):
        second = files.only_one(folder)
        with pytest.raises(ValueError, match=f"process {os.getpid()} on this machine is at work in .*out"), second:
            pass
        assert (folder / ".lock").exists()
    assert not list(folder.iterdir())
    with pytest.raises(RuntimeError), files.only_one(folder):
        raise RuntimeError
    assert not list(folder.iterdir())


def test_what_a_killed_run_left_is_taken_over(tmp_path):
    script = f"from input_pipeline import files\nwith files.only_one({str(tmp_path)!r}): print(1, flush=True), input()"
    with subprocess.Popen([sys.executable, "-c", script], stdin=-1, stdout=-1, text=True) as process:
        assert process.stdout.readline()
        with pytest.raises(ValueError, match=f"process {process.pid} on this machine"), files.only_one(tmp_path):
            pass
        process.kill()
    with files.only_one(tmp_path):
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()


@pytest.mark.parametrize(
    ("text", "silent", "alive"),
    [
        (held_by("elsewhere", 1, 0.0), 30, True),
        (held_by("elsewhere", 1, 0.0), 3600, False),
        (held_by(socket.gethostname(), os.getpid(), psutil.Process().create_time()), 3600, True),
        (
            held_by(socket.gethostname(), os.getpid(), psutil.Process().create_time() - 60),
            0,
            False,
        ),  # the id used again
        ("", 0, True),
        ("", 3600, False),
    ],
    ids=["elsewhere", "elsewhere, silent", "here", "here, its id used again", "starting", "died while starting"],
)
def test_whether_the_run_that_holds_a_folder_is_alive(tmp_path, text, silent, alive):
    lock = tmp_path / ".lock"
    lock.write_text(text)
    os.utime(lock, (time.time() - silent,) * 2)
    if alive:
        with pytest.raises(ValueError, match="at work"), files.only_one(tmp_path):
            pass
        assert lock.read_text() == text
    else:
        with files.only_one(tmp_path):
            assert lock.read_text() != text


def test_of_many_that_take_over_one_succeeds(tmp_path, monkeypatch):
    def slow_holder(*arguments, judge=files._holder):
        found = judge(*arguments)
        time.sleep(0.01)
        return found

    monkeypatch.setattr(files, "_holder", slow_holder)
    for _ in range(3):
        (tmp_path / ".lock").write_text(held_by(socket.gethostname(), os.getpid(), 0.0))
        began, ended, inside = threading.Barrier(8), threading.Barrier(8), []

        def attempt(began=began, ended=ended, inside=inside):
            began.wait()
            try:
                with files.only_one(tmp_path):
                    inside.append(1)
                    ended.wait(timeout=30)
            except ValueError:
                ended.wait(timeout=30)

        threads = [threading.Thread(target=attempt) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(inside) == 1


def test_a_long_run_gives_signs_of_life(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "BEAT_S", 0.01)
    with files.only_one(tmp_path):
        os.utime(tmp_path / ".lock", (0, 0))
        deadline = time.monotonic() + 10
        while (tmp_path / ".lock").stat().st_mtime == 0 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert time.time() - (tmp_path / ".lock").stat().st_mtime < 60
