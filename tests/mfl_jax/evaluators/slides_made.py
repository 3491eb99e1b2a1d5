"""Slides with a known signal in the mean of their regions, that several tests share."""

import numpy as np

from mfl_jax.bags import Bags, Table


def slides(cases: int = 40, dim: int = 6, shift: float = 1.0, classes: int = 2, seed: int = 0) -> tuple[Bags, Table]:
    """One or two slides a case, 1 to 6 regions each; feature k of class k is shifted by `shift`, and every case has a
    place of its own, so that slides of one case are alike. The first slide has no region and the second one."""
    draw = np.random.default_rng(seed)
    names, of_case, labels, features, lengths = [], [], [], [], []
    for case in range(cases):
        own = draw.standard_normal(dim)
        for slide in range(1 + case % 2):
            length = 0 if not names else 1 if len(names) == 1 else int(draw.integers(1, 7))
            x = own + 0.3 * draw.standard_normal((length, dim))
            x[:, case % classes] += shift
            names.append(f"s{case:02d}-{slide}")
            of_case.append(f"c{case:02d}")
            labels.append(case % classes)
            features.append(x.astype(np.float32))
            lengths.append(length)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    coords, sides = np.zeros((sum(lengths), 2)), np.full(len(names), 64.0)
    bags = Bags(np.concatenate(features), coords, offsets, tuple(names), tuple(of_case), sides)
    return bags, Table(tuple(names), tuple(of_case), np.array(labels), tuple("abc"[:classes]))


def turned(bags: Bags, table: Table, seed: int = 1) -> tuple[Bags, Table]:
    """The same slides in another order."""
    order = np.random.default_rng(seed).permutation(len(bags))
    rows = np.concatenate([np.arange(bags.offsets[i], bags.offsets[i + 1]) for i in order])
    offsets = np.concatenate([[0], np.cumsum(bags.lengths[order])])
    slides, cases = (tuple(values[i] for i in order) for values in (bags.slides, bags.cases))
    mixed = Bags(bags.features[rows], bags.coords[rows], offsets, slides, cases, bags.tile[order])
    return mixed, Table(slides, cases, table.labels[order], table.names)
