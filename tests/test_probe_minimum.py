"""The search for the smallest eps: held to the linear classifier's closed form, and honest about what it spent."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pmgaft.errors import InputError
from pmgaft.probe import Nearest, nearest_adversarial
from pmgaft.threat import Norm

SIZE = 3 * 6 * 6
CLASSES = 5


def weights(seed: int = 0) -> Tensor:
    return torch.randn(CLASSES, SIZE, generator=torch.Generator().manual_seed(seed))


def images(count: int, seed: int = 1) -> Tensor:
    return 0.3 + 0.4 * torch.rand(count, 3, 6, 6, generator=torch.Generator().manual_seed(seed))


class Linear:
    """Logits linear in the pixels, so that the smallest change is margin over dual norm; counts what it is asked."""

    def __init__(self, weight: Tensor | None = None) -> None:
        self.weight = weights() if weight is None else weight
        self.asked = 0

    def __call__(self, x: Tensor, rows: Tensor) -> Tensor:
        self.asked += len(x)
        return (x.flatten(1) - 0.5) @ self.weight.T

    def answers(self, x: Tensor) -> Tensor:
        return self(x, torch.arange(len(x))).argmax(dim=1)

    def smallest(self, x: Tensor, answer: int, other: int, norm: Norm) -> float:
        """The closed form for one image [3, 6, 6], far from the ends of [0, 1]."""
        logits = self(x[None], torch.zeros(1, dtype=torch.int64))[0]
        difference = self.weight[answer] - self.weight[other]
        return float(
            (logits[answer] - logits[other]) / torch.linalg.vector_norm(difference, ord=1 if norm == "linf" else 2)
        )


def search(model: Any, x: Tensor, norms: list[Norm], gradients: int = 60, **options: Any) -> Nearest:
    rows = len(x)
    labels = model(x, torch.arange(rows)).argmax(dim=1)
    return nearest_adversarial(model, x, labels, norms, [gradients] * rows, list(range(rows)), **options)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_linear_models_smallest_eps_is_found_to_half_a_percent(norm: Norm) -> None:
    model, x = Linear(), images(6)
    answers = model.answers(x)
    found = search(model, x, [norm] * 6)
    for row in range(6):
        answer = int(answers[row])
        exact = min(model.smallest(x[row], answer, k, norm) for k in range(CLASSES) if k != answer)
        assert exact * (1 - 1e-4) <= float(found.distance[row]) <= exact * 1.005
        assert float(found.failed[row]) < exact
        assert float(found.failed[row]) == pytest.approx(0.98 * float(found.distance[row]), rel=1e-3)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_first_order_estimate_is_exact_where_the_model_is_linear(norm: Norm) -> None:
    model = Linear(weights()[:2])
    x = images(4)
    answers = model.answers(x)
    found = search(model, x, [norm] * 4)
    for row in range(4):
        exact = model.smallest(x[row], int(answers[row]), 1 - int(answers[row]), norm)
        assert float(found.first_order[row]) == pytest.approx(exact, rel=1e-4)


def test_a_target_needs_what_its_own_boundary_needs() -> None:
    model, x = Linear(), images(3)
    answers = model.answers(x)
    targets = (answers + 2) % CLASSES
    found = search(model, x, ["linf"] * 3, targets=targets, gradients=100)
    assert torch.equal(model.answers(found.pixels), targets)
    for row in range(3):
        assert (
            float(found.distance[row]) >= model.smallest(x[row], int(answers[row]), int(targets[row]), "linf") * 0.9999
        )
    assert bool((found.distance >= search(model, x, ["linf"] * 3).distance * 0.999).all())


def test_the_image_found_is_adversarial_inside_the_pixel_range_and_as_far_as_said() -> None:
    model = Linear()
    x = images(6).round()  # on the border of [0, 1], where half of all directions are closed
    found = search(model, x, ["linf", "l2"] * 3)
    assert bool((model.answers(found.pixels) != model.answers(x)).all())
    assert bool(((found.pixels >= 0) & (found.pixels <= 1)).all())
    delta = (found.pixels - x).flatten(1)
    said = torch.where(torch.tensor([False, True] * 3), delta.norm(dim=1), delta.abs().amax(dim=1))
    torch.testing.assert_close(found.distance, said)


def test_no_more_gradients_are_used_than_allowed_and_all_is_counted() -> None:
    for gradients in (2, 7, 30):
        model = Linear()
        found = search(model, images(3), ["linf"] * 3, gradients=gradients)
        assert bool((found.gradients_used <= gradients).all())
        assert int(found.forwards_used.sum()) == model.asked - 3  # the three clean ones


def test_a_known_adversarial_image_is_never_lost() -> None:
    model, x = Linear(), images(2)
    best = search(model, x, ["linf"] * 2)
    again = search(model, x, ["linf"] * 2, gradients=2, starts=best.pixels)
    assert bool((again.distance <= best.distance * (1 + 1e-6)).all())


def test_more_gradients_find_no_larger_eps_on_a_curved_model() -> None:
    bend = torch.randn(40, SIZE, generator=torch.Generator().manual_seed(3)) / 4
    out = torch.randn(CLASSES, 40, generator=torch.Generator().manual_seed(4))

    def curved(x: Tensor, rows: Tensor) -> Tensor:
        return ((x.flatten(1) - 0.5) @ bend.T).tanh() @ out.T

    few, many = (search(curved, images(6), ["linf"] * 6, gradients=g).distance for g in (30, 300))
    assert bool((many <= few * 1.01).all())
    assert float((few / many).median()) < 1.02


def test_each_row_is_searched_as_if_alone() -> None:
    model, x = Linear(), images(4)
    norms: list[Norm] = ["linf", "l2", "linf", "l2"]
    answers, budgets = model.answers(x), [20, 60, 100, 40]
    together = nearest_adversarial(model, x, answers, norms, budgets, [0, 1, 2, 3], resolutions=[0.01, 0.02, 0.05, 0.1])
    for row, width in enumerate((0.01, 0.02, 0.05, 0.1)):
        one = nearest_adversarial(
            model, x[row : row + 1], answers[row : row + 1], [norms[row]], [budgets[row]], [row], resolutions=[width]
        )
        torch.testing.assert_close(one.pixels[0], together.pixels[row], rtol=0, atol=1e-5)
        assert float(one.distance) == pytest.approx(float(together.distance[row]), rel=1e-3)
        assert int(one.gradients_used) == int(together.gradients_used[row])


def test_an_answer_that_cannot_change_is_not_reached() -> None:
    def constant(x: Tensor, rows: Tensor) -> Tensor:
        return torch.tensor([1.0, 0.0]).expand(len(x), 2) + 0 * x.sum()

    found = search(constant, images(2), ["linf", "l2"])
    assert bool(found.distance.isinf().all())
    assert bool(found.first_order.isinf().all())
    assert torch.equal(found.pixels, images(2))
    assert not bool(found.cut_short.any())


def test_out_of_time_the_search_ends_with_the_best_so_far() -> None:
    turns = iter(range(1000))
    found = search(
        Linear(), images(2), ["linf"] * 2, expired=lambda rows: torch.full_like(rows, next(turns) > 12).bool()
    )
    assert bool(found.cut_short.all())
    assert bool(found.distance.isfinite().all())
    assert bool((found.gradients_used <= 14).all())


def test_a_changed_answer_from_the_start_has_distance_zero() -> None:
    model, x = Linear(), images(2)
    wrong = (model.answers(x) + 1) % CLASSES
    found = nearest_adversarial(model, x, wrong, ["linf"] * 2, [20] * 2, [0, 1])
    assert found.distance.tolist() == [0.0, 0.0]
    assert found.gradients_used.tolist() == [0, 0]


def test_pixels_outside_the_range_are_refused() -> None:
    with pytest.raises(InputError):
        search(Linear(), images(1) + 1, ["linf"])
