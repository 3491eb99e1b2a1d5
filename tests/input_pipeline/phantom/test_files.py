"""Files as scanners write them, complete or absent, the same for any number of workers."""

import csv
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import tifffile

from input_pipeline.cohort import read
from input_pipeline.phantom import PhantomError, draw_slide, paint, write_cohort
from input_pipeline.phantom.render import IF_CHANNELS
from input_pipeline.slides.transform import Transform

SMALL = {"cases": 2, "size": 512, "seed": 4, "progress": False}


def digests(root: Path) -> dict[str, str]:
    return {
        str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in root.rglob("*") if p.is_file()
    }


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    return write_cohort(tmp_path_factory.mktemp("cohort"), **SMALL)


def test_every_path_of_the_table_exists_and_nothing_is_left_over(cohort):
    for row in rows(cohort):
        paths = [v for k, v in row.items() if k in ("he", "cells", "regions") or k.startswith(("partner_", "truth_"))]
        assert len(paths) == 9
        assert all((cohort.parent / p).is_file() for p in paths)
        assert row["label"] in ("alpha", "beta")
        assert row["label_lesion"] in ("0", "1")
    cases = rows(cohort.parent / "cases.csv")
    assert sum(int(c["slides"]) for c in cases) == len(rows(cohort))
    assert not list(cohort.parent.rglob("*.part"))


def test_the_project_reads_its_table(cohort):
    slides = read(cohort)
    assert [len(s.partners) for s in slides] == [4] * len(slides)


def test_two_workers_write_the_same_bytes(cohort, tmp_path):
    write_cohort(tmp_path, **SMALL, workers=2)
    assert digests(tmp_path) == digests(cohort.parent)


def test_another_seed_draws_another_slide(cohort, tmp_path):
    other = write_cohort(tmp_path, **SMALL | {"seed": 5, "cases": 1}, partners=())
    name = rows(other)[0]["he"]
    assert (other.parent / name).read_bytes() != (cohort.parent / name).read_bytes()


def test_a_killed_run_continues_and_a_changed_one_starts_again(tmp_path):
    few = SMALL | {"partners": ("nuclei",)}
    table = write_cohort(tmp_path, **few)
    before = digests(tmp_path)
    first, second = (tmp_path / r["he"] for r in rows(table)[:2])
    stamps = {p: p.stat().st_mtime_ns for p in (first, second)}
    second.write_bytes(second.read_bytes()[:1000])
    (first.parent / "x.svs.1.part").write_bytes(b"left by a killed run")
    write_cohort(tmp_path, **few)
    assert digests(tmp_path) == before
    assert first.stat().st_mtime_ns == stamps[first]
    assert second.stat().st_mtime_ns != stamps[second]
    write_cohort(tmp_path, **few | {"mpp": 0.4})
    assert first.stat().st_mtime_ns != stamps[first]


def test_svs_pages_are_in_the_order_of_the_scanner(tmp_path):
    table = write_cohort(tmp_path, **SMALL | {"cases": 1, "size": 1024}, partners=())
    with tifffile.TiffFile(tmp_path / rows(table)[0]["he"]) as tiff:
        shapes = [p.shape[:2] for p in tiff.pages]
        assert shapes[0] == (1024, 1024)
        assert not tiff.pages[1].is_tiled
        assert shapes[2:4] == [(256, 256), (64, 64)]
        assert [p.is_tiled for p in tiff.pages] == [True, False, True, True, False, False]
        text = tiff.pages[0].description
        assert text.startswith("Aperio")
        assert dict(f.split(" = ") for f in text.split("|")[1:])["MPP"] == "0.5"
        assert tiff.pages[0].compression == tifffile.COMPRESSION.JPEG
        level = tiff.pages[0].asarray().astype(int)
    slide = draw_slide(4, 0, 0, size=1024, subtype=_subtype(table), lesion=rows(table)[0]["label_lesion"] == "1")
    assert np.abs(level - paint(slide)).mean() < 4


def _subtype(table: Path) -> int:
    return ("alpha", "beta").index(rows(table)[0]["label"])


