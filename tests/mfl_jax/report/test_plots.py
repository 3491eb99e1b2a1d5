import math
import re
from itertools import pairwise
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mfl_jax.report import plots
from mfl_jax.report.plots import Point, Series

SVG = "{http://www.w3.org/2000/svg}"
HOSTILE = "<script>alert(\"a\")</script> & 'b'"


def parse(svg: str) -> ElementTree.Element:
    assert not re.search(r"\bnan\b|\binf\b|None", svg)
    return ElementTree.fromstring(svg)


def paths(root, name: str) -> list[str]:
    """`d` of the paths that have a class, with or without others."""
    return [e.get("d", "") for e in root.iter(f"{SVG}path") if name in e.get("class", "").split()]


def corners(d: str) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in re.findall(r"[ML](-?[\d.]+) (-?[\d.]+)", d)]


def texts(root) -> list[str]:
    return [e.text or "" for e in root.iter(f"{SVG}text")]


@given(st.floats(-1e6, 1e6), st.floats(1e-4, 1e6), st.integers(3, 8))
def test_ticks_enclose_the_range_evenly_with_a_plain_step(low, span, count):
    high = low + span
    values = plots.ticks(low, high, count)
    steps = [b - a for a, b in pairwise(values)]
    step = sum(steps) / len(steps)
    assert steps == pytest.approx([step] * len(steps), rel=1e-4)
    mantissa = step / 10 ** math.floor(math.log10(step) + 1e-6)
    assert min(abs(mantissa - plain) for plain in (1, 2, 2.5, 5)) < 1e-2
    assert low - 1.001 * step < values[0] <= low + 1e-6 * step
    assert high - 1e-6 * step <= values[-1] < high + 1.001 * step
    assert len(values) <= count + 2


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.52, 0.93, [0.4, 0.6, 0.8, 1.0]),
        (0, 100, [0, 25, 50, 75, 100]),
        (-3, 7, [-5, -2.5, 0, 2.5, 5, 7.5]),
        (2, 2, [1.8, 1.9, 2.0, 2.1, 2.2]),
    ],
)
def test_ticks_by_hand(low, high, expected):
    assert plots.ticks(low, high) == pytest.approx(expected)


@given(st.floats(-100, 100), st.floats(1e-3, 1e6))
def test_tick_texts_are_the_values_and_tell_them_apart(low, span):
    values = plots.ticks(low, low + span)
    written = plots.tick_texts(values)
    read = [float(t.replace("\u2212", "-").rstrip("kM")) * {"k": 1e3, "M": 1e6}.get(t[-1], 1) for t in written]
    step = values[1] - values[0]
    assert read == pytest.approx(values, abs=1e-3 * step)
    assert len(set(written)) == len(values)


def test_tick_texts_by_hand():
    assert plots.tick_texts([-0.5, 0.0, 0.5]) == ["\u22120.5", "0", "0.5"]
    assert plots.tick_texts([0, 20_000, 40_000]) == ["0", "20k", "40k"]
    assert plots.tick_texts([0.0, 0.25]) == ["0", "0.25"]


def test_a_line_lies_where_the_axes_say():
    root = parse(plots.lines([Series("a", [0, 5, 10], [0.4, 0.8, 0.6])], title="t"))
    grid = [float(y) for y in re.findall(r"M[\d.]+ ([\d.]+)H", paths(root, "grid")[0])]
    (a, b, c) = corners(paths(root, "line")[0])
    assert [a[1], c[1], b[1]] == [max(grid), pytest.approx((max(grid) + min(grid)) / 2, abs=0.11), min(grid)]
    assert b[0] == pytest.approx((a[0] + c[0]) / 2, abs=0.11)


def test_log_axis_spaces_decades_evenly():
    root = parse(plots.lines([Series("a", [0.01, 0.1, 1], [1, 2, 3])], title="t", log_x=True, x_ticks=[0.01, 0.1, 1]))
    a, b, c = (x for x, _ in corners(paths(root, "line")[0]))
    assert b - a == pytest.approx(c - b, abs=0.2)


def test_a_gap_starts_a_new_line_and_the_band_leaves_it_out():
    series = Series("a", [0, 1, 2, 3], [1, None, 3, 4], low=[0, None, 2, 3], high=[2, None, 4, 5])
    root = parse(plots.lines([series], title="t"))
    assert paths(root, "line")[0].count("M") == 2
    assert len(corners(paths(root, "band")[0])) == 6


@pytest.mark.parametrize("y", [[], [None, None], [1.0]])
def test_lines_of_nothing_are_a_plot_still(y):
    series = [Series("a", list(range(len(y))), y)]
    parse(plots.lines(series, title="t"))
    parse(plots.lines([], title="t"))


@pytest.mark.parametrize("last", [0.0, 0.5, 0.99])
def test_names_at_the_ends_do_not_overlap(last):
    series = [Series(f"arm {i}", [0, 1, 2], [0, 1, last + i * 1e-3], style=i) for i in range(8)]
    root = parse(plots.lines(series, title="t"))
    at = sorted(float(e.get("y")) for e in root.iter(f"{SVG}text") if "named" in e.get("class", ""))
    assert len(at) == 8
    assert min(b - a for a, b in pairwise(at)) >= 12.9
    assert at[0] > 0
    assert at[-1] <= 280


