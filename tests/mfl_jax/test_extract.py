"""Features of every tile, once, in its slide's file; and what happens when something goes wrong on the way."""

import csv
import dataclasses
import json
import os
import subprocess
import sys
import textwrap

import h5py
import jax
import numpy as np
import pytest

from mfl_jax import sharding, store
from mfl_jax.extract import extract
from tests.mfl_jax.drawn_slides import DIM, Drawn, coords, encoder, expected, source

TABLES = ("status.csv", "encoder.json")
COUNTS = {"a": 37, "empty": 0, "b": 5, "c": 50, "one": 1}


def run(out, given, made=None, **options):
    said = []
    report = extract(
        given, made or encoder(), out, **{"batch": 16, "workers": 3, "progress": False, "say": said.append} | options
    )
    return report, said


def features(out, name):
    with h5py.File(out / f"{name}.h5") as file:
        return file["features"][:], file["coords"][:]


def watched(seen):
    """An encoder that keeps the mask of every batch that it computes."""
    made = encoder()

    def apply(params, images, mask):
        jax.debug.callback(lambda m: seen.append(np.array(m)), mask)
        return made.apply(params, images, mask)

    return type(made)(**{**vars(made), "apply": apply})


def states(out):
    with open(out / "status.csv", newline="") as file:
        return {row["slide_id"]: row["state"] for row in csv.DictReader(file)}


def times(out):
    return {p.name: p.stat().st_mtime_ns for p in out.glob("*.h5")}


def test_every_slide_has_the_features_of_its_tiles_in_their_order(tmp_path):
    report, said = run(tmp_path, source(COUNTS), dtype="float32")
    assert not said
    assert not report.failed
    for name, count in COUNTS.items():
        found, places = features(tmp_path, name)
        assert (found.dtype, found.shape) == (np.float32, (count, DIM))
        np.testing.assert_allclose(found, expected(name, count), rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(places, coords(count))
    assert states(tmp_path) == {name: "done" if count else "empty" for name, count in COUNTS.items()}
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*(f"{n}.h5" for n in COUNTS), *TABLES])
    assert Drawn.opened["now"] == 0


@pytest.mark.parametrize(("layout", "name"), [("ours", None), ("clam", "dataset.csv"), ("stamp", "slides.csv")])
def test_tables_list_every_slide_of_the_folder_whichever_call_it_is_of(tmp_path, layout, name):
    run(tmp_path, source({"a": 3, "=b": 2}), layout=layout)
    run(tmp_path, source({"c": 4, "a": 3}), layout=layout)
    assert {k.removeprefix("'"): v for k, v in states(tmp_path).items()} == dict.fromkeys(("a", "=b", "c"), "done")
    if name:
        with open(tmp_path / name, newline="") as file:
            rows = list(csv.DictReader(file))
        found = {row.get("slide_id", row.get("FILENAME", "")).removesuffix(".h5") for row in rows}
        assert found == {"a", "=b", "c"}
        assert len(rows) == 3
        if layout == "stamp":
            with open(tmp_path / "patients.csv", newline="") as file:
                rows = list(csv.DictReader(file))
            assert {row["PATIENT"] for row in rows} == {"case of a", "case of =b", "case of c"}
        assert [row["label"] for row in rows] == ["yes"] * 3
    next(tmp_path.rglob("c.h5")).unlink()
    run(tmp_path, source({"a": 3}), layout=layout)
    assert "c" not in states(tmp_path)


def test_labels_of_slides_that_are_not_asked_for_now_are_remembered_and_those_that_are_renewed(tmp_path):
    def asked(**labels):
        drawn = source(dict.fromkeys(labels, 2))
        of = [dataclasses.replace(entry, case_id="p", labels=labels[entry.slide_id]) for entry in drawn.entries]
        return dataclasses.replace(drawn, entries=tuple(of))

    def patients():
        with open(tmp_path / "patients.csv", newline="") as file:
            return list(csv.DictReader(file))

    run(tmp_path, asked(a={"label": "yes"}, b={"label": "no", "label_grade": "2"}), layout="stamp")
    assert patients() == [{"PATIENT": "p", "label": "", "label_grade": "2"}]
    run(tmp_path, asked(b={"label": "yes"}), layout="stamp")
    assert patients() == [{"PATIENT": "p", "label": "yes"}]
    run(tmp_path, asked(b={"label": "no"}), layout="stamp")
    assert patients() == [{"PATIENT": "p", "label": ""}]
    run(tmp_path, asked(a={}, b={}), layout="stamp")
    assert patients() == [{"PATIENT": "p"}]


