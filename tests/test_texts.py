"""Labels to features: only what nobody knows is encoded, together for all who wait, and within a budget."""

import asyncio
import threading
from collections.abc import Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor

from pmgaft.clip.text import label_features
from pmgaft.errors import LabelsError
from pmgaft_serve.label_sets import LabelSet
from pmgaft_serve.metrics import Metrics
from pmgaft_serve.texts import TEXTS_AT_ONCE, Texts

T = TypeVar("T")

ONE = ("a {}",)
TWO = ("a {}", "two {}")


class Encoder:
    """Unit features that tell texts apart; records its calls, waits while `gate` is closed, refuses "long" texts."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()
        self.calls: list[list[str]] = []

    context_length = 10

    def tokens(self, texts: Sequence[str]) -> int:
        return len(texts) * max(len(text.split()) for text in texts)

    def encode(self, texts: Sequence[str]) -> Tensor:
        self.calls.append(list(texts))
        self.entered.set()
        assert self.gate.wait(20)
        return self.features(texts)

    def features(self, texts: Sequence[str]) -> Tensor:
        if any("long" in text for text in texts):
            raise LabelsError("too long", code="label_too_long")
        angles = torch.tensor([float(hash(text) % 6283) / 1000 for text in texts])
        return torch.stack([angles.cos(), angles.sin()], dim=1)


@pytest.fixture
def encoder() -> Encoder:
    return Encoder()


@pytest.fixture
def texts(encoder: Encoder) -> Iterator[Texts]:
    with ThreadPoolExecutor(1) as thread:
        yield Texts(encoder, thread, Metrics(), most_bytes=2**20, most_texts=1000, most_tokens=4000)


def run(work: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(asyncio.wait_for(work, 30))


def expected(encoder: Encoder, labels: Sequence[str], templates: tuple[str, ...]) -> Tensor:
    return label_features(encoder.features, labels, templates)


async def together(encoder: Encoder, texts: Texts, *asked: tuple[Sequence[str], tuple[str, ...]]) -> list[Any]:
    """What all get who ask while the encoder is busy with another request."""
    encoder.gate.clear()
    first = asyncio.create_task(texts.features(["first"], ONE))
    while not encoder.entered.is_set():
        await asyncio.sleep(0.005)
    tasks = [asyncio.create_task(texts.features(labels, templates)) for labels, templates in asked]
    while texts._batcher.waiting < len(asked):
        await asyncio.sleep(0.005)
    encoder.gate.set()
    await first
    return await asyncio.gather(*tasks, return_exceptions=True)


def test_only_unknown_labels_are_encoded_and_the_order_is_the_callers(encoder: Encoder, texts: Texts) -> None:
    run(texts.features(["cat", "dog"], ONE))
    features = run(texts.features(["bird", "dog", "cat", "fish"], ONE))
    assert encoder.calls == [["a cat", "a dog"], ["a bird", "a fish"]]
    assert torch.equal(features, expected(encoder, ["bird", "dog", "cat", "fish"], ONE))


def test_the_misses_of_all_who_wait_are_one_call_and_each_label_is_in_it_once(encoder: Encoder, texts: Texts) -> None:
    asked: list[tuple[Sequence[str], tuple[str, ...]]] = [
        (["cat", "dog"], ONE),
        (["dog", "bird"], ONE),
        (["cat", "first"], TWO),
        (["first", "cat"], ONE),
    ]
    features = run(together(encoder, texts, *asked))
    assert len(encoder.calls) == 2
    assert sorted(encoder.calls[1]) == sorted(["a cat", "a dog", "a bird", "a cat", "two cat", "a first", "two first"])
    for found, (labels, templates) in zip(features, asked, strict=True):
        torch.testing.assert_close(found, expected(encoder, labels, templates))


def test_a_label_that_cannot_be_encoded_fails_its_own_request_alone(encoder: Encoder, texts: Texts) -> None:
    good, bad, also = run(together(encoder, texts, (["cat"], ONE), (["long", "x"], ONE), (["dog"], TWO)))
    assert isinstance(bad, LabelsError)
    torch.testing.assert_close(good, expected(encoder, ["cat"], ONE))
    torch.testing.assert_close(also, expected(encoder, ["dog"], TWO))


def test_one_request_with_very_many_labels_does_not_keep_a_small_one_waiting(encoder: Encoder, texts: Texts) -> None:
    many = [f"label {number}" for number in range(3 * TEXTS_AT_ONCE)]

    async def scene() -> list[str]:
        encoder.gate.clear()
        large = asyncio.create_task(texts.features(many, ONE))
        while not encoder.entered.is_set():
            await asyncio.sleep(0.005)
        small = asyncio.create_task(texts.features(["small"], ONE))
        while texts._batcher.waiting < 3:
            await asyncio.sleep(0.005)
        encoder.gate.set()
        await small
        done = list(encoder.calls[1])
        assert torch.equal(await large, expected(encoder, many, ONE))
        return done

    assert run(scene()) == ["a small"]


def test_texts_that_nobody_has_seen_have_a_budget_and_known_ones_have_none(encoder: Encoder, texts: Texts) -> None:
    many = [f"label {number}" for number in range(500)]
    with pytest.raises(LabelsError, match=r"1,002 texts to encode; at most 1,000") as refused:
        run(texts.features([*many, "one more"], TWO))
    assert refused.value.code == "texts_too_many"
    assert encoder.calls == []
    run(texts.features(many, TWO))
    run(texts.features([*many, "one more"], TWO))
    assert encoder.calls[-1] == ["a one more", "two one more"]


def test_tokens_that_nobody_has_seen_have_a_budget_too_counted_where_they_might_exceed_it(
    encoder: Encoder, texts: Texts
) -> None:
    few, many = [[f"{words} {number}" for number in range(500)] for words in ("a", "a b c d e f g")]
    with pytest.raises(LabelsError, match=r"500 labels .* make 4,500 tokens to encode; at most 4,000") as refused:
        run(texts.features(many, ONE))  # of nine words each, by their template
    assert refused.value.code == "tokens_too_many"
    assert encoder.calls == []
    run(texts.features(few, ONE))
    assert sum(map(len, encoder.calls)) == 500


def test_a_named_set_lies_ready_whatever_happens_to_the_cache(encoder: Encoder) -> None:
    pets = LabelSet(name="pets", labels=("cat", "dog", "bird"), templates=TWO)
    with ThreadPoolExecutor(1) as thread:
        texts = Texts(encoder, thread, Metrics(), most_bytes=1000, most_texts=4, most_tokens=100)
        texts.warm_up([pets], [])
        calls = len(encoder.calls)
        first, second = (run(texts.features(pets.labels, TWO, "pets")) for _ in range(2))
        assert first is second
        torch.testing.assert_close(first, expected(encoder, pets.labels, TWO))
        assert len(encoder.calls) == calls
        other = run(texts.features(pets.labels, ONE, "pets"))  # in templates that are not its own
        torch.testing.assert_close(other, expected(encoder, pets.labels, ONE))


def test_warm_labels_are_known_from_the_start_however_many_they_are(encoder: Encoder) -> None:
    many = tuple(f"label {number}" for number in range(2 * TEXTS_AT_ONCE))
    with ThreadPoolExecutor(1) as thread:
        texts = Texts(encoder, thread, Metrics(), most_bytes=2**20, most_texts=10, most_tokens=100)
        texts.warm_up([], [LabelSet(name="", labels=many, templates=TWO)])
        calls = len(encoder.calls)
        assert max(map(len, encoder.calls)) <= TEXTS_AT_ONCE
        run(texts.features(many[::-1], TWO))
        assert len(encoder.calls) == calls
