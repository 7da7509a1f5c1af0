"""Label features are encoded once, in the order asked for, within a bound."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from pmgaft.errors import LabelsError
from pmgaft_serve.text_cache import TextCache

TEMPLATES = ("a {}",)


class Encoder:
    """Features that can be told apart, and a record of what was encoded."""

    def __init__(self) -> None:
        self.calls: list[tuple[tuple[str, ...], tuple[str, ...]]] = []

    def __call__(self, labels: Sequence[str], templates: Sequence[str]) -> Tensor:
        self.calls.append((tuple(labels), tuple(templates)))
        return torch.tensor([[float(hash((label, tuple(templates))) % 1000), len(label)] for label in labels])


@pytest.fixture
def encoder() -> Encoder:
    return Encoder()


def test_only_unknown_labels_are_encoded_and_the_order_is_the_callers(encoder: Encoder) -> None:
    cache = TextCache(encoder)
    first = cache.features(["cat", "dog"], TEMPLATES)
    second = cache.features(["bird", "dog", "cat"], TEMPLATES)
    assert [labels for labels, _ in encoder.calls] == [("cat", "dog"), ("bird",)]
    assert torch.equal(second[[2, 1]], first)


def test_the_same_label_in_other_templates_is_another_feature(encoder: Encoder) -> None:
    cache = TextCache(encoder)
    plain = cache.features(["cat"], ("{}",))
    assert not torch.equal(plain, cache.features(["cat"], ("{}", "a {}")))
    assert torch.equal(plain, cache.features(["cat"], ("{}",)))
    assert len(cache) == 2


def test_a_key_is_no_joined_string(encoder: Encoder) -> None:
    cache = TextCache(encoder)
    cache.features(["a"], ("b {}", "c {}"))
    cache.features(["a"], ("b {}c {}",))
    assert len(encoder.calls) == 2


def test_memory_stays_under_the_bound_and_the_least_used_goes_first(encoder: Encoder) -> None:
    cache = TextCache(encoder, most_bytes=1500)
    for number in range(100):
        cache.features(["kept", f"passing {number}"], TEMPLATES)
        assert cache.bytes <= 1500
    assert 1 < len(cache) < 5
    assert [labels for labels, _ in encoder.calls if "kept" in labels] == [("kept", "passing 0")]


def test_what_does_not_fit_is_answered_and_not_kept(encoder: Encoder) -> None:
    cache = TextCache(encoder, most_bytes=10)
    assert cache.features(["cat"], TEMPLATES).shape == (1, 2)
    assert (len(cache), cache.bytes) == (0, 0)


def test_a_failed_encoding_leaves_nothing_behind() -> None:
    def fail(labels: Sequence[str], templates: Sequence[str]) -> Tensor:
        raise LabelsError("too long", code="label_too_long")

    cache = TextCache(fail)
    with pytest.raises(LabelsError):
        cache.features(["cat"], TEMPLATES)
    assert len(cache) == 0


def test_a_kept_feature_does_not_hold_its_batch_in_memory(encoder: Encoder) -> None:
    cache = TextCache(encoder)
    cache.features([str(number) for number in range(50)], TEMPLATES)
    row = cache.look_up(["7"], TEMPLATES).features["7"]
    assert row.untyped_storage().nbytes() == row.nbytes


def test_many_threads_get_what_one_would(encoder: Encoder) -> None:
    cache = TextCache(encoder, most_bytes=2000)
    alone = {str(number): encoder([str(number)], TEMPLATES)[0] for number in range(20)}

    def ask(start: int) -> bool:
        labels = [str((start + step) % 20) for step in range(10)]
        return torch.equal(cache.features(labels, TEMPLATES), torch.stack([alone[label] for label in labels]))

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(ask, range(200)))
