"""The gate between the model that was trained and the file that is served."""

import pytest
import torch
from torch import Tensor

from pmgaft.errors import ParityError
from pmgaft_export.bundle import Parity
from pmgaft_export.parity import (
    BATCHES,
    FEATURE_TOLERANCE,
    TEXTS,
    Encode,
    Reference,
    enforce,
    enforce_gradient,
    measure,
    measure_gradient,
    reference,
    sample_pixels,
)

D = 8
MATRIX = torch.randn(3 * 8 * 8, D, generator=torch.Generator().manual_seed(1))
TABLE = torch.nn.functional.normalize(torch.randn(100, D, generator=torch.Generator().manual_seed(2)), dim=-1)


def image(pixels: Tensor) -> Tensor:
    return torch.nn.functional.normalize(torch.tanh((pixels - 0.5).flatten(1) @ MATRIX), dim=-1)


def text(tokens: Tensor) -> Tensor:
    return TABLE[tokens.sum(dim=1) % 100]


@pytest.fixture
def eager() -> Reference:
    return reference(image, text, lambda texts: torch.tensor([[len(t), len(t) % 5] for t in texts]), (8, 8))


def test_a_model_agrees_with_itself_exactly(eager: Reference) -> None:
    found = measure(eager, image, text)
    assert found == Parity(batches=BATCHES, image_difference=0.0, text_difference=0.0, top1_agreement=1.0)
    enforce("same", found)
    gradient = measure_gradient(eager, image, image, "image.pt")
    assert (gradient.image_difference, gradient.gradient_difference) == (0.0, 0.0)
    enforce_gradient(gradient)


def test_the_largest_difference_is_what_was_added(eager: Reference) -> None:
    found = measure(eager, lambda pixels: image(pixels) + 0.25, lambda tokens: text(tokens) - 0.5)
    assert found.image_difference == pytest.approx(0.25, abs=1e-6)
    assert found.text_difference == pytest.approx(0.5, abs=1e-6)


@pytest.mark.parametrize("offset", [2 * FEATURE_TOLERANCE, float("nan"), float("inf")])
def test_an_encoder_that_is_off_is_refused(eager: Reference, offset: float) -> None:
    with pytest.raises(ParityError, match="bad: image features: "):
        enforce("bad", measure(eager, lambda pixels: image(pixels) + offset, text))
    with pytest.raises(ParityError, match="bad: text features: "):
        enforce("bad", measure(eager, image, lambda tokens: text(tokens) + offset))


def test_a_difference_in_the_smaller_batch_alone_is_found(eager: Reference) -> None:
    def broken(pixels: Tensor) -> Tensor:
        return image(pixels) + (0.25 if len(pixels) == 1 else 0.0)

    assert measure(eager, broken, text).image_difference == pytest.approx(0.25, abs=1e-6)


def test_another_best_text_is_refused_and_a_tie_is_not(eager: Reference) -> None:
    found = measure(eager, image, text)
    with pytest.raises(ParityError, match=r"the best text is the same for 87\.5% of the images"):
        enforce("bad", found.model_copy(update={"top1_agreement": 7 / 8}))
    shuffled = measure(eager, lambda pixels: -image(pixels), text)
    assert shuffled.top1_agreement < 1
    tied = Reference(image=image, text=lambda t: TABLE[:1].expand(len(t), D), pixels=eager.pixels, tokens=eager.tokens)
    assert measure(tied, image, lambda t: tied.text(t) + 1e-7 * torch.rand(len(t), D)).top1_agreement == 1


@pytest.mark.parametrize(
    "gradient",
    [
        lambda pixels: image(pixels.detach()),
        lambda pixels: image(2 * pixels - pixels.detach()),
        lambda pixels: image(torch.cat([pixels[:, :2], pixels[:, 2:].detach()], dim=1)),
    ],
    ids=["none", "twice as long", "one channel lost"],
)
def test_right_features_with_a_wrong_input_gradient_are_refused(eager: Reference, gradient: Encode) -> None:
    found = measure_gradient(eager, image, gradient, "image.pt")
    assert found.image_difference < 1e-6
    with pytest.raises(ParityError, match=r"image.pt: input gradient"):
        enforce_gradient(found)


def test_a_gradient_twice_as_long_is_off_by_its_length(eager: Reference) -> None:
    found = measure_gradient(eager, image, lambda pixels: image(2 * pixels - pixels.detach()), "image.pt")
    assert found.gradient_difference == pytest.approx(1.0, abs=1e-4)


def test_the_samples_are_pixels_and_the_same_each_time() -> None:
    pixels = sample_pixels(7, (12, 20), seed=3)
    assert pixels.shape == (7, 3, 12, 20)
    assert pixels.dtype == torch.float32
    assert 0 <= pixels.min() < pixels.max() <= 1
    assert torch.equal(pixels, sample_pixels(7, (12, 20), seed=3))


def test_two_batch_sizes_other_than_the_traced_one_are_tried(eager: Reference) -> None:
    from pmgaft_export.build import TRACED_BATCH

    assert len(set(BATCHES)) == 2
    assert 1 in BATCHES
    assert TRACED_BATCH not in BATCHES
    assert tuple(map(len, eager.pixels)) == tuple(map(len, eager.tokens)) == BATCHES
    assert len(TEXTS) == max(BATCHES)
