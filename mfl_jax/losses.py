"""Losses as pure functions of float32 arrays [B, D], each returning (loss, metrics).

Nothing here knows of devices: under one jit the batch is the global batch. For batches whose logits do not fit, see
`info_nce(..., block=, mesh=)`. A row of zeros has no direction: it counts as cosine 0 and gets no gradient.
`mask` [B] bool leaves rows out; a batch with none left has loss 0 and no gradient.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from mfl_jax.pair_lse import pair_lse

Array = jax.Array
Loss = tuple[Array, dict[str, Array]]
EXACT = lax.Precision.HIGHEST  # a GPU would else multiply float32 in TF32
MAX_SCALE = 100.0


def normalise(x: Array, smallest: float = 1e-12) -> Array:
    """Rows of length 1; a row shorter than `smallest` becomes zeros, without a gradient. A NaN stays one: were it zeros
    too, a step on it would pass for a good one."""
    x = x.astype(jnp.float32)
    size = lax.stop_gradient(jnp.max(jnp.abs(x), -1, keepdims=True))
    x = x / jnp.where(size > smallest, size, 1.0)  # so that squares neither overflow nor vanish
    square = jnp.sum(x * x, -1, keepdims=True)
    return jnp.where(size <= smallest, 0.0, x * lax.rsqrt(jnp.where(size > smallest, square, 1.0)))


def present(x: Array, mask: Array | None) -> Array:
    """x with zeros in the rows left out, so that what stands there (a NaN, say) reaches no gradient."""
    x = x.astype(jnp.float32)
    return x if mask is None else jnp.where(mask.reshape(-1, *[1] * (x.ndim - 1)), x, 0.0)


def masked_mean(values: Array, mask: Array | None) -> Array:
    """The mean over rows; values left out may be anything, infinite too."""
    if mask is None:
        return jnp.mean(values)
    return jnp.sum(jnp.where(mask, values, 0.0)) / jnp.maximum(jnp.sum(mask), 1)


def info_nce(
    a: Array,
    b: Array,
    *,
    temperature: float = 0.1,
    log_scale: Array | None = None,
    group: Array | None = None,
    mask: Array | None = None,
    block: int | None = None,
    mesh: jax.sharding.Mesh | None = None,
    axis: str = "data",
) -> Loss:
    """Symmetric InfoNCE: row i of a belongs to row i of b, all other rows are negatives.

    The scale of the logits is 1/temperature, or exp(log_scale) where that is learnt (at most 100, as in CLIP).
    group [B] int: rows of one group (a slide) are not negatives of each other. With `block` the logits exist only
    `block` columns at a time, in value and in gradient, so memory is linear in the batch; with `mesh` each device of
    `axis` keeps its rows and the columns go round a ring. Both equal the plain form.
    """
    a, b = normalise(present(a, mask)), normalise(present(b, mask))
    scale = jnp.float32(1 / temperature)
    if log_scale is not None:
        scale = jnp.exp(capped(log_scale.astype(jnp.float32)))
    positive = jnp.sum(a * b, -1)
    rows, columns, best = pair_lse(a, b, scale, group, mask, block=block, mesh=mesh, axis=axis)
    loss = masked_mean((rows + columns) / 2 - scale * positive, mask)
    metrics = {
        "accuracy": masked_mean((positive >= best / scale - 1e-5).astype(jnp.float32), mask),
        "positive_cosine": masked_mean(positive, mask),
        "scale": scale,
    }
    return loss, metrics


@jax.custom_vjp
def capped(log_scale: Array) -> Array:
    """At most log(MAX_SCALE). Above it the gradient still leads back: only what would raise it further is 0."""
    return jnp.minimum(log_scale, jnp.log(MAX_SCALE))


capped.defvjp(
    lambda x: (capped(x), x >= jnp.log(MAX_SCALE)),
    lambda above, slope: (jnp.where(above & (slope < 0), 0.0, slope),),
)


def queue_nce(
    query: Array,
    key: Array,
    queue: Array,
    *,
    temperature: float = 0.2,
    group: Array | None = None,
    queue_group: Array | None = None,
    mask: Array | None = None,
    queue_mask: Array | None = None,
    batch_negatives: bool = False,
) -> Loss:
    """MoCo: row i of query belongs to row i of key, and the rows of the queue [K, D], of length 1, are its negatives;
    with batch_negatives the other keys of the batch as well.

    Only the query gets a gradient. group [B] and queue_group [K] int: rows of one group are no negatives; nor are rows
    of the queue that queue_mask leaves out.
    """
    query, key = normalise(present(query, mask)), lax.stop_gradient(normalise(present(key, mask)))
    positive = jnp.sum(query * key, -1)
    negative = jnp.matmul(query, lax.stop_gradient(queue).T, precision=EXACT)
    if group is not None and queue_group is not None:
        negative = jnp.where(group[:, None] == queue_group[None], -jnp.inf, negative)
    if queue_mask is not None:
        negative = jnp.where(queue_mask[None], negative, -jnp.inf)
    if batch_negatives:
        left_out = jnp.eye(len(key), dtype=bool)
        left_out = left_out if mask is None else left_out | ~mask[None]
        left_out = left_out if group is None else left_out | (group[:, None] == group[None])
        others = jnp.matmul(query, key.T, precision=EXACT)
        negative = jnp.concatenate([negative, jnp.where(left_out, -jnp.inf, others)], 1)
    logits = jnp.concatenate([positive[:, None], negative], 1) / temperature
    loss = masked_mean(jax.nn.logsumexp(logits, 1) - logits[:, 0], mask)
    right = (positive >= jnp.max(negative, 1)).astype(jnp.float32)
    return loss, {"accuracy": masked_mean(right, mask), "positive_cosine": masked_mean(positive, mask)}


def centred(x: Array, mask: Array | None) -> tuple[Array, Array]:
    """x less its mean over the rows of the mask, zeros elsewhere; and the number of rows."""
    x = x.astype(jnp.float32)
    if mask is None:
        return x - jnp.mean(x, 0), jnp.float32(x.shape[0])
    x, count = jnp.where(mask[:, None], x, 0.0), jnp.sum(mask).astype(jnp.float32)
    return jnp.where(mask[:, None], x - jnp.sum(x, 0) / jnp.maximum(count, 1), 0.0), count


def safe_sqrt(x: Array) -> Array:
    """The root of a number >= 0, whose gradient at 0 is 0."""
    return jnp.where(x > 0, jnp.sqrt(jnp.where(x > 0, x, 1.0)), 0.0)


def vicreg(
    a: Array,
    b: Array,
    *,
    invariance: float = 25.0,
    variance: float = 25.0,
    covariance: float = 1.0,
    gamma: float = 1.0,
    mask: Array | None = None,
    released: bool = False,
) -> Loss:
    """VICReg. released=True is the balance of the More From Less code: ordered pairs count twice in the invariance,
    the covariance is divided by B, not B - 1, and the standard deviation has epsilon 1e-5, not 1e-4."""
    epsilon = 1e-5 if released else 1e-4
    pairs = masked_mean(jnp.mean(jnp.square(present(a, mask) - present(b, mask)), -1), mask)
    spread, redundancy, deviation = jnp.float32(0), jnp.float32(0), jnp.float32(0)
    for x in (a, b):
        x, count = centred(x, mask)
        free = jnp.maximum(count - 1, 1)
        std = jnp.sqrt(jnp.sum(x * x, 0) / free + epsilon)
        alive = count > 1  # one row has no spread to ask for
        spread += jnp.where(alive, jnp.mean(jax.nn.relu(gamma - std)) / 2, 0.0)
        deviation += jnp.mean(std) / 2
        cov = jnp.matmul(x.T, x, precision=EXACT) / (count if released else free).clip(1)
        redundancy += jnp.sum(jnp.square(off_diagonal(cov))) / x.shape[1]
    loss = (2 if released else 1) * invariance * pairs + variance * spread + covariance * redundancy
    return loss, {"invariance": pairs, "variance": spread, "covariance": redundancy, "std": deviation}


def off_diagonal(square: Array) -> Array:
    return jnp.where(jnp.eye(square.shape[0], dtype=bool), 0.0, square)


def barlow(a: Array, b: Array, *, redundancy: float = 5e-3, epsilon: float = 1e-5, mask: Array | None = None) -> Loss:
    """Barlow Twins: the cross-correlation of the standardised features should be the identity."""
    standard = []
    for x in (a, b):
        x, count = centred(x, mask)
        standard.append(x * lax.rsqrt(jnp.sum(x * x, 0) / jnp.maximum(count, 1) + epsilon))
    c = jnp.matmul(standard[0].T, standard[1], precision=EXACT) / jnp.maximum(count, 1)
    on, off = jnp.sum(jnp.square(jnp.diag(c) - 1)), jnp.sum(jnp.square(off_diagonal(c)))
    loss = jnp.where(count > 0, on + redundancy * off, 0.0)
    return loss, {"on_diagonal": on, "off_diagonal": off, "correlation": jnp.mean(jnp.diag(c))}


def distance(a: Array, b: Array) -> Array:
    return safe_sqrt(jnp.sum(jnp.square(a.astype(jnp.float32) - b.astype(jnp.float32)), -1))


def margin(a: Array, b: Array, near: Array, *, gap: float = 1.0, mask: Array | None = None) -> Loss:
    """Contrastive loss of pairs: y d^2 + (1 - y) max(0, gap - d)^2, where near [B] is y."""
    d, near = distance(a, b), near.astype(jnp.float32)
    loss = masked_mean(near * d * d + (1 - near) * jnp.square(jax.nn.relu(gap - d)), mask)
    kept = jnp.ones_like(d) if mask is None else mask
    metrics = {"near": masked_mean(d, (near > 0.5) & (kept > 0)), "far": masked_mean(d, (near <= 0.5) & (kept > 0))}
    return loss, metrics


def triplet(anchor: Array, near: Array, far: Array, *, gap: float = 1.0, mask: Array | None = None) -> Loss:
    """max(0, d(anchor, near) - d(anchor, far) + gap), with plain distances."""
    close, wide = distance(anchor, near), distance(anchor, far)
    loss = masked_mean(jax.nn.relu(close - wide + gap), mask)
    active = masked_mean((close - wide + gap > 0).astype(jnp.float32), mask)
    return loss, {"near": masked_mean(close, mask), "far": masked_mean(wide, mask), "active": active}


def negative_cosine(prediction: Array, target: Array, mask: Array | None = None) -> Array:
    prediction, target = present(prediction, mask), lax.stop_gradient(present(target, mask))
    return -masked_mean(jnp.sum(normalise(prediction) * normalise(target), -1), mask)


def simsiam(prediction_a: Array, prediction_b: Array, a: Array, b: Array, *, mask: Array | None = None) -> Loss:
    """Each view's prediction against the other view's projection, which gets no gradient; from -1 to 1."""
    loss = (negative_cosine(prediction_a, b, mask) + negative_cosine(prediction_b, a, mask)) / 2
    return loss, {"cosine": -loss}


def byol(
    prediction_a: Array, prediction_b: Array, target_a: Array, target_b: Array, *, mask: Array | None = None
) -> Loss:
    """The squared distance of directions, 2 - 2 cos, summed over both ways; targets come from the slow network."""
    loss, metrics = simsiam(prediction_a, prediction_b, target_a, target_b, mask=mask)
    return jnp.where(True if mask is None else jnp.any(mask), 4 + 4 * loss, 0.0), metrics


def xent(
    logits: Array,
    labels: Array,
    *,
    smoothing: float = 0.0,
    mask: Array | None = None,
    weights: Array | None = None,
) -> Loss:
    """Cross-entropy with labels [B] int or [B, K] probabilities; weights [K] are of classes. With a mask, labels of
    rows left out may be anything (-1)."""
    logits, classes = logits.astype(jnp.float32), logits.shape[-1]
    target = jax.nn.one_hot(labels, classes) if labels.ndim == 1 else labels.astype(jnp.float32)
    smooth = target * (1 - smoothing) + smoothing / classes
    smooth = smooth if weights is None else smooth * weights
    right = jnp.argmax(logits, -1) == jnp.argmax(target, -1)
    loss = masked_mean(soft_xent(smooth, logits), mask)
    return loss, {"accuracy": masked_mean(right.astype(jnp.float32), mask)}


def soft_xent(target: Array, logits: Array) -> Array:
    """-sum p log softmax(logits); where p is 0 an infinitely unlikely class costs nothing."""
    return -jnp.sum(jnp.where(target > 0, target * jax.nn.log_softmax(logits, -1), 0.0), -1)


def regression(
    prediction: Array, target: Array, *, kind: str = "mse", delta: float = 1.0, mask: Array | None = None
) -> Loss:
    """mse (mean squared error) or huber: quadratic within delta, linear beyond."""
    error = present(prediction, mask) - present(target, mask)
    size = jnp.abs(error)
    kinds: dict[str, Callable[[], Array]] = {
        "mse": lambda: error * error,
        "huber": lambda: jnp.where(size <= delta, 0.5 * error * error, delta * (size - 0.5 * delta)),
    }
    if kind not in kinds:
        raise ValueError(f"a regression loss is one of {', '.join(kinds)}, not {kind!r}")
    rows = lambda x: jnp.mean(x.reshape(x.shape[0], -1), -1)  # noqa: E731
    return masked_mean(rows(kinds[kind]()), mask), {"mae": masked_mean(rows(size), mask)}


def centred_targets(teacher: Array, centre: Array, temperature: Any) -> Array:
    """DINO's teacher distribution: softmax((logits - centre) / T)."""
    return lax.stop_gradient(jax.nn.softmax((teacher.astype(jnp.float32) - centre) / temperature, -1))


