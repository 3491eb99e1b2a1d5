import pytest

from mfl_jax import cli, doctor


def test_the_doctor_finds_this_environment_healthy(capsys):
    assert cli.main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert "devices" in printed
    assert "all that is required is there" in printed


def test_the_doctor_names_what_is_missing_and_the_command(monkeypatch):
    monkeypatch.setattr(doctor, "REQUIRED", ("a-package-that-is-not-there",))
    lines, healthy = doctor.report()
    assert not healthy
    assert any(line.startswith("TO MEND") and "pip install 'a-package-that-is-not-there'" in line for line in lines)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tile", "nowhere.csv", "--out", "out"], "there is no cohort at nowhere.csv"),
        (["pack", "nowhere", "--out", "out"], "made by mfl tile"),
        (["show", "nowhere", "--out", "picture"], r"--out is a .png or .jpg"),
        (["verify", "nowhere"], "nowhere"),
        (["train", "--config", "configs/no.py", "--workdir", "out"], "there is no config"),
    ],
)
def test_a_wrong_request_is_one_line_and_exit_status_2(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments) in (1, 2)
    printed = capsys.readouterr()
    assert message in printed.err + printed.out
    assert "Traceback" not in printed.err


@pytest.mark.slow
def test_the_data_of_the_demo_are_made_and_made_again(tmp_path, capsys):
    """The rest of it: demo/test_demo.py."""
    arguments = ["demo", "--data-only", "--out", str(tmp_path / "demo"), "--cases", "4", "--size", "768"]
    arguments += ["--workers", "2", "--quiet"]
    assert cli.main(arguments) == 0
    assert (tmp_path / "demo" / "batch.png").stat().st_size > 10_000
    assert "A tile set stands: " in capsys.readouterr().out
    assert cli.main(arguments) == 0
