"""From a bag of tile features to one prediction: the heads of multiple-instance learning, as pure functions.

    head = make_mil("deepmil,hidden=128")
    params = head.init(key, dim, out)
    logits, scores = head.apply(params, bag, mask, rng, train)      # bag [N, D], mask bool [N] -> [out], [N]

Rows that `mask` leaves out change nothing, nor does the order of the others; a bag without any gives finite logits.
vmap over bags and over params. `scores` say what each tile adds: attention (sums to 1; a transformer's CLS token has a
part of it), or the tile's own logit, of the class that the bag gets where there are several. Layers start as those of
torch do: uniform within 1/sqrt(inputs).
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mfl_jax.models import check, choose, parse
from mfl_jax.models.layers import product

Params = Any
LOW = -1e30
QUERIES = 512  # rows of attention that exist at once


@dataclass(frozen=True)
class MILHead:
    """`instance(params, bag, mask, label) -> loss` is CLAM's, None elsewhere; the loss of the bag weighs `bag_weight`
    and that of its tiles the rest. `held` is about how many numbers a tile takes while training."""

    name: str
    init: Callable[[jax.Array, int, int], Params]
    apply: Callable[..., tuple[jax.Array, jax.Array]]
    instance: Callable[..., jax.Array] | None = None
    bag_weight: float = 1.0
    held: int = 1024


def make_mil(spec: str) -> MILHead:
    """meanpool, maxpool, chowder, deepmil, clam, transformer, hipt, instance; settings follow: 'chowder,top=5'."""
    name, settings = parse(spec)
    builder: Callable[..., Any] = choose(name, HEADS, "head of bags")
    return builder(spec, **check(builder, settings, spec))


@dataclass(frozen=True)
class Uniform:
    """An array to be: uniform within the bound."""

    shape: tuple[int, ...]
    bound: float


def fill(key: jax.Array, layout: Params) -> Params:
    """All that is Uniform in the layout, from one draw: a draw each would take seconds to compile."""
    leaves, tree = jax.tree.flatten(layout, is_leaf=lambda leaf: isinstance(leaf, Uniform))
    sizes = [math.prod(leaf.shape) if isinstance(leaf, Uniform) else 0 for leaf in leaves]
    draw = jax.random.uniform(key, (sum(sizes),), minval=-1.0, maxval=1.0)
    parts = jnp.split(draw, np.cumsum(sizes)[:-1])
    return jax.tree.unflatten(
        tree,
        [
            part.reshape(leaf.shape) * leaf.bound if isinstance(leaf, Uniform) else leaf
            for leaf, part in zip(leaves, parts, strict=True)
        ],
    )


def dense(inputs: int, outputs: int, bias: bool = True, copies: tuple[int, ...] = ()) -> dict[str, Uniform]:
    bound = 1 / math.sqrt(inputs)
    weight = {"w": Uniform((*copies, inputs, outputs), bound)}
    return weight | ({"b": Uniform((*copies, outputs), bound)} if bias else {})


def linear(p: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    # Of tiles the gradient of w is a product for each bag: left to itself XLA:CPU makes one of all bags.
    y = product(x, p["w"]) if x.ndim == 2 else x @ p["w"]
    return y + p["b"] if "b" in p else y


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {"relu": jax.nn.relu, "sigmoid": jax.nn.sigmoid}


def _activation(name: str, spec: str) -> Callable[[jax.Array], jax.Array]:
    if name not in ACTIVATIONS:
        raise ValueError(f"{spec!r}: activation is {' or '.join(ACTIVATIONS)}, not {name!r}")
    return ACTIVATIONS[name]


def layers(*widths: int) -> list[dict[str, Uniform]]:
    return [dense(a, b) for a, b in itertools.pairwise(widths)]


def mlp(params: list[dict[str, jax.Array]], x: jax.Array, act: Callable[[jax.Array], jax.Array]) -> jax.Array:
    for layer in params[:-1]:
        x = act(linear(layer, x))
    return linear(params[-1], x)


def masked_softmax(a: jax.Array, mask: jax.Array) -> jax.Array:
    """Over the last axis; all zero where nothing is left."""
    a = jnp.where(mask, a, LOW)
    e = jnp.where(mask, jnp.exp(a - lax.stop_gradient(a.max(-1, keepdims=True))), 0.0)
    return e / jnp.maximum(e.sum(-1, keepdims=True), 1e-30)


def masked_mean(x: jax.Array, mask: jax.Array) -> jax.Array:
    total = jnp.where(mask[:, None], x, 0.0).sum(0)
    return total / jnp.maximum(mask.sum(), 1)


def extremes(values: jax.Array, mask: jax.Array, k: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The k greatest, greatest first: values, their rows, and which of them exist. A bag of fewer tiles repeats its
    last one, so that it looks like a small bag and not like one with tiles of score 0; an empty one is all 0."""
    short = max(0, k - len(values))
    padded = jnp.pad(jnp.where(mask, values, LOW), (0, short), constant_values=LOW)
    best, rows = lax.top_k(padded, k)
    count = mask.sum()
    take = jnp.minimum(jnp.arange(k), jnp.maximum(count - 1, 0))
    best, rows = best[take], jnp.minimum(rows[take], len(values) - 1)
    return jnp.where(count > 0, best, 0.0), rows, jnp.arange(k) < count