def row_sums(teacher: Array, mask: Array | None = None) -> dict[str, Array]:
    """What a centre needs of logits [..., B, K]: their sum over rows that count, and how many those are. Means of both
    over slices of a batch still give the mean over all its rows, where means of means would not."""
    teacher = teacher.astype(jnp.float32)
    kept = jnp.ones(teacher.shape[:-1], bool) if mask is None else jnp.broadcast_to(mask, teacher.shape[:-1])
    total = jnp.sum(jnp.where(kept[..., None], teacher, 0.0), range(teacher.ndim - 1))
    return {"total": total, "count": jnp.sum(kept).astype(jnp.float32)}


def next_centre(centre: Array, sums: dict[str, Array], momentum: float = 0.9) -> Array:
    """The moving mean of the teacher's logits, from `row_sums` of a batch; unchanged by a batch with no row."""
    count = sums["count"]
    mean = sums["total"] / jnp.where(count > 0, count, 1.0)
    return jnp.where(count > 0, momentum * centre + (1 - momentum) * mean, centre)


def sinkhorn_targets(teacher: Array, temperature: Any, iterations: int = 3, mask: Array | None = None) -> Array:
    """Teacher distributions [B, K] of which each prototype gets an equal share, by Sinkhorn-Knopp on logarithms.
    Rows left out take no share, and are zeros."""
    logs = teacher.astype(jnp.float32) / temperature
    kept = jnp.ones(logs.shape[0], bool) if mask is None else mask
    logs = jnp.where(kept[:, None], logs, 0.0)
    for _ in range(iterations):
        shares = jax.nn.logsumexp(logs, 0, where=kept[:, None])
        logs = logs - jnp.where(jnp.any(kept), shares, 0.0)
        logs = logs - jax.nn.logsumexp(logs, 1, keepdims=True)
    return lax.stop_gradient(jnp.where(kept[:, None], jnp.exp(logs), 0.0))


