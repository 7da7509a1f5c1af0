"""What a probe says beside its verdict: groups, targets, the smallest eps, and whether its attack can be trusted."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from pmgaft.attacks import Adversarial
from pmgaft.errors import LabelsError, ThreatError
from pmgaft.probe import ProbeReport, ProbeSettings, attack, health, minimum, probe
from pmgaft.threat import ThreatModel

SCALE = 30.0


class Encoder:
    """Pixels -> unit features [B, 8], linear before their length is made one."""

    def __init__(self) -> None:
        self.weight = torch.randn(8, 108, generator=torch.Generator().manual_seed(0)) / 10
        self.seen = 0

    def __call__(self, x: Tensor) -> Tensor:
        self.seen += len(x)
        return F.normalize(x.flatten(1) @ self.weight.T, dim=1)


def texts(count: int = 5, seed: int = 3) -> Tensor:
    return F.normalize(torch.randn(count, 8, generator=torch.Generator().manual_seed(seed)), dim=1)


def pixels(count: int = 1, seed: int = 2) -> Tensor:
    return 0.2 + 0.6 * torch.rand(count, 3, 6, 6, generator=torch.Generator().manual_seed(seed))


def asked(eps: float = 0.05, **settings: Any) -> ProbeSettings:
    return ProbeSettings(threat=ThreatModel(eps=eps), **settings)


def one(settings: ProbeSettings, encoder: Any = None, words: Tensor | None = None) -> ProbeReport:
    return probe(encoder or Encoder(), SCALE, pixels(), [texts() if words is None else words], [settings])[0]


def ranked() -> list[int]:
    logits = Encoder()(pixels())[0] @ texts().T
    return logits.argsort(descending=True).tolist()


def test_min_eps_agrees_with_the_verdict_on_either_side() -> None:
    least = one(asked(min_eps=True)).min_eps
    assert least is not None
    assert least.eps is not None
    assert least.first_order is not None
    assert 0 < least.failed_eps < least.eps
    assert least.eps - least.failed_eps <= 1.01 * least.resolution * least.eps
    assert least.first_order == pytest.approx(least.eps, rel=0.3)
    assert one(asked(1.05 * least.eps, steps=50)).verdict == "broken"
    assert one(asked(0.9 * least.eps, steps=50)).verdict == "not_broken"
    assert least.pixels is not None
    assert float((least.pixels - pixels()[0]).abs().max()) == pytest.approx(least.eps)


def test_the_label_flipped_to_is_the_models_answer_to_the_image_found() -> None:
    least = one(asked(min_eps=True)).min_eps
    assert least is not None
    assert least.pixels is not None
    assert least.index == int((Encoder()(least.pixels[None]) @ texts().T).argmax()) != ranked()[0]


def test_the_search_settles_what_the_verdicts_attack_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """An attack that does nothing; the search then finds the image inside the ball, and that counts."""
    from pmgaft.probe import run

    def lazy(batch: attack.Batch) -> Adversarial:
        return attack._untouched(batch.pixels)

    least = one(asked(min_eps=True)).min_eps
    assert least is not None
    assert least.eps is not None
    monkeypatch.setattr(run, "attack", lazy)
    assert one(asked(2 * least.eps)).verdict == "not_broken"
    assert one(asked(2 * least.eps, min_eps=True)).verdict == "broken"
    assert one(asked(0.9 * least.eps, min_eps=True)).verdict == "not_broken"


def test_a_change_inside_a_group_is_no_change() -> None:
    first = ranked()[0]
    free = one(asked(min_eps=True)).min_eps
    assert free is not None
    assert free.index is not None
    second = free.index
    tied = one(asked(min_eps=True, groups=((first, second),))).min_eps
    assert tied is not None
    assert free.eps is not None
    assert tied.eps is not None
    assert tied.index not in (first, second)
    assert tied.eps > 1.5 * free.eps
    between = (free.eps * tied.eps) ** 0.5
    assert one(asked(between, steps=50)).verdict == "broken"
    report = one(asked(between, steps=50, groups=((first, second),)))
    assert report.verdict == "not_broken"
    assert len(report.probabilities_before) == 5


def test_a_group_of_everything_leaves_nothing_to_attack() -> None:
    with pytest.raises(LabelsError) as caught:
        one(asked(groups=((0, 1, 2, 3, 4),)))
    assert caught.value.code == "labels_too_few"
    with pytest.raises(ThreatError):
        asked(groups=((0, 1), (1, 2)))
    with pytest.raises(LabelsError):
        one(asked(groups=((0, 7),)))


def test_a_targeted_probe_breaks_only_by_reaching_its_target() -> None:
    target = ranked()[-1]
    easy = one(asked(min_eps=True)).min_eps
    hard = one(asked(min_eps=True, target=target)).min_eps
    assert easy is not None
    assert hard is not None
    assert easy.eps is not None
    assert hard.eps is not None
    assert hard.index == target
    assert hard.eps > easy.eps
    report = one(asked(1.05 * hard.eps, target=target, steps=50))
    assert report.verdict == "broken"
    assert report.adversarial_index == target
    assert one(asked(1.05 * easy.eps, target=target, steps=50)).verdict == "not_broken"


def test_a_target_that_is_the_answer_already_is_inconclusive_and_an_unknown_one_refused() -> None:
    report = one(asked(target=ranked()[0], min_eps=True, health=True))
    assert report.verdict == "inconclusive"
    assert report.reason == "the answer is the target already"
    with pytest.raises(LabelsError) as caught:
        one(asked(target=5))
    assert caught.value.code == "target_invalid"


def test_the_table_has_the_likeliest_others_and_none_is_nearer_than_min_eps() -> None:
    report = one(asked(1e-4, min_eps=True, targets=3))
    assert [line.index for line in report.targets] == ranked()[1:4]
    assert report.min_eps is not None
    assert report.min_eps.eps is not None
    reached = [line.eps for line in report.targets if line.eps is not None]
    assert reached
    assert report.min_eps.eps <= min(reached)
    assert {line.index: line.eps for line in report.targets}[report.min_eps.index or 0] == report.min_eps.eps
    assert all(line.gradients <= 100 for line in report.targets)


def test_a_label_that_wins_nowhere_is_not_reached() -> None:
    words = texts(3)
    words[2] = 0.5 * (words[0] + words[1])  # never above both
    (line,) = [line for line in one(asked(1e-4, targets=2), words=words).targets if line.index == 2]
    assert line.eps is None


def test_losses_follow_the_number_of_answers() -> None:
    assert one(asked(1e-6, steps=3, losses=("dlr",))).gradients == 3
    assert one(asked(1e-6, steps=3, losses=("ce", "margin", "dlr"))).gradients == 9
    for settings, words in ((asked(losses=("dlr",)), texts(2)), (asked(losses=("dlr",), target=0), texts(3))):
        with pytest.raises(ThreatError) as caught:
            one(settings, words=words)
        assert caught.value.code == "loss_invalid"
    with pytest.raises(ThreatError):
        asked(losses=("cross",))
    with pytest.raises(ThreatError):
        asked(losses=())


def test_apgd_is_taken_where_it_has_room() -> None:
    assert (asked(steps=49).used_algorithm, asked(steps=50).used_algorithm) == ("pgd", "apgd")
    assert asked(steps=50, algorithm="pgd").used_algorithm == "pgd"
    assert asked(0.1, steps=50).used_step_size == pytest.approx(0.2)
    assert one(asked(0.2, steps=50)).verdict == "broken"


def test_margins_and_curves_are_the_models_own() -> None:
    report = one(asked(1e-3, steps=5, losses=("margin",)))
    logits = (SCALE * Encoder()(pixels())[0] @ texts().T).sort(descending=True).values
    assert report.margin_before == pytest.approx(float(logits[0] - logits[1]), abs=1e-4)
    (curve,) = report.curves
    assert curve.loss == "margin"
    assert len(curve.values) == 6
    assert max(curve.values) == pytest.approx(-report.margin_after, abs=1e-4)


def test_a_sound_attack_passes_every_check() -> None:
    encoder = Encoder()
    report = one(asked(1e-4, health=True, square_queries=20, min_eps=True), encoder)
    assert [check.name for check in report.health] == [
        "finite",
        "zero_gradients",
        "loss_rises",
        "eps_zero",
        "monotone",
        "huge_eps",
        "square",
    ]
    assert all(check.passed for check in report.health), [check.said for check in report.health]
    assert report.verdict == "not_broken"
    assert report.forwards >= encoder.seen - 1  # but for the look at which label the nearest image flips to


def broken_check(encoder: Any, **settings: Any) -> tuple[ProbeReport, set[str]]:
    report = one(asked(0.01, health=True, **settings), encoder)
    return report, {check.name for check in report.health if check.passed is False}


def test_a_constant_answer_fails_the_huge_ball() -> None:
    plain = Encoder()
    fixed = plain(pixels())

    def nearly_constant(x: Tensor) -> Tensor:
        return F.normalize(fixed + 1e-4 * plain(x), dim=1)

    report, failed = broken_check(nearly_constant)
    assert "huge_eps" in failed
    assert report.verdict == "inconclusive"


def test_hidden_gradients_fail_their_check() -> None:
    plain = Encoder()
    report, failed = broken_check(lambda x: plain(torch.round(x * 255) / 255))
    assert "zero_gradients" in failed
    assert report.verdict == "inconclusive"


def test_a_loss_that_falls_fails_its_check() -> None:
    """A gradient of the wrong sign: the forward is right, the backward lies."""
    plain = Encoder()

    def lying(x: Tensor) -> Tensor:
        return plain(2 * x.detach() - x)

    report, failed = broken_check(lying, square_queries=200)
    assert "loss_rises" in failed
    assert report.verdict != "not_broken"


def test_an_attack_without_gradients_settles_what_gradients_hide() -> None:
    plain = Encoder()
    hidden = one(asked(0.45, health=True, square_queries=200), lambda x: plain(torch.round(x * 255) / 255))
    assert hidden.verdict == "broken"
    assert {check.name: check.passed for check in hidden.health}["square"] is False


def test_a_larger_ball_that_holds_where_a_smaller_one_broke_fails_its_check() -> None:
    assert health._monotone([(0.1, False), (0.2, True), (0.4, True)], "linf").passed
    assert health._monotone([(0.1, True), (0.11, False), (0.4, True)], "linf").passed  # as near as attacks are good
    assert health._monotone([(0.1, True), (0.2, False), (0.4, True)], "linf").passed is False


def test_what_broke_a_small_ball_breaks_the_larger_ones_too() -> None:
    """The list is monotone whatever each ball's own attack came to, and says whose find it was."""
    check = health._monotone([(2 / 255, False), (1 / 255, False), (1.9 / 255, True), (4 / 255, True)], "linf")
    assert check.figures["eps"] == sorted(check.figures["eps"])
    assert check.figures["broke"] == [False, True, True, True]
    assert check.figures["by_own_attack"] == [False, True, False, True]
    assert check.said == "eps tried: 1/255 held, 1.9/255 broke, 2/255 inherits that, 4/255 broke"
    missed = health._monotone([(1 / 255, True), (2 / 255, False)], "linf")
    assert missed.figures["broke"] == [True, True]
    assert missed.said.endswith("the attack in 2/255 should have found it")