def test_a_folder_knows_the_cases_that_its_encoder_was_trained_on(tmp_path):
    made = encoder()
    knowing = type(made)(**{**vars(made), "cases": ("case 2", "case 1")})
    run(tmp_path / "known", source({"a": 3}), knowing, layout="clam")
    assert store.trained_cases(tmp_path / "known" / "h5_files") == ("case 1", "case 2")
    run(tmp_path / "unknown", source({"a": 3}))
    assert store.trained_cases(tmp_path / "unknown") is None
    os.replace(tmp_path / "known" / "encoder.json", tmp_path / "unknown" / "encoder.json")
    assert store.trained_cases(tmp_path / "unknown") == ("case 1", "case 2")
    run(tmp_path / "other", source({"a": 3}), encoder(digest="b" * 64))
    os.replace(tmp_path / "unknown" / "encoder.json", tmp_path / "other" / "encoder.json")
    with pytest.raises(ValueError, match=r"encoder[.]json is of another encoder than"):
        store.trained_cases(tmp_path / "other")


def test_half_precision_is_the_rounding_of_the_features(tmp_path):
    run(tmp_path / "half", source(COUNTS))
    run(tmp_path / "full", source(COUNTS), dtype="float32")
    for name in COUNTS:
        half, full = features(tmp_path / "half", name)[0], features(tmp_path / "full", name)[0]
        assert half.dtype == np.float16
        np.testing.assert_array_equal(half, full.astype(np.float16))


def test_tiles_of_many_slides_share_a_batch_and_padding_is_masked(tmp_path):
    seen = []
    run(tmp_path, source(COUNTS), watched(seen), batch=32)
    assert [m.sum() for m in seen] == [32, 32, 29]
    assert {len(m) for m in seen} == {32}
    assert seen[2][:29].all()


def test_the_ledger_accounts_for_what_was_done_and_names_a_limit(tmp_path):
    report, _ = run(tmp_path, source(COUNTS))
    assert (report.ledger.tiles, report.ledger.slides) == (93, 5)
    assert {"read", "decode", "host to device", "compute", "write"} == set(report.ledger.seconds)
    assert report.ledger.seconds["decode"] == pytest.approx(0.002 * 5)
    assert "The limit is" in report.ledger.table()


def test_a_bad_slide_stops_no_other_and_is_done_again_alone(tmp_path):
    def spoil(name, row):
        if (name, row) == ("c", 40):
            raise OSError("the disk says no")

    report, said = run(tmp_path, source(COUNTS, spoil))
    assert [row["slide_id"] for row in report.failed] == ["c"]
    assert said == ["c failed: OSError: the disk says no"]
    assert states(tmp_path)["c"] == "failed"
    assert sorted(p.name for p in tmp_path.glob("*.h5*")) == ["a.h5", "b.h5", "empty.h5", "one.h5"]
    assert not list(tmp_path.glob(".*.part"))
    assert Drawn.opened["now"] == 0
    before = times(tmp_path)
    report, _ = run(tmp_path, source(COUNTS))
    assert (report.kept, report.failed) == (4, [])
    assert before.items() <= times(tmp_path).items()
    np.testing.assert_allclose(features(tmp_path, "c")[0], expected("c", 50), atol=2e-3)
    report, _ = run(tmp_path, source(COUNTS))
    assert report.kept == 5
    assert "nothing was done" in report.ledger.table()


def test_what_is_of_failed_slides_alone_is_not_computed(tmp_path):
    seen = []

    def spoil(name, row):
        raise ValueError("a hole")

    report, _ = run(tmp_path, source({f"s{i}": 64 for i in range(4)}, spoil), watched(seen))
    assert len(report.failed) == 4
    assert not seen


@pytest.mark.parametrize("row", [0, 16, 36])
def test_wherever_a_slide_fails_its_neighbours_are_whole(row, tmp_path):
    def spoil(name, at):
        if (name, at) == ("a", row):
            raise ValueError("a hole")

    report, _ = run(tmp_path, source(COUNTS, spoil), dtype="float32")
    assert [(r["slide_id"], r["reason"]) for r in report.failed] == [("a", "a hole")]
    for name in ("b", "c", "one"):
        np.testing.assert_allclose(features(tmp_path, name)[0], expected(name, COUNTS[name]), rtol=1e-5, atol=1e-6)


