"""Weight interpolation of two image towers: a free slider between the clean and the robust model.

Source: Wortsman et al. 2022 (arXiv 2109.01903), between a model before and after fine-tuning.
"""

from __future__ import annotations

import copy
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from pmgaft.clip.image import PixelEncoder, freeze
from pmgaft.clip.loading import Clip, tensors_hash
from pmgaft.errors import InputError, ModelError


def blended(one: Clip, other: Clip, weight: float) -> Clip:
    """`one` with the image tower (1 - weight) one + weight other; weight 0 is exactly `one`, 1 exactly `other`.

    weight: in [0, 1]. Counters and other whole numbers are `one`'s.
    Raises: ModelError naming the difference where the two are not variants of one model; InputError for a weight
    outside [0, 1].
    """
    if not 0 <= weight <= 1:
        raise InputError(f"a weight lies in [0, 1], unlike {weight}", field="weight")
    difference = unlike(one, other)
    if difference:
        raise ModelError(f"{one.name} and {other.name} cannot be blended: {difference}")
    model = copy.deepcopy(one.open_clip_model)
    tower = model.visual
    assert isinstance(tower, nn.Module)
    second = other.image.tower.state_dict()
    tower.load_state_dict({name: _mixed(mine, second[name], weight) for name, mine in tower.state_dict().items()})
    encoder = PixelEncoder(tower, one.preprocess.mean, one.preprocess.std, one.image.size).to(one.image.mean.device)
    name = f"{1 - weight:g} {one.name} + {weight:g} {other.name}"
    return replace(one, name=name, image=freeze(encoder), open_clip_model=model)


def unlike(one: Clip, other: Clip) -> str | None:
    """Why two models cannot be blended, or None: they must read the same pixels with the same layers and mean the same
    by their features.
    """
    for field in fields(one.preprocess):
        ours, theirs = getattr(one.preprocess, field.name), getattr(other.preprocess, field.name)
        if ours != theirs:
            return f"the images' {field.name} is {ours} and {theirs}"
    ours, theirs = (_layers(clip.open_clip_config["model_cfg"]) for clip in (one, other))
    for key in sorted(ours.keys() | theirs.keys()):
        if ours.get(key) != theirs.get(key):
            return f"{key} is {ours.get(key)} and {theirs.get(key)}"
    first, second = one.image.tower.state_dict(), other.image.tower.state_dict()
    for name in sorted(first.keys() ^ second.keys()):
        return f"only {(one if name in first else other).name} has the tensor {name}"
    for name, tensor in first.items():
        if tensor.shape != second[name].shape:
            return f"the tensor {name} is {tuple(tensor.shape)} and {tuple(second[name].shape)}"
    if one.logit_scale != other.logit_scale:
        return f"the logit scale is {one.logit_scale:g} and {other.logit_scale:g}"
    if tensors_hash(one.text_tower) != tensors_hash(other.text_tower):
        return "their text towers differ, so that their image features mean different things"
    return None


def _mixed(mine: Tensor, theirs: Tensor, weight: float) -> Tensor:
    if not mine.is_floating_point():
        return mine
    return torch.lerp(mine.double(), theirs.to(mine.device).double(), weight).to(mine.dtype)


def _layers(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """What a configuration says about the layers, flat; not where their weights once came from."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            found |= _layers(value, f"{prefix}{key}.")
        elif not key.endswith("pretrained"):
            found[prefix + key] = value
    return found