def test_whatever_a_check_finds_inside_the_ball_breaks_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the verdict's attack nor the search finds anything; a check's attack in a larger ball comes upon an image
    that lies inside the stated one. The verdict, the smallest eps and the list follow it."""
    from pmgaft.probe import run

    least = one(asked(min_eps=True)).min_eps
    assert least is not None
    assert least.eps is not None
    assert least.pixels is not None
    eps, near = 2 * least.eps, least.pixels
    nothing = one(asked(1e-6, min_eps=True, seconds=0.0)).min_eps
    assert nothing is not None
    assert nothing.eps is None
    climb = health.climb

    def lucky(batch: attack.Batch, rows: Tensor, *arguments: Any, **options: Any) -> Adversarial:
        found = climb(batch, rows, *arguments, **options)
        if options["eps"][0] <= eps:
            return replace(found, success=torch.zeros_like(found.success))
        return replace(found, pixels=near.expand_as(found.pixels), success=torch.ones_like(found.success))

    monkeypatch.setattr(run, "attack", lambda batch: attack._untouched(batch.pixels))
    monkeypatch.setattr(run, "nearest_adversarial", blind_search)
    monkeypatch.setattr(health, "climb", lucky)
    report = one(asked(eps, min_eps=True, health=True))
    assert report.verdict == "broken"
    assert report.min_eps is not None
    assert report.min_eps.eps == pytest.approx(least.eps)
    assert report.distance == pytest.approx(least.eps)
    monotone = {check.name: check for check in report.health}["monotone"]
    stated = monotone.figures["eps"].index(pytest.approx(eps))
    assert monotone.figures["broke"][stated] is True
    assert monotone.figures["by_own_attack"][stated] is False
    assert monotone.passed is False  # the attack in twice the radius should have found it


def blind_search(*arguments: Any, **options: Any) -> Any:
    """As `nearest_adversarial`, out of time at once and knowing nothing."""
    everyone = options | {"starts": None, "expired": lambda places: torch.ones_like(places, dtype=torch.bool)}
    return minimum.nearest_adversarial(*arguments, **everyone)


def test_an_answer_that_moves_by_itself_fails_eps_zero() -> None:
    plain, calls = Encoder(), iter(range(10**6))
    _, failed = broken_check(lambda x: F.normalize(plain(x) + 0.01 * math.sin(next(calls)), dim=1))
    assert "eps_zero" in failed


def test_extras_of_one_row_are_not_its_neighbours() -> None:
    settings = [asked(1e-4, min_eps=True, targets=2, seed=1), asked(0.02), asked(1e-4, health=True, square_queries=5)]
    lists = [texts(5), texts(3), texts(4)]
    together = probe(Encoder(), SCALE, pixels(3), lists, settings)
    assert [report.min_eps is not None for report in together] == [True, False, False]
    assert [len(report.targets) for report in together] == [2, 0, 0]
    assert [len(report.health) for report in together] == [0, 0, 7]
    for row, report in enumerate(together):
        (alone,) = probe(Encoder(), SCALE, pixels(3)[row : row + 1], [lists[row]], [settings[row]])
        assert (alone.verdict, alone.gradients, alone.forwards) == (report.verdict, report.gradients, report.forwards)
        if report.min_eps is not None and alone.min_eps is not None:
            assert report.min_eps.eps == pytest.approx(alone.min_eps.eps, rel=1e-3)


def test_a_search_out_of_time_says_so_and_keeps_the_verdict_honest() -> None:
    report = one(asked(1e-6, steps=3, seconds=0.0, min_eps=True, targets=1, health=True))
    assert report.verdict == "inconclusive"
    assert report.min_eps is not None
    assert not report.min_eps.finished
