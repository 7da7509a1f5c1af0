"""The losses of training against numbers worked out by hand, and the properties that any correct version has."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from pmgaft.objectives import (
    OBJECTIVES,
    Direction,
    Encoding,
    Objective,
    Reduction,
    Targets,
    Weights,
    divergence,
    finetune,
    pmg_aft,
    tecoa,
    weighted,
)

# Texts with a direction in common, T_k = (0.5, b e_k, 0), as real ones have: so 200 cosines of about 0.2 at once exist.
COMMON = 0.5
OWN = (1 - COMMON**2) ** 0.5


def common_texts(classes: int) -> Tensor:
    """Unit texts [K, K + 2]."""
    common = torch.full((classes, 1), COMMON, dtype=torch.float64)
    return torch.cat([common, OWN * torch.eye(classes, classes + 1, dtype=torch.float64)], dim=1)


def features(cosines: Tensor) -> Tensor:
    """Features [B, K + 2] with these cosines [B, K] to `common_texts`, and of length 1 whatever the cosines are:
    so gradients with respect to the cosines pass through the normalisation unchanged.
    """
    first = torch.full_like(cosines[:, :1], 0.2 / COMMON)
    own = (cosines - 0.2) / OWN
    rest = (1 - first.square() - own.square().sum(dim=1, keepdim=True)).sqrt()
    return torch.cat([first, own, rest], dim=1)


def targets(labels: Tensor, classes: int, scale: float) -> Targets:
    texts = common_texts(classes)
    return Targets(labels=labels, texts=texts, guide_texts=texts, scale=scale)


class Case:
    """Cosines of a batch; loss and gradients with respect to those cosines."""

    def __init__(self, adversarial: Tensor, guide: Tensor, clean: Tensor, labels: Tensor) -> None:
        self.adversarial, self.guide, self.clean, self.labels = adversarial, guide, clean, labels

    def encodings(self, adversarial: Tensor, clean: Tensor) -> dict[Encoding, Tensor]:
        return {"student_adv": adversarial, "student_clean": clean, "guide_adv": features(self.guide)}

    def __call__(self, weights: Weights, scale: float) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """The terms per sample, and the gradients of the whole loss at the cosines on x_a and on x."""
        adversarial = self.adversarial.clone().requires_grad_()
        clean = self.clean.clone().requires_grad_()
        terms = pmg_aft(weights).terms(
            self.encodings(features(adversarial), features(clean)),
            targets(self.labels, adversarial.shape[1], scale),
        )
        loss = weighted(terms, len(adversarial))
        at_adversarial, at_clean = torch.autograd.grad(loss, [adversarial, clean], allow_unused=True)
        return (
            {name: term.values.detach() for name, term in terms.items()},
            at_adversarial,
            torch.zeros_like(clean) if at_clean is None else at_clean,
        )

    def loss(self, weights: Weights, scale: float) -> float:
        terms = pmg_aft(weights).terms(
            self.encodings(features(self.adversarial), features(self.clean)),
            targets(self.labels, self.adversarial.shape[1], scale),
        )
        return float(weighted(terms, len(self.adversarial)))


def double(rows: list[list[float]]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


E1 = Case(
    adversarial=double([[0.20, 0.30, 0.25], [0.28, 0.22, 0.24]]),
    guide=double([[0.18, 0.31, 0.26], [0.25, 0.25, 0.24]]),
    clean=double([[0.29, 0.22, 0.24], [0.30, 0.21, 0.23]]),
    labels=torch.tensor([0, 0]),
)

# The four readings of the method: as first released, as released since, as re-implemented by others twice.
READINGS = {
    "V0": (Weights(kl_direction="student-first", reduction="sum"), 1.0),
    "V1": (Weights(kl_direction="teacher-first", reduction="sum"), 1.0),
    "V2": (Weights(kl_direction="teacher-first", reduction="batchmean"), 100.0),
    "V3": (Weights(kl_direction="student-first", reduction="batchmean"), 100.0),
}


def near(actual: Tensor, expected: list[list[float]] | list[float], digits: float = 1e-8) -> None:
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=digits)


@pytest.mark.parametrize(
    ("reading", "expected"), [("V0", 1.11044826), ("V1", 1.11046073), ("V2", 11.05964761), ("V3", 8.89763118)]
)
def test_worked_example_one_has_the_losses_worked_out(reading: str, expected: float) -> None:
    assert E1.loss(*READINGS[reading]) == pytest.approx(expected, abs=1e-8)


@pytest.mark.parametrize(
    ("scale", "direction", "ce", "guide", "clean"),
    [
        (1.0, "teacher-first", [1.14944545, 1.06559103], [9.668e-5, 3.0098e-4], [2.44259e-3, 1.0225e-4]),
        (1.0, "student-first", [1.14944545, 1.06559103], [9.704e-5, 3.0093e-4], [2.43012e-3, 1.0194e-4]),
        (100.0, "teacher-first", [10.00676044, 0.02058114], [3.611e-5, 2.15858633], [9.91688748, 0.01644372]),
        (100.0, "student-first", [10.00676044, 0.02058114], [9.243e-5, 0.77301651], [6.95324583, 0.04156600]),
    ],
)
def test_worked_example_one_has_the_terms_worked_out(
    scale: float, direction: Direction, ce: list[float], guide: list[float], clean: list[float]
) -> None:
    terms, _, _ = E1(Weights(kl_direction=direction), scale)
    near(terms["ce"], ce)
    near(terms["guide_adv"], guide)
    near(terms["clean"], clean)


@pytest.mark.parametrize(
    ("reading", "expected"),
    [
        ("V1", [[-0.36511003, 0.19854738, 0.16656265], [-0.32446238, 0.15561738, 0.16884501]]),
        ("V2", [[-99.61376049, 99.27885962, 0.33490086], [25.88015221, -20.75786532, -5.12228690]]),
        ("V3", [[-50.02920408, 52.02108098, -1.99187690], [-0.66172077, -0.24194134, 0.90366211]]),
    ],
)
@pytest.mark.parametrize("detach", [False, True])
def test_worked_example_one_has_the_gradients_worked_out(
    reading: str, expected: list[list[float]], detach: bool
) -> None:
    weights, scale = READINGS[reading]
    _, at_adversarial, _ = E1(replace(weights, detach_clean=detach), scale)
    near(at_adversarial, expected)


@pytest.mark.parametrize(
    ("reading", "expected"),
    [
        ("V1", [[0.03050165, -0.02652843, -0.00397323], [0.00683692, -0.00338428, -0.00345264]]),
        ("V2", [[4.08139045, -0.76549356, -3.31589689], [0.15497272, -0.01847320, -0.13649951]]),
    ],
)
def test_the_clean_branch_is_pulled_along_unless_detached(reading: str, expected: list[list[float]]) -> None:
    weights, scale = READINGS[reading]
    near(E1(weights, scale)[2], expected)
    assert not bool(E1(replace(weights, detach_clean=True), scale)[2].any())


def _e2() -> Case:
    i = torch.arange(256, dtype=torch.float64)[:, None]
    k = torch.arange(200, dtype=torch.float64)[None, :]
    base = 0.20 + 0.03 * torch.sin(1.7 * i + 0.9 * k)
    adversarial = base + 0.02 * torch.sin(0.6 * i + 2.3 * k)
    clean = base + 0.01 * torch.sin(1.1 * i + 3.1 * k)
    labels = torch.arange(256) % 200
    clean[torch.arange(256), labels] += 0.06
    return Case(adversarial, base, clean, labels)


@pytest.mark.parametrize(
    ("scale", "ce", "guide", "clean", "norms"),
    [
        (1.0, 5.298568, 0.025599, 0.034385, (0.062344, 0.016003, 0.018561, 6.3e-5, 7.3e-5)),
        (100.0, 7.700116, 210.942995, 625.118212, (6.314901, 205.956730, 817.518913, 0.804518, 3.193433)),
    ],
)
def test_worked_example_two_shows_what_scale_and_reduction_do(
    scale: float, ce: float, guide: float, clean: float, norms: tuple[float, ...]
) -> None:
    case = _e2()
    terms, _, _ = case(Weights(), scale)
    assert float(terms["ce"].mean()) == pytest.approx(ce, abs=1e-6)
    assert float(terms["guide_adv"].sum()) == pytest.approx(guide, abs=1e-6)
    assert float(terms["clean"].sum()) == pytest.approx(clean, abs=1e-6)
    only_ce, only_guide, only_clean = (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)
    asked: list[tuple[tuple[float, float, float], Reduction]] = [
        (only_ce, "sum"),
        (only_guide, "sum"),
        (only_clean, "sum"),
        (only_guide, "batchmean"),
        (only_clean, "batchmean"),
    ]
    for ((a, b, c), reduction), expected in zip(asked, norms, strict=True):
        _, gradient, _ = case(Weights(ce=a, alpha=b, beta=c, reduction=reduction), scale)
        assert float(gradient.norm()) == pytest.approx(expected, abs=1e-6 if expected > 1e-3 else 5e-7)


def test_the_loss_changes_with_the_logit_scale() -> None:
    assert E1.loss(Weights(), 1.0) != pytest.approx(E1.loss(Weights(), 100.0))


def test_a_batch_twice_has_the_same_loss_unless_summed() -> None:
    twice = Case(*(torch.cat([part, part]) for part in (E1.adversarial, E1.guide, E1.clean, E1.labels)))
    assert twice.loss(Weights(), 100.0) == pytest.approx(E1.loss(Weights(), 100.0))
    guide_only = Weights(ce=0, beta=0, reduction="sum")
    assert twice.loss(guide_only, 100.0) == pytest.approx(2 * E1.loss(guide_only, 100.0))


def test_a_sum_is_the_batch_size_times_a_batchmean() -> None:
    mean, total = (E1.loss(Weights(ce=0, reduction=r), 100.0) for r in ("batchmean", "sum"))
    assert total == pytest.approx(2 * mean)


@pytest.mark.parametrize("reading", READINGS)
def test_parts_of_a_batch_add_up_to_the_whole(reading: str) -> None:
    weights, scale = READINGS[reading]
    whole = E1.loss(weights, scale)
    parts = 0.0
    for row in range(2):
        part = slice(row, row + 1)
        terms = pmg_aft(weights).terms(
            {
                "student_adv": features(E1.adversarial[part]),
                "student_clean": features(E1.clean[part]),
                "guide_adv": features(E1.guide[part]),
            },
            targets(E1.labels[part], 3, scale),
        )
        parts += float(weighted(terms, 2))
    assert parts == pytest.approx(whole)


@pytest.mark.parametrize("direction", ["teacher-first", "student-first"])
def test_a_divergence_is_zero_between_equals_with_zero_gradient_and_positive_else(direction: Direction) -> None:
    generator = torch.Generator().manual_seed(0)
    one, other = (5 * torch.randn(20, 7, generator=generator, dtype=torch.float64) for _ in range(2))
    equal = one.clone().requires_grad_()
    values = divergence(one, equal, direction)
    (gradient,) = torch.autograd.grad(values.sum(), equal)
    assert float(values.detach().abs().max()) < 1e-12
    assert float(gradient.abs().max()) < 1e-12
    assert bool((divergence(one, other, direction) > 0).all())


@pytest.mark.parametrize("direction", ["teacher-first", "student-first"])
def test_a_divergence_ignores_a_constant_per_row_and_the_order_of_classes(direction: Direction) -> None:
    generator = torch.Generator().manual_seed(1)
    teacher, student = (5 * torch.randn(6, 7, generator=generator, dtype=torch.float64) for _ in range(2))
    value = divergence(teacher, student, direction)
    shift, order = torch.arange(6, dtype=torch.float64)[:, None], torch.randperm(7, generator=generator)
    torch.testing.assert_close(divergence(teacher + shift, student - 2 * shift, direction), value)
    torch.testing.assert_close(divergence(teacher[:, order], student[:, order], direction), value)


def test_gradients_have_their_closed_forms() -> None:
    """d KL(Q || P) / dz = P - Q, and d KL(P || Q) / dz = P (ln P - ln Q - KL)."""
    generator = torch.Generator().manual_seed(2)
    teacher, z = (3 * torch.randn(5, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    z.requires_grad_()
    p, q = z.softmax(dim=1).detach(), teacher.softmax(dim=1)
    (first,) = torch.autograd.grad(divergence(teacher, z, "teacher-first").sum(), z)
    torch.testing.assert_close(first, p - q)
    values = divergence(teacher, z, "student-first")
    (second,) = torch.autograd.grad(values.sum(), z)
    torch.testing.assert_close(second, p * (p.log() - q.log() - values.detach()[:, None]))


def test_the_guide_on_clean_images_speaks_over_its_own_texts() -> None:
    generator = torch.Generator().manual_seed(3)
    student, guide = (torch.randn(4, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    classes, words = (F.normalize(torch.randn(n, 8, generator=generator, dtype=torch.float64), dim=1) for n in (3, 11))
    objective = pmg_aft(Weights(ce=0, alpha=0, beta=0, gamma=2.0))
    terms = objective.terms(
        {"student_adv": student, "guide_clean": guide},
        Targets(labels=torch.zeros(4, dtype=torch.int64), texts=classes, guide_texts=words, scale=10.0),
    )
    p, p0 = (F.softmax(10 * F.normalize(f, dim=1) @ words.T, dim=1) for f in (student, guide))
    expected = 2.0 * (p0 * (p0.log() - p.log())).sum(dim=1).mean()
    torch.testing.assert_close(weighted(terms, 4), expected)


def test_feature_distance_is_that_of_raw_features_summed_over_their_dimensions() -> None:
    student, guide = double([[1.0, 2.0], [0.0, 4.0]]), double([[1.0, 0.0], [3.0, 0.0]])
    objective = pmg_aft(Weights(ce=0, alpha=0, beta=0, feature=0.5))
    texts = double([[1.0, 0.0], [0.0, 1.0]])
    terms = objective.terms(
        {"student_adv": student, "guide_clean": guide},
        Targets(labels=torch.tensor([0, 1]), texts=texts, guide_texts=texts, scale=1.0),
    )
    assert terms["feature"].values.tolist() == [4.0, 25.0]
    assert float(weighted(terms, 2)) == pytest.approx(0.5 * 29 / 2)


@pytest.mark.parametrize(
    ("objective", "reads"),
    [
        (pmg_aft(Weights()), {"student_adv", "student_clean", "guide_adv"}),
        (pmg_aft(Weights(beta=0)), {"student_adv", "guide_adv"}),
        (pmg_aft(Weights(alpha=0, beta=0, gamma=1)), {"student_adv", "guide_clean"}),
        (pmg_aft(Weights(alpha=0, beta=0, feature=1)), {"student_adv", "guide_clean"}),
        (tecoa(Weights()), {"student_adv"}),
        (finetune(Weights()), {"student_clean"}),
    ],
)
def test_an_objective_reads_what_it_needs_and_no_more(objective: Objective, reads: set[str]) -> None:
    assert objective.reads == reads
    encodings: dict[Encoding, Tensor] = dict.fromkeys(objective.reads, features(E1.adversarial))
    assert torch.isfinite(weighted(objective.terms(encodings, targets(E1.labels, 3, 10.0)), 2))


def test_tecoa_is_pmg_aft_without_guide_and_clean_branch() -> None:
    encodings: dict[Encoding, Tensor] = {"student_adv": features(E1.adversarial)}
    alone = pmg_aft(Weights(alpha=0, beta=0)).terms(encodings, targets(E1.labels, 3, 100.0))
    plain = tecoa(Weights()).terms(encodings, targets(E1.labels, 3, 100.0))
    assert float(weighted(alone, 2)) == float(weighted(plain, 2))


def test_every_objective_is_known_by_the_name_that_recipes_use() -> None:
    assert set(OBJECTIVES) == {"pmg-aft", "tecoa", "finetune"}
