"""DINO's loss, its targets and its centre against float64 oracles written from the definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax, logsumexp, softmax

from mfl_jax import losses
from tests.mfl_jax.test_losses import draw


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e3])
def test_dino_against_the_oracle(scale):
    student, teacher = draw(4, 3, 6, seed=1, scale=scale), draw(2, 3, 6, seed=2, scale=scale)
    centre = draw(6, seed=3, scale=scale)
    targets = softmax((teacher.astype(np.float64) - centre) / 0.04, -1)
    logs = log_softmax(student.astype(np.float64) / 0.1, -1)
    pairs = [-np.mean(np.sum(targets[t] * logs[s], -1)) for t in range(2) for s in range(4) if s != t]
    ours = losses.centred_targets(teacher, centre, 0.04)
    np.testing.assert_allclose(ours, targets, rtol=1e-3, atol=1e-6)
    value, metrics = losses.dino_ce(student, ours)
    np.testing.assert_allclose(value, np.mean(pairs), rtol=1e-4)
    assert metrics["teacher_entropy"] >= -1e-6
    prototypes = losses.prototype_ce(student, ours[0])[0]
    np.testing.assert_allclose(prototypes, -np.mean(np.sum(targets[0] * logs, -1)), rtol=1e-4)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_the_gradient_of_dino_is_the_slope_of_its_oracle(scale):
    student, mask = draw(4, 3, 6, seed=1, scale=scale), np.array([1, 0, 1], bool)
    targets = softmax(draw(2, 3, 6, seed=2).astype(np.float64), -1)

    def oracle(x):
        logs = log_softmax(x / 0.1, -1)[:, mask]
        pairs = [-np.mean(np.sum(targets[t][mask] * logs[s], -1)) for t in range(2) for s in range(4) if s != t]
        return np.mean(pairs)

    run = jax.jit(jax.grad(lambda x: losses.dino_ce(x, jnp.float32(targets), mask=mask)[0]))
    gradient = np.asarray(run(student), np.float64)
    assert not np.any(gradient[:, ~mask])
    way, wide, step = draw(4, 3, 6, seed=3).astype(np.float64), student.astype(np.float64), 1e-6 * scale
    slope = (oracle(wide + step * way) - oracle(wide - step * way)) / (2 * step)
    assert abs(np.sum(gradient * way) - slope) <= 2e-4 * np.linalg.norm(gradient) * np.linalg.norm(way)


def test_a_student_of_dino_is_not_compared_with_the_view_it_shares_with_the_teacher():
    """With two views and targets that each fit the other's logits, the loss is their entropy, and no lower."""
    logits = draw(2, 4, 6, seed=1)
    targets = softmax(logits[::-1] / 0.1, -1)
    value, metrics = losses.dino_ce(logits, jnp.asarray(targets))
    entropy = -np.mean(np.sum(targets * np.log(targets), -1))
    np.testing.assert_allclose([value, metrics["teacher_entropy"]], entropy, rtol=1e-4)
    np.testing.assert_allclose(metrics["divergence"], 0, atol=1e-5)
    with pytest.raises(ValueError, match="a student that sees 1 view"):
        losses.dino_ce(logits[:1], targets)


def test_the_signs_of_distributions_tell_a_uniform_teacher_from_one_that_names_one_class():
    student, mask = draw(2, 4, 6, seed=1), np.array([1, 1, 1, 0], bool)
    targets = softmax(draw(2, 4, 6, seed=2), -1)
    found = losses.distribution_signs(student, jnp.asarray(targets), mask=mask)
    own, mixed = softmax(student[:, mask] / 0.1, -1), targets[:, mask].mean((0, 1))
    np.testing.assert_allclose(found["student_entropy"], -np.mean(np.sum(own * np.log(own), -1)), rtol=1e-4)
    np.testing.assert_allclose(found["mixture_entropy"], -np.sum(mixed * np.log(mixed)), rtol=1e-4)
    np.testing.assert_allclose(
        found["to_uniform"], np.mean(np.sum(targets * np.log(6 * targets), -1)[:, mask]), rtol=1e-3
    )
    same = losses.distribution_signs(student, jnp.full((2, 4, 6), 1 / 6))
    np.testing.assert_allclose(same["to_uniform"], 0, atol=1e-6)
    one = losses.distribution_signs(student, jnp.eye(6)[jnp.zeros((2, 4), int)])
    np.testing.assert_allclose(one["mixture_entropy"], 0, atol=1e-6)


