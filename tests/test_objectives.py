"""The losses of training against numbers worked out by hand, and the properties that any correct version has."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import get_args

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from pmgaft.objectives import (
    OBJECTIVES,
    Agft,
    Caw,
    Direction,
    Encoding,
    Fare,
    Finetune,
    Objective,
    PmgAft,
    Reduction,
    Targets,
    Tecoa,
    TgaZsr,
    Ucat,
    attention_map,
    dirichlet_divergence,
    divergence,
    soft_cross_entropy,
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

    def __call__(self, weights: PmgAft, scale: float) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """The terms per sample, and the gradients of the whole loss at the cosines on x_a and on x."""
        adversarial = self.adversarial.clone().requires_grad_()
        clean = self.clean.clone().requires_grad_()
        terms = weights.terms(
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

    def loss(self, weights: PmgAft, scale: float) -> float:
        terms = weights.terms(
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
    "V0": (PmgAft(kl_direction="student-first", reduction="sum"), 1.0),
    "V1": (PmgAft(kl_direction="teacher-first", reduction="sum"), 1.0),
    "V2": (PmgAft(kl_direction="teacher-first", reduction="batchmean"), 100.0),
    "V3": (PmgAft(kl_direction="student-first", reduction="batchmean"), 100.0),
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
    terms, _, _ = E1(PmgAft(kl_direction=direction), scale)
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
    terms, _, _ = case(PmgAft(), scale)
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
        _, gradient, _ = case(PmgAft(ce=a, alpha=b, beta=c, reduction=reduction), scale)
        assert float(gradient.norm()) == pytest.approx(expected, abs=1e-6 if expected > 1e-3 else 5e-7)


def test_the_loss_changes_with_the_logit_scale() -> None:
    assert E1.loss(PmgAft(), 1.0) != pytest.approx(E1.loss(PmgAft(), 100.0))


def test_a_batch_twice_has_the_same_loss_unless_summed() -> None:
    twice = Case(*(torch.cat([part, part]) for part in (E1.adversarial, E1.guide, E1.clean, E1.labels)))
    assert twice.loss(PmgAft(), 100.0) == pytest.approx(E1.loss(PmgAft(), 100.0))
    guide_only = PmgAft(ce=0, beta=0, reduction="sum")
    assert twice.loss(guide_only, 100.0) == pytest.approx(2 * E1.loss(guide_only, 100.0))


def test_a_sum_is_the_batch_size_times_a_batchmean() -> None:
    mean, total = (E1.loss(PmgAft(ce=0, reduction=r), 100.0) for r in ("batchmean", "sum"))
    assert total == pytest.approx(2 * mean)


@pytest.mark.parametrize("reading", READINGS)
def test_parts_of_a_batch_add_up_to_the_whole(reading: str) -> None:
    weights, scale = READINGS[reading]
    whole = E1.loss(weights, scale)
    parts = 0.0
    for row in range(2):
        part = slice(row, row + 1)
        terms = weights.terms(
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
    objective = PmgAft(ce=0, alpha=0, beta=0, gamma=2.0)
    terms = objective.terms(
        {"student_adv": student, "guide_clean": guide},
        Targets(labels=torch.zeros(4, dtype=torch.int64), texts=classes, guide_texts=words, scale=10.0),
    )
    p, p0 = (F.softmax(10 * F.normalize(f, dim=1) @ words.T, dim=1) for f in (student, guide))
    expected = 2.0 * (p0 * (p0.log() - p.log())).sum(dim=1).mean()
    torch.testing.assert_close(weighted(terms, 4), expected)


def test_feature_distance_is_that_of_raw_features_summed_over_their_dimensions() -> None:
    student, guide = double([[1.0, 2.0], [0.0, 4.0]]), double([[1.0, 0.0], [3.0, 0.0]])
    objective = PmgAft(ce=0, alpha=0, beta=0, feature=0.5)
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
        (PmgAft(), {"student_adv", "student_clean", "guide_adv"}),
        (PmgAft(beta=0), {"student_adv", "guide_adv"}),
        (PmgAft(alpha=0, beta=0, gamma=1), {"student_adv", "guide_clean"}),
        (PmgAft(alpha=0, beta=0, feature=1), {"student_adv", "guide_clean"}),
        (Tecoa(), {"student_adv"}),
        (Finetune(), {"student_clean"}),
    ],
)
def test_an_objective_reads_what_it_needs_and_no_more(objective: Objective, reads: set[str]) -> None:
    assert objective.reads == reads
    encodings: dict[Encoding, Tensor] = dict.fromkeys(objective.reads, features(E1.adversarial))
    assert torch.isfinite(weighted(objective.terms(encodings, targets(E1.labels, 3, 10.0)), 2))


def test_tecoa_is_pmg_aft_without_guide_and_clean_branch() -> None:
    encodings: dict[Encoding, Tensor] = {"student_adv": features(E1.adversarial)}
    alone = PmgAft(alpha=0, beta=0).terms(encodings, targets(E1.labels, 3, 100.0))
    plain = Tecoa().terms(encodings, targets(E1.labels, 3, 100.0))
    assert float(weighted(alone, 2)) == float(weighted(plain, 2))


def test_every_objective_is_known_by_the_name_that_recipes_use() -> None:
    assert list(OBJECTIVES) == ["pmg-aft", "tecoa", "finetune", "fare", "caw", "agft", "ucat", "tga-zsr"]


class Random:
    """Random encodings of 4 images, 5 classes and 11 guide texts in 8 dimensions, patches 2 x 2; float64."""

    def __init__(self, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.encodings: dict[Encoding, Tensor] = {
            name: normal(4, 4, 8) if name.endswith("_tokens") else normal(4, 8) for name in get_args(Encoding)
        }
        self.targets = Targets(
            labels=torch.tensor([0, 4, 2, 2]),
            texts=F.normalize(normal(5, 8), dim=1),
            guide_texts=F.normalize(normal(11, 8), dim=1),
            scale=20.0,
        )

    def probabilities(self, name: Encoding, texts: Tensor, scale: float = 20.0) -> Tensor:
        return F.softmax(scale * F.normalize(self.encodings[name], dim=1) @ texts.T, dim=1)

    def terms(self, objective: Objective) -> dict[str, Tensor]:
        return {name: term.values for name, term in objective.terms(self.encodings, self.targets).items()}


def test_fare_is_the_squared_distance_of_raw_features_and_attacks_the_same() -> None:
    case = Random()
    distance = (case.encodings["student_adv"] - case.encodings["guide_clean"]).square().sum(dim=1)
    torch.testing.assert_close(case.terms(Fare()), {"feature": distance})
    torch.testing.assert_close(Fare().inner(case.encodings["student_adv"], case.encodings, case.targets), distance)
    clean = (case.encodings["student_clean"] - case.encodings["guide_clean"]).square().sum(dim=1)
    loss = weighted(Fare(clean_weight=0.3).terms(case.encodings, case.targets), 4)
    torch.testing.assert_close(loss, (0.3 * clean + 0.7 * distance).mean())


def test_fare_reads_neither_labels_nor_texts() -> None:
    case = Random()
    before = weighted(Fare().terms(case.encodings, case.targets), 4)
    other = replace(case.targets, labels=case.targets.labels.flip(0), texts=-case.targets.texts, scale=1.0)
    assert torch.equal(before, weighted(Fare().terms(case.encodings, other), 4))


def test_caw_weighs_the_guidance_by_how_unsure_the_student_is() -> None:
    case = Random()
    terms = case.terms(Caw())
    p = case.probabilities("student_adv", case.targets.guide_texts)
    p0 = case.probabilities("guide_clean", case.targets.guide_texts)
    own = case.probabilities("student_adv", case.targets.texts).gather(1, case.targets.labels[:, None])[:, 0]
    torch.testing.assert_close(terms["ce"], -own.log())
    torch.testing.assert_close(terms["guide_clean"], (p * (p / p0).log()).sum(dim=1) * (1 - own))
    distance = (case.encodings["student_adv"] - case.encodings["guide_adv"]).square().sum(dim=1).sqrt()
    torch.testing.assert_close(terms["feature"], distance)
    loss = weighted(Caw(alpha=2, beta=3).terms(case.encodings, case.targets), 4)
    torch.testing.assert_close(loss, (terms["ce"] + 2 * terms["guide_clean"] + 3 * terms["feature"]).mean())


def test_agft_learns_the_guides_softened_answer_at_a_sharper_scale_and_attacks_the_same() -> None:
    case = Random()
    q = case.probabilities("guide_clean", case.targets.guide_texts, 0.4 * 1.8 * 20)
    p = case.probabilities("student_adv", case.targets.guide_texts, 1.8 * 20)
    expected = -(q * p.log()).sum(dim=1)
    torch.testing.assert_close(case.terms(Agft())["guide_clean"], expected)
    torch.testing.assert_close(Agft().inner(case.encodings["student_adv"], case.encodings, case.targets), expected)


def test_agft_at_the_scale_of_clip_has_the_published_180_and_72() -> None:
    case = Random()
    case.targets = replace(case.targets, scale=100.0)
    q = case.probabilities("guide_clean", case.targets.guide_texts, 72.0)
    p = case.probabilities("student_adv", case.targets.guide_texts, 180.0)
    torch.testing.assert_close(case.terms(Agft())["guide_clean"], -(q * p.log()).sum(dim=1))


def test_a_soft_cross_entropy_has_the_gradient_p_minus_q() -> None:
    generator = torch.Generator().manual_seed(4)
    teacher, z = (3 * torch.randn(5, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    q = teacher.softmax(dim=1)
    (gradient,) = torch.autograd.grad(soft_cross_entropy(q, z.requires_grad_()).sum(), z)
    torch.testing.assert_close(gradient, z.detach().softmax(dim=1) - q)


def test_pmg_aft_with_the_teacher_first_is_one_soft_cross_entropy_with_a_mixed_target() -> None:
    case = Random()
    texts = case.targets.texts
    targets = replace(case.targets, guide_texts=texts)
    student = case.encodings["student_adv"].clone().requires_grad_()
    encodings = case.encodings | {"student_adv": student}
    objective = PmgAft(alpha=0.7, beta=1.3, detach_clean=True)
    (gradient,) = torch.autograd.grad(weighted(objective.terms(encodings, targets), 4), student)
    hard = F.one_hot(targets.labels, 5).double()
    mixed = hard + 0.7 * case.probabilities("guide_adv", texts) + 1.3 * case.probabilities("student_clean", texts)
    logits = 20 * F.normalize(student, dim=1) @ texts.T
    (expected,) = torch.autograd.grad(3 * soft_cross_entropy(mixed / 3, logits).mean(), student)
    torch.testing.assert_close(gradient, expected)


def test_ucats_divergence_is_that_of_dirichlet_distributions() -> None:
    generator = torch.Generator().manual_seed(5)
    first, second = (torch.rand(6, 7, generator=generator, dtype=torch.float64) * 50 + 0.1 for _ in range(2))
    expected = torch.distributions.kl_divergence(
        torch.distributions.Dirichlet(first), torch.distributions.Dirichlet(second)
    )
    torch.testing.assert_close(dirichlet_divergence(first, second), expected)


def test_ucat_has_the_published_evidence_and_weight_at_the_scale_of_clip() -> None:
    case = Random()
    case.targets = replace(case.targets, scale=100.0)
    a, a0 = (
        1e-6 + torch.exp((F.normalize(case.encodings[name], dim=1) @ case.targets.guide_texts.T + 1) / 0.07)
        for name in ("student_adv", "guide_clean")
    )
    strength = 1e5 / math.exp(F.softplus(torch.tensor(2 / 0.07, dtype=torch.float64)))
    assert strength == pytest.approx(3.9e-8, rel=0.01)
    torch.testing.assert_close(case.terms(Ucat())["guide_clean"], strength * dirichlet_divergence(a, a0))
    torch.testing.assert_close(case.terms(Ucat(tau=0.07)), case.terms(Ucat()))


def test_ucats_divergence_is_finite_in_float32_features_near_a_text() -> None:
    case = Random()
    encodings = {name: value.float() for name, value in case.encodings.items()}
    targets = replace(case.targets, texts=case.targets.texts.float(), guide_texts=case.targets.guide_texts.float())
    encodings["student_adv"] = targets.guide_texts[:4].clone().requires_grad_()
    loss = weighted(Ucat().terms(encodings, targets), 4)
    (gradient,) = torch.autograd.grad(loss, encodings["student_adv"])
    assert loss.dtype == torch.float32
    assert bool(torch.isfinite(gradient).all())


def test_an_attention_map_is_stretched_to_one_and_enlarged() -> None:
    tokens = double([[3, 0], [0, 5], [1, 1], [1, 0]])[None]
    found = attention_map(tokens, double([[1, 0]])).reshape(224, 224)
    assert (float(found.min()), float(found.max())) == (0.0, 1.0)
    corners = [found[0, 0], found[0, -1], found[-1, 0], found[-1, -1]]
    near(torch.stack(corners), [1.0, 0.0, 0.5**0.5, 1.0])


def test_tga_zsr_compares_both_branches_with_the_originals_attention_to_the_true_class() -> None:
    case = Random()
    own = case.targets.texts[case.targets.labels]
    maps = {name: attention_map(case.encodings[name], own) for name in get_args(Encoding) if name.endswith("_tokens")}
    terms = case.terms(TgaZsr())
    original = maps["guide_clean_tokens"]
    torch.testing.assert_close(terms["attention"], (maps["student_adv_tokens"] - original).norm(dim=1))
    torch.testing.assert_close(terms["clean_attention"], (maps["student_clean_tokens"] - original).norm(dim=1))


@pytest.mark.parametrize("kind", sorted(set(OBJECTIVES) - {"agft"}))
def test_guidance_vanishes_with_its_gradient_where_the_student_is_the_guide_and_images_are_clean(kind: str) -> None:
    """AGFT has no such point: its guide is softer than its student by design."""
    case = Random()
    leaves: dict[str, Tensor] = {}
    for name, value in case.encodings.items():
        original = case.encodings["guide_clean_tokens" if name.endswith("_tokens") else "guide_clean"]
        leaves[name] = (original if not name.startswith("guide") else value).clone().requires_grad_()
    leaves["guide_adv"] = case.encodings["guide_clean"].clone()
    objective = PmgAft(gamma=1.0, feature=1.0) if kind == "pmg-aft" else OBJECTIVES[kind]()
    terms = {
        name: term
        for name, term in objective.terms({n: leaves[n] for n in get_args(Encoding)}, case.targets).items()
        if name != "ce"
    }
    for name, term in terms.items():
        assert float(term.values.detach().abs().max()) < 1e-6, name
        students = [leaves[n] for n in objective.reads if n.startswith("student")]
        for gradient in torch.autograd.grad(term.values.sum(), students, allow_unused=True, retain_graph=True):
            assert gradient is None or float(gradient.abs().max()) < 1e-5, name


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_every_objective_reads_what_its_terms_need_and_parts_add_up(kind: str) -> None:
    case, objective = Random(), OBJECTIVES[kind]()
    read = {name: case.encodings[name] for name in objective.reads}
    whole = weighted(objective.terms(read, case.targets), 4)
    parts = [
        weighted(
            objective.terms(
                {name: value[part] for name, value in read.items()},
                replace(case.targets, labels=case.targets.labels[part]),
            ),
            4,
        )
        for part in (slice(0, 1), slice(1, 4))
    ]
    torch.testing.assert_close(sum(parts), whole)


@pytest.mark.parametrize("kind", sorted(set(OBJECTIVES) - {"agft", "fare"}))
def test_the_inner_attack_of_labelled_objectives_climbs_the_cross_entropy(kind: str) -> None:
    case = Random()
    climbed = OBJECTIVES[kind]().inner(case.encodings["student_adv"], case.encodings, case.targets)
    logits = 20 * F.normalize(case.encodings["student_adv"], dim=1) @ case.targets.texts.T
    expected = F.cross_entropy(logits, case.targets.labels, reduction="none")
    torch.testing.assert_close(F.softplus(climbed), expected)
