"""Our layers and networks against torch with the same weights (a test extra), and what torch is not needed for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from mfl_jax.models import layers, make
from mfl_jax.trees import named_leaves

KEY = jax.random.key(0)


def noise(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def shake(tree, seed=0):
    """Every leaf gets values that no initialiser gives, so that an ignored parameter shows."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: np.asarray(x) + 0.1 * rng.random(x.shape).astype(np.float32), tree)


@pytest.mark.parametrize(("size", "stride", "pixels"), [(1, 2, 5), (3, 1, 2), (3, 2, 4), (7, 2, 9)])
def test_convolutions_agree_in_value_and_gradient(size, stride, pixels):
    """The patch form against XLA's own convolution."""
    x, kernel = noise(2, pixels, pixels, 3), noise(size, size, 3, 5, seed=1)
    pad = [(size // 2, size // 2)] * 2

    def theirs(x, kernel):
        return jax.lax.conv_general_dilated(x, kernel, (stride,) * 2, pad, dimension_numbers=("NHWC", "HWIO", "NHWC"))

    def both(convolve):
        def run(x, kernel):
            out, back = jax.vjp(convolve, x, kernel)
            return out, back(jnp.sin(out))

        return jax.tree.leaves(jax.jit(run)(x, kernel))

    for a, b in zip(both(lambda x, k: layers.patch_convolve(x, k, stride)), both(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("shift", [0.0, 100.0])
def test_batch_norm_against_numpy(groups, shift):
    x = noise(4, 3, 3, 2) * np.array([1.0, 1e-2], np.float32) + shift
    module = layers.BatchNorm(groups=groups)
    variables = module.init(KEY, x, True)
    if shift:  # the running mean of a network that has been trained
        variables["batch_stats"]["mean"] = jnp.full(2, shift)
    run = jax.jit(lambda v, x: module.apply(v, x, True, mutable=["batch_stats"]))
    y, new = run(variables, x)
    rows = x.astype(np.float64).reshape(groups, -1, 2)
    mean, var = rows.mean(1, keepdims=True), rows.var(1, keepdims=True)
    np.testing.assert_allclose(y, ((rows - mean) / np.sqrt(var + 1e-5)).reshape(x.shape), rtol=2e-3, atol=2e-3)
    expected = 0.1 * rows.mean((0, 1)) + 0.9 * shift
    np.testing.assert_allclose(new["batch_stats"]["mean"], expected, rtol=1e-5, atol=1e-6)
    unbiased = rows.var(1, ddof=1).mean(0)
    np.testing.assert_allclose(new["batch_stats"]["var"], 0.9 + 0.1 * unbiased, rtol=1e-4)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("relu", [False, True])
def test_gradient_of_batch_norm_against_differences(groups, relu):
    x, slope = noise(4, 3, 2) * 3 + 1, noise(4, 3, 2)
    scale, bias = np.array([1.5, -0.5], np.float32), np.array([0.3, 0.1], np.float32)
    module = layers.BatchNorm(groups=groups, relu=relu)
    stats = {"mean": jnp.full(2, 0.7), "var": jnp.ones(2)}

    def ours(x, scale, bias):
        variables = {"params": {"scale": scale, "bias": bias}, "batch_stats": stats}
        return jnp.sum(module.apply(variables, x, True, mutable=["batch_stats"])[0] * slope)

    def plain(x, scale, bias):
        rows = x.reshape(groups, -1, 2)
        y = (rows - rows.mean(1, keepdims=True)) / np.sqrt(rows.var(1, keepdims=True) + 1e-5) * scale + bias
        return np.sum((np.maximum(y, 0) if relu else y).reshape(x.shape) * slope)

    found = jax.jit(jax.grad(ours, (0, 1, 2)))(x, scale, bias)
    given = [np.asarray(a, np.float64) for a in (x, scale, bias)]
    for which, gradient in enumerate(found):
        for place in np.ndindex(gradient.shape):
            moved = []
            for by in (1e-5, -1e-5):
                args = [a.copy() for a in given]
                args[which][place] += by
                moved.append(plain(*args))
            np.testing.assert_allclose(gradient[place], (moved[0] - moved[1]) / 2e-5, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("side", [(7, 8), (4, 5)])
def test_gradient_of_max_pool_goes_to_the_first_of_the_largest(side):
    x = np.round(np.abs(noise(2, *side, 3)))  # many are equal
    size = [(n + 1) // 2 for n in side]
    slope = noise(2, *size, 3)
    value, gradient = jax.jit(jax.value_and_grad(lambda x: jnp.sum(layers.max_pool(x) * slope)))(x)
    expected, total = np.zeros_like(x), 0.0
    for b, i, j, c in np.ndindex(slope.shape):
        rows, columns = (slice(max(2 * k - 1, 0), 2 * k + 2) for k in (i, j))
        window = x[b, rows, columns, c]
        a, d = divmod(int(window.argmax()), window.shape[1])
        expected[b, rows.start + a, columns.start + d, c] += slope[b, i, j, c]
        total += window.max() * slope[b, i, j, c]
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(value, total, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(jax.jit(layers.max_pool)(x), jax.jit(lambda x: layers._max_pool(x)[0])(x))


def test_gelu_against_its_definition():
    from scipy.special import erf

    x = np.concatenate([noise(50) * 3, [0, -30, 30, -1e4, 1e4]]).astype(np.float32)
    value, slope = jax.jit(jax.vmap(jax.value_and_grad(layers.gelu)))(x)
    wide = x.astype(np.float64)
    share = (1 + erf(wide / np.sqrt(2))) / 2
    np.testing.assert_allclose(value, wide * share, rtol=1e-5, atol=2e-6)
    density = np.exp(-np.minimum(wide**2, 1e3) / 2) / np.sqrt(2 * np.pi)
    np.testing.assert_allclose(slope, share + wide * density, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("some", [False, True])
def test_attention_and_its_gradient_against_those_that_jax_derives(some):
    def plain(qkv):
        q, k, v = qkv.transpose(2, 0, 3, 1, 4)
        logits = q @ k.swapaxes(-1, -2) / np.sqrt(qkv.shape[-1])
        if some:
            logits = jnp.where(there[:, None, None], logits, -jnp.inf)
        return (jax.nn.softmax(logits) @ v).transpose(0, 2, 1, 3)

    qkv, slope = noise(3, 7, 3, 2, 5), noise(3, 7, 2, 5)
    there = np.arange(7) < np.array([[7], [1], [4]]) if some else None
    found, back = jax.vjp(lambda x: layers.attend(x, there), qkv)
    expected, derived = jax.vjp(plain, qkv)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(back(slope)[0], derived(slope)[0], rtol=1e-4, atol=1e-6)


def test_what_all_keys_share_does_not_show_in_the_gradient_of_rounded_queries():
    """A softmax is blind to it; in bfloat16 it is only as long as the rows of the gradient of the logits sum to 0."""
    draw = np.random.default_rng(0)
    qkv = draw.normal(size=(2, 33, 3, 2, 32)) + np.array([0, 3, 3])[:, None, None]
    slope = draw.normal(size=(2, 33, 2, 32))
    of = {}
    for dtype in (jnp.float32, jnp.bfloat16):
        rounded = jnp.asarray(qkv, jnp.bfloat16).astype(dtype)
        back = jax.jit(lambda x: jax.vjp(layers.attend, x)[1](jnp.asarray(slope, jnp.bfloat16).astype(x.dtype))[0])
        of[dtype] = np.asarray(back(rounded), np.float32)[:, :, 0]
    wrong = np.linalg.norm(of[jnp.bfloat16] - of[jnp.float32]) / np.linalg.norm(of[jnp.float32])
    assert wrong < 0.03


@pytest.mark.parametrize(("wide", "features"), [(192, 200), (200, 192), (9, 5)])
def test_a_dense_layer_and_its_gradient_against_those_that_jax_derives(wide, features):
    dense, x, slope = layers.Dense(features), noise(2, 300, wide), noise(2, 300, features)
    params = jax.tree.map(lambda p: p + 0.1, dense.init(KEY, x))
    found, back = jax.vjp(jax.jit(dense.apply), params, x)
    expected, derived = jax.vjp(lambda p, x: x @ p["params"]["kernel"] + p["params"]["bias"], params, x)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4), back(slope), derived(slope))


@pytest.mark.parametrize("use_bias", [False, True])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_half_a_norm_and_a_dense_layer_are_a_norm_and_a_dense_layer(use_bias, dtype):
    """In value, and in the gradient of x and of all parameters, which have the same names."""
    ours = [layers.HalfNorm(), layers.Dense(7, use_bias, dtype=dtype)]
    theirs = [nn.LayerNorm(epsilon=1e-6, dtype=dtype), nn.Dense(7, use_bias, dtype=dtype)]
    x, slope = 3 * noise(2, 5, 9) + 1, noise(2, 5, 7, seed=1)
    params = [shake(module.init(KEY, x), seed) for seed, module in enumerate(theirs)]

    def first(params, x):
        return ours[1].apply(params[1], *ours[0].apply(params[0], x.astype(dtype))).astype(jnp.float32)

    def second(params, x):
        return theirs[1].apply(params[1], theirs[0].apply(params[0], x.astype(dtype))).astype(jnp.float32)

    found, back = jax.vjp(jax.jit(first), params, x)
    expected, derived = jax.vjp(second, params, x)
    exact = {"rtol": 1e-5, "atol": 1e-5} if dtype == jnp.float32 else {"rtol": 0.05, "atol": 0.05}
    np.testing.assert_allclose(found, expected, **exact)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **exact), back(slope), derived(slope))


def test_groups_that_do_not_divide_the_batch_are_refused():
    module = layers.BatchNorm(groups=3)
    with pytest.raises(ValueError, match="4 rows cannot be normalised in bn_groups=3"):
        module.init(KEY, noise(4, 2), True)


def test_fold_blocks_keeps_the_pixels_of_a_block_together():
    x = np.arange(2 * 4 * 6 * 3).reshape(2, 4, 6, 3)
    y = np.asarray(layers.fold_blocks(x, 2))
    assert y.shape == (2, 2, 3, 12)
    np.testing.assert_array_equal(y[1, 1, 2], x[1, 2:4, 4:6].reshape(-1))
    with pytest.raises(ValueError, match="5 x 4 px cannot be cut into blocks of 2 px"):
        layers.fold_blocks(np.zeros((1, 5, 4, 3)), 2)


def test_positions_of_no_square_cannot_be_resized():
    model = make("vit_ti8,features=12,heads=3,blocks=1")
    params, stats = model.init(KEY, np.zeros((1, 16, 24, 3)))
    assert model.apply(params, stats, np.zeros((1, 16, 24, 3)), train=False)[0].shape == (1, 12)
    with pytest.raises(ValueError, match="6 patches, which is no square"):
        model.apply(params, stats, np.zeros((1, 16, 16, 3)), train=False)


def test_rematerialisation_changes_no_number():
    x = noise(2, 16, 16, 3)
    results = []
    for remat in (False, True):
        model = make("vit_ti8,features=12,heads=3,blocks=1", remat=remat)
        params, stats = model.init(KEY, x)
        run = jax.jit(jax.grad(lambda p, m=model, s=stats: jnp.sum(m.apply(p, s, x, train=True)[0] ** 2)))
        results.append(run(params))
    for a, b in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("new", [(7, 7), (3, 5), (4, 4), (9, 2)])
def test_positions_are_resized_as_torch_does(new):
    torch = pytest.importorskip("torch")
    grid = noise(4, 4, 3)
    theirs = torch.nn.functional.interpolate(
        torch.tensor(grid).permute(2, 0, 1)[None], size=new, mode="bicubic", align_corners=False
    )
    np.testing.assert_allclose(
        layers.resize_grid(jnp.asarray(grid), *new), theirs[0].permute(1, 2, 0), rtol=1e-4, atol=1e-5
    )


def to_torch(torch, name, value):
    value = np.asarray(value)
    if name.endswith("kernel"):
        value = value.transpose(3, 2, 0, 1) if value.ndim == 4 else value.T
    return torch.tensor(np.ascontiguousarray(value))


def torch_block(torch, weights, name, x):
    """Pre-norm transformer block of three heads from torch's own functions."""
    f = torch.nn.functional
    w = {key.removeprefix(name): value for key, value in weights.items() if key.startswith(name)}
    d = x.shape[-1]
    h = f.layer_norm(x, (d,), w["norm1/scale"], w["norm1/bias"], 1e-6)
    qkv = (
        f.linear(h, w["attn/qkv/kernel"], w["attn/qkv/bias"]).reshape(*x.shape[:2], 3, 3, d // 3).permute(2, 0, 3, 1, 4)
    )
    h = f.scaled_dot_product_attention(*qkv.unbind(0)).transpose(1, 2).reshape(x.shape)
    x = x + f.linear(h, w["attn/proj/kernel"], w["attn/proj/bias"])
    h = f.layer_norm(x, (d,), w["norm2/scale"], w["norm2/bias"], 1e-6)
    h = f.gelu(f.linear(h, w["mlp/fc1/kernel"], w["mlp/fc1/bias"]))
    return x + f.linear(h, w["mlp/fc2/kernel"], w["mlp/fc2/bias"])


def test_vit_against_torch():
    torch = pytest.importorskip("torch")
    model, x = make("vit_ti8,features=24,heads=3,blocks=2,registers=2"), noise(2, 24, 24, 3)
    params, stats = model.init(KEY, np.zeros((1, 16, 16, 3)))
    params = shake(params)
    w = {name: to_torch(torch, name, value) for name, value in named_leaves(params).items()}
    f = torch.nn.functional
    kernel = torch.tensor(np.asarray(params["patch_embed"]["kernel"]).reshape(8, 8, 3, 24).transpose(3, 2, 0, 1))
    tokens = f.conv2d(torch.tensor(x).permute(0, 3, 1, 2), kernel, w["patch_embed/bias"], 8).flatten(2).transpose(1, 2)
    grid = w["pos_embed"][:, 1:].reshape(1, 2, 2, 24).permute(0, 3, 1, 2)
    grid = f.interpolate(grid, size=(3, 3), mode="bicubic", align_corners=False).flatten(2).transpose(1, 2)
    lead = torch.cat([w["cls_token"] + w["pos_embed"][:, :1], w["reg_token"]], 1).expand(2, -1, -1)
    t = torch.cat([lead, tokens + grid], 1)
    for i in range(2):
        t = torch_block(torch, w, f"blocks_{i}/", t)
    t = f.layer_norm(t, (24,), w["norm/scale"], w["norm/bias"], 1e-6)
    features, maps = jax.jit(lambda p, x: model.apply(p, stats, x, train=False, maps=True))(params, x)
    np.testing.assert_allclose(features, t[:, 0], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(maps.reshape(2, 9, 24), t[:, 3:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "spec", ["resnet18,width=0.125", pytest.param("resnet26,width=0.125,small_stem", marks=pytest.mark.slow)]
)
def test_resnet_against_torch(spec):
    """A training step's features, and the running statistics it leaves, from torch's own functions."""
    torch = pytest.importorskip("torch")
    f = torch.nn.functional
    model, x = make(spec), noise(8, 32, 32, 3)
    params, stats = model.init(KEY, x)
    last = "bn3/scale" if spec.startswith("resnet26") else "bn2/scale"  # a fresh residual branch is silent
    assert [np.max(leaf) for name, leaf in named_leaves(params).items() if name.endswith(last)] == [0.0] * 8
    params, stats = shake(params), shake(stats, 1)
    w = {name: to_torch(torch, name, value) for name, value in named_leaves(params).items()}
    s = {name: torch.tensor(np.asarray(value)) for name, value in named_leaves(stats).items()}

    def conv(t, name, stride=1):
        kernel = w[f"{name}/kernel"]
        return f.conv2d(t, kernel, stride=stride, padding=kernel.shape[-1] // 2)

    def norm(t, name):
        means = s[f"{name}/mean"], s[f"{name}/var"]
        return f.batch_norm(t, *means, w[f"{name}/scale"], w[f"{name}/bias"], True, 0.1, 1e-5)

    bottleneck, small = spec.startswith("resnet26"), "small_stem" in spec
    t = torch.relu(norm(conv(torch.tensor(x).permute(0, 3, 1, 2), "conv1", 1 if small else 2), "bn1"))
    t = t if small else f.max_pool2d(t, 3, 2, 1)
    for stage in range(4):
        for i in range(2):
            name, y = f"layer{stage + 1}_{i}", t
            stride = 2 if stage and not i else 1
            for j in range(1, 4 if bottleneck else 3):
                y = norm(conv(y, f"{name}/conv{j}", stride if j == (2 if bottleneck else 1) else 1), f"{name}/bn{j}")
                y = torch.relu(y) if f"{name}/conv{j + 1}/kernel" in w else y
            if f"{name}/downsample_0/kernel" in w:
                t = norm(conv(t, f"{name}/downsample_0", stride), f"{name}/downsample_1")
            t = torch.relu(t + y)
    features, new = jax.jit(lambda p, s, x: model.apply(p, s, x, train=True))(params, stats, x)
    np.testing.assert_allclose(features, t.mean((2, 3)), rtol=2e-3, atol=2e-3)
    for name, value in named_leaves(new).items():
        np.testing.assert_allclose(value, s[name], rtol=2e-3, atol=2e-3, err_msg=name)
