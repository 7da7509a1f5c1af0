"""Pixels -> features."""

from __future__ import annotations

import copy
from typing import Any

import open_clip
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torch import Tensor, nn

from pmgaft.clip.image import FewSizes, PixelEncoder, few_sizes, fold_batchnorm, freeze, frozen_copy
from pmgaft.clip.loading import Clip
from pmgaft.clip.preprocess import to_pixels
from pmgaft.errors import ModelError


@pytest.fixture
def pixels(tiny_clip: Clip, tiny_images: list[Image.Image]) -> Tensor:
    return torch.stack([to_pixels(image, tiny_clip.preprocess) for image in tiny_images])


def largest_difference(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())


@pytest.mark.parametrize("name", ["tiny_clip", "tiny_vit_clip"])
def test_pixels_get_the_features_and_logits_that_open_clip_gives(
    name: str, request: pytest.FixtureRequest, tiny_images: list[Image.Image]
) -> None:
    clip: Clip = request.getfixturevalue(name)
    model: Any = clip.open_clip_model
    preprocess = image_transform_v2(PreprocessCfg(**open_clip.get_model_preprocess_cfg(model)), is_train=False)
    tokens = open_clip.get_tokenizer(clip.spec.model)(["a cat", "a dog"])
    with torch.no_grad():
        theirs, _ = model.get_logits(torch.stack([preprocess(image) for image in tiny_images]), tokens)
        pixels = torch.stack([to_pixels(image, clip.preprocess) for image in tiny_images])
        ours = clip.logits(pixels, clip.text.encode(["a cat", "a dog"]))
    assert largest_difference(ours, theirs) < 1e-4


def test_features_have_unit_length_and_raw_ones_their_own(tiny_clip: Clip, pixels: Tensor) -> None:
    raw, unit = tiny_clip.image.raw(pixels), tiny_clip.image(pixels)
    assert torch.allclose(unit.norm(dim=-1), torch.ones(len(pixels)))
    assert torch.allclose(unit, nn.functional.normalize(raw, dim=-1))
    assert largest_difference(raw.norm(dim=-1), torch.ones(len(pixels))) > 1e-3


def test_a_frozen_copy_does_not_follow_the_original(tiny_clip: Clip, pixels: Tensor) -> None:
    student = copy.deepcopy(tiny_clip.image).requires_grad_(True)
    guide = frozen_copy(student)
    before = guide(pixels)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.mul_(1.5)
    assert torch.equal(guide(pixels), before)
    assert not any(parameter.requires_grad for parameter in guide.parameters())
    assert not any(module.training for module in guide.modules())
    assert all(parameter.requires_grad for parameter in student.parameters())


def test_freezing_gives_back_the_same_module() -> None:
    module = nn.Linear(2, 2).train()
    assert freeze(module) is module
    assert not module.training


def test_folding_batchnorm_changes_no_feature_and_no_gradient(tiny_clip: Clip, pixels: Tensor) -> None:
    folded = fold_batchnorm(tiny_clip.image)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    assert largest_difference(folded(pixels), tiny_clip.image(pixels)) < 1e-5

    def gradient(encoder: PixelEncoder) -> Tensor:
        leaf = pixels.clone().requires_grad_()
        return torch.autograd.grad(encoder(leaf)[:, 0].sum(), leaf)[0]

    assert largest_difference(gradient(folded), gradient(tiny_clip.image)) < 1e-5


def test_folding_leaves_the_original_as_it_was(tiny_clip: Clip) -> None:
    state = {name: tensor.clone() for name, tensor in tiny_clip.image.state_dict().items()}
    fold_batchnorm(tiny_clip.image)
    assert any(isinstance(module, nn.BatchNorm2d) for module in tiny_clip.image.modules())
    assert all(torch.equal(tensor, state[name]) for name, tensor in tiny_clip.image.state_dict().items())


def test_without_batchnorm_folding_is_a_copy(tiny_vit_clip: Clip) -> None:
    folded = fold_batchnorm(tiny_vit_clip.image)
    assert folded is not tiny_vit_clip.image
    assert folded.state_dict().keys() == tiny_vit_clip.image.state_dict().keys()


def test_open_clips_own_resnet_can_be_folded() -> None:
    torch.manual_seed(0)
    tower = open_clip.model.ModifiedResNet(layers=(1, 1, 1, 1), output_dim=8, heads=4, image_size=32, width=8)
    for module in tower.modules():
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None:
            assert module.running_var is not None
            module.running_mean.uniform_(-0.2, 0.2)
            module.running_var.uniform_(0.5, 1.5)
    encoder = freeze(PixelEncoder(tower, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), (32, 32)))
    folded = fold_batchnorm(encoder)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    pixels = torch.rand(2, 3, 32, 32)
    assert largest_difference(folded(pixels), encoder(pixels)) < 1e-5


def test_a_tower_that_uses_a_convolution_twice_is_not_folded_wrongly() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
            nn.init.uniform_(self.norm.weight, 2, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            z: Tensor = (self.norm(y) * y).mean(dim=(2, 3))
            return z

    torch.manual_seed(0)
    with pytest.raises(ModelError, match="twice"):
        fold_batchnorm(PixelEncoder(Twice(), (0, 0, 0), (1, 1, 1), (8, 8)))


def test_a_padded_tower_gives_the_same_features_and_gradients_and_meets_few_batch_sizes() -> None:
    met: list[int] = []

    class Tower(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            met.append(len(images))
            return images.square().mean(dim=(2, 3))

    padded = FewSizes(Tower())
    for size in (0, 1, 2, 15, 16, 17, 128, 129, 145, 300):
        images = torch.rand(size, 3, 4, 4, generator=torch.Generator().manual_seed(size), requires_grad=True)
        features = padded(images)
        torch.testing.assert_close(features, images.square().mean(dim=(2, 3)))
        (gradient,) = torch.autograd.grad(features.sum(), images)
        torch.testing.assert_close(gradient, images.detach() / 8)
    assert sorted(set(met)) == [0, 1, 16, 128]


def test_few_sizes_pads_towers_of_many_convolutions_and_leaves_others() -> None:
    many = PixelEncoder(nn.Sequential(*(nn.Conv2d(3, 3, 1) for _ in range(5))), (0, 0, 0), (1, 1, 1), (8, 8))
    few = PixelEncoder(nn.Conv2d(3, 3, 8), (0, 0, 0), (1, 1, 1), (8, 8))
    assert isinstance(few_sizes(many).tower, FewSizes)
    assert few_sizes(few) is few
