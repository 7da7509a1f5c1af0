"""Which format is the quickest."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pmgaft_export import speed
from pmgaft_export.speed import BATCHES, ROUNDS, measure_speed, quickest


class Clock:
    """Time that passes when an encoder runs, and only then; every other call is disturbed: ten times as long."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[tuple[str, int]] = []

    def perf_counter(self) -> float:
        return self.now

    def encoder(self, name: str, a_call: float, an_image: float) -> Callable[[Tensor], Tensor]:
        def encode(pixels: Tensor) -> Tensor:
            assert pixels.shape[1:] == (3, 4, 6)
            before = self.calls.count((name, len(pixels)))
            self.calls.append((name, len(pixels)))
            self.now += (a_call + an_image * len(pixels)) * (10 if before % 2 else 1)
            return torch.zeros(len(pixels), 2)

        return encode


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(speed, "time", made)
    return made


def test_a_rate_is_that_of_the_call_that_was_disturbed_least(clock: Clock) -> None:
    rates = measure_speed({"a": clock.encoder("a", 0.05, 0.01), "b": clock.encoder("b", 0, 0.02)}, (4, 6))
    assert rates["a"] == {1: pytest.approx(1 / 0.06), 16: pytest.approx(16 / 0.21)}
    assert rates["b"] == {1: pytest.approx(50), 16: pytest.approx(50)}


def test_encoders_take_turns_after_a_warm_up_of_each(clock: Clock) -> None:
    measure_speed({"a": clock.encoder("a", 0, 1), "b": clock.encoder("b", 0, 2)}, (4, 6))
    for batch in BATCHES:
        names = "".join(name for name, size in clock.calls if size == batch)
        assert names == "aabb" + "ab" * ROUNDS


def test_quick_encoders_are_called_until_a_second_has_passed_for_each(clock: Clock) -> None:
    measure_speed({"a": clock.encoder("a", 0, 0.001)}, (4, 6))
    assert sum(size == 1 for _, size in clock.calls) > 100


def test_the_quickest_is_good_at_lone_images_and_at_batches() -> None:
    assert quickest({"a": {1: 100.0, 16: 100.0}, "b": {1: 40.0, 16: 300.0}}) == "b"
    assert quickest({"a": {1: 100.0, 16: 100.0}, "b": {1: 30.0, 16: 300.0}}) == "a"
