"""A model's name -> a Clip. Letters: B batch, K labels, D features. Not for serving workers: imports open_clip."""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import json
import logging
import math
import os
import pickle
import shutil
import tempfile
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import open_clip
import safetensors.torch
import torch
from open_clip.constants import IMAGENET_MEAN, IMAGENET_STD, OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from open_clip.model import set_model_preprocess_cfg
from open_clip.pretrained import get_pretrained_cfg, list_pretrained_tags_by_model
from safetensors import SafetensorError
from torch import Tensor, nn

from pmgaft.clip import zoo
from pmgaft.clip.image import PixelEncoder, freeze
from pmgaft.clip.open_clip_text import TextTower, convert_tokenizer
from pmgaft.clip.preprocess import PreprocessSpec
from pmgaft.clip.text import TextEncoder, Tokenizer
from pmgaft.errors import ModelError, ModelWarning, first_line, quote

CONFIG_FILE = "open_clip_config.json"
WEIGHTS_FILE = "open_clip_model.safetensors"
TOKENIZER_FILE = "tokenizer.json"

Config = dict[str, Any]
State = dict[str, Tensor]
Built = tuple[Any, Config, Tokenizer]  # open_clip's model (open_clip is untyped), its configuration, its tokenizer

# Published checkpoints keep their best accuracy as a NumPy scalar, which torch's safe unpickler does not know. Files of
# NumPy 1 name the same function by its old address.
_NUMPY_SCALAR = np._core.multiarray.scalar  # type: ignore[attr-defined]
_SAFE_GLOBALS = [
    _NUMPY_SCALAR,
    (_NUMPY_SCALAR, "numpy.core.multiarray.scalar"),
    np.dtype,
    *(type(np.dtype(kind)) for kind in (np.float16, np.float32, np.float64, np.int32, np.int64)),
]


_STATISTICS = {
    "imagenet": (IMAGENET_MEAN, IMAGENET_STD),
    "clip": (OPENAI_DATASET_MEAN, OPENAI_DATASET_STD),
}
"""Mean and deviation of red, green and blue, by name."""

_QUICKGELU = "-quickgelu"  # the end of the names of models that open_clip builds with that activation
_WRAPPERS = ("module.", "_orig_mod.")  # what DataParallel, DDP and torch.compile put before every name

