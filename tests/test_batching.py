"""Batches form while the thread is busy, in turns, and nobody waits for ever."""

import asyncio
import threading
from collections.abc import Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import pytest

from pmgaft.errors import PmgaftError
from pmgaft_serve.batching import Batcher

T = TypeVar("T")


class Work:
    """Squares numbers; records its batches, waits while `gate` is closed, and fails for more than `room` at once."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()
        self.batches: list[list[int]] = []
        self.room = 100

    def __call__(self, numbers: Sequence[int]) -> list[int | Exception]:
        self.batches.append(list(numbers))
        self.entered.set()
        assert self.gate.wait(20)
        if len(numbers) > self.room:
            raise PmgaftError("full", code="out_of_memory")
        return [number * number if number >= 0 else ValueError(str(number)) for number in numbers]


@pytest.fixture
def thread() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as pool:
        yield pool


def run(work: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(asyncio.wait_for(work, 30))


async def held(batcher: Batcher[int, int], work: Work, items: Sequence[tuple[int, int, int]]) -> list[Any]:
    """Results of (item, weight, turn) that all arrive while a first item, 0, keeps the thread busy."""
    work.gate.clear()
    first = asyncio.create_task(batcher(0))
    while not work.entered.is_set():
        await asyncio.sleep(0.005)
    tasks = [asyncio.create_task(batcher(item, weight=weight, turn=turn)) for item, weight, turn in items]
    while batcher.waiting < len(tasks):
        await asyncio.sleep(0.005)
    work.gate.set()
    await first
    return await asyncio.gather(*tasks, return_exceptions=True)


def test_what_waits_is_the_next_batch_up_to_its_weight(thread: ThreadPoolExecutor) -> None:
    work = Work()
    weights: list[int] = []
    batcher = Batcher(work, thread, 5, weights.append)
    results = run(held(batcher, work, [(1, 2, 0), (2, 2, 0), (3, 2, 0), (4, 9, 0), (5, 1, 0)]))
    assert work.batches == [[0], [1, 2], [3], [4], [5]]  # in order, and what is too heavy goes alone
    assert weights == [1, 4, 2, 9, 1]
    assert [result for result, _ in results] == [1, 4, 9, 16, 25]


def test_the_first_items_of_all_callers_come_before_the_second_of_one(thread: ThreadPoolExecutor) -> None:
    work = Work()
    batcher = Batcher(work, thread, 2)
    run(held(batcher, work, [(10, 1, 0), (11, 1, 1), (12, 1, 2), (20, 1, 0), (30, 1, 0), (31, 1, 1)]))
    assert work.batches == [[0], [10, 20], [30, 11], [31, 12]]


def test_an_item_may_fail_alone(thread: ThreadPoolExecutor) -> None:
    work = Work()
    results = run(held(Batcher(work, thread, 8), work, [(1, 1, 0), (-1, 1, 0), (2, 1, 0)]))
    assert isinstance(results[1], ValueError)
    assert [results[0][0], results[2][0]] == [1, 4]
    assert len(work.batches) == 2


def test_a_batch_that_fails_as_a_whole_is_tried_again_in_halves(thread: ThreadPoolExecutor) -> None:
    work = Work()
    work.room = 2
    results = run(held(Batcher(work, thread, 8), work, [(number, 1, 0) for number in range(7)]))
    assert [result for result, _ in results] == [number * number for number in range(7)]
    assert max(map(len, work.batches)) == 7


def test_a_lost_thread_leaves_nobody_waiting(thread: ThreadPoolExecutor) -> None:
    batcher = Batcher(Work(), thread, 8)
    thread.shutdown()
    with pytest.raises(RuntimeError):
        run(batcher(1))


def test_a_caller_that_gave_up_disturbs_nobody(thread: ThreadPoolExecutor) -> None:
    work = Work()

    async def scene() -> int:
        batcher = Batcher(work, thread, 8)
        work.gate.clear()
        first = asyncio.create_task(batcher(1))
        while not work.entered.is_set():
            await asyncio.sleep(0.005)
        first.cancel()
        second = asyncio.create_task(batcher(2))
        await asyncio.sleep(0)
        work.gate.set()
        return (await second)[0]

    assert run(scene()) == 4


def test_two_batches_run_beside_each_other_and_nobody_is_forgotten() -> None:
    work = Work()
    seen: list[int] = []
    together = threading.Barrier(2)

    def beside(items: Sequence[int]) -> list[int | Exception]:
        if 0 in items or 1 in items:
            together.wait(20)  # goes on once both are here
        seen.append(batcher.running)
        return work(items)

    async def scene() -> list[tuple[int, float]]:
        first = [asyncio.create_task(batcher(number)) for number in range(2)]
        found = await asyncio.gather(*first)
        for start in range(2, 400, 7):  # whatever comes just as a runner ends
            more = [asyncio.create_task(batcher(number)) for number in range(start, start + 7)]
            await asyncio.sleep(0)
            found += await asyncio.gather(*more)
        return found

    with ThreadPoolExecutor(2) as threads:
        batcher = Batcher(beside, threads, 1, at_once=2)
        found = run(scene())
    assert [result for result, _ in found] == [number * number for number in range(len(found))]
    assert max(seen) == 2
    assert batcher.running == 0
