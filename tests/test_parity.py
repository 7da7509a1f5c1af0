"""The gate between the model that was trained and the file that is served."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pmgaft.clip.preprocess import PreprocessSpec
from pmgaft.data import skimage_crops
from pmgaft.errors import DataError, InputError, ParityError
from pmgaft_export import sample as samples
from pmgaft_export.bundle import Parity, Precision
from pmgaft_export.parity import (
    BATCHES,
    COST_POINTS,
    FEATURE_TOLERANCE,
    TOLERANCES,
    Reference,
    enforce,
    enforce_gradient,
    measure,
    measure_gradient,
    reference,
)
from pmgaft_export.runtime import Encode
from pmgaft_export.sample import SHAPES, TEXTS, Sample, comparison_sample, photographs, sample_pixels
from tests.conftest import CLASS_NAMES

D = 8
MATRIX = torch.randn(3 * 8 * 8, D, generator=torch.Generator().manual_seed(1))
TABLE = torch.nn.functional.normalize(torch.randn(100, D, generator=torch.Generator().manual_seed(2)), dim=-1)


def image(pixels: Tensor) -> Tensor:
    return torch.nn.functional.normalize(torch.tanh((pixels - 0.5).flatten(1) @ MATRIX), dim=-1)


def text(tokens: Tensor) -> Tensor:
    return TABLE[tokens.sum(dim=1) % 100]


NAMES = ("ab", "abc", "abcd", "abcdefg")
SAMPLE = Sample(
    name="pictures",
    pixels=sample_pixels(40, (8, 8), seed=7),
    labels=torch.arange(40) % len(NAMES),
    class_names=NAMES,
    templates=("{}", "a {}"),
)


def tokenize(texts: Sequence[str]) -> Tensor:
    return torch.tensor([[len(t), len(t) % 5] for t in texts])


def asked(sample: Sample = SAMPLE) -> Reference:
    return reference(image, text, tokenize, (8, 8), sample)


@pytest.fixture(scope="module")
def eager() -> Reference:
    return asked()


def test_a_model_agrees_with_itself_exactly(eager: Reference) -> None:
    found = measure(eager, image, text)
    assert (found.image_difference, found.text_difference, found.top1_agreement) == (0.0, 0.0, 1.0)
    assert (found.batches, found.sample, found.images, found.lost, found.won) == (BATCHES, "pictures", 40, 0, 0)
    assert found.cosine == pytest.approx(1, abs=1e-6)
    enforce("same", "float32", found)
    gradient = measure_gradient(eager, image, image, "image.pt")
    assert (gradient.image_difference, gradient.gradient_difference) == (0.0, 0.0)
    enforce_gradient(gradient)


def test_clean_accuracy_is_the_eager_models_on_all_prompts_of_a_class(eager: Reference) -> None:
    features = [torch.stack([text(tokenize([f"{name}"]))[0], text(tokenize([f"a {name}"]))[0]]) for name in NAMES]
    classes = torch.stack([torch.nn.functional.normalize(pair.mean(dim=0), dim=0) for pair in features])
    assert SAMPLE.labels is not None
    right = torch.eq((image(SAMPLE.pixels) @ classes.T).argmax(dim=1), SAMPLE.labels)
    assert measure(eager, image, text).accuracy == pytest.approx(float(right.double().mean()))


def test_what_a_format_costs_is_what_it_loses_less_what_it_wins(eager: Reference) -> None:
    assert SAMPLE.labels is not None
    answers = (eager.sample_features @ eager.class_features.T).argmax(dim=1)
    right, wrong = (rows.nonzero()[:, 0] for rows in (answers == SAMPLE.labels, answers != SAMPLE.labels))
    changed = image(SAMPLE.pixels).clone()
    changed[right[:3]] = eager.class_features[(SAMPLE.labels[right[:3]] + 1) % 4]
    changed[wrong[:1]] = eager.class_features[SAMPLE.labels[wrong[:1]]]
    pages = iter([image(pixels) for pixels in eager.pixels] + list(torch.split(changed, 32)))
    found = measure(eager, lambda pixels: next(pages), text)
    assert (found.lost, found.won) == (3, 1)
    assert found.cost_points == pytest.approx(100 * 2 / 40)
    assert found.cost_error_points == pytest.approx(100 * 2 / 40)  # the root of 4 answers that changed
    assert found.top1_agreement == pytest.approx(36 / 40)


def test_pictures_without_labels_have_agreement_and_no_accuracy() -> None:
    found = measure(asked(replace(SAMPLE, labels=None)), image, text)
    assert (found.accuracy, found.lost, found.won, found.top1_agreement) == (None, 0, 0, 1.0)


def test_a_part_of_the_sample_is_spread_over_all_of_it(eager: Reference) -> None:
    seen: list[Tensor] = []

    def watched(pixels: Tensor) -> Tensor:
        seen.append(pixels)
        return image(pixels)

    assert measure(eager, watched, text, images=5).images == 5
    assert torch.equal(seen[-1], SAMPLE.pixels[[0, 8, 16, 24, 32]])
    assert measure(eager, image, text, images=400).images == 40


def test_the_largest_difference_is_what_was_added(eager: Reference) -> None:
    found = measure(eager, lambda pixels: image(pixels) + 0.25, lambda tokens: text(tokens) - 0.5)
    assert found.image_difference == pytest.approx(0.25, abs=1e-6)
    assert found.text_difference == pytest.approx(0.5, abs=1e-6)


@pytest.mark.parametrize("offset", [2 * FEATURE_TOLERANCE, float("nan"), float("inf")])
def test_an_encoder_that_is_off_is_refused(eager: Reference, offset: float) -> None:
    with pytest.raises(ParityError, match="bad: image features: "):
        enforce("bad", "float32", measure(eager, lambda pixels: image(pixels) + offset, text))
    with pytest.raises(ParityError, match="bad: text features: "):
        enforce("bad", "int8", measure(eager, image, lambda tokens: text(tokens) + offset))


def test_a_difference_in_the_smaller_batch_alone_is_found(eager: Reference) -> None:
    def broken(pixels: Tensor) -> Tensor:
        return image(pixels) + (0.25 if len(pixels) == 1 else 0.0)

    assert measure(eager, broken, text).image_difference == pytest.approx(0.25, abs=1e-6)


def parity(**changes: object) -> Parity:
    """Figures that every precision passes, but for the changes."""
    good = {
        "batches": BATCHES,
        "image_difference": 0.0,
        "text_difference": 0.0,
        "cosine": 1.0,
        "cosine_mean": 1.0,
        "sample": "pictures",
        "images": 1000,
        "top1_agreement": 1.0,
        "accuracy": 0.5,
        "lost": 0,
        "won": 0,
        "machine": "cpu",
    }
    return Parity.model_validate(good | changes)


def test_another_best_text_is_refused_and_a_tie_is_not(eager: Reference) -> None:
    with pytest.raises(ParityError, match=r"the best text is the same for 99\.9% of the images, not all"):
        enforce("bad", "float32", parity(top1_agreement=0.999))
    assert measure(eager, lambda pixels: -image(pixels), text).top1_agreement < 1
    tied = reference(image, lambda tokens: TABLE[:1].expand(len(tokens), D), tokenize, (8, 8), SAMPLE)
    assert measure(tied, image, lambda t: TABLE[:1] + 1e-7 * torch.rand(len(t), D)).top1_agreement == 1


@pytest.mark.parametrize(
    ("precision", "field", "message"),
    [
        ("float16", "cosine", "the lowest cosine of image features with the eager model's is"),
        ("float16", "cosine_mean", "the mean cosine of image features with the eager model's is"),
        ("float16", "top1_agreement", "the best text is the same for"),
        ("int8", "cosine_mean", "the mean cosine of image features with the eager model's is"),
        ("int8", "top1_agreement", "the best text is the same for"),
    ],
)
def test_lower_precision_has_room_and_an_end(precision: Precision, field: str, message: str) -> None:
    least = getattr(TOLERANCES[precision], field)
    enforce("good", precision, parity(**{field: least}, image_difference=0.1))
    for value in (least - 1e-3, float("nan")):
        with pytest.raises(ParityError, match=f"^bad: {message}"):
            enforce("bad", precision, parity(**{field: value}))


@pytest.mark.parametrize("precision", ["float32", "float16", "int8"])
def test_clean_accuracy_may_cost_half_a_point_and_what_a_sample_cannot_show(precision: Precision) -> None:
    enforce("good", precision, parity(lost=50, won=45))
    enforce("good", precision, parity(images=100, lost=2, won=0))  # two points, give or take 1.4: no loss is shown
    enforce("good", precision, parity(lost=0, won=100))
    with pytest.raises(ParityError, match=r"bad costs 3\.0 points of clean accuracy on 1000 images of pictures"):
        enforce("bad", precision, parity(lost=35, won=5))
    assert COST_POINTS == 0.5


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


def test_made_up_pictures_are_pixels_and_the_same_each_time() -> None:
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


SPEC = PreprocessSpec(size=(8, 8), mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bicubic", resize_mode="shortest")


def test_the_built_in_sample_has_every_class_and_calibration_sees_none_of_its_pictures() -> None:
    sample = comparison_sample(SPEC, None, 120)
    assert sample.name == "skimage"
    assert sample.labels is not None
    assert sorted(set(sample.labels.tolist())) == list(range(len(sample.class_names)))
    assert sample.pixels.shape == (120, 3, 8, 8)
    pictures = photographs(SPEC, None)
    assert pictures.shape == (samples.CALIBRATION_IMAGES, 3, 8, 8)
    assert not any(torch.equal(one, other) for one in sample.pixels for other in pictures)


def test_a_set_without_a_training_split_calibrates_by_what_it_has(shards: Path) -> None:
    assert len(photographs(SPEC, str(shards))) == 48
    assert len(photographs(SPEC, str(shards / "test.parquet"))) == 12
    sample = comparison_sample(SPEC, str(shards), 5)
    assert (len(sample.pixels), sample.class_names) == (5, CLASS_NAMES)


def test_without_any_photographs_shapes_compare_and_nothing_calibrates(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> Path:
        raise DataError("no scikit-image here")

    monkeypatch.setattr(skimage_crops, "_folder", missing)
    sample = comparison_sample(SPEC, None, 9)
    assert (sample.name, sample.labels, len(sample.pixels)) == (SHAPES, None, 9)
    with pytest.raises(InputError, match="needs photographs to calibrate with") as caught:
        photographs(SPEC, None)
    assert caught.value.code == "calibration_missing"


@pytest.mark.parametrize("ask", [lambda: comparison_sample(SPEC, "nowhere", 3), lambda: photographs(SPEC, "nowhere")])
def test_a_data_set_that_is_not_there_is_never_replaced_by_another(ask: Callable[[], object]) -> None:
    with pytest.raises(DataError, match="nowhere"):
        ask()