def test_openslide_opens_brightfield_and_reports_its_mpp(cohort):
    openslide = pytest.importorskip("openslide")
    for row in rows(cohort):
        for name in ("he", "partner_ihc"):
            with openslide.OpenSlide(cohort.parent / row[name]) as slide:
                assert slide.properties["openslide.vendor"] == "aperio"
                with tifffile.TiffFile(cohort.parent / row[name]) as tiff:
                    told = float(tiff.pages[0].description.split("MPP = ")[1].split("|")[0])
                assert abs(float(slide.properties["openslide.mpp-x"]) - told) < 1e-9
                assert set(slide.associated_images) == {"label", "macro", "thumbnail"}
                assert all(image.size[0] > 10 for image in slide.associated_images.values())
                assert slide.level_downsamples[1] == pytest.approx(4, rel=0.02)
        assert told != 0.5


def test_fluorescence_is_an_ome_pyramid_with_names(cohort):
    row = rows(cohort)[0]
    with tifffile.TiffFile(cohort.parent / row["partner_if"]) as tiff:
        assert tiff.is_ome
        series = tiff.series[0]
        assert series.axes == "CYX"
        assert series.dtype == np.uint16
        assert len(series.levels) >= 2
        channels = tifffile.xml2dict(tiff.ome_metadata)["OME"]["Image"]["Pixels"]
        assert tuple(c["Name"] for c in channels["Channel"]) == IF_CHANNELS
        mpp, pixels = float(channels["PhysicalSizeX"]), series.asarray()
    truth = Transform.load(cohort.parent / row["truth_transform_if"])
    cells = rows(cohort.parent / row["cells"])
    points = np.array([(float(c["x_um"]), float(c["y_um"])) for c in cells])
    x, y = np.floor(truth(points) / mpp).astype(int).T
    assert np.median(pixels[0, y, x]) > 3 * np.median(pixels[0])


def test_maps_are_lossless_and_never_mixed(cohort):
    row = rows(cohort)[0]
    with tifffile.TiffFile(cohort.parent / row["partner_nuclei"]) as tiff:
        levels = [level.asarray() for level in tiff.series[0].levels]
    assert levels[0].dtype == np.uint16
    pairs = [set(map(tuple, level.reshape(2, -1).T.tolist())) for level in levels]
    assert len(levels) > 1
    assert all(p <= pairs[0] for p in pairs[1:])
    names = json.loads((cohort.parent / "regions.json").read_text())
    with tifffile.TiffFile(cohort.parent / row["regions"]) as tiff:
        regions = tiff.series[0].levels[0].asarray()
        size = float(tifffile.xml2dict(tiff.ome_metadata)["OME"]["Image"]["Pixels"]["PhysicalSizeX"])
    assert size == names["mpp"]
    assert regions.max() < len(names["names"])


def test_he_may_be_an_ome_tiff(tmp_path):
    table = write_cohort(tmp_path, **SMALL | {"cases": 1}, partners=(), he_format="ome", mpp=0.25)
    with tifffile.TiffFile(tmp_path / rows(table)[0]["he"]) as tiff:
        series = tiff.series[0]
        assert tiff.is_ome
        assert [level.shape for level in series.levels] == [(512, 512, 3), (128, 128, 3), (32, 32, 3)]
        assert 'PhysicalSizeX="0.25"' in tiff.ome_metadata
        assert series.asarray().mean() > 100


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"size": 256}, "size is 256"),
        ({"cases": 0}, "cases is 0"),
        ({"partners": ("if", "x")}, "unknown partner x"),
        ({"he_format": "png"}, "svs, ome"),
        ({"tissue": "lung"}, "mixed, normal"),
        ({"mpp": 5.0}, "from 0.1 to 2"),
        ({"workers": 0}, "workers is 0"),
    ],
)
def test_what_cannot_be_drawn_is_refused_before_anything_is_written(tmp_path, wrong, says):
    with pytest.raises(PhantomError, match=says):
        write_cohort(tmp_path / "new", **SMALL | wrong)
    assert not (tmp_path / "new").exists()