def test_a_slide_that_cannot_be_opened_and_one_that_was_not_tiled(tmp_path):
    given = source(COUNTS, faults={"b": "tiling failed: it is no slide"})
    broken = given.entries[0]

    def no():
        raise ValueError("there is no such file")

    entries = (type(broken)(**{**vars(broken), "open": no}), *given.entries[1:])
    report, said = run(tmp_path, type(given)(**{**vars(given), "entries": entries}))
    assert {r["slide_id"]: r["reason"] for r in report.failed} == {
        "a": "there is no such file",
        "b": "tiling failed: it is no slide",
    }
    assert len(said) == 2
    assert states(tmp_path)["c"] == "done"


@pytest.mark.parametrize("change", ["digest", "signature", "dtype"])
def test_what_changed_is_done_again(change, tmp_path):
    run(tmp_path, source(COUNTS))
    before = times(tmp_path)
    options = {"dtype": "float32"} if change == "dtype" else {}
    made = encoder("b" * 64, scale=2.0) if change == "digest" else encoder()
    report, _ = run(tmp_path, source(COUNTS, signature="2" if change == "signature" else "1"), made, **options)
    assert report.kept == 0
    assert all(times(tmp_path)[name] != time for name, time in before.items())
    wanted = expected("a", 37) * (2 if change == "digest" else 1)
    np.testing.assert_allclose(features(tmp_path, "a")[0], wanted, atol=4e-3)


def test_a_file_that_is_no_longer_true_does_not_stay_under_its_name(tmp_path):
    run(tmp_path, source(COUNTS))
    old = (tmp_path / "b.h5").read_bytes()
    report, _ = run(tmp_path, source(COUNTS, faults={"b": "its files changed since it was tiled"}))
    assert [r["slide_id"] for r in report.failed] == ["b"]
    assert not (tmp_path / "b.h5").exists()
    assert (tmp_path / "b.h5.stale").read_bytes() == old


def test_features_of_two_encoders_are_not_mixed_and_no_stranger_is_overwritten(tmp_path):
    run(tmp_path, source({"a": 3}))
    with pytest.raises(ValueError, match=r"a\.h5 is of a slide that was not asked for, and of another encoder \(toy\)"):
        run(tmp_path, source({"b": 3}), encoder("b" * 64))
    report, _ = run(tmp_path, source({"b": 3}))
    assert not report.failed
    with h5py.File(tmp_path / "c.h5", "w") as file:
        file["features"] = np.zeros((2, 3))
    with pytest.raises(ValueError, match=r"c\.h5 is damaged, or was not written by mfl extract"):
        run(tmp_path, source({"c": 3}))
    (tmp_path / "c.h5").write_bytes(b"\x89HDF nothing")
    with pytest.raises(ValueError, match=r"c\.h5 is damaged, or was not written by mfl extract"):
        run(tmp_path, source({"c": 3}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mpp": 1.0}, r"a\.h5 is of .* tiles of another scale \(0\.5 um per px, not 1\)"),
        ({"size": 16}, r"a\.h5 is of .* tiles of another size \(8 px, not 16\)"),
    ],
)
def test_features_of_two_scales_are_not_mixed(change, message, tmp_path):
    run(tmp_path, source({"a": 3}))
    with pytest.raises(ValueError, match=message):
        run(tmp_path, dataclasses.replace(source({"b": 3}), **change))


def test_interrupted_it_leaves_whole_files_only_and_goes_on(tmp_path):
    def interrupt(name, row):
        if (name, row) == ("c", 20):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "one", source(COUNTS, interrupt))
    assert {p.name for p in (tmp_path / "one").glob("*.h5")} <= {"a.h5", "b.h5", "empty.h5"}
    assert not list((tmp_path / "one").glob(".*"))
    assert Drawn.opened["now"] == 0
    run(tmp_path / "one", source(COUNTS))
    run(tmp_path / "other", source(COUNTS))
    for name in COUNTS:
        for a, b in zip(features(tmp_path / "one", name), features(tmp_path / "other", name), strict=True):
            np.testing.assert_array_equal(a, b)