def test_the_centre_is_a_moving_mean_that_an_empty_batch_leaves_alone():
    centre, teacher = draw(5), draw(2, 4, 5, seed=1)
    np.testing.assert_allclose(
        losses.next_centre(centre, losses.row_sums(teacher)),
        0.9 * centre + 0.1 * teacher.mean((0, 1)),
        rtol=1e-4,
        atol=1e-6,
    )
    nothing = losses.row_sums(teacher, jnp.zeros(4, bool))
    np.testing.assert_array_equal(losses.next_centre(centre, nothing), centre)


def test_the_centre_of_slices_with_unlike_masks_is_that_of_the_whole_batch():
    teacher, mask = draw(2, 8, 5, seed=1), np.array([1, 0, 1, 0, 1, 0, 1, 1], bool)
    teacher[:, 1] = np.nan  # a row left out may hold anything
    parts = [losses.row_sums(teacher[:, i::2], mask[i::2]) for i in range(2)]
    merged = jax.tree.map(lambda *each: jnp.stack(each).mean(0), *parts)
    found = losses.next_centre(jnp.zeros(5), merged, 0.0)
    np.testing.assert_allclose(found, teacher[:, mask].astype(np.float64).mean((0, 1)), rtol=1e-5)


def test_sinkhorn_shares_the_prototypes_evenly():
    logits = draw(24, 4, seed=1, scale=0.05)
    q = np.exp(logits.astype(np.float64) / 0.05)
    for _ in range(50):
        q = q / q.sum(0)
        q = q / q.sum(1, keepdims=True)
    ours = losses.sinkhorn_targets(logits, 0.05, iterations=50)
    np.testing.assert_allclose(ours, q, rtol=1e-3)
    np.testing.assert_allclose(ours.sum(0), 6.0, rtol=1e-3)
    assert np.all(np.isfinite(losses.sinkhorn_targets(draw(4, 3, scale=1e4), 0.05)))


@pytest.mark.parametrize("scale", [1e-4, 0.05, 1e3])
def test_sinkhorn_of_three_rounds_leaves_out_masked_rows(scale):
    logits, mask = draw(8, 5, seed=1, scale=scale), np.array([1, 1, 0, 1, 1, 0, 1, 1], bool)
    q = logits[mask].astype(np.float64) / 0.04
    for _ in range(3):
        q = q - logsumexp(q, 0, keepdims=True)
        q = q - logsumexp(q, 1, keepdims=True)
    logits[2] = np.inf
    ours = jax.jit(lambda x: losses.sinkhorn_targets(x, 0.04, mask=mask))(logits)
    np.testing.assert_allclose(ours[mask], np.exp(q), rtol=2e-3, atol=1e-5)
    assert not np.any(ours[~mask])
    nobody = losses.sinkhorn_targets(logits, 0.04, mask=jnp.zeros(8, bool))
    assert not np.any(nobody)


def test_many_classes_cost_a_few_copies_of_the_logits_not_one_for_every_pair_of_views():
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((10, 8, 4096), (2, 8, 4096))]
    run = jax.jit(jax.value_and_grad(lambda student, targets: losses.dino_ce(student, targets), has_aux=True))
    temporary = run.lower(*shapes).compile().memory_analysis().temp_size_in_bytes
    assert temporary < 2.5 * 10 * 8 * 4096 * 4
