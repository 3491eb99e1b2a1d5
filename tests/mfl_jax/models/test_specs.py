import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mfl_jax import trees
from mfl_jax.models import describe, make, make_head, parse

KEY = jax.random.key(0)


def test_spec_grammar():
    assert parse("mlp,widths=512-256,bn,dropout=0.5,pool=mean,last_bn=false") == (
        "mlp",
        {"widths": (512, 256), "bn": True, "dropout": 0.5, "pool": "mean", "last_bn": False},
    )


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("resnet51", "no encoder is called 'resnet51'; .* did you mean 'resnet5?0?"),
        ("resnet50,widht=2", "has no setting 'widht'; .* did you mean 'width'"),
        ("resnet50,width=big", "width is of type float, as in 1.0, not 'big'"),
        ("resnet50,width=0", "width is out of range: 0.0"),
        ("resnet50,bn_groups=0", "bn_groups is out of range: 0"),
        ("resnet50,remat=1", "remat is of type bool"),
        ("resnet50,width=1,width=2", "each once"),
        ("resnet50,width=", "is no setting"),
        ("vit_ti8,heads=5", "192 features cannot be shared by 5 heads"),
        ("vit_ti8,pool=max", "pool is cls or mean"),
        ("vit_ti8,drop_path=1", "are below 1"),
        ("mlp,widths=0-4", "widths is out of range"),
    ],
)
def test_wrong_specs_are_refused(spec, message):
    with pytest.raises(ValueError, match=message):
        make(spec)


def test_wrong_heads_are_refused():
    with pytest.raises(ValueError, match=r"no head is called 'projektor'; .* did you mean 'projector'"):
        make_head("projektor", 8)
    with pytest.raises(ValueError, match="has no setting 'in_dim'"):
        make_head("projector,in_dim=3", 8)


def test_overrides_win():
    assert make("mlp,widths=8-8", widths=(4, 6)).dim == 6
    assert make("mlp", widths=[16]).dim == 16


@pytest.mark.parametrize(
    ("spec", "count"),
    [  # of the published models without a classifier
        ("resnet18", 11_176_512),
        ("resnet50", 23_508_032),
        ("resnet26", 13_946_176),
        ("vit_ti16", 5_524_416),
        ("vit_s16", 21_665_664),
        ("vit_b16", 85_798_656),
    ],
)
def test_parameter_counts_are_those_of_timm(spec, count):
    model = make(spec)
    params, _ = jax.eval_shape(lambda: model.init(KEY, jnp.zeros((1, 224, 224, 3))))
    assert trees.count(params) == count
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}


SMALL = {
    "resnet18,width=0.125,small_stem": (2, 16, 16, 5),
    "vit_ti8,features=24,heads=3,blocks=2,registers=2": (2, 16, 16, 3),
    "vit_ti8,features=24,heads=3,blocks=2,pool=mean": (2, 16, 24, 1),
    "compact,widths=8-16": (2, 16, 16, 4),
    "mlp,widths=16-12": (4, 30),
}


@pytest.mark.parametrize("spec", SMALL)
def test_the_contract_of_a_model(spec):
    model, shape = make(spec), SMALL[spec]
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    params, stats = model.init(KEY, x)
    train = jax.jit(lambda p, s, x: model.apply(p, s, x, train=True, dtype=jnp.bfloat16))
    features, new = train(params, stats, x)
    assert features.shape == (shape[0], model.dim)
    assert features.dtype == jnp.float32
    assert jax.tree.structure(new) == jax.tree.structure(stats)
    assert {leaf.dtype for leaf in jax.tree.leaves((params, new))} == {jnp.dtype("float32")}
    images = len(shape) == 4
    test = jax.jit(lambda p, s, x: model.apply(p, s, x, train=False, maps=images))
    whole, maps = test(params, new, x)
    assert np.all(np.isfinite(whole))
    others = np.concatenate([x[:1], x[1:] * 2 + 1])
    np.testing.assert_allclose(test(params, new, others)[0][0], whole[0], rtol=1e-4, atol=1e-5)
    if images:
        assert maps.shape[0] == shape[0]
        assert maps.ndim == 4
    else:
        with pytest.raises(ValueError, match="has no maps"):
            model.apply(params, new, x, train=False, maps=True)
    text = describe(model, params)
    assert text.splitlines()[-1].split()[-1] == f"{trees.count(params):,}"


@pytest.mark.parametrize(
    ("spec", "dim", "names"),
    [
        ("projector,widths=16-16-8,bn", 8, ["dense0/kernel", "dense1/kernel", "dense2/bias", "dense2/kernel"]),
        ("projector,widths=16-8,last_bn", 8, ["dense0/bias", "dense0/kernel", "dense1/kernel"]),
        ("predictor,hidden=4", 6, ["dense0/kernel", "dense1/bias", "dense1/kernel"]),
        ("linear,out=3", 3, ["dense0/bias", "dense0/kernel"]),
        ("classifier,out=3", 3, ["dense0/bias", "dense0/kernel", "dense1/bias", "dense1/kernel"]),
    ],
)
def test_heads(spec, dim, names):
    head, x = make_head(spec, 6), np.random.default_rng(0).standard_normal((5, 6)).astype(np.float32)
    params, stats = head.init(KEY, x)
    out, _ = jax.jit(lambda p, s, x: head.apply(p, s, x, train=True))(params, stats, x)
    assert out.shape == (5, dim) == (5, head.dim)
    assert sorted(n for n in trees.named_leaves(params) if n.startswith("dense")) == names
    if "last_bn" in spec:
        np.testing.assert_allclose(np.std(out, 0), 1, atol=1e-2)


def test_dropout_needs_a_key_and_differs_by_it():
    model, x = make("mlp,widths=64,dropout=0.5,bn=false"), np.ones((2, 8), np.float32)
    params, stats = model.init(KEY, x)
    one, two = (model.apply(params, stats, x, train=True, rng=jax.random.key(k))[0] for k in (1, 2))
    assert np.any(one != two)
    assert np.all(one[0] == model.apply(params, stats, x, train=True, rng=jax.random.key(1))[0][0])
    with pytest.raises(Exception, match="dropout"):
        model.apply(params, stats, x, train=True)


def test_drop_path_keeps_the_mean():
    from mfl_jax.models.layers import DropPath

    y = DropPath(0.25).apply({}, jnp.ones((4000, 2)), True, rngs={"dropout": KEY})
    assert sorted(set(np.asarray(y[:, 0]).round(4))) == [0.0, 1.3333]
    assert np.all(y[:, 0] == y[:, 1])
    assert abs(float(y.mean()) - 1) < 0.03
