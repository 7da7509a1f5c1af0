"""The probe: honest verdicts, and rows of different requests that do not feel each other."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pmgaft.errors import InputError, LabelsError, ThreatError
from pmgaft.probe import ProbeReport, ProbeSettings, probe
from pmgaft.threat import ThreatModel

SHAPE = (3, 6, 6)
SCALE = 30.0


class Encoder(nn.Module):
    """Pixels -> unit features [B, 8]: linear, so that how much eps an answer survives can be worked out."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(8, 3 * 36, generator=generator) / 10)
        self.seen: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(len(x))
        return F.normalize(x.flatten(1) @ self.weight.T, dim=1)


def texts(count: int, seed: int = 1) -> Tensor:
    return F.normalize(torch.randn(count, 8, generator=torch.Generator().manual_seed(seed)), dim=1)


def pixels(count: int, seed: int = 2) -> Tensor:
    return 0.2 + 0.6 * torch.rand(count, *SHAPE, generator=torch.Generator().manual_seed(seed))


def asked(eps: float, **settings: Any) -> ProbeSettings:
    return ProbeSettings(threat=ThreatModel(eps=eps), **settings)


def one(eps: float, encoder: Any = None, labels: Tensor | None = None, **settings: Any) -> ProbeReport:
    words = texts(5) if labels is None else labels
    return probe(encoder or Encoder(), SCALE, pixels(1), [words], [asked(eps, **settings)])[0]


def test_a_large_eps_breaks_the_answer_and_the_image_proves_it() -> None:
    encoder, image, words = Encoder(), pixels(1), texts(5)
    (report,) = probe(encoder, SCALE, image, [words], [asked(0.2)])
    assert report.verdict == "broken"
    assert report.reason is None
    assert report.adversarial_pixels is not None
    with torch.no_grad():
        after = (SCALE * encoder(report.adversarial_pixels[None]) @ words.T).softmax(dim=1)[0]
    assert report.adversarial_index == int(after.argmax()) != report.clean_index
    assert report.probabilities_after == pytest.approx(after.tolist(), abs=1e-6)
    assert sum(report.probabilities_before) == pytest.approx(1)
    assert report.distance <= 0.2 + 1e-6
    assert report.distance == pytest.approx(float((report.adversarial_pixels - image[0]).abs().max()))


def test_a_tiny_eps_breaks_nothing_and_gives_no_image() -> None:
    report = one(1e-6, steps=4)
    assert report.verdict == "not_broken"
    assert report.reason is None
    assert report.adversarial_pixels is None
    assert report.adversarial_index == report.clean_index


def test_what_was_spent_is_counted() -> None:
    encoder = Encoder()
    report = one(1e-6, encoder, steps=3, restarts=2)
    assert report.gradients == 2 * 2 * 3  # two losses, two restarts, three steps
    assert report.forwards == len(encoder.seen)
    assert sum(encoder.seen) == report.forwards


def test_two_labels_need_one_loss_only() -> None:
    assert one(1e-6, labels=texts(2), steps=3).gradients == 3


def test_the_models_own_answer_is_attacked_in_either_norm() -> None:
    for norm, eps in (("linf", 0.2), ("l2", 2.0)):
        settings = ProbeSettings(threat=ThreatModel(norm=norm, eps=eps))  # type: ignore[arg-type]
        (report,) = probe(Encoder(), SCALE, pixels(1), [texts(5)], [settings])
        assert report.verdict == "broken"
        assert report.distance <= eps + 1e-6


def test_each_row_gets_what_it_would_get_alone() -> None:
    """Other label lists, eps, steps and seeds in one batch; the neighbours include very confident and hopeless ones."""
    images = pixels(6, seed=5)
    lists = [texts(2 + row, seed=row) for row in range(6)]
    settings = [
        asked(eps, steps=3 + row, restarts=1 + row % 2, seed=row)
        for row, eps in enumerate((1e-5, 0.02, 0.3, 0.005, 0.01, 0.0))
    ]
    together = probe(Encoder(), SCALE, images, lists, settings)
    assert {report.verdict for report in together} == {"broken", "not_broken"}
    for row, report in enumerate(together):
        (alone,) = probe(Encoder(), SCALE, images[row : row + 1], [lists[row]], [settings[row]])
        assert (report.verdict, report.clean_index, report.adversarial_index, report.gradients) == (
            alone.verdict,
            alone.clean_index,
            alone.adversarial_index,
            alone.gradients,
        )
        assert len(report.probabilities_before) == len(lists[row])
        assert report.probabilities_after == pytest.approx(alone.probabilities_after, abs=1e-4)
        if report.adversarial_pixels is not None and alone.adversarial_pixels is not None:
            torch.testing.assert_close(report.adversarial_pixels, alone.adversarial_pixels, rtol=0, atol=1e-6)


