"""`mfl attention`: a sheet of tiles, or regions, and heads, of the network that evaluators see."""

import dataclasses

import jax
import numpy as np
import pytest
from PIL import Image

from input_pipeline.show import ABSENT
from input_pipeline.tileset import Record, Spec, TileSet, finish, write_slide
from mfl_jax import attention, cli, encoder, models, slides, train, trained
from mfl_jax.report import pictures
from tests.input_pipeline.tileset import samples
from tests.mfl_jax import synthetic

pytestmark = pytest.mark.usefixtures("compile_cache")


@pytest.fixture(scope="module", name="made")
def made_fixture(tmp_path_factory):
    """A set, and a run of no step on it; the teacher is another network than the student, as after many."""
    root = tmp_path_factory.mktemp("attention")
    samples.write_set(root / "set")
    config = synthetic.tiny("dino", data__tileset=str(root / "set"), data__batch=4)
    train.train(config, root / "run", progress=False, stop_at=0)
    return root


@pytest.fixture(autouse=True)
def other_teacher(monkeypatch):
    def opened(workdir, mesh=None):
        run = trained.open_run(workdir, mesh)
        slow = jax.tree.map(lambda p: p + 0.1 * np.sin(np.arange(p.size)).reshape(p.shape), run.extra["teacher"])
        return dataclasses.replace(run, extra=run.extra | {"teacher": jax.tree.map(np.float32, slow)})

    for module in (attention, encoder):
        monkeypatch.setattr(module, "open_run", opened)


def test_a_sheet_has_a_row_a_tile_and_a_column_a_head(made, tmp_path, capsys):
    out = tmp_path / "attention.png"
    asked = ["attention", str(made / "run"), "--tileset", str(made / "set"), "--rows", "3", "--out", str(out)]
    assert cli.main(asked) == 0
    assert str(out) in capsys.readouterr().out
    side, gap, title = pictures.SIDE, pictures.GAP, pictures.TITLE
    sheet = np.asarray(Image.open(out))
    assert sheet.shape == (gap + title + 3 * (side + title + gap), gap + 4 * (side + gap), 3)  # tile, mean, two heads
    for column in range(4):
        left = gap + column * (side + gap)
        assert sheet[gap + title : gap + title + side, left : left + side].std() > 5, column


