"""The region ViT: against torch with the same weights, and that a tile which is not there has no say."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mfl_jax.models import layers, make
from mfl_jax.trees import named_leaves
from tests.mfl_jax.models.test_parity import KEY, noise, shake, to_torch, torch_block

SPEC = "grid_vit,features=24,blocks=2,heads=3"


def regions(rows=3, side=4, features=5, seed=0):
    there = np.random.default_rng(seed).random((rows, side, side, 1)) < 0.6
    return np.concatenate([noise(rows, side, side, features) * there, there], -1).astype(np.float32)


@pytest.fixture(scope="module")
def made():
    model = make(SPEC)
    params, stats = model.init(KEY, regions())
    run = jax.jit(lambda p, x: model.apply(p, stats, x, train=False, maps=True))
    return model, shake(params), run


def test_the_numbers_are_those_of_hipt():
    model = make("grid_vit")
    like = jax.eval_shape(lambda k: model.init(k, jnp.zeros((1, 14, 14, 385))), KEY)[0]
    assert model.dim == 192
    count = sum(leaf.size for leaf in named_leaves(like).values())
    block = 2 * 2 * 192 + (192 * 576 + 576) + (192 * 192 + 192) + (192 * 768 + 768) + (768 * 192 + 192)
    assert count == (384 * 192 + 192) + 192 + 197 * 192 + 6 * block + 2 * 192


@pytest.mark.parametrize("side", [4, 3, 6])
def test_it_is_what_torch_computes_of_the_tiles_that_are_there(made, side):
    """Missing tiles are left out of torch's sequence altogether. Positions are resized as DINO and HIPT do."""
    torch = pytest.importorskip("torch")
    _, params, run = made
    x = regions(side=side, seed=1)
    w = {name: to_torch(torch, name, value) for name, value in named_leaves(params).items()}
    f = torch.nn.functional
    grid = w["pos_embed"][:, 1:].reshape(1, 4, 4, 24).permute(0, 3, 1, 2)
    if side != 4:
        grid = f.interpolate(grid, scale_factor=((side + 0.1) / 4,) * 2, mode="bicubic")
    assert grid.shape[2:] == (side, side)
    positions = grid.flatten(2).transpose(1, 2)
    features, maps = run(params, x)
    for row in range(len(x)):
        there = x[row, ..., -1].reshape(-1) == 1
        tiles = torch.tensor(x[row, ..., :-1].reshape(-1, 5)[there])
        tokens = f.gelu(f.linear(tiles, w["phi/kernel"], w["phi/bias"])) + positions[0, there]
        t = torch.cat([w["cls_token"][0] + w["pos_embed"][0, :1], tokens])[None]
        for i in range(2):
            t = torch_block(torch, w, f"blocks_{i}/", t)
        t = f.layer_norm(t, (24,), w["norm/scale"], w["norm/bias"], 1e-6)[0]
        np.testing.assert_allclose(features[row], t[0], rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(maps[row].reshape(-1, 24)[there], t[1:], rtol=1e-4, atol=1e-4)


def test_what_stands_in_a_masked_cell_changes_nothing_and_no_tile_at_all_is_finite(made):
    model, params, run = made
    x = regions()
    x[2] = 0
    features, maps = run(params, x)
    assert np.isfinite(features).all()
    assert not np.asarray(maps)[x[..., -1] == 0].any()
    filled = np.where(x[..., -1:] == 1, x, np.array([np.nan] * 5 + [0], np.float32))
    for a, b in zip(run(params, filled), (features, maps), strict=True):
        np.testing.assert_array_equal(a, b)
    moved = x.copy()
    moved[0, ..., 0] += x[0, ..., -1]
    assert np.abs(run(params, moved)[0] - features)[0].max() > 1e-3
    gradient = jax.jit(jax.grad(lambda x: model.apply(params, {}, x, train=False)[0].std()))(filled)
    assert np.isfinite(gradient).all()
    assert not np.asarray(gradient)[x[..., -1] == 0].any()


def test_the_mean_over_tiles_that_are_there(made):
    _, params, run = made
    x = regions()
    x[1] = 0
    mean = make(SPEC + ",pool=mean").apply(params, {}, x, train=False)[0]
    maps, there = np.asarray(run(params, x)[1]), x[..., -1] == 1
    for row in (0, 2):
        np.testing.assert_allclose(mean[row], maps[row][there[row]].mean(0), rtol=1e-4, atol=1e-5)
    assert not np.asarray(mean[1]).any()


def test_drop_path_acts_while_training_alone():
    model, x = make(SPEC + ",drop_path=.5"), regions()
    params, stats = model.init(KEY, x)
    run = jax.jit(lambda key, train: model.apply(params, stats, x, train=train, rng=key)[0], static_argnums=1)
    still = [np.asarray(run(jax.random.key(i), False)) for i in range(2)]
    moved = [np.asarray(run(jax.random.key(i), True)) for i in range(2)]
    np.testing.assert_array_equal(*still)
    assert np.abs(moved[0] - moved[1]).max() > 1e-3


@pytest.mark.parametrize(("spec", "message"), [("heads=5", "cannot be shared by 5 heads"), ("pool=max", "cls or mean")])
def test_settings_that_cannot_be_are_refused(spec, message):
    with pytest.raises(ValueError, match=message):
        make(f"grid_vit,{spec}")


@pytest.mark.parametrize(("old", "new"), [(14, 6), (14, 16), (4, 3)])
def test_an_offset_moves_positions_as_in_dino(old, new):
    torch = pytest.importorskip("torch")
    grid = noise(old, old, 3)
    planes = torch.tensor(grid).permute(2, 0, 1)[None]
    theirs = torch.nn.functional.interpolate(planes, scale_factor=((new + 0.1) / old,) * 2, mode="bicubic")
    ours = layers.resize_grid(jnp.asarray(grid), new, new, 0.1)
    np.testing.assert_allclose(ours, theirs[0].permute(1, 2, 0), rtol=1e-4, atol=1e-5)
    assert np.abs(layers.resize_grid(jnp.asarray(grid), new, new) - ours).max() > 1e-3