def _said(tile_logits: jax.Array, logits: jax.Array) -> jax.Array:
    """[N] of [N, out]: of the class that the bag gets."""
    return tile_logits[:, 0] if logits.shape[0] == 1 else jnp.take(tile_logits, logits.argmax(), axis=1)


def _drop(x: jax.Array, rate: float, rng: jax.Array | None, train: bool) -> jax.Array:
    if not train or rng is None or not rate:
        return x
    return jnp.where(jax.random.bernoulli(rng, 1 - rate, x.shape), x / (1 - rate), 0.0)


def build_meanpool(spec: str) -> MILHead:
    """The mean of the tiles, then a linear layer."""

    def init(key, dim, out):
        return fill(key, {"out": dense(dim, out)})

    def apply(params, bag, mask, rng=None, train=False):
        logits = linear(params["out"], masked_mean(bag, mask))
        return logits, _said(linear(params["out"], bag), logits) * mask

    return MILHead(spec, init, apply)


def build_maxpool(spec: str) -> MILHead:
    """The greatest value of each feature over the tiles, then a linear layer; a tile's score is the part of the logit
    that comes from the features in which it is the greatest."""

    def init(key, dim, out):
        return fill(key, {"out": dense(dim, out)})

    def apply(params, bag, mask, rng=None, train=False):
        top = jnp.where(mask.any(), jnp.where(mask[:, None], bag, LOW).max(0), 0.0)
        logits = linear(params["out"], top)
        first = jnp.where(mask[:, None], bag, LOW).argmax(0)
        parts = top[:, None] * params["out"]["w"]
        own = jnp.zeros((len(bag), parts.shape[1]), parts.dtype).at[first].add(parts)
        return logits, _said(own, logits) * mask

    return MILHead(spec, init, apply)


def build_chowder(
    spec: str,
    *,
    hidden: int = 128,
    top: int = 10,
    bottom: int = 10,
    widths: tuple[int, ...] = (128, 64),
    activation: str = "relu",
) -> MILHead:
    """Tile scores D -> hidden -> 1, a sigmoid between; the `top` greatest (falling) and `bottom` least (rising) of them
    through an MLP. Several classes have a score each and share the MLP."""
    act = _activation(activation, spec)

    def init(key, dim, out):
        return fill(key, {"tile": layers(dim, hidden, out), "bag": layers(top + bottom, *widths, 1)})

    def apply(params, bag, mask, rng=None, train=False):
        tiles = mlp(params["tile"], bag, jax.nn.sigmoid)

        def one(score):
            greatest, _, _ = extremes(score, mask, top)
            least, _, _ = extremes(-score, mask, bottom)
            return mlp(params["bag"], jnp.concatenate([greatest, -least]), act)[0]

        logits = jax.vmap(one, in_axes=1)(tiles)
        return logits, _said(tiles, logits) * mask

    return MILHead(spec, init, apply)


def _gate(width: int, hidden: int) -> dict[str, Any]:
    return {"v": dense(width, hidden), "u": dense(width, hidden), "w": dense(hidden, 1)}


def _gated(p: dict[str, Any], h: jax.Array) -> jax.Array:
    return linear(p["w"], jnp.tanh(linear(p["v"], h)) * jax.nn.sigmoid(linear(p["u"], h)))[:, 0]


def build_deepmil(
    spec: str, *, hidden: int = 128, attention: int = 128, widths: tuple[int, ...] = (128, 64), activation: str = "relu"
) -> MILHead:
    """Gated attention: a linear layer D -> hidden, w(tanh(V h) * sigmoid(U h)), softmax over tiles, an MLP."""
    act = _activation(activation, spec)

    def init(key, dim, out):
        embed, gate = dense(dim, hidden), _gate(hidden, attention)
        return fill(key, {"embed": embed, "gate": gate, "bag": layers(hidden, *widths, out)})

    def apply(params, bag, mask, rng=None, train=False):
        h = linear(params["embed"], bag)
        weights = masked_softmax(_gated(params["gate"], h), mask)
        return mlp(params["bag"], weights @ h, act), weights

    return MILHead(spec, init, apply)