def test_the_maps_are_of_the_teacher_on_what_evaluation_sees(made):
    run, tileset = attention.open_run(made / "run"), TileSet.open(made / "set")
    he = np.stack([tileset.decode(example)["he"] for example in tileset.read(range(3))])
    seen, maps = attention.attended(run, he)
    size = run.config.views.size
    view, model = encoder.view_of(run), models.make(run.config.encoder)
    np.testing.assert_allclose(seen, jax.jit(lambda x: view(jax.random.key(5), x))(he), atol=1e-6)
    slow = run.extra["teacher"]["params"]["encoder"]
    expected = jax.jit(lambda p, x: model.attention(p, view(jax.random.key(5), x)))(slow, he)
    np.testing.assert_allclose(maps, expected, rtol=1e-4, atol=1e-6)
    assert maps.shape == (3, 2, size // 8, size // 8)


def test_export_and_features_are_the_teacher_s_too(made, tmp_path):
    exported = encoder.export(made / "run", tmp_path / "weights")
    assert exported["features"] == 16
    run = encoder.open_run(made / "run")
    params, _ = encoder.part_of(run)
    synthetic.assert_same(params, run.extra["teacher"]["params"]["encoder"])
    assert synthetic.differing(params, run.params["he"]["encoder"])


SIDE, CELL, MPP = 5, 16, 2.0  # tiles along a side of a region, and level-0 px of one


@pytest.fixture(scope="module", name="regions")
def regions_fixture(tmp_path_factory):
    """A set of one slide with six regions, the slide itself, each cell of one colour, and a run of no step."""
    root, draw = tmp_path_factory.mktemp("regions"), np.random.default_rng(0)
    cells = draw.integers(0, 256, (2 * SIDE, 3 * SIDE, 3), np.uint8)
    (root / "slides").mkdir()
    dpi = 25400 / (1.3 * MPP)  # the file says another scale than that by which it was cut
    Image.fromarray(cells.repeat(CELL, 0).repeat(CELL, 1)).save(root / "slides" / "s.tif", dpi=(dpi, dpi))
    records = []
    for number in range(6):
        there = draw.random((SIDE, SIDE, 1)) < 0.7
        grid = np.concatenate([draw.normal(size=(SIDE, SIDE, 6)) * there, there], -1).astype(np.float16)
        at = np.array([number % 3, number // 3]) * SIDE * CELL
        records.append(Record(grid, {}, *map(float, at), MPP, label=-1, columns={}, score={}))
    spec = Spec("grids", SIDE, CELL * MPP, he_encoding="float16", he_kind="grid", he_channels=7)
    write_slide(root / "set", spec, "s", "c", records, {})
    finish(root / "set", spec, splits={"train": ["c"]})
    config = synthetic.tiny("dino_regions", data__tileset=str(root / "set"), data__batch=4)
    train.train(config, root / "run", progress=False, stop_at=0)
    return root, cells


def large_cell(picture, row, column):
    """The pixels of a cell of three, but for its edge."""
    side = attention.REGION_SIDE // 3
    return picture[row * side + 4 : (row + 1) * side - 4, column * side + 4 : (column + 1) * side - 4]


@pytest.mark.parametrize("over", [False, True])
def test_a_sheet_of_regions_is_grey_where_no_tile_is(regions, tmp_path, over):
    (root, _), out = regions, tmp_path / "attention.png"
    asked = ["attention", str(root / "run"), "--tileset", str(root / "set"), "--rows", "6", "--out", str(out)]
    assert cli.main([*asked, *(["--slides", str(root / "slides")] * over)]) == 0
    side, gap, title = attention.REGION_SIDE, pictures.GAP, pictures.TITLE
    sheet = np.asarray(Image.open(out))
    assert sheet.shape == (gap + title + 6 * (side + title + gap), gap + 4 * (side + gap), 3)
    with TileSet.open(root / "set") as tiles:
        grids = np.stack([tiles.decode(e)["he"][1:4, 1:4] for e in tiles.read(range(6))])  # of five, the middle three
    run = attention.open_run(root / "run")
    maps = models.make(run.config.encoder).attention(run.extra["teacher"]["params"]["encoder"], np.float32(grids))
    assert (grids[..., -1] == 0).sum() > 0
    for number, head in np.ndindex(6, 2):
        top, left = gap + title + number * (side + title + gap), gap + (2 + head) * (side + gap)
        drawn, heat = sheet[top : top + side, left : left + side], np.asarray(maps[number, head])
        light = np.array([[large_cell(drawn, r, c).mean() for c in range(3)] for r in range(3)])
        there = grids[number, ..., -1] == 1
        for r, c in np.argwhere(~there):
            cell = large_cell(drawn, r, c).reshape(-1, 3)
            assert np.ptp(cell) == 0  # grey, of one level: of the slide, or of what is not there
            assert over or cell[0, 0] == ABSENT
        if not over:  # the colours grow lighter with the share
            np.testing.assert_array_equal(np.argsort(heat[there]), np.argsort(light[there]))


def test_regions_are_drawn_from_the_slide_where_the_network_sees_them(regions):
    root, cells = regions
    run, cohort = attention.open_run(root / "run"), {s.slide_id: s for s in slides.read_cohort(root / "slides")}
    with TileSet.open(root / "set") as tiles:
        drawn = attention.of_slides(run, tiles, np.array([1, 5]), cohort, 3)
        with pytest.raises(ValueError, match="--slides does not list s, which"):
            attention.of_slides(run, tiles, np.array([1]), {}, 3)
        with run.config.unlocked():
            run.config.views.eval = "window"
        with pytest.raises(ValueError, match=r"known of 'centre' alone: leave --slides out"):
            attention.of_slides(run, tiles, np.array([1]), cohort, 3)
    for picture, (row, column) in zip(drawn, ((0, SIDE), (SIDE, 2 * SIDE)), strict=True):
        for r, c in np.ndindex(3, 3):
            expected = cells[row + 1 + r, column + 1 + c]
            assert np.abs(large_cell(picture, r, c) - expected.astype(float)).max() <= 1


def test_tiles_are_not_drawn_over_slides(made, capsys):
    asked = ["attention", str(made / "run"), "--tileset", str(made / "set"), "--slides", str(made / "slides")]
    (made / "slides").mkdir()
    Image.new("RGB", (9, 9)).save(made / "slides" / "s.tif")
    assert cli.main(asked) == 2
    assert "holds tiles, which are pictures themselves" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--out", "maps.gif"], "a .png or a .jpg, not 'maps.gif'"),
        (["--rows", "0"], "--rows is 0; there are 1 to"),
    ],
)
def test_a_wrong_request_is_one_line(made, more, message, capsys):
    assert cli.main(["attention", str(made / "run"), "--tileset", str(made / "set"), *more]) == 2
    assert message in capsys.readouterr().err


def test_a_convnet_has_no_attention(made):
    run = trained.open_run(made / "run")
    with run.config.unlocked():
        run.config.encoder = "compact,widths=8"
    with pytest.raises(ValueError, match="'compact,widths=8', which has no attention: it takes a ViT over tiles"):
        attention.attended(run, np.zeros((1, 16, 16, 3), np.uint8))
