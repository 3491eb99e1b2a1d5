import jax.numpy as jnp
import numpy as np
import pytest

from mfl_jax import trees

TREE = {
    "encoder": {"conv1": {"kernel": np.zeros((3, 3, 4), np.float32)}, "bn1": {"scale": np.zeros(4, np.float32)}},
    "projector": [{"kernel": np.zeros((4, 2), jnp.bfloat16)}],
}
NAMES = ["encoder/bn1/scale", "encoder/conv1/kernel", "projector/0/kernel"]


def test_names():
    assert sorted(trees.named_leaves(TREE)) == NAMES
    assert trees.map_named(lambda name, leaf: (name, leaf.ndim), TREE)["projector"][0]["kernel"] == (NAMES[2], 2)


def test_the_first_rule_that_matches_wins():
    rules = [(".*/conv1/.*", 1), ("encoder/.*", 2), (".*", 3)]
    assert list(trees.named_leaves(trees.match(rules, TREE)).values()) == [2, 1, 3]


def test_a_value_may_be_nothing():
    assert trees.match([(".*", None)], {"a": np.zeros(1)}) == {"a": None}


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([("encoder/.*", 1)], "1 of 3 leaves match no rule: 'projector/0/kernel'; end the rules with '.*'"),
        ([("encoder/conv2/.*", 1), (".*", 0)], "'encoder/conv2/.*' matches no leaf .* near it: 'encoder/conv1/kernel'"),
        ([("kernel", 1), (".*", 0)], "WHOLE name"),
        ([("encoder/.*", 1), ("encoder/bn1/.*", 2), (".*", 0)], "of no use: earlier rules match 'encoder/bn1/scale'"),
        ([("(", 1)], "a rule is .regular expression, value."),
        ([".*"], "a rule is .regular expression, value."),
    ],
)
def test_rules_that_do_not_fit_are_refused(rules, message):
    with pytest.raises(ValueError, match=f"decay: .*{message}"):
        trees.match(rules, TREE, "decay")


def test_a_catch_all_may_have_nothing_left_to_do():
    assert trees.match([("encoder/.*", 1), ("projector/.*", 2), (".*", 3)], TREE)["projector"] == [{"kernel": 2}]


def test_sizes():
    assert trees.count(TREE) == 36 + 4 + 8
    assert trees.size_bytes(TREE) == 40 * 4 + 8 * 2


def test_overview():
    lines = trees.overview(TREE, decay=trees.match([(".*/kernel", "yes"), (".*", "no")], TREE)).splitlines()
    assert lines[0].split() == ["parameters", "shape", "dtype", "values", "decay"]
    assert "encoder/conv1/kernel  3x3x4  float32       36  yes" in lines
    assert lines[-1].split() == ["total", "0.0", "MiB", "48"]
    assert len({line.find("float32") for line in lines if "float32" in line}) == 1
