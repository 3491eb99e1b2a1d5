"""Whole views: the same pixels however the batch is cut and wherever it runs, shared geometry, all kinds of partner."""

import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from mfl_jax import contact_sheet
from mfl_jax.views import KINDS, Modality, parse, parse_many, plan
from mfl_jax.views import partners as view_partners
from mfl_jax.views.geometry import sources

KEY = jax.random.key(11)
SPEC = "crop(.6,1)|flip|rot90|rotate(20)|hed|jitter(p=.8)|blur(p=.5)|noise(.02)|cutout(.1)|normalise"


def picture(rows=6, side=20, channels=3, dtype=np.uint8, top=256):
    return np.random.default_rng(0).integers(0, top, (rows, side, side, channels)).astype(dtype)


def test_a_view_depends_on_the_key_the_row_and_nothing_else_of_the_batch():
    view, images = jax.jit(parse(SPEC, size=16)), picture(6)
    whole = np.asarray(view(KEY, images, rows=jnp.arange(6)))
    assert whole.shape == (6, 16, 16, 3)
    assert whole.dtype == np.float32
    plain = jax.jit(parse("hflip", size=20))
    np.testing.assert_array_equal(plain(KEY, images), plain(KEY, images, rows=jnp.arange(6)))
    later = np.asarray(view(KEY, images[[4, 5, 0, 1, 2, 3]], rows=jnp.array([4, 5, 0, 1, 2, 3])))
    np.testing.assert_allclose(later, whole[[4, 5, 0, 1, 2, 3]], atol=1e-6)
    same = np.repeat(images[:1], 6, 0)
    drawn = np.asarray(view(KEY, same, rows=jnp.arange(6)))
    assert min(np.abs(drawn[i] - drawn[j]).max() for i in range(6) for j in range(i)) > 0.1
    assert np.abs(np.asarray(view(jax.random.key(12), images, rows=jnp.arange(6))) - whole).max() > 0.1


EIGHT = """
    import os
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
    import jax, numpy as np
    from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
    from mfl_jax.views import Modality, plan

    views = plan({"he": "SPEC", "map": "crop(.6,1)|flip|rot90|rotate(20)|boundary", "genes": "permute|genedrop|noise",
                  "region": "2*window|flip|rot90|drop|noise"},
                 {"he": Modality(size=16), "map": Modality("map", 1, 16), "genes": Modality("vector", 12),
                  "region": Modality("grid", 5, 3)})
    rng = np.random.default_rng(0)
    batch = {"he": rng.integers(0, 256, (16, 20, 20, 3), np.uint8),
             "map": rng.integers(0, 9, (16, 20, 20, 1)).astype(np.uint16),
             "region": rng.normal(size=(16, 4, 4, 5)).astype(np.float16),
             "genes": rng.poisson(3.0, (16, 12)).astype(np.float32)}
    step = jax.jit(views)
    key = jax.random.key(0)
    one = jax.tree.map(np.asarray, step(key, batch))
    mesh = Mesh(np.array(jax.devices()), ("data",), axis_types=(AxisType.Auto,))
    spread = jax.device_put(batch, NamedSharding(mesh, P("data")))
    program = step.lower(key, spread).compile()
    eight = program(key, spread)
    assert all(len(x.sharding.device_set) == 8 and not x.is_fully_replicated for x in jax.tree.leaves(eight))
    worst = max(float(np.abs(np.asarray(a) - b).max()) for a, b in zip(jax.tree.leaves(eight), jax.tree.leaves(one)))
    text = program.as_text()
    moved = [op for op in ("all-gather", "all-reduce", "all-to-all", "collective-permute") if f" {op}(" in text]
    print(worst, moved, float(np.abs(one["he"][0][0] - one["he"][0][1]).max()) > 0.1)
"""


def test_the_same_key_gives_the_same_pixels_on_one_and_on_eight_devices_and_no_pixel_travels():
    code = textwrap.dedent(EIGHT).replace("SPEC", SPEC)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    worst, moved = done.stdout.strip().split(" ", 1)
    assert float(worst) <= 5e-6  # of values up to 2.6: rounding, as XLA orders sums by the shape of a shard
    assert moved == "[] True"