def dino_ce(student: Array, targets: Array, *, temperature: float = 0.1, mask: Array | None = None) -> Loss:
    """Cross-entropy of student logits [S, B, K] with teacher distributions [T, B, K] over all pairs of different views:
    student view i < T is the teacher's view i. `targets` comes from centred_targets or sinkhorn_targets.

    The targets of a student view are summed first, so that its logits, of which there are very many, are read once.
    """
    views, teachers = student.shape[0], targets.shape[0]
    if views < 2:
        raise ValueError(f"a student that sees {views} view has no view to compare with; it takes 2 or more")
    rows, pairs = jnp.zeros(student.shape[1]), 0
    for s in range(views):
        others = [targets[t] for t in range(teachers) if t != s]
        if others:
            rows += dual_xent(sum(others[1:], others[0]), len(others), student[s].astype(jnp.float32) / temperature)
            pairs += len(others)
    loss = masked_mean(rows, mask) / pairs
    entropy = masked_mean(entropy_of(targets).mean(0), mask)
    return loss, {"teacher_entropy": entropy, "divergence": loss - entropy}


def dual_xent(target: Array, total: int, logits: Array) -> Array:
    """-sum target log softmax(logits) for finite logits and a target whose sum is `total`. Both terms are positive, so
    that nothing cancels at any scale."""
    below = logits - lax.stop_gradient(jnp.max(logits, -1, keepdims=True))
    return total * jnp.log(jnp.sum(jnp.exp(below), -1)) - jnp.sum(target * below, -1)