def test_the_same_seed_gives_the_same_report() -> None:
    first, second = one(0.02, seed=3), one(0.02, seed=3)
    assert first.probabilities_after == second.probabilities_after


def test_out_of_time_is_inconclusive_not_robust() -> None:
    report = one(1e-6, seconds=0.0)
    assert report.verdict == "inconclusive"
    assert report.reason is not None
    assert "time" in report.reason
    stopped = probe(Encoder(), SCALE, pixels(1), [texts(3)], [asked(1e-6)], should_stop=lambda: True)[0]
    assert stopped.verdict == "inconclusive"


def test_one_rows_deadline_is_not_its_neighbours() -> None:
    reports = probe(
        Encoder(), SCALE, pixels(2), [texts(3), texts(3)], [asked(1e-6, seconds=0.0, steps=3), asked(1e-6, steps=3)]
    )
    assert [report.verdict for report in reports] == ["inconclusive", "not_broken"]
    assert reports[1].gradients == 6


def test_a_model_that_hides_its_gradient_is_inconclusive() -> None:
    encoder = Encoder()

    def rounded(x: Tensor) -> Tensor:
        """8-bit rounding in front: the gradient is zero everywhere."""
        features: Tensor = encoder(torch.round(x * 255) / 255)
        return features

    report = one(0.02, rounded)
    assert report.verdict == "inconclusive"
    assert report.reason is not None
    assert "zero" in report.reason


def test_a_broken_answer_is_broken_even_where_gradients_are_poor() -> None:
    encoder = Encoder()
    with torch.no_grad():
        encoder.weight[:, :54] = 0  # half of the pixels play no part
    report = one(0.3, encoder)
    assert report.zero_gradient_share > 0.4 or report.gradients == 0
    assert report.verdict == "broken"


def test_gradients_that_are_not_finite_are_inconclusive() -> None:
    encoder = Encoder()

    def broken(x: Tensor) -> Tensor:
        features: Tensor = encoder(x)
        return (
            features + (x - x).flatten(1).sum(dim=1, keepdim=True).sqrt()
        )  # value 0, derivative infinite minus itself

    report = one(0.02, broken)
    assert report.verdict == "inconclusive"
    assert report.reason is not None
    assert "finite" in report.reason


def test_a_very_confident_answer_is_attacked_all_the_same() -> None:
    (report,) = probe(Encoder(), 1e4, pixels(1), [texts(5)], [asked(0.2)])
    assert report.verdict == "broken"
    assert report.probabilities_before[report.clean_index] == pytest.approx(1)


def test_eps_zero_breaks_nothing() -> None:
    assert one(0.0).verdict == "not_broken"


def test_a_probe_works_inside_inference_mode_and_touches_no_gradient() -> None:
    encoder = Encoder()
    with torch.inference_mode():
        words, image = texts(4) * 1, pixels(1) * 1
        (report,) = probe(encoder, SCALE, image, [words], [asked(0.2)])
    assert report.verdict == "broken"
    assert encoder.weight.grad is None


def test_a_scripted_encoder_is_attacked_like_an_eager_one(tiny_clip: Any) -> None:
    with pytest.warns(FutureWarning, match="deprecated"):
        traced = torch.jit.trace(tiny_clip.image, torch.rand(2, 3, 32, 32))  # type: ignore[no-untyped-call]
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    words = tiny_clip.text.encode(["cat", "dog", "house"])
    reports = [
        probe(encode, tiny_clip.logit_scale, image, [words], [asked(1 / 255, steps=5)])[0]
        for encode in (tiny_clip.image, traced)
    ]
    assert reports[0].verdict == reports[1].verdict
    assert reports[0].clean_index == reports[1].clean_index


def test_one_label_is_refused() -> None:
    with pytest.raises(LabelsError) as caught:
        one(0.1, labels=texts(1))
    assert caught.value.code == "labels_too_few"


def test_impossible_settings_and_pixels_are_refused() -> None:
    with pytest.raises(ThreatError):
        asked(0.1, steps=0)
    with pytest.raises(ThreatError):
        asked(math.nan)
    with pytest.raises(InputError):
        probe(Encoder(), SCALE, pixels(1) + 1, [texts(3)], [asked(0.1)])
