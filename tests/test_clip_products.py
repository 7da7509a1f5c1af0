"""Vision transformers as products: the same function of the same parameters."""

import copy

import open_clip
import pytest
import torch
from torch import Tensor, nn

from pmgaft.clip.image import PixelEncoder, freeze
from pmgaft.clip.products import PatchProduct, as_products

SIZE = 32


def vit() -> PixelEncoder:
    torch.manual_seed(0)
    config = {"image_size": SIZE, "patch_size": 8, "layers": 2, "width": 64, "head_width": 16}
    text = {"context_length": 8, "vocab_size": 100, "width": 64, "heads": 4, "layers": 1}
    model = open_clip.CLIP(embed_dim=32, vision_cfg=config, text_cfg=text)
    return freeze(PixelEncoder(model.visual, (0.5,) * 3, (0.5,) * 3, (SIZE, SIZE)))


def with_gradient(encoder: nn.Module, pixels: Tensor) -> tuple[Tensor, Tensor]:
    x = pixels.clone().requires_grad_(True)
    features = encoder(x)
    (gradient,) = torch.autograd.grad(features.square().sum() + features[:, 0].sum(), x)
    return features.detach(), gradient


def pixels(batch: int = 3) -> Tensor:
    return torch.rand(batch, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


def test_features_and_gradients_are_the_same() -> None:
    plain = vit()
    quick = as_products(copy.deepcopy(plain))
    for found, expected in zip(with_gradient(quick, pixels()), with_gradient(plain, pixels()), strict=True):
        assert torch.allclose(found, expected, atol=1e-5, rtol=1e-4)


def test_patch_tokens_are_the_same() -> None:
    plain = vit()
    quick = as_products(copy.deepcopy(plain))
    for found, expected in zip(quick.raw_with_tokens(pixels()), plain.raw_with_tokens(pixels()), strict=True):
        assert torch.allclose(found, expected, atol=1e-5)


def test_parameters_keep_their_names_values_and_memory() -> None:
    plain = vit()
    before = {name: parameter.data_ptr() for name, parameter in plain.named_parameters()}
    quick = as_products(plain)
    assert quick is plain
    assert {name: parameter.data_ptr() for name, parameter in quick.named_parameters()} == before


def test_it_really_runs_as_products() -> None:
    quick = as_products(vit())
    assert isinstance(quick.get_submodule("tower.conv1"), PatchProduct)
    with torch.profiler.profile() as profile:
        with_gradient(quick, pixels())
    names = {event.key for event in profile.key_averages()}
    assert "aten::addmm" in names
    assert not names & {"aten::convolution", "aten::convolution_backward", "aten::bmm"}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("bias", [False, True])
def test_a_patch_product_is_the_convolution_also_where_patches_do_not_fill_the_image(
    layout: torch.memory_format, bias: bool
) -> None:
    convolution = nn.Conv2d(3, 16, kernel_size=8, stride=8, bias=bias).to(memory_format=layout)
    images = torch.rand(2, 3, 27, 19).to(memory_format=layout)
    expected = convolution(images)
    found = PatchProduct.of(convolution)(images)
    assert found.shape == expected.shape
    assert torch.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize(
    "convolution",
    [
        nn.Conv2d(3, 8, kernel_size=8, stride=4),
        nn.Conv2d(3, 8, kernel_size=8, stride=8, padding=1),
        nn.Conv2d(4, 8, kernel_size=8, stride=8, groups=2),
        nn.Conv2d(3, 8, kernel_size=8, stride=8, dilation=2),
        nn.Conv2d(3, 8, kernel_size=2, stride=2),
    ],
)
def test_other_convolutions_stay_what_they_are(convolution: nn.Conv2d) -> None:
    assert type(as_products(nn.Sequential(convolution))[0]) is nn.Conv2d


def test_the_parameters_derivatives_are_the_same() -> None:
    plain = vit().requires_grad_(True)
    quick = as_products(copy.deepcopy(plain))
    for encoder in (plain, quick):
        encoder(pixels())[:, 0].sum().backward()
    for (name, found), (_, expected) in zip(quick.named_parameters(), plain.named_parameters(), strict=True):
        if expected.grad is not None:
            assert found.grad is not None, name
            assert torch.allclose(found.grad, expected.grad, atol=1e-5, rtol=1e-3), name
