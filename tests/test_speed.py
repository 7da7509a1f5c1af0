"""Which format is the quickest."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pmgaft_export import speed
from pmgaft_export.speed import BATCHES, ROUNDS, measure_speed, quickest


class Clock:
    """Time that passes when an encoder runs, and only then."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def encoder(self, a_call: float, an_image: float, calls: list[str], name: str) -> Callable[[Tensor], Tensor]:
        def encode(pixels: Tensor) -> Tensor:
            assert pixels.shape[1:] == (3, 4, 6)
            calls.append(name)
            self.now += a_call + an_image * len(pixels)
            return torch.zeros(len(pixels), 2)

        return encode


def test_a_rate_is_images_over_the_time_of_their_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, calls = Clock(), list[str]()
    monkeypatch.setattr(speed, "time", clock)
    rates = measure_speed({"a": clock.encoder(0.05, 0.01, calls, "a"), "b": clock.encoder(0, 0.02, calls, "b")}, (4, 6))
    assert rates["a"][1] == pytest.approx(1 / 0.06)
    assert rates["a"][16] == pytest.approx(16 / 0.21)
    assert rates["b"] == {1: pytest.approx(50), 16: pytest.approx(50)}
    turns = [name for name, before in zip(calls, ["", *calls], strict=False) if name != before]
    assert turns == ["a", "b"] * (len(BATCHES) * (ROUNDS + 1)), "encoders take turns, after a warm-up of each"


def test_the_quickest_is_good_at_lone_images_and_at_batches() -> None:
    assert quickest({"a": {1: 100.0, 16: 100.0}, "b": {1: 40.0, 16: 300.0}}) == "b"
    assert quickest({"a": {1: 100.0, 16: 100.0}, "b": {1: 30.0, 16: 300.0}}) == "a"
