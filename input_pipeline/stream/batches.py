"""The batches that workers are writing, and who does the writing."""

import threading
from dataclasses import replace
from functools import partial

import numpy as np

from input_pipeline.crew import Crew, Shelf, step_back
from input_pipeline.stream.executors import Done
from input_pipeline.stream.fetching import Plan, fetch, fetch_apart, layout

LENT = 3  # batches that a consumer may keep before it is given copies


class Batches:
    """Batches that workers are writing, by step; the executor's window bounds how many there are. Their memory is used
    again: to touch new memory for every batch takes a tenth of the time that a stream has for it."""

    def __init__(self, plan: Plan, window: int, apart: bool, nice: int):
        self._plan, self._nice, self._lock = plan, nice, threading.Lock()
        self._shelf = Shelf(layout(plan), window + LENT, shared=apart, lent=LENT)
        work = partial(fetch_apart, replace(plan, kept=None))  # what each process kept would be its own
        self._crew = Crew(work, self._shelf, nice) if apart else None
        self._places: dict[int, int] = {}

    def write(self, number: int) -> None:
        step = number // self._plan.chunks
        with self._lock:
            if step not in self._places:
                self._places[step] = self._shelf.take()
            place = self._places[step]
        if self._crew is None:
            step_back(self._nice)
            fetch(self._plan, number, self._shelf.arrays(place))
        else:
            self._plan.reasons.update(self._crew.do(place, number))

    def pop(self, step: int) -> dict[str, np.ndarray]:
        with self._lock:
            place = self._places.pop(step)
        return self._shelf.lend(place)

    def dump(self) -> None:
        if self._crew is not None:
            self._crew.dump()

    def closed_after(self, done: Done) -> Done:
        """The same; the processes, and tiles that were kept, go when it ends."""
        try:
            yield from done
        finally:
            if self._crew is not None:
                self._crew.close()
            if self._plan.kept is not None:
                self._plan.kept.clear()