def entropy_of(distribution: Array) -> Array:
    """In nats, over the last axis."""
    return -jnp.sum(jax.scipy.special.xlogy(distribution, distribution), -1)


def distribution_signs(
    student: Array, targets: Array, *, temperature: float = 0.1, mask: Array | None = None
) -> dict[str, Array]:
    """Where a DINO goes wrong, of logits and distributions [T, B, K]: a teacher that is uniform (to_uniform, the
    divergence of its rows from that, is 0), or one that says the same of all rows (mixture_entropy, of their mean, is
    no more than teacher_entropy). student_entropy is what the student's own rows have. In nats, K at most e^H."""
    targets, rows = lax.stop_gradient(targets), lax.stop_gradient(student.astype(jnp.float32)) / temperature
    mixture = row_sums(targets, mask)
    mixture_entropy = entropy_of(mixture["total"] / jnp.maximum(mixture["count"], 1.0))
    return {
        "student_entropy": masked_mean(entropy_of(jax.nn.softmax(rows, -1)).mean(0), mask),
        "mixture_entropy": mixture_entropy,
        "to_uniform": jnp.log(targets.shape[-1]) - masked_mean(entropy_of(targets).mean(0), mask),
    }


def prototype_ce(student: Array, targets: Array, *, temperature: float = 0.1, mask: Array | None = None) -> Loss:
    """Cross-entropy of every student view [S, B, K] with ONE distribution a row [B, K], that of the row's prototype.
    The mask names the rows whose slide has prototypes; a batch without any costs 0."""
    rows = jnp.zeros(targets.shape[0])
    for view in student:
        rows += dual_xent(targets, 1, view.astype(jnp.float32) / temperature)
    loss = masked_mean(rows / len(student), mask)
    return loss, {"eligible": masked_mean(jnp.ones(targets.shape[0]) if mask is None else mask * 1.0, None)}


