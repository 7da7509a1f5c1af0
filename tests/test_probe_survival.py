"""Whether an adversarial image outlives a file, and wordings that change an answer."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from pmgaft.probe import survivals, surviving_pixels, wordings
from pmgaft.probe.survival import difference_picture, picture_of, pixels_of, rounded
from pmgaft.threat import ThreatModel

LEVEL = 1 / 255
EVERY = [
    "rounded to 8 bits",
    "saved as PNG",
    "saved as JPEG, quality 90",
    "resized by -4 pixels and back",
    "resized by +4 pixels and back",
]


def mean_above(limit: float) -> object:
    def logits_of(x: Tensor) -> Tensor:
        mean = x.mean(dim=(1, 2, 3))
        return torch.stack([limit - mean, mean - limit], dim=1)

    return logits_of


def flips(logits: Tensor) -> bool:
    return int(logits.argmax()) == 1


CLEAN = torch.full((3, 16, 16), 100 * LEVEL)


def test_a_large_change_survives_everything_and_a_small_one_nothing() -> None:
    large = survivals(mean_above(110 * LEVEL), flips, CLEAN, CLEAN + 20 * LEVEL)  # type: ignore[arg-type]
    assert [one.name for one in large] == EVERY
    assert all(one.flips and one.index == 1 for one in large)
    small = survivals(mean_above(100.2 * LEVEL), flips, CLEAN, CLEAN + 0.4 * LEVEL)  # type: ignore[arg-type]
    assert not any(one.flips for one in small)
    assert small[0].distance == pytest.approx(0, abs=1e-6)


def test_jpeg_undoes_what_png_keeps() -> None:
    """A fine pattern of one grey level: what the model reads off is gone after JPEG."""
    board = (torch.arange(16)[:, None] + torch.arange(16)) % 2 * 2.0 - 1

    def logits_of(x: Tensor) -> Tensor:
        match = ((x - CLEAN) * board).mean(dim=(1, 2, 3))
        return torch.stack([0.8 * LEVEL - match, match - 0.8 * LEVEL], dim=1)

    found = {one.name: one.flips for one in survivals(logits_of, flips, CLEAN, CLEAN + LEVEL * board)}
    assert found["saved as PNG"]
    assert not found["saved as JPEG, quality 90"]


def test_what_rounding_saves_is_rounded_away_from_the_image_where_eps_allows() -> None:
    logits_of = mean_above(100.2 * LEVEL)
    threat = ThreatModel(eps=LEVEL)
    best, survives = surviving_pixels(logits_of, flips, CLEAN, CLEAN + 0.4 * LEVEL, threat)  # type: ignore[arg-type]
    assert survives
    assert float((best - CLEAN).abs().max()) <= LEVEL + 1e-6
    assert torch.equal(best, rounded(best))
    tight = ThreatModel(eps=0.5 * LEVEL)
    best, survives = surviving_pixels(logits_of, flips, CLEAN, CLEAN + 0.4 * LEVEL, tight)  # type: ignore[arg-type]
    assert not survives
    torch.testing.assert_close(best, CLEAN)


def test_in_l2_rounding_away_stays_in_the_ball_too() -> None:
    logits_of = mean_above(100.2 * LEVEL)
    change = 0.4 * LEVEL * (3 * 16 * 16) ** 0.5
    for eps, expected in ((1.01 * change, False), (3 * change, True)):
        threat = ThreatModel(norm="l2", eps=eps)
        best, survives = surviving_pixels(logits_of, flips, CLEAN, CLEAN + 0.4 * LEVEL, threat)  # type: ignore[arg-type]
        assert survives == expected
        assert float((best - CLEAN).norm()) <= eps


def test_pictures_round_and_come_back_as_they_were() -> None:
    for level in range(256):
        exact = torch.full((3, 1, 1), level / 255)
        assert torch.equal(pixels_of(picture_of(exact + 0.4 * LEVEL).convert("RGB")), rounded(exact + 0.4 * LEVEL))


def test_the_difference_is_amplified_to_what_fits() -> None:
    picture, factor = difference_picture(CLEAN, CLEAN + LEVEL)
    assert factor == pytest.approx(127.5, rel=1e-3)
    assert picture.getpixel((0, 0)) == (255, 255, 255)
    assert difference_picture(CLEAN, CLEAN)[0].getpixel((0, 0)) in ((127, 127, 127), (128, 128, 128))


WORDS = {"cat": 0.0, "dog": 1.2, "puss": 0.1, "bow wow": 2.5}


def encode(texts: Sequence[str]) -> Tensor:
    """An angle per word; the template "a {} at night" turns dogs towards the image."""
    rows = []
    for text in texts:
        (word,) = [word for word in WORDS if word in text]
        angle = WORDS[word] - (1.15 if "night" in text and word == "dog" else 0)
        rows.append(torch.tensor([torch.tensor(angle).cos(), torch.tensor(angle).sin()]))
    return torch.stack(rows)


def test_templates_and_synonyms_that_change_the_answer_are_named() -> None:
    image = F.normalize(torch.tensor([1.0, 0.3]), dim=0)
    found = wordings(
        encode,
        image,
        ["cat", "dog"],
        ["a {}."],
        others=["the {}.", "a {} at night"],
        synonyms=["puss", "bow wow"],
    )
    assert (found.templates, found.synonyms) == (2, 2)
    assert [(one.text, one.index) for one in found.flipped_by_template] == [("a {} at night", 1)]
    assert [(one.text, one.index) for one in found.flipped_by_synonym] == [("bow wow", 1)]


def test_inside_a_group_no_wording_changes_anything() -> None:
    image = F.normalize(torch.tensor([1.0, 0.3]), dim=0)
    found = wordings(
        encode, image, ["cat", "dog"], ["a {}."], others=["a {} at night"], synonyms=["bow wow"], groups=((0, 1),)
    )
    assert found.flipped_by_template == found.flipped_by_synonym == ()
