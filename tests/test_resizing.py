"""The differentiable resize: Pillow's, but for its rounding, whatever the sizes, and a gradient everywhere."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from pmgaft.clip.preprocess import PreprocessSpec, to_pixels
from pmgaft.clip.resizing import Resize


def spec(size: tuple[int, int], **options: Any) -> PreprocessSpec:
    return PreprocessSpec(size=size, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), **options)


def both(image: Image.Image, wanted: PreprocessSpec) -> tuple[Tensor, Tensor]:
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float().div(255)
    resize = Resize(image.height, image.width, wanted)
    return resize(resize.seen(pixels[None]))[0], to_pixels(image, wanted)


@pytest.mark.parametrize("resize_mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [(32, 32), (24, 40)])
@pytest.mark.parametrize("source", [(32, 32), (33, 64), (100, 37), (7, 90), (641, 427), (1, 30), (3, 2500)])
def test_it_is_pillows_resize_within_two_grey_levels(
    resize_mode: Any, interpolation: Any, size: tuple[int, int], source: tuple[int, int]
) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(64, 192, size=(*source[::-1], 3), dtype=np.uint8))
    ours, theirs = both(image, spec(size, resize_mode=resize_mode, interpolation=interpolation))
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= 2 / 255
    assert (ours - theirs).abs().mean() <= 0.4 / 255


def test_a_picture_of_the_models_size_stays_as_it_is() -> None:
    pixels = torch.rand(2, 3, 32, 32)
    resize = Resize(32, 32, spec((32, 32)))
    assert torch.equal(resize.seen(pixels), pixels)
    torch.testing.assert_close(resize(pixels), pixels)


def test_overshoot_is_cut_to_the_pixel_range_as_in_pillow() -> None:
    edge = Image.fromarray(np.repeat(np.repeat([[[0], [255]]], 8, axis=0), 3, axis=2).astype(np.uint8))
    ours, theirs = both(edge, spec((32, 32), resize_mode="squash"))
    assert ours.min() >= 0
    assert ours.max() <= 1
    assert (ours - theirs).abs().max() <= 2 / 255


@pytest.mark.parametrize("source", [(9, 9), (9, 30), (100, 40)])
def test_every_pixel_that_is_seen_has_a_gradient_even_in_a_flat_white_picture(source: tuple[int, int]) -> None:
    resize = Resize(*source, spec((32, 32)))
    seen = resize.seen(torch.ones(1, 3, *source)).requires_grad_()
    (gradient,) = torch.autograd.grad((resize(seen) * torch.rand(32, 32)).sum(), seen)
    assert bool((gradient != 0).all())


def test_what_is_not_seen_changes_nothing() -> None:
    picture = np.random.default_rng(1).integers(0, 256, size=(20, 60, 3), dtype=np.uint8)
    wanted = spec((16, 16))
    seen = Resize(20, 60, wanted).seen(torch.arange(60).expand(1, 3, 20, 60))
    first, last = int(seen.min()), int(seen.max())
    assert 0 < first < last < 59
    other = picture.copy()
    other[:, :first], other[:, last + 1 :] = 0, 255
    assert torch.equal(to_pixels(Image.fromarray(picture), wanted), to_pixels(Image.fromarray(other), wanted))


def test_the_gradient_is_the_transpose_of_the_resize() -> None:
    resize = Resize(11, 14, spec((8, 8)))
    seen = resize.seen(torch.rand(1, 3, 11, 14) / 2 + 0.25).requires_grad_()  # no overshoot: everything is linear
    weight = torch.rand(1, 3, 8, 8)
    resized = (resize(seen) * weight).sum()
    (gradient,) = torch.autograd.grad(resized, seen)
    torch.testing.assert_close((gradient * seen).sum(), resized)