def build_clam(
    spec: str,
    *,
    hidden: int = 512,
    attention: int = 256,
    dropout: float = 0.25,
    tiles: int = 8,
    bag_weight: float = 0.7,
    subtyping: bool = False,
) -> MILHead:
    """CLAM with a single branch. The most and least attended `tiles` are told apart by a classifier of the bag's
    class, with cross-entropy (the original's default is a smooth SVM loss); `subtyping` also calls the most attended
    ones none of the other classes'. A bag of fewer than 2 * tiles gives half of its tiles to each side."""

    def init(key, dim, out):
        instance = dense(hidden, 2, copies=(2 if out == 1 else out,))
        gate, top = _gate(hidden, attention), dense(hidden, out)
        return fill(key, {"embed": dense(dim, hidden), "gate": gate, "out": top, "instance": instance})

    def apply(params, bag, mask, rng=None, train=False):
        h = _drop(jax.nn.relu(linear(params["embed"], bag)), dropout, rng, train)
        weights = masked_softmax(_gated(params["gate"], h), mask)
        return linear(params["out"], weights @ h), weights

    def instance(params, bag, mask, label):
        h = jax.nn.relu(linear(params["embed"], bag))
        attended = lax.stop_gradient(_gated(params["gate"], h))
        _, best, _ = extremes(attended, mask, tiles)
        _, worst, _ = extremes(-attended, mask, tiles)
        used = jnp.arange(tiles) < mask.sum() // 2
        both = jnp.concatenate([h[best], h[worst]])
        z = jnp.einsum("nd,cdk->cnk", both, params["instance"]["w"]) + params["instance"]["b"][:, None]
        said = jax.nn.log_softmax(z)
        own = jnp.arange(len(z)) == label
        loss_best = -jnp.where(own[:, None], said[:, :tiles, 1], said[:, :tiles, 0] if subtyping else 0.0)
        loss_worst = -jnp.where(own[:, None], said[:, tiles:, 0], 0.0)
        count = used.sum() * (len(z) + 1 if subtyping else 2)
        return jnp.where(used, loss_best + loss_worst, 0.0).sum() / jnp.maximum(count, 1)

    return MILHead(spec, init, apply, instance, bag_weight, 4 * hidden)


def build_transformer(spec: str, *, width: int = 512, heads: int = 8, blocks: int = 2, dropout: float = 0.1) -> MILHead:
    """Of TransMIL's size: D -> width, a CLS token, `blocks` of x + attention(norm(x)), CLS -> linear. Attention is
    exact (TransMIL approximates it) and knows no positions (TransMIL convolves over a made-up square)."""
    if width % heads:
        raise ValueError(f"{spec!r}: width {width} cannot be shared by {heads} heads")

    def init(key, dim, out):
        each = [
            {"norm": _norm(width), "qkv": dense(width, 3 * width, False), "proj": dense(width, width)}
            for _ in range(blocks)
        ]
        ends = {"embed": dense(dim, width), "cls": Uniform((width,), 0.02), "out": dense(width, out)}
        return fill(key, ends | {"blocks": each, "norm": _norm(width)})

    def apply(params, bag, mask, rng=None, train=False):
        x = jnp.concatenate([params["cls"][None], jax.nn.relu(linear(params["embed"], bag))])
        known = jnp.concatenate([jnp.ones(1, bool), mask])
        weights = jnp.zeros((1, len(x)))
        for i, block in enumerate(params["blocks"]):
            q, k, v = jnp.split(linear(block["qkv"], _normalised(block["norm"], x)), 3, -1)
            last = i + 1 == blocks  # after it only CLS is read
            mixed, weights = _attend(q[:1] if last else q, k, v, known, heads)
            mixed = _drop(mixed, dropout, None if rng is None else jax.random.fold_in(rng, i), train)
            x = (x[:1] if last else x) + linear(block["proj"], mixed)
        cls = _normalised(params["norm"], x[0])
        return linear(params["out"], cls), weights[0, 1:]

    return MILHead(spec, init, apply, held=3 * heads * QUERIES)


