"""Where the time went: seconds by stage, tiles per second, and which stage is the limit."""

from collections import Counter, defaultdict
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter
from typing import Protocol


@dataclass
class Ledger:
    """Adds up what every process spent in every stage; `wall` is the time that passed on the clock meanwhile. Only what
    was done is added: slides that failed early would make the rates look better than they are."""

    seconds: Counter = field(default_factory=Counter)
    tiles: int = 0
    slides: int = 0
    wall: float = 0.0
    crews: dict[str, tuple[str, int]] = field(default_factory=dict)  # stage -> who works at it, and how many they are

    def add(self, seconds: Mapping[str, float], tiles: int) -> None:
        self.seconds.update(seconds)
        self.tiles += tiles
        self.slides += 1

    def table(self) -> str:
        total = sum(self.seconds.values())
        if not total or not self.wall:
            return "nothing was done, so there is nothing to account for"
        lines = [f"{'stage':<14}{'seconds':>9}{'share':>8}{'tiles/s':>11}   (tiles/s: of this stage alone, one core)"]
        for stage, spent in self.seconds.most_common():
            rate = f"{self.tiles / spent:>11,.0f}" if spent > 0 else f"{'-':>11}"
            lines.append(f"{stage:<14}{spent:>9.1f}{spent / total:>8.0%}{rate}")
        limit, longest, busy = self.limit()
        crew = self.crews.get(limit, ("", 1))[0]
        told = f"{longest / total:.0%} of the work" + (
            f", {crew} busy {busy / self.wall:.0%} of the time" if crew else ""
        )
        lines.append(
            f"{self.slides} slides, {self.tiles:,} tiles in {self.wall:.1f} s: {self.tiles / self.wall:,.0f} tiles/s, "
            f"{60 * self.slides / self.wall:.1f} slides/min. The limit is {limit} ({told})."
        )
        return "\n".join(lines)

    def limit(self) -> tuple[str, float, float]:
        """The stage that took longest, and its seconds; where crews work side by side, the longest of the crew that was
        busy longest, and for how long each of that crew was."""
        busy: defaultdict[str, float] = defaultdict(float)
        for stage, spent in self.seconds.items():
            crew, hands = self.crews.get(stage, ("", 1))
            busy[crew] += spent / hands
        slowest = max(busy, key=lambda crew: busy[crew])
        of_crew = {s: spent for s, spent in self.seconds.items() if self.crews.get(s, ("", 1))[0] == slowest}
        return *max(of_crew.items(), key=lambda item: item[1]), busy[slowest]


class Reader(Protocol):
    @property
    def timings(self) -> Mapping[str, float]: ...


class Stopwatch:
    """Seconds by stage within one thread. What a stage spent inside other stages, or waiting for the readers that the
    watch follows, counts there and not twice: `with watch('register'): ...`."""

    def __init__(self):
        self.stages: defaultdict[str, float] = defaultdict(float)
        self.readers: list[Reader] = []

    @contextmanager
    def __call__(self, stage: str):
        start, before = perf_counter(), sum(self.seconds.values())
        try:
            yield
        finally:
            elsewhere = sum(self.seconds.values()) - before
            self.stages[stage] += max(perf_counter() - start - elsewhere, 0.0)

    @property
    def seconds(self) -> dict[str, float]:
        total = Counter(self.stages)
        for reader in self.readers:
            total.update(reader.timings)
        return dict(total)
