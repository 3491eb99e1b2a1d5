"""The language of views: 'crop(.6,1)|flip|jitter(.4,p=.8)' to checked calls, and back to one canonical string."""

import difflib
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

Value = float | tuple[float, ...] | None

_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
_NUMBERS = re.compile(rf"{_NUMBER}(?:-{_NUMBER})*\Z")
_NAME = re.compile(r"[A-Za-z_]\w*")


class ViewError(ValueError):
    """A view that cannot be: what is wrong, where, and what is allowed."""


@dataclass(frozen=True)
class Arg:
    """A number in [low, high], or with many=True one number or several joined by '-', one a channel."""

    name: str
    default: Value
    low: float
    high: float
    integer: bool = False
    many: bool = False


def fraction(name: str, default: Value) -> Arg:
    return Arg(name, default, 0.0, 1.0)


@dataclass(frozen=True)
class Op:
    """draw(source, args, shape) -> parameters; apply(parameters, value, args) -> value. Both pure, and for one row.

    For a geometric op `apply(parameters, None, args)` is its matrix; `channels` is the only channel count it takes.
    """

    stage: str  # 'geometry' | 'scale' | 'augment' | 'encode' | 'normalise'
    args: tuple[Arg, ...]
    draw: Callable[..., dict[str, Any]]
    apply: Callable[..., Any]
    check: Callable[[dict[str, Value]], str | None] = lambda values: None
    channels: int | None = None
    about: str = ""


@dataclass(frozen=True)
class Call:
    name: str
    values: tuple[tuple[str, Value], ...]
    position: int = field(default=0, compare=False)

    @property
    def args(self) -> dict[str, Any]:
        return dict(self.values)

    def __str__(self) -> str:
        words, named = [], False
        for name, value in self.values:
            if value is None:
                named = True
                continue
            text = "-".join(map(_text, value)) if isinstance(value, tuple) else _text(value)
            words.append(f"{name}={text}" if named else text)
        return f"{self.name}({','.join(words)})" if words else self.name


def _text(number: float) -> str:
    return repr(int(number)) if number == int(number) and abs(number) < 1e15 else repr(number)


def canonical(calls: tuple[Call, ...]) -> str:
    """Every argument written out, so that a record does not change its meaning when a default does."""
    return "|".join(map(str, calls))


def nearest(word: str, words: Mapping[str, Any] | list[str], otherwise: str = "") -> str:
    close = difflib.get_close_matches(word, list(words), n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else otherwise


def read(spec: str, ops: Mapping[str, Op], *, kind: str, others: Mapping[str, Mapping[str, Op]]) -> tuple[Call, ...]:
    """The calls of a spec; `others` holds the ops of other kinds of view, to say where a misplaced op belongs."""
    calls: list[Call] = []
    start = 0
    for part in spec.split("|"):
        calls.append(_call(spec, part, start, ops, kind, others))
        start += len(part) + 1
    return tuple(calls)


def _fail(spec: str, position: int, what: str) -> NoReturn:
    raise ViewError(f"{what}\n  {spec}\n  {' ' * position}^ position {position}")


def _call(
    spec: str, part: str, start: int, ops: Mapping[str, Op], kind: str, others: Mapping[str, Mapping[str, Op]]
) -> Call:
    position = start + len(part) - len(part.lstrip())
    text = part.strip()
    match = _NAME.match(text)
    if not match:
        _fail(spec, position, f"an op is a name, such as 'flip' or 'crop(.6,1)', not {text!r}")
    name, rest = match.group(), text[match.end() :]
    if name not in ops:
        for other, table in others.items():
            if name in table:
                _fail(spec, position, f"'{name}' is an op of {other} views, and this is a view of kind '{kind}'")
        _fail(spec, position, f"unknown op '{name}'{nearest(name, ops, '.')} Ops of {kind} views: {', '.join(ops)}")
    if rest and not (rest.startswith("(") and rest.endswith(")") and "(" not in rest[1:]):
        _fail(spec, position + len(name), f"'{name}' is followed by {rest!r}; arguments look like '{name}(.1,p=.5)'")
    op = ops[name]
    values = _arguments(spec, name, rest[1:-1], position + len(name) + 1, op.args)
    complaint = op.check(values)
    if complaint:
        _fail(spec, position, f"'{name}': {complaint}")
    return Call(name, tuple(values.items()), position)


def _arguments(spec: str, op: str, text: str, start: int, args: tuple[Arg, ...]) -> dict[str, Value]:
    known = {arg.name: arg for arg in args}
    signature = f"{op}({', '.join(f'{a.name}={_show(a.default)}' for a in args)})" if args else f"{op}, no arguments"
    given: dict[str, Value] = {}
    position, named = start, False
    for i, part in enumerate(text.split(",") if text.strip() else []):
        here = position + len(part) - len(part.lstrip())
        word, equals, value = part.strip().rpartition("=")
        word = word.strip()
        if equals:
            named = True
            if word not in known:
                _fail(spec, here, f"'{op}' has no argument '{word}'{nearest(word, known, '.')} It is {signature}")
        elif named:
            _fail(spec, here, f"'{op}': a value without a name follows a named one. It is {signature}")
        elif i >= len(args):
            _fail(spec, here, f"'{op}' takes at most {len(args)} arguments. It is {signature}")
        else:
            word = args[i].name
        if word in given:
            _fail(spec, here, f"'{op}': '{word}' is given twice")
        given[word] = _value(spec, op, known[word], value.strip(), here)
        position += len(part) + 1
    return {arg.name: given.get(arg.name, arg.default) for arg in args}


def _show(value: Value) -> str:
    if value is None:
        return "none"
    return "-".join(map(_text, value)) if isinstance(value, tuple) else _text(value)


def _value(spec: str, op: str, arg: Arg, text: str, position: int) -> Value:
    allowed = f"{'integers' if arg.integer else 'numbers'} in [{_text(arg.low)}, {_text(arg.high)}]"
    if arg.many:
        allowed += ", one for all or one a channel joined by '-'"
    if not _NUMBERS.match(text):
        _fail(spec, position, f"'{op}': {arg.name} is not {text!r}; allowed: {allowed}")
    numbers = tuple(float(number) for number in re.findall(rf"(?:(?<=[\d.])-)?({_NUMBER})", text))
    if len(numbers) > 1 and not arg.many:
        _fail(spec, position, f"'{op}': {arg.name} is one number, not {text!r}; allowed: {allowed}")
    for number in numbers:
        fits = math.isfinite(number) and arg.low <= number <= arg.high and (not arg.integer or number == int(number))
        if not fits:
            _fail(spec, position, f"'{op}': {arg.name}={_text(number)} is out of range; allowed: {allowed}")
    return numbers if arg.many else numbers[0]
