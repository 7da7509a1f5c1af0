"""Work of many callers, done together: whatever waits when a thread becomes free is the next batch."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import Generic, TypeVar

T = TypeVar("T")
R = TypeVar("R")


@dataclass(order=True, slots=True)
class _Waiting(Generic[T, R]):
    turn: int
    number: int
    item: T = field(compare=False)
    weight: int = field(compare=False)
    future: asyncio.Future[tuple[R, float]] = field(compare=False)
    arrived: float = field(compare=False)


class Batcher(Generic[T, R]):
    """A lone caller waits for nobody, no clock is looked at, and a batch forms while the threads are busy.

    work: items -> as many results, where a result may also be the error of its item alone; run in `threads`, at most
    `at_once` batches at a time. most: weight of one batch, of which there is always at least one item. on_batch: told
    each batch's weight. on_waiting: told how many items wait, whenever that changes.
    A batch whose work raises is tried again in halves, so that only the items at fault fail.
    """

    def __init__(
        self,
        work: Callable[[Sequence[T]], Sequence[R | Exception]],
        threads: Executor,
        most: int,
        on_batch: Callable[[int], None] = lambda weight: None,
        on_waiting: Callable[[int], None] = lambda items: None,
        at_once: int = 1,
    ) -> None:
        self._work = work
        self._threads = threads
        self._most = most
        self._idle = at_once  # runners that could be started
        self._on_batch = on_batch
        self._on_waiting = on_waiting
        self._waiting: list[_Waiting[T, R]] = []
        self._numbers = itertools.count()
        self._runners: set[asyncio.Task[None]] = set()
        self.running = 0
        """Batches in work."""

    async def __call__(self, item: T, *, weight: int = 1, turn: int = 0) -> tuple[R, float]:
        """One item's result, and the seconds it waited for its batch to start. Raises: what its work raises.

        turn: lower ones go first, and equal ones in the order they came. A caller with much to do numbers its items 0,
        1, 2, ..., and so does not keep others waiting for all of it.
        """
        future: asyncio.Future[tuple[R, float]] = asyncio.get_running_loop().create_future()
        waiting = _Waiting(turn, next(self._numbers), item, weight, future, time.perf_counter())
        heapq.heappush(self._waiting, waiting)
        self._on_waiting(len(self._waiting))
        if self._idle:
            self._idle -= 1
            runner = asyncio.create_task(self._run())
            self._runners.add(runner)
            runner.add_done_callback(self._runners.discard)
        return await future

    @property
    def waiting(self) -> int:
        """Items whose batch has not started."""
        return len(self._waiting)

    async def _run(self) -> None:
        """Work off batch after batch until nobody waits."""
        loop = asyncio.get_running_loop()
        while self._waiting:
            batch = self._next()
            start = time.perf_counter()
            self.running += 1
            try:
                results = await loop.run_in_executor(self._threads, self._attempt, [one.item for one in batch])
            except Exception as error:  # the threads are gone: nobody may wait for ever
                results = [error] * len(batch)
            self.running -= 1
            for one, result in zip(batch, results, strict=True):
                if one.future.done():
                    continue  # its request was given up
                if isinstance(result, Exception):
                    one.future.set_exception(result)
                else:
                    one.future.set_result((result, start - one.arrived))
        self._idle += 1  # here, not when the task is done: what comes in between would wait for ever

    def _next(self) -> list[_Waiting[T, R]]:
        batch = [heapq.heappop(self._waiting)]
        weight = batch[0].weight
        while self._waiting and weight + self._waiting[0].weight <= self._most:
            batch.append(heapq.heappop(self._waiting))
            weight += batch[-1].weight
        self._on_batch(weight)
        self._on_waiting(len(self._waiting))
        return batch

    def _attempt(self, items: Sequence[T]) -> Sequence[R | Exception]:
        """Each item's result or its error."""
        try:
            return self._work(items)
        except Exception as error:
            if len(items) == 1:
                return [error]
            half = len(items) // 2
            return [*self._attempt(items[:half]), *self._attempt(items[half:])]
