"""Blending: exact at its ends, straight between them, and only of what belongs together."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from torch import nn

from pmgaft.blend import blended, unlike
from pmgaft.cli import main
from pmgaft.clip.loading import Clip, load_clip, save_local_dir, tensors_hash
from pmgaft.errors import InputError, ModelError


def moved(directory: Path, target: Path, change: Callable[[nn.Module], None]) -> Path:
    """The model in `directory`, changed."""
    clip = load_clip(str(directory))
    with torch.no_grad():
        change(clip.open_clip_model)
    save_local_dir(clip.open_clip_model, clip.open_clip_config, target, clip.tokenizer)
    return target


def other_weights(model: Any) -> None:
    generator = torch.Generator().manual_seed(7)
    for parameter in model.visual.parameters():
        parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    for name, buffer in model.visual.named_buffers():
        if name.endswith("num_batches_tracked"):
            buffer.add_(8)


@pytest.fixture(scope="module")
def second_dir(tiny_clip_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return moved(tiny_clip_dir, tmp_path_factory.mktemp("blend") / "second", other_weights)


@pytest.fixture(scope="module")
def second(second_dir: Path) -> Clip:
    return load_clip(str(second_dir))


def test_weight_zero_is_the_first_and_weight_one_the_second_exactly(tiny_clip: Clip, second: Clip) -> None:
    before = tensors_hash(tiny_clip.image)
    assert tensors_hash(blended(tiny_clip, second, 0.0).image) == before
    last, other = blended(tiny_clip, second, 1.0).image.tower.state_dict(), second.image.tower.state_dict()
    assert all(torch.equal(last[name], tensor) for name, tensor in other.items() if tensor.is_floating_point())
    assert tensors_hash(tiny_clip.image) == before


@pytest.mark.parametrize("weight", [0.25, 0.6])
def test_every_floating_tensor_lies_on_the_straight_line(weight: float, tiny_clip: Clip, second: Clip) -> None:
    found = blended(tiny_clip, second, weight)
    one, other = tiny_clip.image.tower.state_dict(), second.image.tower.state_dict()
    for name, tensor in found.image.tower.state_dict().items():
        line = (1 - weight) * one[name] + weight * other[name] if tensor.is_floating_point() else one[name]
        torch.testing.assert_close(tensor, line.to(tensor.dtype), rtol=1e-6, atol=1e-7)
    assert found.image.tower is found.open_clip_model.visual


def test_unlike_models_are_refused_with_the_difference(tiny_clip: Clip, second: Clip, tiny_vit_clip: Clip) -> None:
    assert unlike(tiny_clip, second) is None
    with pytest.raises(ModelError, match=r"vision_cfg\.\w+ is"):
        blended(tiny_clip, tiny_vit_clip, 0.5)
    with pytest.raises(ModelError, match="the images' mean is"):
        blended(tiny_clip, replace(second, preprocess=replace(second.preprocess, mean=(0.1, 0.2, 0.3))), 0.5)
    with pytest.raises(ModelError, match="the logit scale is"):
        blended(tiny_clip, replace(second, logit_scale=1.0), 0.5)
    with pytest.raises(InputError, match=r"\[0, 1\]"):
        blended(tiny_clip, second, 1.5)


def test_one_activation_for_another_is_a_difference_though_all_tensors_fit(tiny_vit_clip: Clip) -> None:
    config = json.loads(json.dumps(tiny_vit_clip.open_clip_config))
    config["model_cfg"]["quick_gelu"] = True
    assert unlike(tiny_vit_clip, replace(tiny_vit_clip, open_clip_config=config)) == "quick_gelu is None and True"


def test_other_texts_are_a_difference(tiny_clip: Clip, tiny_clip_dir: Path, tmp_path: Path) -> None:
    def other_text(model: Any) -> None:
        model.text_projection += 1

    stranger = load_clip(str(moved(tiny_clip_dir, tmp_path / "stranger", other_text)))
    assert "text towers differ" in (unlike(tiny_clip, stranger) or "")


def blend(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["blend", *map(str, arguments)])


def test_the_command_writes_a_model_that_every_command_takes(
    tiny_clip_dir: Path, second_dir: Path, tiny_clip: Clip, second: Clip, tmp_path: Path
) -> None:
    target = tmp_path / "middle"
    done = blend(tiny_clip_dir, second_dir, "--weight", "0.5", "--output-dir", target)
    assert done.exit_code == 0, done.output
    assert tensors_hash(load_clip(str(target)).image) == tensors_hash(blended(tiny_clip, second, 0.5).image)
    facts = json.loads((target / "blend.json").read_text())["blend"]
    assert facts["weight"] == 0.5
    assert facts["b"]["hash"] == tensors_hash(second.image)
    again = blend(tiny_clip_dir, second_dir, "--weight", "0.5", "--output-dir", target)
    assert again.exit_code == 2
    assert "not empty" in again.stderr


def test_the_slider_is_judged_in_one_command(
    tiny_clip_dir: Path, second_dir: Path, shards: Path, tmp_path: Path
) -> None:
    how = ["--dataset", str(shards), "--attack", "pgd:1", "--check-images", "0", "--device", "cpu"]
    done = blend(tiny_clip_dir, second_dir, "--weight", "0,0.5,1", "--output-dir", tmp_path / "slider", *how)
    assert done.exit_code == 0, done.output
    hashes = [
        json.loads((tmp_path / "slider" / f"weight-{weight}.json").read_text())["model"]["hash"]
        for weight in ("0", "0.5", "1")
    ]
    assert len(set(hashes)) == 3
    assert hashes[0] == tensors_hash(load_clip(str(tiny_clip_dir)).open_clip_model)
    page = (tmp_path / "slider" / "slider.md").read_text()
    assert page.count("\n| 0.5") == 1
    assert (tmp_path / "slider" / "slider.png").is_file()


@pytest.mark.parametrize(
    ("weight", "said"), [("2", "[0, 1]"), ("-0.1", "[0, 1]"), ("half", "number"), ("0,1", "--dataset")]
)
def test_weights_that_make_no_sense_are_refused(
    weight: str, said: str, tiny_clip_dir: Path, second_dir: Path, tmp_path: Path
) -> None:
    done = blend(tiny_clip_dir, second_dir, "--weight", weight, "--output-dir", tmp_path / "x")
    assert done.exit_code == 2
    assert said in done.stderr