def test_multi_crop_gives_every_view_its_own_number_and_shape():
    views, images = parse_many("2*crop(.4,1)|flip; 3*crop(.05,.4)|flip|size(8); centre", size=16), picture(4)
    seen = jax.jit(views)(KEY, images)
    assert [v.shape for v in seen] == [(4, 16, 16, 3)] * 2 + [(4, 8, 8, 3)] * 3 + [(4, 16, 16, 3)]
    flat = [np.asarray(v) for v in seen]
    assert all(np.abs(flat[i] - flat[j]).max() > 0.1 for i, j in ((0, 1), (2, 3), (3, 4)))
    first = jax.jit(parse_many("crop(.4,1)|flip; crop(.4,1)|flip", size=16))
    for alone, together in zip(first(KEY, images), seen[:2], strict=True):
        np.testing.assert_allclose(alone, together, atol=1e-5)


@pytest.mark.parametrize("paired", [True, False])
def test_paired_geometry_shows_the_same_place_in_every_modality_whatever_its_size(paired):
    rows, columns = np.mgrid[:24, :24]
    he = np.repeat(np.stack([rows * 10, columns * 10, rows * 0], -1)[None], 5, 0).astype(np.uint8)
    fine = np.mgrid[:48, :48]
    partner = np.repeat(np.stack([fine[0] * 5, fine[1] * 5], -1)[None], 5, 0).astype(np.uint16)
    geometry = "crop(.2,.8)|flip|rot90|rotate(10)"
    views = plan(
        {"he": f"2*{geometry}", "if": f"{geometry}|scale(255)"},
        {"he": Modality(size=12), "if": Modality(channels=2, size=12)},
        paired_geometry=paired,
    )
    seen = jax.tree.map(np.asarray, jax.jit(views)(KEY, {"he": he, "if": partner}))
    assert [len(seen[name]) for name in ("he", "if")] == [2, 1]
    apart = np.abs(seen["he"][0][..., :2] - seen["if"][0])[:, 3:-3, 3:-3].max()
    assert (apart < 0.03) if paired else (apart > 0.2)
    assert np.abs(seen["he"][0] - seen["he"][1]).max() > 0.2


def test_another_modality_beside_it_changes_nothing():
    images = picture(3)
    of = {"he": Modality(size=12), "genes": Modality("vector", 5)}
    for paired in (True, False):
        alone = plan({"he": "crop"}, of, paired_geometry=paired)
        beside = plan({"genes": "noise", "he": "crop"}, of, paired_geometry=paired)
        got = jax.jit(beside)(KEY, {"he": images, "genes": np.ones((3, 5), np.float32)})
        np.testing.assert_allclose(got["he"][0], jax.jit(alone)(KEY, {"he": images})["he"][0], atol=1e-6)


def test_label_maps_stay_discrete_and_encoders_stand_side_by_side():
    labels = picture(3, 20, 2, np.uint16, 5)
    view = parse("crop(.3,1)|rotate(180)|onehot(4,1)|boundary|foreground|embed(5,3)", size=18, kind="map", channels=2)
    seen = np.asarray(jax.jit(view)(KEY, labels))
    assert seen.shape == (3, 18, 18, view.out_channels) == (3, 18, 18, 9)
    assert set(np.unique(seen[..., :6])) == {0.0, 1.0}
    assert set(np.unique(seen[..., :4].sum(-1))) == {0.0, 1.0}  # label 4 is beyond the classes: no channel
    table = view_partners.embedding_table(5, 3)
    np.testing.assert_allclose(np.linalg.norm(table[1:], axis=1), 1, atol=1e-6)
    assert not table[0].any()
    nearest = np.abs(seen[..., 6:, None] - table.T).max(-2).min(-1)
    assert nearest.max() < 1e-6
    np.testing.assert_array_equal(seen[..., 6:].any(-1), seen[..., 5] > 0)


def test_a_boundary_is_where_one_of_four_neighbours_differs():
    labels = np.random.default_rng(2).choice(3, (15, 15), p=[0.5, 0.25, 0.25]).astype(np.uint16)
    view = parse("boundary", size=15, kind="map", channels=1)
    expected = np.zeros((15, 15))
    for r in range(15):
        for c in range(15):
            around = [
                labels[i, j] for i, j in ((r - 1, c), (r + 1, c), (r, c - 1), (r, c + 1)) if 0 <= i < 15 and 0 <= j < 15
            ]
            expected[r, c] = labels[r, c] > 0 and any(other != labels[r, c] for other in around)
    np.testing.assert_array_equal(np.asarray(jax.jit(view)(KEY, labels[None, ..., None]))[0, ..., 0], expected)


def test_counts_are_scaled_to_one_sum_and_logged():
    counts = np.random.default_rng(0).poisson(2.0, (4, 9)).astype(np.float32)
    counts[1] = 0
    got = parse("log1p(100)|normalise", kind="vector", channels=9, mean=np.arange(9.0), std=np.full(9, 2.0))(
        KEY, counts
    )
    total = np.maximum(counts.sum(1, keepdims=True), 1)
    np.testing.assert_allclose(got, (np.log1p(counts / total * 100) - np.arange(9)) / 2, atol=1e-5)
    np.testing.assert_allclose(jax.jit(parse("log1p(0)", kind="vector"))(KEY, counts), np.log1p(counts), atol=1e-6)


