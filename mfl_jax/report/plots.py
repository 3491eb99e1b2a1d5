"""Plots as SVG text: pure functions of numbers, drawn for a width of 420 that reads well on a phone and in a column.

Colours are CSS classes (style.py holds them for light, dark and paper); a series differs from its neighbours by dash
and marker as well. None among the values is a gap.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mfl_jax.report.markup import Html, join, tag

DASHES = (None, "7 3", "2 3", "9 3 2 3", "5 2", "1 3", "12 4", "6 2 1 2")
COLOURS, BINS = 8, 5
UNKNOWN = 2  # the shape of a point without a value: a cross
LETTER, STRONG = 7.3, 8.0  # px of a letter, in the widest of the fonts that a reader may have
Values = Sequence[float | None]


@dataclass(frozen=True)
class Series:
    name: str
    x: Sequence[float]
    y: Values
    low: Values | None = None
    high: Values | None = None
    style: int = 0
    strong: bool = False
    plain: bool = False  # no dashes: one of several alike


@dataclass(frozen=True)
class Point:
    name: str
    mean: float | None
    low: float | None = None
    high: float | None = None
    dots: Values = ()
    style: int = 0
    strong: bool = False


@dataclass(frozen=True)
class Axis:
    """From values in [low, high] to pixels in [start, end]."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high = (math.log10(self.low), math.log10(self.high)) if self.log else (self.low, self.high)
        return self.start + ((math.log10(value) if self.log else value) - low) / (high - low) * (self.end - self.start)


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` multiples of 1, 2, 2.5 or 5 times a power of ten that enclose [low, high]."""
    if not high > low:
        pad = abs(low) * 0.1 or 0.5
        low, high = low - pad, high + pad
    raw = (high - low) / max(count - 1, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{i * step:.12g}") for i in range(first, last + 1)]


def tick_texts(values: Sequence[float]) -> list[str]:
    """As many decimals as tell the ticks apart, thousands as k and millions as M."""
    top = max((abs(v) for v in values), default=0)
    unit, suffix = (1e6, "M") if top >= 1e6 else (1e3, "k") if top >= 1e4 else (1.0, "")
    if 0 < top < 1e-3:
        return [f"{v:g}".replace("-", "\u2212") for v in values]
    decimals = next((d for d in range(6) if all(abs(round(v / unit, d) - v / unit) < 1e-9 for v in values)), 6)
    return [f"{v / unit:.{decimals}f}{suffix}".replace("-", "\u2212") if v else "0" for v in values]


def lines(
    series: Sequence[Series],
    *,
    title: str,
    x_title: str = "",
    y_title: str = "",
    x_ticks: Sequence[float] | None = None,
    x_text: Callable[[float], str] | None = None,
    log_x: bool = False,
    names: bool = True,
    reference: float | None = None,
    width: int = 420,
    height: int = 280,
) -> Html:
    """Lines with bands; each is named at its end (`names`), so no legend has to be matched by colour."""
    count = 5 if height > 200 else 3
    extent = [v for s in series for values in (s.y, s.low or (), s.high or ()) for v in values if v is not None]
    y_values = ticks(*_range([*extent, *_given(reference)]), count)
    y_texts = tick_texts(y_values)
    left = 14 + LETTER * max(map(len, y_texts)) + (16 if y_title else 0)
    right = min(_room([(s.name, s.strong) for s in series]) + 16, width * 0.34) if names else 12
    bottom = height - (40 if x_title else 24)
    all_x = _range([v for s in series for v in s.x])
    if not log_x and 0 < all_x[0] < 0.05 * all_x[1]:
        all_x = (0.0, all_x[1])
    if x_ticks is None:
        x_ticks = [v for v in ticks(*all_x, 4) if all_x[0] <= v <= all_x[1]]
    low, high = (all_x[0] / 1.15, all_x[1] * 1.15) if log_x else all_x
    if not high > low:
        low, high = low - 0.5, high + 0.5
    x = Axis(low, high, left, width - right, log_x)
    y = Axis(y_values[0], y_values[-1], bottom, 12)
    x_texts = [x_text(v) for v in x_ticks] if x_text else tick_texts(x_ticks)
    drawn = [_band(s, x, y) for s in series] + [_line(s, x, y, markers=log_x) for s in sorted(series, key=_strength)]
    return _svg(
        title,
        width,
        height,
        _y_axis(y, y_values, y_texts, left, width - right, y_title, height),
        _x_axis(x, x_ticks, x_texts, bottom, x_title, width),
        _level(y, reference, left, width - right),
        *drawn,
        *(_ends(series, y, width - right + 6, bottom, right - 8) if names else ()),
    )


def forest(
    points: Sequence[Point],
    *,
    title: str,
    x_title: str = "",
    reference: float | None = None,
    reference_name: str = "",
    text: Callable[[float], str] = "{:.3f}".format,
    width: int = 420,
) -> Html:
    """One row a point: its interval, its mean, small dots for what it is the mean of; figures stand at the right."""
    row, top = 30, 24 if reference_name else 10
    values = [v for p in points for v in (p.mean, p.low, p.high, *p.dots) if v is not None]
    x_values = ticks(*_range([*values, *_given(reference)]), 4)
    texts = [text(p.mean) if p.mean is not None else "not defined" for p in points]
    left = min(_room([(p.name, p.strong) for p in points]) + 12, width * 0.46)
    right = _room([(text, p.strong) for text, p in zip(texts, points, strict=True)]) + 12
    bottom = top + row * len(points)
    height = bottom + (40 if x_title else 24)
    x = Axis(x_values[0], x_values[-1], left + 6, width - right - 6)
    drawn: list[Html | None] = [_x_axis(x, x_values, tick_texts(x_values), bottom, x_title, width, grid=top)]
    if reference is not None:
        across = _px(x(reference))
        drawn.append(tag("path", d=f"M{across} {top}V{bottom}", class_="reference"))
        drawn.append(tag("text", reference_name, x=across, y=top - 8, class_="mid soft"))
    for i, (p, shown) in enumerate(zip(points, texts, strict=True)):
        at = top + row * (i + 0.5)
        strong = " strong" if p.strong else ""
        name = _fit(p.name, left - 8, p.strong)
        drawn.append(tag("text", name, x=_px(left - 4), y=_px(at + 4), class_=f"end{strong}"))
        drawn.append(tag("text", shown, x=width - 2, y=_px(at + 4), class_=f"end{strong}"))
        drawn.append(_interval(p, x, at))
    return _svg(title, width, height, *drawn)


def _interval(p: Point, x: Axis, at: float) -> Html:
    dots = "".join(f"M{_px(x(v))} {_px(at + 8)}h0" for v in p.dots if v is not None)
    parts = [tag("path", d=dots, class_="dots") if dots else None]
    if p.low is not None and p.high is not None:
        low, high, cap = _px(x(p.low)), _px(x(p.high)), 4
        bar = f"M{low} {_px(at)}H{high}M{low} {_px(at - cap)}v{2 * cap}M{high} {_px(at - cap)}v{2 * cap}"
        parts.append(tag("path", d=bar, class_="bar heavy" if p.strong else "bar"))
    if p.mean is not None:
        parts.append(_marks([(x(p.mean), at)], p.style, 4.5 if p.strong else 3.5))
    return tag("g", *parts, class_=f"c{p.style % COLOURS}")


def scatter(
    x: Sequence[float],
    y: Sequence[float],
    values: Sequence[float | None],
    *,
    title: str,
    categories: int | None = None,
    width: int = 260,
    height: int = 220,
) -> Html:
    """Points by category (its colour and shape are legend()'s) or, without categories, by value in five steps of
    colour, and unknown ones as scale() says. The axes carry no figures: those of a projection mean nothing."""
    if categories is None:
        low, high = _range([v for v in values if v is not None])
        wide = (high - low) or 1
        codes = [BINS if v is None else min(int((v - low) / wide * BINS), BINS - 1) for v in values]
    else:
        codes = [int(v) for v in values if v is not None]
    across, up = Axis(*_wide(x), 8, width - 8), Axis(*_wide(y), height - 8, 8)
    groups = []
    for code in sorted(set(codes)):
        at = [(across(a), up(b)) for a, b, c in zip(x, y, codes, strict=True) if c == code]
        if categories is None:
            shape, look = UNKNOWN if code == BINS else 0, f"s{code}"
        else:
            shape, look = code, f"c{code % COLOURS} points"
        groups.append(tag("g", _marks(at, shape, 2), class_=look))
    frame = tag("rect", x=1, y=1, width=width - 2, height=height - 2, class_="frame")
    return _svg(title, width, height, frame, *groups)


def bars(names: Sequence[str], values: Sequence[float], *, title: str, texts: Sequence[str], width: int = 420) -> Html:
    """Horizontal bars from zero, each with its text at the end."""
    row = 24
    left = min(_room([(name, False) for name in names]) + 14, width * 0.4)
    right = max(map(len, texts), default=0) * LETTER + 12
    x = Axis(0, max([*values, 0]) or 1, left, width - right)
    drawn = []
    for i, (name, value, text) in enumerate(zip(names, values, texts, strict=True)):
        at = 4 + row * i
        drawn.append(tag("text", _fit(name, left - 8), x=_px(left - 6), y=at + 15, class_="end"))
        length = max(x(max(value, 0)) - left, 1)
        drawn.append(tag("rect", x=_px(left), y=at + 4, width=_px(length), height=row - 8, class_="fill c0"))
        drawn.append(tag("text", text, x=_px(left + length + 6), y=at + 15))
    return _svg(title, width, row * len(names) + 8, *drawn)


def legend(names: Sequence[str], styles: Sequence[int] | None = None, *, line: bool = False) -> Html:
    """An HTML list of markers and names, for plots that share it."""
    items = []
    for style, name in zip(styles or range(len(names)), names, strict=True):
        mark = _marks([(12, 7)], style, 3.5)
        rule = tag("path", d="M0 7H24", class_="line", stroke_dasharray=DASHES[style % len(DASHES)]) if line else None
        drawn = tag("g", rule, mark, class_=f"c{style % COLOURS}")
        swatch = tag("svg", drawn, viewBox="0 0 24 14", width=24, height=14, aria_hidden="true")
        items.append(tag("li", swatch, name))
    return tag("ul", *items, class_="legend")


def scale(low: str, high: str, unknown: bool = False) -> Html:
    """The five steps of colour of a scatter by value, between its ends, and the mark of what has no value."""
    boxes = [
        tag("g", tag("rect", x=14 * i, y=2, width=14, height=10, class_="fill"), class_=f"s{i}") for i in range(BINS)
    ]
    swatch = tag("svg", *boxes, viewBox="0 0 70 14", width=70, height=14, aria_hidden="true")
    mark = tag("g", _marks([(7, 7)], UNKNOWN, 3.5), class_=f"s{BINS}")
    none = tag("svg", mark, viewBox="0 0 14 14", width=14, height=14, aria_hidden="true")
    return tag("p", low, " ", swatch, " ", high, *((none, " unknown") if unknown else ()), class_="legend")


def _svg(title: str, width: float, height: float, *children: Html | None) -> Html:
    box = f"0 0 {_px(width)} {_px(height)}"
    head = tag("title", title)
    return tag("svg", head, *children, xmlns="http://www.w3.org/2000/svg", viewBox=box, role="img", aria_label=title)


def _y_axis(
    y: Axis, values: Sequence[float], texts: Sequence[str], left: float, right: float, title: str, height: float
) -> Html:
    grid = "".join(f"M{_px(left)} {_px(y(v))}H{_px(right)}" for v in values)
    labels = [
        tag("text", text, x=_px(left - 6), y=_px(y(v) + 4), class_="end soft")
        for v, text in zip(values, texts, strict=True)
    ]
    return join(tag("path", d=grid, class_="grid"), *labels, _axis_title(title, y, height, 12, turned=True))


def _x_axis(
    x: Axis,
    values: Sequence[float],
    texts: Sequence[str],
    bottom: float,
    title: str,
    width: float,
    grid: float | None = None,
) -> Html:
    shown = [v for v in values if x.low <= v <= x.high]
    base = f"M{_px(x.start)} {_px(bottom)}H{_px(x.end)}"
    marks = "".join(f"M{_px(x(v))} {_px(bottom)}v4" for v in shown)
    rules = "".join(f"M{_px(x(v))} {_px(grid)}V{_px(bottom)}" for v in shown) if grid is not None else ""
    labels = [
        tag("text", text, x=_px(x(v)), y=_px(bottom + 17), class_="mid soft")
        for v, text in zip(values, texts, strict=True)
        if v in shown
    ]
    named = _axis_title(title, x, width, bottom + 35)
    lines = tag("path", d=rules, class_="grid") if rules else None
    return join(lines, tag("path", d=base + marks, class_="axis"), *labels, named)


def _axis_title(title: str, axis: Axis, length: float, beside: float, *, turned: bool = False) -> Html | None:
    """Its middle is near the axis's own, and all of it within the `length` of the picture."""
    if not title:
        return None
    shown = _fit(title, length - 4)
    half = min(_room([(shown, False)]), length) / 2
    middle, across = _px(min(max((axis.start + axis.end) / 2, half), length - half)), _px(beside)
    if turned:
        return tag("text", shown, x=across, y=middle, class_="mid", transform=f"rotate(-90 {across} {middle})")
    return tag("text", shown, x=middle, y=across, class_="mid")


def _level(y: Axis, value: float | None, left: float, right: float) -> Html | None:
    return (
        tag("path", d=f"M{_px(left)} {_px(y(value))}H{_px(right)}", class_="reference") if value is not None else None
    )


def _line(s: Series, x: Axis, y: Axis, *, markers: bool) -> Html:
    at = [(x(a), y(b)) if b is not None else None for a, b in zip(s.x, s.y, strict=True)]
    path = "".join(
        f"{'L' if i and at[i - 1] is not None else 'M'}{_px(p[0])} {_px(p[1])}" for i, p in enumerate(at) if p
    )
    dash = None if s.plain else DASHES[s.style % len(DASHES)]
    line = tag("path", d=path, class_="line heavy" if s.strong else "line", stroke_dasharray=dash) if path else None
    marks = _marks([p for p in at if p], s.style, 4 if s.strong else 3) if markers else None
    return tag("g", line, marks, class_=f"c{s.style % COLOURS}")


def _band(s: Series, x: Axis, y: Axis) -> Html | None:
    if s.low is None or s.high is None:
        return None
    triples = zip(s.x, s.low, s.high, strict=True)
    edges = [(x(a), y(lo), y(hi)) for a, lo, hi in triples if lo is not None and hi is not None]
    if len(edges) < 2:
        return None
    there = "L".join(f"{_px(a)} {_px(hi)}" for a, _, hi in edges)
    back = "L".join(f"{_px(a)} {_px(lo)}" for a, lo, _ in reversed(edges))
    return tag("g", tag("path", d=f"M{there}L{back}Z", class_="band"), class_=f"c{s.style % COLOURS}")


def _ends(series: Sequence[Series], y: Axis, left: float, bottom: float, room: float) -> list[Html]:
    """The name of each line at its last point, moved apart where they would overlap."""
    last = [(y(next(v for v in reversed(s.y) if v is not None)), s) for s in series if any(v is not None for v in s.y)]
    last.sort(key=lambda pair: pair[0])
    at: list[float] = []
    step = 13.0
    for height, _ in last:
        at.append(max(height, at[-1] + step) if at else max(height, 12))
    for i in reversed(range(len(at))):
        at[i] = min(at[i], (at[i + 1] if i + 1 < len(at) else bottom + step) - step)
    return [
        tag(
            "text",
            _fit(s.name, room, s.strong),
            x=_px(left),
            y=_px(height + 4),
            class_=f"c{s.style % COLOURS} named{' strong' if s.strong else ''}",
        )
        for height, (_, s) in zip(at, last, strict=True)
    ]


def _marks(at: Sequence[tuple[float, float]], style: int, r: float) -> Html:
    """A shape for each style: disc, square, cross, triangle, plus, diamond."""
    kind, half, whole = style % 6, _px(r), _px(2 * r)
    wide, twice, tall = _px(1.2 * r), _px(2.4 * r), _px(2.1 * r)
    shape = (
        f"m-{half} 0a{half} {half} 0 1 0 {whole} 0a{half} {half} 0 1 0 -{whole} 0z",
        f"m-{half} -{half}h{whole}v{whole}h-{whole}z",
        f"m-{half} -{half}l{whole} {whole}m0 -{whole}l-{whole} {whole}",
        f"m0 -{wide}l{wide} {tall}h-{twice}z",
        f"m-{wide} 0h{twice}m-{wide} -{wide}v{twice}",
        f"m0 -{wide}l{wide} {wide}l-{wide} {wide}l-{wide} -{wide}z",
    )[kind]
    path = "".join(f"M{_px(a)} {_px(b)}{shape}" for a, b in at)
    return tag("path", d=path, class_="open" if kind in (2, 4) else "fill")


def _px(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def _fit(name: str, room: float, strong: bool = False) -> str:
    """Without its middle where there is no room: names of slides and arms differ at their ends."""
    letters = max(int(room / (STRONG if strong else LETTER)), 3)
    if len(name) <= letters:
        return name
    tail = (letters - 1) // 3
    return f"{name[: letters - 1 - tail]}\u2026{name[-tail:] if tail else ''}"


def _room(names: Sequence[tuple[str, bool]]) -> float:
    return max((len(name) * (STRONG if strong else LETTER) for name, strong in names), default=0.0)


def _given(value: float | None) -> list[float]:
    return [] if value is None else [value]


def _range(values: Sequence[float]) -> tuple[float, float]:
    return (min(values), max(values)) if values else (0.0, 1.0)


def _wide(values: Sequence[float]) -> tuple[float, float]:
    low, high = _range(values)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _strength(series: Series) -> bool:
    return series.strong