def build_hipt(spec: str, *, width: int = 192, heads: int = 3, blocks: int = 2, dropout: float = 0.25) -> MILHead:
    """HIPT's aggregator of regions: D -> width, ReLU; `blocks` of norm(x + attention), norm(x + MLP of that width);
    gated attention; width -> width, ReLU; linear. The original sees one bag a step (`mfl mil --batch 1 --lr 2e-4
    --decay 1e-5 --epochs 20`) and drops weights of attention too; here decay is decoupled, and what attention gives is
    dropped."""
    if width % heads:
        raise ValueError(f"{spec!r}: width {width} cannot be shared by {heads} heads")

    def init(key, dim, out):
        each = [
            {"qkv": dense(width, 3 * width), "proj": dense(width, width), "mlp": layers(width, width, width)}
            | {"norms": [_norm(width), _norm(width)]}
            for _ in range(blocks)
        ]
        ends = {"embed": dense(dim, width), "gate": _gate(width, width), "bag": dense(width, width)}
        return fill(key, ends | {"blocks": each, "out": dense(width, out)})

    def apply(params, bag, mask, rng=None, train=False):
        def drop(x, place):
            return _drop(x, dropout, None if rng is None else jax.random.fold_in(rng, place), train)

        x = drop(jax.nn.relu(linear(params["embed"], bag)), 0)
        for i, block in enumerate(params["blocks"]):
            q, k, v = jnp.split(linear(block["qkv"], x), 3, -1)
            mixed = linear(block["proj"], _attend(q, k, v, mask, heads)[0])
            x = _normalised(block["norms"][0], x + drop(mixed, 3 * i + 1))
            inner = drop(jax.nn.relu(linear(block["mlp"][0], x)), 3 * i + 2)
            x = _normalised(block["norms"][1], x + drop(linear(block["mlp"][1], inner), 3 * i + 3))
        weights = masked_softmax(_gated(params["gate"], x), mask)
        pooled = drop(jax.nn.relu(linear(params["bag"], weights @ x)), 3 * blocks + 1)
        return linear(params["out"], pooled), weights

    return MILHead(spec, init, apply, held=3 * heads * QUERIES)


def _norm(width: int) -> dict[str, jax.Array]:
    return {"scale": jnp.ones(width), "bias": jnp.zeros(width)}


def _normalised(p: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    centred = x - x.mean(-1, keepdims=True)
    return centred * lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + 1e-5) * p["scale"] + p["bias"]


def _attend(q: jax.Array, k: jax.Array, v: jax.Array, known: jax.Array, heads: int) -> tuple[jax.Array, jax.Array]:
    """-> [M, width], and the weights of the first query, mean over heads [1, N]. Queries go in blocks."""
    k, v = (t.reshape(len(t), heads, -1) for t in (k, v))

    def rows(q):
        a = jnp.einsum("mhd,nhd->hmn", q.reshape(len(q), heads, -1), k) / math.sqrt(k.shape[-1])
        w = masked_softmax(a, known)
        return jnp.einsum("hmn,nhd->mhd", w, v).reshape(len(q), -1), w

    first, weights = rows(q[:1])
    if len(q) == 1:
        return first, weights.mean(0)
    padded = jnp.pad(q, ((0, -len(q) % min(QUERIES, len(q))), (0, 0)))
    blocks = padded.reshape(-1, min(QUERIES, len(q)), q.shape[1])
    mixed = lax.map(jax.checkpoint(lambda block: rows(block)[0]), blocks)
    return mixed.reshape(-1, q.shape[1])[: len(q)], weights.mean(0)


def build_instance(spec: str, *, hidden: int = 32, topk: int = 0) -> MILHead:
    """Each tile predicts by itself, D -> hidden -> out; the bag is the mean of all tile logits or of the topk best."""

    def init(key, dim, out):
        return fill(key, {"tile": layers(dim, hidden, out)})

    def apply(params, bag, mask, rng=None, train=False):
        tiles = mlp(params["tile"], bag, jax.nn.relu)
        if not topk:
            logits = masked_mean(tiles, mask)
        else:
            best, _, known = jax.vmap(lambda score: extremes(score, mask, topk), in_axes=1)(tiles)
            logits = jnp.where(known, best, 0.0).sum(1) / jnp.maximum(known.sum(1), 1)
        return logits, _said(tiles, logits) * mask

    return MILHead(spec, init, apply)


HEADS: dict[str, Callable[..., Any]] = {
    "meanpool": build_meanpool,
    "maxpool": build_maxpool,
    "chowder": build_chowder,
    "deepmil": build_deepmil,
    "clam": build_clam,
    "transformer": build_transformer,
    "hipt": build_hipt,
    "instance": build_instance,
}