def collapse(z: Array, other: Array | None = None, *, rows: int = 512) -> dict[str, Array]:
    """Signs of collapse, cheap enough for every step; nothing here is meant to be differentiated.

    feature_std: the spread of directions, 1 when they fill the sphere, 0 when all are one. effective_rank: the
    participation ratio of the covariance's spectrum, tr^2 / |.|^2. uniformity: log E exp(-2 |x - y|^2), lower is more
    uniform, 0 is collapse. alignment (given `other`): E |x - x'|^2. The last three use the first `rows` rows.
    """
    z = lax.stop_gradient(z.astype(jnp.float32))
    unit = normalise(z)
    x = z[:rows] - jnp.mean(z[:rows], 0)
    x = x / jnp.maximum(jnp.max(jnp.abs(x)), 1e-30)
    gram = jnp.matmul(x, x.T, precision=EXACT)
    squares = 2 - 2 * jnp.matmul(unit[:rows], unit[:rows].T, precision=EXACT)
    n = gram.shape[0]
    apart = jnp.where(jnp.eye(n, dtype=bool), -jnp.inf, -2 * jnp.maximum(squares, 0.0))
    result = {
        "feature_std": jnp.sqrt(jnp.mean(jnp.var(unit, 0)) * z.shape[1]),
        "effective_rank": jnp.square(jnp.trace(gram)) / jnp.maximum(jnp.sum(gram * gram), 1e-30),
        "uniformity": jax.nn.logsumexp(apart) - jnp.log(n * (n - 1.0)) if n > 1 else jnp.float32(0),
    }
    if other is not None:
        gaps = jnp.square(unit - normalise(lax.stop_gradient(other)))
        result["alignment"] = jnp.mean(jnp.sum(gaps, -1))
    return result


def looks_collapsed(metrics: dict[str, Any], *, least_std: float = 0.05, least_rank: float = 1.5) -> Array:
    """The alarm: bool, from the metrics of `collapse`."""
    return (metrics["feature_std"] < least_std) | (metrics["effective_rank"] < least_rank)