_KIN = 0.5
"""Cosine of two image towers' weights above which one may descend from the other: fine-tuned towers have 0.9 and more,
towers trained apart about 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """Where a model comes from: the two words that `load_clip` takes."""

    model: str
    pretrained: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Clip:
    """A CLIP, ready to use: frozen and in eval mode.

    text_tower: token ids -> unit features, the module behind `text`.
    logit_scale: already exponentiated (100 for OpenAI's models).
    open_clip_model: shares all weights with `image` and `text_tower`.
    open_clip_config: model_cfg and preprocess_cfg, as in an open_clip_config.json.
    """

    name: str
    spec: ModelSpec
    image: PixelEncoder
    text: TextEncoder
    text_tower: TextTower
    tokenizer: Tokenizer
    logit_scale: float
    preprocess: PreprocessSpec
    embed_dim: int
    open_clip_model: nn.Module
    open_clip_config: Config

    def logits(self, pixels: Tensor, text_features: Tensor) -> Tensor:
        """pixels: float32 [B, 3, H, W] in [0, 1]; text_features: unit [K, D] -> logits [B, K] = scale * cosine."""
        features: Tensor = self.image(pixels)
        return self.logit_scale * features @ text_features.T


def load_clip(model: str, pretrained: str | None = None, device: str | torch.device = "cpu") -> Clip:
    """The model that a recipe or a command line names.

    model: "mini" or "mini-robust" (shipped), a run directory or a directory in open_clip's local-dir form,
    "local-dir:PATH", "hf-hub:OWNER/NAME", or an open_clip model name, which needs `pretrained`.
    pretrained: an open_clip tag, a weights file, or "TAG+FILE". A FILE may hold a whole model or an image tower alone,
    in any of the forms robust CLIPs are published in; an image tower is put into the model that `model` and TAG give.
    With "?normalize=imagenet" behind it, pictures are normalised by ImageNet's statistics instead of the model's own:
    PMG-AFT's published weights were trained so, and no file says which it was.
    Raises: ModelError for unknown names, files that do not fit, and weights that would not compute what they were
    trained to (QuickGELU). Warns (ModelWarning) where a file fits, but may not belong to this model.
    """
    weights, statistics = _split_statistics(pretrained)
    built, config, tokenizer = _build(model, weights)
    if statistics is not None:
        _normalize_by(built, config, statistics)
    freeze(built).to(device)
    built.visual.output_tokens = False  # CoCa's tower would give a tuple; features are all that is used here
    spec = _preprocess_spec(built)
    text_tower = freeze(TextTower(built)).to(device)
    return Clip(
        name=model,
        spec=ModelSpec(model=model, pretrained=pretrained),
        image=freeze(PixelEncoder(built.visual, spec.mean, spec.std, spec.size)).to(device),
        text=TextEncoder(tokenizer, lambda tokens: text_tower(tokens.to(device)), text_tower.causal),
        text_tower=text_tower,
        tokenizer=tokenizer,
        logit_scale=float(built.logit_scale.exp()),
        preprocess=spec,
        embed_dim=int(config["model_cfg"]["embed_dim"]),
        open_clip_model=built,
        open_clip_config=config,
    )


def save_local_dir(clip_model: nn.Module, config: Config, directory: Path, tokenizer: Tokenizer | None = None) -> None:
    """Write an open_clip model in open_clip's local-dir form; `open_clip.create_model("local-dir:...")` reads it.

    Written beside its place and then renamed: `directory` is never half written, and replaced if it exists. tokenizer:
    needed for models whose tokenizer is not CLIP's own; written as tokenizer.json.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
    try:
        scratch.chmod(0o755)
        state = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in clip_model.state_dict().items()}
        safetensors.torch.save_file(state, scratch / WEIGHTS_FILE)
        (scratch / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        if tokenizer is not None:
            tokenizer.save(scratch / TOKENIZER_FILE)
        if directory.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{directory.name}-old-", dir=directory.parent))
            os.replace(directory, old)
            os.replace(scratch, directory)
            shutil.rmtree(old)
        else:
            os.replace(scratch, directory)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def tensors_hash(module: nn.Module) -> str:
    """sha256, in hexadecimal, of every tensor's name, type, shape and bytes: what tells two models apart."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _build(model: str, pretrained: str | None) -> Built:
    if model in zoo.NAMES:
        if pretrained is not None:
            raise ModelError(
                f"{model} brings its weights; leave out pretrained = {quote(pretrained)}", field="pretrained"
            )
        with zoo.local_dir(model) as directory:
            return _from_directory(directory)
    tag, file = _split_pretrained(pretrained)
    if model.startswith("local-dir:") or Path(model).is_dir():
        built, config, tokenizer = _from_directory(_model_directory(model.removeprefix("local-dir:")))
    elif model.startswith("hf-hub:"):
        built, config, tokenizer = _from_hub(model)
    else:
        return _from_name(model, tag, file)
    if tag is not None:
        raise ModelError(f"{model} brings its weights; pretrained may only name a file here", field="pretrained")
    if file is not None:
        _put_into(built, file)
    return built, config, tokenizer


def _split_statistics(pretrained: str | None) -> tuple[str | None, str | None]:
    """ "WEIGHTS?normalize=NAME" -> weights and name."""
    weights, mark, name = (pretrained or "").partition("?normalize=")
    if mark and name not in _STATISTICS:
        message = f"there are no statistics {quote(name)} to normalise by; there are {', '.join(_STATISTICS)}"
        raise ModelError(message, field="pretrained")
    return weights or None, name or None


def _normalize_by(model: Any, config: Config, statistics: str) -> None:
    """For the model at hand, and for whoever loads what is saved of it."""
    mean, std = _STATISTICS[statistics]
    set_model_preprocess_cfg(model, _preprocess_cfg(model) | {"mean": mean, "std": std})
    config["preprocess_cfg"] = config.get("preprocess_cfg", {}) | {"mean": list(mean), "std": list(std)}


def _split_pretrained(pretrained: str | None) -> tuple[str | None, Path | None]:
    """ "TAG", "FILE" or "TAG+FILE" -> tag and file."""
    if pretrained is None:
        return None, None
    if Path(pretrained).is_file():
        return None, Path(pretrained)
    tag, plus, file = pretrained.partition("+")
    if plus and not Path(file).is_file():
        raise ModelError(f"no weights file at {file}", field="pretrained")
    if not plus and (os.sep in pretrained or Path(pretrained).suffix):
        raise ModelError(f"no weights file at {pretrained}", field="pretrained")
    return tag, Path(file) if plus else None


def _model_directory(where: str) -> Path:
    for directory in (Path(where), Path(where) / "model"):
        if (directory / CONFIG_FILE).is_file():
            return directory
    raise ModelError(f"{where} is neither a run nor an open_clip model: it has no {CONFIG_FILE}", field="model")


def _from_directory(directory: Path) -> Built:
    name = f"local-dir:{directory}"
    try:
        config: Config = json.loads((directory / CONFIG_FILE).read_text(encoding="utf-8"))
        if not any(directory.glob("*.safetensors")):
            raise ModelError(f"{directory} has no weights (*.safetensors)", field="model")
        with quietly():
            built = open_clip.create_model(name)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"the model in {directory} is damaged: {first_line(error)}", field="model") from error
    if (directory / TOKENIZER_FILE).is_file():
        tokenizer = Tokenizer.load(directory / TOKENIZER_FILE, _context_length(built))
    else:
        tokenizer = _open_clip_tokenizer(name, built)
    return built, config, tokenizer


def _from_hub(model: str) -> Built:
    try:
        with quietly():
            built = open_clip.create_model(model, require_pretrained=True)
    except Exception as error:  # the hub's client raises a wide family of its own
        raise ModelError(f"{model} could not be fetched: {first_line(error)}", field="model") from error
    return built, _config_of(model, built), _open_clip_tokenizer(model, built)


def _from_name(model: str, tag: str | None, file: Path | None) -> Built:
    if model not in open_clip.list_models():
        near = difflib.get_close_matches(model, [*zoo.NAMES, *open_clip.list_models()], n=3, cutoff=0.5)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise ModelError(f"there is no model {quote(model)}{hint}", field="model")
    tags = list_pretrained_tags_by_model(model)
    if tag is None and file is None:
        offers = f"one of {', '.join(tags)}, or a file" if tags else "a weights file"
        raise ModelError(f"{model} needs pretrained = {offers}", field="pretrained")
    if tag is not None:
        _check_tag(model, tag, tags)
    if tag is None and file is not None and not _is_whole_model(_read_weights(file)):
        example = f"openai+{file}" if "openai" in tags else f"TAG+{file}"
        message = (
            f"{file} holds an image tower alone; name the text tower's source too: pretrained = {quote(example, 200)}"
        )
        raise ModelError(message, field="pretrained")
    try:
        with quietly():
            built = open_clip.create_model(model, pretrained=tag, load_weights=tag is not None)
    except Exception as error:  # downloads fail in many ways
        raise ModelError(f"{model} with {tag} could not be had: {first_line(error)}", field="pretrained") from error
    if file is not None and _put_into(built, file) == "whole":
        _warn_of_activation(model, file)
    return built, _config_of(model, built), _open_clip_tokenizer(model, built)


def _check_tag(model: str, tag: str, tags: list[str]) -> None:
    if tag not in tags:
        near = difflib.get_close_matches(tag, tags, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(tags) or 'none'}"
        raise ModelError(f"{model} has no pretrained weights {quote(tag)}; {hint}", field="pretrained")
    if get_pretrained_cfg(model, tag).get("quick_gelu") and not open_clip.get_model_config(model).get("quick_gelu"):
        # open_clip only warns, and computes something else than was trained
        raise ModelError(f"{tag} was trained with QuickGELU: use model = {quote(model + '-quickgelu')}", field="model")


def _put_into(model: Any, file: Path) -> Literal["whole", "tower"]:
    """Load a published checkpoint, strictly, and make sure that it changed the model. Returns what it held.

    Warns of an image tower that shares no history with the one it replaces: the texts are then another model's.
    """
    state = _read_weights(file)
    kind: Literal["whole", "tower"] = "whole" if _is_whole_model(state) else "tower"
    target: nn.Module = model if kind == "whole" else model.visual
    have = {name: tensor.detach().clone() for name, tensor in target.state_dict().items()}
    misfit = _misfit(have, state)
    if misfit:
        raise ModelError(f"the weights in {file} do not fit this model: {misfit}", field="pretrained")
    target.load_state_dict(state, strict=True)
    if all(torch.equal(have[name], tensor) for name, tensor in target.state_dict().items()):
        raise ModelError(f"the weights in {file} are those the model has already", field="pretrained")
    if kind == "tower" and _cosine(have, target.state_dict()) < _KIN:
        message = (
            f"the image tower in {file} does not descend from the one it replaces; unless it was trained against this "
            "very text tower, its answers mean nothing. Name the model and the weights that it was fine-tuned from"
        )
        warnings.warn(message, ModelWarning, stacklevel=2)
    return kind


def _misfit(have: State, given: State) -> str:
    """What keeps tensors from being loaded, in one line; empty if nothing does."""
    problems = []
    for names, word in ((have.keys() - given.keys(), "missing"), (given.keys() - have.keys(), "unexpected")):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            problems.append(f"{word} {min(names)}{more}")
    shapes = [name for name in have if name in given and given[name].shape != have[name].shape]
    if shapes:
        here, there = (" x ".join(map(str, state[shapes[0]].shape)) or "a number" for state in (given, have))
        problems.append(f"{shapes[0]} is {here}, and {there} in the model")
    return "; ".join(problems)


def _cosine(one: State, other: State) -> float:
    """Of all matrices and kernels together; biases and norms start from the same values in every training."""
    names = [name for name, tensor in one.items() if tensor.ndim > 1]
    dot, left, right = (
        sum(float((a[name].double() * b[name].double()).sum()) for name in names)
        for a, b in ((one, other), (one, one), (other, other))
    )
    return dot / (math.sqrt(left * right) or 1.0)


def _warn_of_activation(model: str, file: Path) -> None:
    """A file does not say whether it was trained with QuickGELU, and shapes are equal."""
    twin = model.removesuffix(_QUICKGELU) if model.endswith(_QUICKGELU) else model + _QUICKGELU
    if twin not in open_clip.list_models():
        return
    built, other = ("QuickGELU", "plain GELU") if model.endswith(_QUICKGELU) else ("plain GELU", "QuickGELU")
    message = (
        f"{file} does not say which activation it was trained with, and {model} has {built}. OpenAI's weights, and all "
        f"fine-tuned from them, need QuickGELU, LAION's plain GELU; for {other} use {twin}"
    )
    warnings.warn(message, ModelWarning, stacklevel=2)


def _is_whole_model(state: State) -> bool:
    return any(name.startswith("visual.") for name in state)


def _read_weights(file: Path) -> State:
    """The tensors of a published checkpoint, named as in the model or in its image tower; code in it is never run."""
    try:
        if file.suffix == ".safetensors":
            content: object = safetensors.torch.load_file(file)
        else:
            with torch.serialization.safe_globals(_SAFE_GLOBALS):
                content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        message = f"{file} holds more than tensors, or is damaged; convert it to safetensors where you trust it"
        raise ModelError(message, field="pretrained") from error
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, SafetensorError, zipfile.BadZipFile) as error:
        raise ModelError(f"{file} is not a readable weights file: {first_line(error)}", field="pretrained") from error
    return _tensors_in(content, file)


def _tensors_in(content: object, file: Path) -> State:
    state = content
    if isinstance(content, dict):
        modules = content.get("modules")
        if "vision_encoder_state_dict" in content:  # TeCoA, PMG-AFT, TGA-ZSR, UCAT, SAFT; state_dict is a prompter's
            state = content["vision_encoder_state_dict"]
        elif "partial_state_dict" in content:  # AdvFLYP: the image tower under the whole model's names
            state = content["partial_state_dict"]
        elif isinstance(modules, dict) and "clip.visual" in modules:  # AGFT
            state = modules["clip.visual"]
        elif "state_dict" in content:  # open_clip's training script
            state = content["state_dict"]
    if not isinstance(state, Mapping) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise ModelError(f"{file} is not a checkpoint of a kind known here", field="pretrained")
    tensors = {_unwrapped(str(name)): value for name, value in state.items()}
    if any(name.startswith("vision_model.") for name in tensors):
        message = f"{file} names its tensors as transformers' CLIPModel does; convert it to open_clip's names"
        raise ModelError(message, field="pretrained")
    if all(name.startswith("visual.") for name in tensors):
        return {name.removeprefix("visual."): value for name, value in tensors.items()}
    return tensors


def _unwrapped(name: str) -> str:
    for wrapper in _WRAPPERS:
        if name.startswith(wrapper):
            return _unwrapped(name.removeprefix(wrapper))
    return name


def _open_clip_tokenizer(name: str, model: nn.Module) -> Tokenizer:
    try:
        with quietly():
            tokenizer = open_clip.get_tokenizer(name)
    except Exception as error:  # downloads fail in many ways
        raise ModelError(f"the tokenizer of {name} could not be had: {first_line(error)}", field="model") from error
    return convert_tokenizer(tokenizer, _context_length(model))


def _context_length(model: nn.Module) -> int:
    length = model.context_length
    assert isinstance(length, int)
    return length


def _config_of(name: str, model: nn.Module) -> Config:
    kept = ("mean", "std", "interpolation", "resize_mode")
    preprocess = _preprocess_cfg(model)
    return {
        "model_cfg": open_clip.get_model_config(name),
        "preprocess_cfg": {key: preprocess[key] for key in kept},
    }


def _preprocess_spec(model: nn.Module) -> PreprocessSpec:
    cfg = _preprocess_cfg(model)
    size = cfg["size"]
    height, width = (size, size) if isinstance(size, int) else size
    red, green, blue = map(float, cfg["mean"])
    deviations = tuple(map(float, cfg["std"]))
    return PreprocessSpec(
        size=(int(height), int(width)),
        mean=(red, green, blue),
        std=(deviations[0], deviations[1], deviations[2]),
        interpolation="bilinear" if cfg["interpolation"] == "bilinear" else "bicubic",  # "random" means bicubic
        resize_mode=cfg["resize_mode"],
    )


def _preprocess_cfg(model: nn.Module) -> dict[str, Any]:
    cfg: dict[str, Any] = open_clip.get_model_preprocess_cfg(model)
    return cfg


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """open_clip writes to the root logger, which would install a handler and print."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(before)
