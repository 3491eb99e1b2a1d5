"""Made-up features of a cohort, with known truth."""

from typing import Any

import numpy as np


def cohort(seed: int = 0, cases: int = 12, per_case: int = 24, dim: int = 8, signal: float = 1.5) -> dict[str, Any]:
    """Two slides a case; class 1 shifts feature 0 by `signal`; every case shifts all features by its own amount."""
    rng = np.random.default_rng(seed)
    n = cases * per_case
    case = np.repeat([f"case{i:02d}" for i in range(cases)], per_case)
    slide = np.array([f"{c}-{i % 2}" for i, c in enumerate(case)])
    label = rng.integers(0, 2, n).astype(np.int32)
    features = rng.normal(size=(n, dim)) + 0.3 * np.repeat(rng.normal(size=(cases, dim)), per_case, 0)
    features[:, 0] += signal * label
    positive = np.clip(0.5 + 0.2 * (features[:, 0] - signal / 2) + 0.02 * rng.normal(size=n), 0, 1)
    names = sorted(set(case))
    splits = {"train": names[: cases // 2], "val": names[cases // 2 : 2 * cases // 3], "test": names[2 * cases // 3 :]}
    columns = {"case": case, "slide": slide, "label": label, "positive": positive}
    return {"features": features.astype(np.float32), "columns": columns, "splits": splits}
