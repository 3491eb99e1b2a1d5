"""Heads of bags against float64 restatements; what must not matter to them, and bags of no tile and of one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mfl_jax.models.mil import make_mil

DIM = 6
SPECS = [
    "meanpool",
    "maxpool",
    "chowder,hidden=9,top=3,bottom=4,widths=7-5",
    "deepmil,hidden=9,attention=5,widths=7-4",
    "clam,hidden=9,attention=5,tiles=3",
    "transformer,width=8,heads=2",
    "hipt,width=6,heads=3",
    "instance,hidden=7",
    "instance,hidden=7,topk=3",
]


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def relu(x):
    return np.maximum(x, 0)


def lin(p, x):
    return x @ p["w"] + p.get("b", 0)


def stack(layers, x, act):
    for layer in layers[:-1]:
        x = act(lin(layer, x))
    return lin(layers[-1], x)


def softmax(a):
    e = np.exp(a - a.max())
    return e / e.sum()


def gated(p, h):
    return lin(p["w"], np.tanh(lin(p["v"], h)) * sigmoid(lin(p["u"], h)))[:, 0]


def meanpool(p, x):
    logits = lin(p["out"], x.mean(0))
    return logits, lin(p["out"], x)[:, logits.argmax()]


def maxpool(p, x):
    logits = lin(p["out"], x.max(0))
    scores = np.zeros(len(x))
    for d in range(x.shape[1]):
        scores[x[:, d].argmax()] += x[:, d].max() * p["out"]["w"][d, logits.argmax()]
    return logits, scores


def chowder(p, x):
    tiles = stack(p["tile"], x, sigmoid)
    logits = []
    for column in tiles.T:
        up = np.sort(column)
        top, bottom = up[::-1][:3], up[:4]
        top = np.append(top, [top[-1]] * (3 - len(top)))
        bottom = np.append(bottom, [bottom[-1]] * (4 - len(bottom)))
        logits.append(stack(p["bag"], np.append(top, bottom), relu)[0])
    return np.array(logits), tiles[:, np.argmax(logits)]


def deepmil(p, x):
    h = lin(p["embed"], x)
    a = softmax(gated(p["gate"], h))
    return stack(p["bag"], a @ h, relu), a


def clam(p, x):
    h = relu(lin(p["embed"], x))
    a = softmax(gated(p["gate"], h))
    return lin(p["out"], a @ h), a


def norm(q, t):
    t = t - t.mean(-1, keepdims=True)
    return t / np.sqrt((t**2).mean(-1, keepdims=True) + 1e-5) * q["scale"] + q["bias"]


def transformer(p, x):
    t = np.concatenate([p["cls"][None], relu(lin(p["embed"], x))])
    for block in p["blocks"]:
        q, k, v = np.split(lin(block["qkv"], norm(block["norm"], t)), 3, 1)
        mixed, seen = np.zeros_like(t), []
        for head in (slice(0, 4), slice(4, 8)):
            w = np.stack([softmax(row) for row in q[:, head] @ k[:, head].T / 2])
            mixed[:, head] = w @ v[:, head]
            seen.append(w[0, 1:])
        t = t + lin(block["proj"], mixed)
    return lin(p["out"], norm(p["norm"], t[0])), np.mean(seen, 0)


def hipt(p, x):
    t = relu(lin(p["embed"], x))
    for block in p["blocks"]:
        q, k, v = np.split(lin(block["qkv"], t), 3, 1)
        mixed = np.zeros_like(t)
        for head in (slice(0, 2), slice(2, 4), slice(4, 6)):
            w = np.stack([softmax(row) for row in q[:, head] @ k[:, head].T / np.sqrt(2)])
            mixed[:, head] = w @ v[:, head]
        t = norm(block["norms"][0], t + lin(block["proj"], mixed))
        t = norm(block["norms"][1], t + stack(block["mlp"], t, relu))
    a = softmax(gated(p["gate"], t))
    return lin(p["out"], relu(lin(p["bag"], a @ t))), a


def instance(p, x, topk=0):
    tiles = stack(p["tile"], x, relu)
    logits = np.sort(tiles, 0)[::-1][: topk or len(x)].mean(0)
    return logits, tiles[:, logits.argmax()]


ORACLES = [meanpool, maxpool, chowder, deepmil, clam, transformer, hipt, instance, lambda p, x: instance(p, x, 3)]


def made(spec, out, tiles, seed=0):
    head = make_mil(spec)
    draw = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda key: head.init(key, DIM, out), jax.random.key(0))
    params = jax.tree.map(lambda leaf: draw.uniform(-0.6, 0.6, leaf.shape).astype(np.float32), shapes)
    return head, params, draw.standard_normal((tiles, DIM)).astype(np.float32)


def padded(x, length):
    """Rows that are not there hold numbers that would show."""
    return jnp.asarray(np.pad(x, ((0, length - len(x)), (0, 0)), constant_values=50.0)), np.arange(length) < len(x)


def check(spec, oracle, out, sizes):
    """As the formula has it for unpadded tiles, in the order given and in another."""
    head, params, x = made(spec, out, max(sizes))
    exact = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    run = jax.jit(head.apply)
    for tiles in sizes:
        expected, of_tiles = oracle(exact, x[:tiles].astype(np.float64))
        for order in (np.arange(tiles), np.random.default_rng(1).permutation(tiles)):
            logits, scores = run(params, *padded(x[order], 16))
            assert logits.shape == (out,)
            np.testing.assert_allclose(logits, expected, rtol=2e-5, atol=2e-6)
            np.testing.assert_allclose(scores[:tiles], of_tiles[order], rtol=2e-5, atol=2e-6)
            assert not np.asarray(scores[tiles:]).any()


@pytest.mark.parametrize(("spec", "oracle"), list(zip(SPECS, ORACLES, strict=True)), ids=SPECS)
def test_a_head_is_its_formula_whatever_the_padding_and_the_order(spec, oracle):
    check(spec, oracle, 3, (11, 2, 1))


@pytest.mark.parametrize("which", [2, 3], ids=["chowder", "deepmil"])
def test_one_logit_is_enough_for_two_classes(which):
    check(SPECS[which], ORACLES[which], 1, (11, 2))


@pytest.mark.parametrize("spec", SPECS)
def test_bags_of_no_tile_and_of_one_are_finite_and_can_be_learnt_from(spec):
    head, params, x = made(spec, 2, 1)

    def loss(params, bag, mask):
        total = head.apply(params, bag, mask, jax.random.key(1), True)[0].sum()
        return total + (head.instance(params, bag, mask, 1) if head.instance else 0.0)

    run = jax.jit(jax.value_and_grad(loss))
    for tiles in (0, 1):
        value, grads = run(params, *padded(x[:tiles], 8))
        assert np.isfinite(value)
        assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
    assert sum(float(abs(g).sum()) for g in jax.tree.leaves(grads)) > 0


def test_many_queries_go_in_blocks_and_the_blocks_are_the_whole(monkeypatch):
    head, params, x = made("transformer,width=8,heads=2", 2, 21)
    whole = jax.jit(head.apply)(params, *padded(x, 24))
    monkeypatch.setattr("mfl_jax.models.mil.QUERIES", 7)
    head, *_ = made("transformer,width=8,heads=2", 2, 21)
    for a, b in zip(whole, jax.jit(head.apply)(params, *padded(x, 24)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("subtyping", [False, True])
@pytest.mark.parametrize("tiles", [9, 5])
def test_the_loss_over_tiles_is_that_of_clam(subtyping, tiles):
    head, params, x = made("clam,hidden=9,attention=5,tiles=3" + (",subtyping" if subtyping else ""), 3, tiles)
    found = jax.jit(head.instance)(params, *padded(x, 12), 2)
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    h = relu(lin(p["embed"], x.astype(np.float64)))
    order, k = np.argsort(-gated(p["gate"], h)), min(3, tiles // 2)
    each = []
    for c in range(3):
        z = h @ p["instance"]["w"][c] + p["instance"]["b"][c]
        said = z - np.log(np.exp(z).sum(1, keepdims=True))
        if c == 2:
            each += [*-said[order[:k], 1], *-said[order[::-1][:k], 0]]
        elif subtyping:
            each += [*-said[order[:k], 0]]
    assert float(found) == pytest.approx(np.mean(each), rel=1e-5)


def test_layers_start_within_one_over_the_root_of_their_inputs():
    params = make_mil("clam,hidden=400,attention=90").init(jax.random.key(0), 25, 3)
    for layer, inputs in ((params["embed"], 25), (params["instance"], 400), (params["gate"]["w"], 90)):
        assert 0.98 < abs(layer["w"]).max() * np.sqrt(inputs) <= 1
        assert abs(layer["w"].mean()) * np.sqrt(inputs) < 0.2
    assert params["instance"]["w"].shape == (3, 400, 2)
    assert not np.array_equal(params["instance"]["b"][0], params["instance"]["b"][1])


def test_dropout_is_for_training_alone():
    head, params, x = made("clam,hidden=9,attention=5,tiles=3", 1, 8)
    bag, mask = padded(x, 8)
    plain = head.apply(params, bag, mask)[0]
    assert np.array_equal(plain, head.apply(params, bag, mask, jax.random.key(0), False)[0])
    dropped = [head.apply(params, bag, mask, jax.random.key(i), True)[0] for i in range(40)]
    assert not np.array_equal(plain, dropped[0])
    assert abs(np.mean(dropped) - plain[0]) < 4 * np.std(dropped) / np.sqrt(40) + 0.05


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("deepmill", "did you mean 'deepmil'"),
        ("deepmil,hiden=3", "did you mean 'hidden'"),
        ("chowder,activation=tanh", "activation is relu or sigmoid, not 'tanh'"),
        ("transformer,width=10,heads=4", "cannot be shared by 4 heads"),
    ],
)
def test_a_wrong_spec_is_refused(spec, message):
    with pytest.raises(ValueError, match=message):
        make_mil(spec)
