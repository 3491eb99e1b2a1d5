"""`mfl attention`: a sheet of tiles and heads, of the network that evaluators see."""

import dataclasses

import jax
import numpy as np
import pytest
from PIL import Image

from input_pipeline.tileset import TileSet
from mfl_jax import attention, cli, encoder, models, train, trained
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
    seen, maps = attention.of_tiles(run, he)
    size = run.config.views.size
    assert (seen.shape, seen.dtype) == ((3, size, size, 3), np.uint8)
    view, model = encoder.view_of(run), models.make(run.config.encoder)
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
        attention.of_tiles(run, np.zeros((1, 16, 16, 3), np.uint8))
