"""What figures say of a claim, in words: by intervals, and by p values after Holm's correction."""

from collections.abc import Mapping, Sequence
from typing import Any

from mfl_jax.report import tables


def ahead(judged: Mapping[str, Any], key: str, ours: Sequence[str], others: Sequence[str]) -> str:
    """Of each of ours, the figure and the differences to the others."""
    of = {arm["name"]: arm for arm in judged["arms"]}
    apart = {(d["a"], d["b"]): d for d in judged["differences"] if d["metric"] == key}
    told = []
    for name in ours:
        rows = [apart[name, other] for other in others if (name, other) in apart]
        each = "; ".join(f"{of[row['b']]['title']} {signed(row)}" for row in rows)
        above = sum(row["difference"] > 0 and row["p_holm"] < 0.05 for row in rows)
        mean = tables.figure(of[name]["metrics"][key]["mean"])
        told.append(f"{of[name]['title']} {mean}, clearly above {above} of {len(rows)} ({each})")
    return f"{key}: {'. '.join(told)}."


def ranked(judged: Mapping[str, Any], key: str, title: str) -> str:
    arms = sorted(judged["arms"], key=lambda arm: -(arm["metrics"][key]["mean"] or 0.0))
    each = (f"{arm['title']} {tables.figure(arm['metrics'][key]['mean'])}" for arm in arms)
    return f"{title}: {', '.join(each)}."


def lifted(judged: Mapping[str, Any], task: str, heads: Sequence[str], encoders: Sequence[str], base: str) -> str:
    """Does every head gain by features learnt in the domain? Of each encoder, its differences to `base`."""
    apart = {(d["a"], d["b"]): d for d in judged["differences"]}
    titles = {arm["name"]: arm["title"] for arm in judged["arms"]}
    told = []
    for encoder in encoders:
        rows = [apart[f"{encoder}/{head}", f"{base}/{head}"] for head in heads]
        above = sum(row["difference"] > 0 and row["p_holm"] < 0.05 for row in rows)
        below = sum(row["difference"] < 0 and row["p_holm"] < 0.05 for row in rows)
        each = "; ".join(f"{head} {signed(row)}" for head, row in zip(heads, rows, strict=True))
        verdict = "lifts every head" if above == len(rows) else f"lifts {above} of {len(rows)} heads clearly"
        verdict += f" and lowers {below}" if below else ""
        told.append(f"{titles[f'{encoder}/{heads[0]}'].split(',')[0]} {verdict} above {base} ({each})")
    return f"{task.capitalize()}: {'. '.join(told)}."


def reached(judged: Mapping[str, Any], task: str, heads: Sequence[str], arm: str) -> str:
    """Of each head on one arm, its figure."""
    of = {one["name"]: one for one in judged["arms"]}
    metrics = {head: of[f"{arm}/{head}"]["metrics"][f"{task}/auc"] for head in heads}
    each = (f"{head} {tables.figure(m['mean'])} {tables.interval(m)}".strip() for head, m in metrics.items())
    title = of[f"{arm}/{heads[0]}"]["title"].split(",")[0]
    return f"{task.capitalize()}, {title.lower()}: {', '.join(each)}."


def near_ceiling(
    judged: Mapping[str, Any], task: str, heads: Sequence[str], encoders: Sequence[str], top: str, within: float
) -> str:
    """Is the best head on such features within so much of the ceiling? The best is chosen on these very cases."""
    key = f"{task}/auc"
    of = {arm["name"]: arm for arm in judged["arms"]}
    names = [f"{encoder}/{head}" for encoder in encoders for head in heads]
    best = max(names, key=lambda name: of[name]["metrics"][key]["mean"] or 0.0)
    row = next(d for d in judged["differences"] if (d["a"], d["b"]) == (best, top))
    low, high, middle = row["low"], row["high"], row["difference"]
    if low is None:
        verdict = "there are too few cases to say more"
    elif low > -within:
        verdict = f"within {within:g} of it"
    elif high < -within:
        verdict = f"not within {within:g} of it"
    else:
        verdict = f"within {within:g} of it is {'likelier than not' if middle > -within else 'unlikely'}, and not shown"
    ours, ceiling = (tables.figure(of[name]["metrics"][key]["mean"]) for name in (best, top))
    return (
        f"The best head without such labels, {of[best]['title']}, has an AUC of {ours}, the ceiling {ceiling}: the "
        f"difference is {signed(row)}, {verdict}."
    )


def signed(row: Mapping[str, Any]) -> str:
    return f"{tables.figure(row['difference'], sign=True)} {tables.interval(row)}".strip()