def test_what_a_killed_run_left_is_cleared_away(tmp_path):
    (tmp_path / ".b.h5.part").write_bytes(b"half a slide")
    (tmp_path / ".mine.part").write_bytes(b"not ours")
    run(tmp_path, source(COUNTS))
    assert [p.name for p in tmp_path.glob(".*")] == [".mine.part"]


def test_what_fails_on_the_device_ends_the_run_and_leaves_no_part(tmp_path):
    made = encoder()

    def apply(params, images, mask):
        def refuse(m):
            raise RuntimeError("out of memory")

        return made.apply(params, images, mask) + jax.pure_callback(refuse, jax.ShapeDtypeStruct((), np.float32), mask)

    with pytest.raises(Exception, match="out of memory"):
        run(tmp_path, source({"a": 40}), type(made)(**{**vars(made), "apply": apply}))
    assert not list(tmp_path.glob("*.h5"))
    assert not list(tmp_path.glob(".*"))


def test_features_that_are_no_numbers_are_refused(tmp_path):
    report, _ = run(tmp_path / "half", source({"a": 20, "empty": 0}), encoder(scale=1e6))
    assert report.failed[0]["reason"].endswith("the first is 0; they are too large for float16: use float32")
    report, _ = run(tmp_path / "half", source({"a": 20, "empty": 0}), encoder(scale=1e6), dtype="float32")
    assert not report.failed
    report, _ = run(tmp_path / "nan", source({"a": 20}), encoder(scale=np.nan), dtype="float32")
    assert report.failed[0]["reason"] == "features of 16 tiles are not finite, the first is 0"


def test_wrong_requests(tmp_path):
    with pytest.raises(ValueError, match="batch and workers are at least 1"):
        run(tmp_path, source(COUNTS), batch=0)
    with pytest.raises(ValueError, match="layout is 'slides'; allowed: ours, clam"):
        run(tmp_path, source(COUNTS), layout="slides")
    with pytest.raises(ValueError, match="layout 'stamp' with 'float32'; allowed are"):
        run(tmp_path, source(COUNTS), layout="stamp", dtype="float32")
    assert not list(tmp_path.glob("*.h5"))


def test_few_slides_are_open_at_once(tmp_path):
    run(tmp_path, source({f"s{i}": 8 for i in range(60)}), batch=32, workers=2)
    assert Drawn.opened["most"] <= 2 + 32 // 16 + 1


def test_more_devices_give_the_same_features(tmp_path):
    """In a process of its own, which has four; 93 tiles in batches of 10, which four do not divide."""
    code = textwrap.dedent("""
        import sys, jax
        from pathlib import Path
        from mfl_jax.extract import extract
        from tests.mfl_jax.drawn_slides import encoder, source
        from tests.mfl_jax.test_extract import COUNTS
        assert jax.device_count() == 4
        extract(source(COUNTS), encoder(), sys.argv[1], batch=10, workers=2, dtype="float32", progress=False)
    """)
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    env = dict(os.environ) | flags
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "four")], check=True, env=env)
    mesh = sharding.make_mesh({"data": 1}, jax.devices()[:1])
    run(tmp_path / "one", source(COUNTS), dtype="float32", mesh=mesh)
    for name in COUNTS:
        a, b = features(tmp_path / "four", name)[0], features(tmp_path / "one", name)[0]
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
def test_memory_is_flat_over_many_slides(tmp_path):
    """200 slides of 12 MB of pixels each in a process of its own: what is held after 40 is held after 200."""
    code = textwrap.dedent("""
        import json, sys, psutil
        import numpy as np
        from mfl_jax.extract import extract
        from tests.mfl_jax import drawn_slides
        drawn_slides.pixels = lambda slide, row: np.full((8, 8, 3), row % 251, np.uint8)
        seen = []
        given = drawn_slides.source({f"s{i}": 4000 for i in range(200)})
        for entry in given.entries:
            opener = entry.open
            def noted(opener=opener):
                seen.append(psutil.Process().memory_info().rss)
                return opener()
            object.__setattr__(entry, "open", noted)
        extract(given, drawn_slides.encoder(), sys.argv[1], batch=256, workers=2, progress=False)
        print(json.dumps(seen))
    """)
    out = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, capture_output=True, text=True)
    seen = json.loads(out.stdout)
    assert max(seen[40:]) - max(seen[:40]) < 24 << 20
