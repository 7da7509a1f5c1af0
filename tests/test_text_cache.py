"""Label features are kept in the order asked for, within a bound, and the least used are forgotten first."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from pmgaft_serve.text_cache import TextCache

TEMPLATES = ("a {}",)


def feature(label: str, templates: Sequence[str] = TEMPLATES) -> list[float]:
    return [float(hash((label, tuple(templates))) % 1000), float(len(label))]


def rows(labels: Sequence[str], templates: Sequence[str] = TEMPLATES) -> Tensor:
    return torch.tensor([feature(label, templates) for label in labels])


def store(cache: TextCache, *labels: str, templates: tuple[str, ...] = TEMPLATES) -> None:
    cache.store(labels, templates, rows(labels, templates))


def known(cache: TextCache, *labels: str, templates: tuple[str, ...] = TEMPLATES) -> list[str]:
    found = cache.look_up(labels, templates)
    assert torch.equal(found.features.view(-1, 2), rows([labels[i] for i in found.known], templates).view(-1, 2))
    assert sorted(found.known + found.missing) == list(range(len(labels)))
    return [labels[i] for i in found.known]


def test_an_empty_cache_knows_nothing() -> None:
    assert known(TextCache(), "cat", "dog") == []


def test_known_labels_come_in_the_callers_order() -> None:
    cache = TextCache()
    store(cache, "cat", "dog", "bird")
    assert known(cache, "bird", "fish", "cat") == ["bird", "cat"]
    assert cache.look_up(("bird", "fish", "cat"), TEMPLATES).missing == [1]


def test_the_same_label_in_other_templates_is_another_feature() -> None:
    cache = TextCache()
    store(cache, "cat")
    assert known(cache, "cat", templates=("{}", "a {}")) == []
    store(cache, "cat", templates=("{}", "a {}"))
    assert known(cache, "cat") == known(cache, "cat", templates=("{}", "a {}")) == ["cat"]
    assert len(cache) == 2


def test_a_key_is_no_joined_string() -> None:
    cache = TextCache()
    store(cache, "a", templates=("b {}", "c {}"))
    assert known(cache, "a", templates=("b {}c {}",)) == []


def test_what_is_stored_twice_is_kept_once() -> None:
    cache = TextCache()
    store(cache, "cat")
    size = cache.bytes
    store(cache, "cat")
    assert (len(cache), cache.bytes) == (1, size)


def test_a_thousand_known_labels_are_one_gather(monkeypatch: pytest.MonkeyPatch) -> None:
    labels = [f"label {number}" for number in range(1000)]
    cache = TextCache()
    cache.store(labels, TEMPLATES, rows(labels))
    gathers: list[int] = []
    real = Tensor.index_select

    def watched(self: Tensor, dimension: int, index: Tensor) -> Tensor:
        gathers.append(1)
        return real(self, dimension, index)

    monkeypatch.setattr(Tensor, "index_select", watched)
    found = cache.look_up(labels[::-1], TEMPLATES)
    monkeypatch.undo()
    assert len(gathers) == 1
    assert torch.equal(found.features, rows(labels[::-1]))


def test_memory_stays_under_the_bound_and_the_least_used_goes_first() -> None:
    cache = TextCache(most_bytes=3000)
    store(cache, "kept")
    for number in range(100):
        assert known(cache, "kept") == ["kept"]
        store(cache, f"passing {number}")
        assert cache.bytes <= 3000
    assert 3 < len(cache) < 10
    assert known(cache, "passing 99", "passing 3") == ["passing 99"]


def test_templates_that_nobody_uses_any_more_are_forgotten_too() -> None:
    cache = TextCache(most_bytes=5000)
    for number in range(100):
        store(cache, "cat", templates=(f"{number} {{}}", "x" * 100 + "{}"))
        assert cache.bytes <= 5000
    assert len(cache._groups) == len(cache) < 10


def test_what_does_not_fit_is_not_kept() -> None:
    cache = TextCache(most_bytes=10)
    store(cache, "cat")
    assert (len(cache), cache.bytes) == (0, 0)
    assert known(cache, "cat") == []


def test_no_request_makes_the_bookkeeping_wrong() -> None:
    chance = torch.Generator().manual_seed(0)
    cache = TextCache(most_bytes=6000)
    for _ in range(300):
        labels = {f"{int(n)}" * int(n % 5 + 1) for n in torch.randint(40, (6,), generator=chance)}
        templates = (f"{int(torch.randint(3, (1,), generator=chance))} {{}}",)
        known(cache, *labels, templates=templates)
        store(cache, *labels, templates=templates)
        size = sum(group.bytes + sum(cache._size(label) for label in group.rows) for group in cache._groups.values())
        assert cache.bytes == size <= 6000
        assert len(cache) == sum(len(group.rows) for group in cache._groups.values())


def test_many_threads_get_what_one_would() -> None:
    cache = TextCache(most_bytes=4000)

    def ask(start: int) -> bool:
        labels = [str((start + step) % 20) for step in range(10)]
        store(cache, *labels)
        known(cache, *labels)
        return True

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(ask, range(200)))