def test_gene_dropout_and_permutation_take_a_uniform_share_of_the_genes():
    genes, rows = 400, 400

    def drawn(name, **args):
        op = KINDS["vector"][name]
        keys = jax.random.split(KEY, rows)
        return {
            k: np.asarray(v)
            for k, v in jax.jit(jax.vmap(lambda k: op.draw(sources(k, 1)[0], args, (genes,))))(keys).items()
        }

    dropped = 1 - drawn("genedrop", max=0.2)["keep"].mean(1)
    assert abs(dropped.mean() - 0.1) < 0.01
    assert 0.17 < dropped.max() < 0.27
    assert dropped.min() < 0.02
    source = drawn("permute", max=0.1)["source"]
    np.testing.assert_array_equal(np.sort(source, 1), np.broadcast_to(np.arange(genes), (rows, genes)))
    moved = (source != np.arange(genes)).mean(1)
    assert abs(moved.mean() - 0.05) < 0.006
    assert moved.max() < 0.16
    noise = drawn("noise", std=0.3, p=1.0)["noise"]
    assert abs(noise.std() - 0.3) < 0.005
    vector = np.arange(genes, dtype=np.float32)
    got = view_partners.permute({"source": jnp.asarray(source[0])}, jnp.asarray(vector), {})
    np.testing.assert_array_equal(got, source[0])


def test_a_wrong_array_is_refused_with_its_shape_or_type():
    view = parse("flip", size=8)
    with pytest.raises(ValueError, match=r"takes an array \[rows, height, width, 3\], not \[2, 8, 8, 4\]"):
        view(KEY, np.zeros((2, 8, 8, 4), np.uint8))
    with pytest.raises(ValueError, match="takes uint8, uint16 or floating point, not int32"):
        view(KEY, np.zeros((2, 8, 8, 3), np.int32))
    with pytest.raises(ValueError, match="takes integers, not float32"):
        parse("boundary", size=8, kind="map", channels=1)(KEY, np.zeros((2, 8, 8, 1), np.float32))
    with pytest.raises(ValueError, match=r"takes an array \[rows, length\], not \[3\]"):
        parse("log1p", kind="vector")(KEY, np.zeros(3, np.float32))


def test_the_contact_sheet_shows_every_modality_and_view(tmp_path):
    of = {
        "he": Modality(size=16),
        "if": Modality(channels=5, size=16),
        "nuclei": Modality("map", 1, 16),
        "genes": Modality("vector", 30),
    }
    specs = {
        "he": "2*crop|flip|normalise",
        "if": "crop|flip",
        "nuclei": "crop|flip|onehot(4)|boundary",
        "genes": "log1p",
    }
    batch = {
        "he": np.full((3, 20, 20, 3), 200, np.uint8),
        "if": picture(3, 20, 5, np.uint16, 4000),
        "nuclei": picture(3, 20, 1, np.uint16, 4),
        "genes": np.random.default_rng(0).poisson(2.0, (3, 30)).astype(np.float32),
    }
    path = contact_sheet.draw(specs, batch, tmp_path / "views.png", modalities=of, rows=2)
    assert [p.name for p in tmp_path.iterdir()] == ["views.png"]
    with Image.open(path) as sheet:
        pixels = np.asarray(sheet.convert("RGB"))
    cell, gap, header = contact_sheet.CELL, contact_sheet.GAP, contact_sheet.HEADER
    assert pixels.shape == (header + 2 * (cell + gap) + gap, 9 * (cell + gap) + gap, 3)
    for column in range(3):  # stored, and two views from which the normalisation is taken back
        left = gap + column * (cell + gap)
        assert np.abs(pixels[header : header + cell, left : left + cell].astype(int) - 200).max() <= 1


def test_only_takes_one_channel_and_refuses_one_that_is_not_there():
    images = np.random.default_rng(0).integers(0, 60000, (3, 8, 8, 4)).astype(np.uint16)
    view = parse("centre|only(2)|scale(60000)", size=8, channels=4)
    assert view.out_channels == 1
    np.testing.assert_allclose(view(jax.random.key(0), images), images[..., 2:3] / 60000, atol=1e-5)
    with pytest.raises(ValueError, match="reads channel 4 of an image that has 4"):
        parse("centre|only(4)", size=8, channels=4)