def test_forest_puts_means_within_their_intervals():
    points = [Point("a", 0.7, 0.6, 0.9, dots=(0.65, None)), Point("b", None), Point("c", 0.8, strong=True)]
    root = parse(plots.forest(points, title="t", reference=0.5, reference_name="chance"))
    low, high = re.match(r"M([\d.]+) [\d.]+H([\d.]+)", paths(root, "bar")[0]).groups()
    mark = float(re.match(r"M([\d.]+)", paths(root, "fill")[0]).group(1))
    assert (mark - float(low)) / (float(high) - float(low)) == pytest.approx(1 / 3, abs=0.01)
    reference = float(re.match(r"M([\d.]+)", paths(root, "reference")[0]).group(1))
    assert reference < float(low)
    assert {"0.700", "not defined", "0.800", "chance"} <= set(texts(root))
    assert paths(root, "dots")[0].count("M") == 1
    strong = [e.text for e in root.iter(f"{SVG}text") if "strong" in e.get("class", "")]
    assert strong == ["c", "0.800"]


def test_scatter_draws_each_point_once_in_its_category():
    root = parse(plots.scatter([0, 1, 2, 3], [0, 1, 0, 1], [0, 2, 2, 1], title="t", categories=3))
    groups = {g.get("class").split()[0]: g[0].get("d").count("M") for g in root.iter(f"{SVG}g")}
    assert groups == {"c0": 1, "c1": 1, "c2": 2}
    shapes = {g[0].get("d").split("m", 1)[1] for g in root.iter(f"{SVG}g") if g[0].get("d").count("M") == 1}
    assert len(shapes) == 2  # told apart without colour


def test_scatter_by_value_uses_the_whole_scale():
    root = parse(plots.scatter(range(10), range(10), range(10), title="t"))
    assert sorted(g.get("class") for g in root.iter(f"{SVG}g")) == ["s0", "s1", "s2", "s3", "s4"]
    parse(plots.scatter([1, 1], [2, 2], [3, 3], title="t"))
    parse(plots.scatter([], [], [], title="t"))


def test_points_without_a_value_have_a_mark_of_their_own():
    root = parse(plots.scatter([0, 1, 2], [0, 1, 2], [-5.0, None, 3.0], title="t"))
    groups = {g.get("class"): g[0].get("class") for g in root.iter(f"{SVG}g")}
    assert groups == {"s0": "fill", "s4": "fill", "s5": "open"}
    assert "unknown" in plots.scale("0", "1", unknown=True)
    assert "unknown" not in plots.scale("0", "1")


@pytest.mark.parametrize("letters", [5, 40, 54, 90])
def test_titles_of_axes_stay_within_the_picture(letters):
    title = "m" * letters
    drawn = {
        plots.forest([Point("a name of some length", 0.5)], title="t", x_title=title): 1,
        plots.lines([Series("a", [0, 1], [0, 1])], title="t", x_title=title, y_title=title): 2,
    }
    for svg, count in drawn.items():
        root = parse(svg)
        _, _, width, height = (float(v) for v in root.get("viewBox").split())
        named = [e for e in root.iter(f"{SVG}text") if e.text.startswith("mm")]
        assert len(named) == count
        for e in named:
            at, length = (float(e.get("y")), height) if e.get("transform") else (float(e.get("x")), width)
            half = len(e.text) * plots.LETTER / 2
            assert at - half >= -0.1
            assert at + half <= length + 0.1
            assert e.text == title or "\u2026" in e.text


def test_bars_are_as_long_as_their_values():
    root = parse(plots.bars(["a", "b"], [10, 5], title="t", texts=["x", "y"]))
    a, b = (float(e.get("width")) for e in root.iter(f"{SVG}rect"))
    assert a == pytest.approx(2 * b, rel=0.01)
    parse(plots.bars([], [], title="t", texts=[]))


def test_names_are_text_and_never_markup():
    drawn = [
        plots.lines([Series(HOSTILE, [0, 1], [0, 1])], title=HOSTILE, x_title=HOSTILE, y_title=HOSTILE, width=4000),
        plots.forest([Point(HOSTILE, 1.0)], title=HOSTILE, width=4000),
        plots.bars([HOSTILE], [1], title=HOSTILE, texts=[HOSTILE], width=4000),
    ]
    for svg in drawn:
        root = parse(svg)
        assert HOSTILE in texts(root)
        assert root.get("aria-label") == HOSTILE
        assert not list(root.iter(f"{SVG}script"))


def test_plots_are_pictures_with_a_name():
    root = parse(plots.lines([Series("a", [0, 1], [0, 1])], title="what it shows"))
    assert root.get("role") == "img"
    assert root.find(f"{SVG}title").text == "what it shows"


def test_a_long_name_loses_its_middle_and_stays_within_the_plot():
    names = [f"TCGA-AA-1234-01Z-00-DX1.{'0123456789abcdef' * 3}-{i}" for i in range(2)]
    drawn = [
        plots.forest([Point(name, 0.5, strong=bool(i)) for i, name in enumerate(names)], title="t"),
        plots.lines([Series(name, [0, 1], [i, i + 1]) for i, name in enumerate(names)], title="t"),
        plots.bars(names, [1, 2], title="t", texts=["", ""]),
    ]
    for svg in drawn:
        shown = [text for text in texts(parse(svg)) if "\u2026" in text]
        assert sorted(text[-1] for text in shown) == ["0", "1"]
        assert all(text.startswith("TCGA") and 8 <= len(text) <= 26 for text in shown)
