"""Names and files -> models: what is loaded is what was meant, or a clear refusal."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import safetensors.torch
import torch
from PIL import Image
from torch import Tensor, nn

from pmgaft.clip import zoo
from pmgaft.clip.loading import Clip, load_clip, save_local_dir, tensors_hash
from pmgaft.clip.preprocess import to_pixels
from pmgaft.errors import ModelError, ModelWarning

State = dict[str, Tensor]


def tower_of(clip: Clip) -> nn.Module:
    tower = clip.open_clip_model.visual
    assert isinstance(tower, nn.Module)
    return tower


@pytest.fixture
def robust(tiny_vit_clip: Clip) -> State:
    """The image tower's weights, changed: what a robust fine-tuning leaves."""
    torch.manual_seed(7)
    return {
        name: tensor + 0.01 * torch.randn_like(tensor) for name, tensor in tower_of(tiny_vit_clip).state_dict().items()
    }


def prompter_file(state: State) -> dict[str, Any]:
    return {
        "epoch": 3,
        "state_dict": {},
        "add_prompter": torch.zeros(1, 0, 768),
        "vision_encoder_state_dict": state,
        "best_acc1": np.float64(41.5),
        "optimizer": {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 0.1, "params": [0]}]},
    }


FORMS: dict[str, Callable[[State], Any]] = {
    "vision_encoder_state_dict": prompter_file,
    "partial_state_dict": lambda state: {
        "partial_state_dict": {f"visual.{name}": tensor for name, tensor in state.items()},
        "best_acc1": np.float32(1),
    },
    "modules": lambda state: {"modules": {"clip.visual": state}, "params": {}},
    "bare": lambda state: state,
    "bare, halved": lambda state: {name: tensor.half() for name, tensor in state.items()},
    "in DataParallel": lambda state: {f"module.{name}": tensor for name, tensor in state.items()},
    "in DataParallel and compiled": lambda state: {f"module._orig_mod.{name}": t for name, t in state.items()},
    "the whole model in DataParallel, its image tower": lambda state: {
        "partial_state_dict": {f"module.visual.{name}": tensor for name, tensor in state.items()}
    },
    "prompter in DataParallel": lambda state: prompter_file({f"module.{name}": t for name, t in state.items()}),
}


@pytest.mark.parametrize("form", FORMS)
def test_published_robust_checkpoints_are_put_into_the_image_tower(
    form: str, robust: State, tiny_vit_clip: Clip, tiny_vit_clip_dir: Path, tmp_path: Path
) -> None:
    file = tmp_path / "model_best.pth.tar"
    torch.save(FORMS[form](robust), file)
    clip = load_clip(f"local-dir:{tiny_vit_clip_dir}", str(file))
    loaded = tower_of(clip).state_dict()
    assert all(torch.allclose(loaded[name], tensor, rtol=1e-3, atol=1e-4) for name, tensor in robust.items())
    assert torch.equal(clip.text.encode(["cat"]), tiny_vit_clip.text.encode(["cat"]))
    assert clip.spec.pretrained == str(file)


def test_a_scalar_pickled_by_numpy_1_is_read_too(robust: State, tiny_vit_clip_dir: Path, tmp_path: Path) -> None:
    file, old = tmp_path / "new.pth", tmp_path / "old.pth"
    torch.save(prompter_file(robust), file, _use_new_zipfile_serialization=False)
    content = file.read_bytes()
    assert b"numpy._core.multiarray" in content
    old.write_bytes(content.replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    load_clip(f"local-dir:{tiny_vit_clip_dir}", str(old))


@pytest.mark.parametrize("whole", [False, True])
def test_safetensors_files_may_hold_a_tower_or_a_whole_model(
    whole: bool, robust: State, tiny_vit_clip: Clip, tiny_vit_clip_dir: Path, tmp_path: Path
) -> None:
    state = robust
    if whole:
        rest = {n: t for n, t in tiny_vit_clip.open_clip_model.state_dict().items() if not n.startswith("visual.")}
        state = rest | {f"visual.{name}": tensor for name, tensor in robust.items()}
    safetensors.torch.save_file({name: tensor.clone() for name, tensor in state.items()}, tmp_path / "r.safetensors")
    clip = load_clip(f"local-dir:{tiny_vit_clip_dir}", str(tmp_path / "r.safetensors"))
    assert all(torch.equal(tower_of(clip).state_dict()[name], tensor) for name, tensor in robust.items())


def test_open_clips_training_checkpoints_are_whole_models(
    tiny_vit_clip: Clip, tiny_vit_clip_dir: Path, tmp_path: Path
) -> None:
    state = {f"module.{name}": tensor * 1.1 for name, tensor in tiny_vit_clip.open_clip_model.state_dict().items()}
    torch.save({"epoch": 1, "name": "run", "state_dict": state}, tmp_path / "epoch_1.pt")
    clip = load_clip(f"local-dir:{tiny_vit_clip_dir}", str(tmp_path / "epoch_1.pt"))
    assert clip.logit_scale == pytest.approx(tiny_vit_clip.logit_scale**1.1, rel=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: {f"visual.trunk.{n}": t for n, t in state.items()}, "missing .* more; unexpected trunk.* more"),
        (lambda state: dict(list(state.items())[1:]), "do not fit this model: missing class_embedding$"),
        (lambda state: state | {"extra": torch.zeros(1)}, "do not fit this model: unexpected extra$"),
        (lambda state: state | {"class_embedding": torch.zeros(3)}, "class_embedding is 3, and 32 in the model$"),
        (lambda state: state | {"conv1.weight": torch.zeros(2, 3)}, "conv1.weight is 2 x 3, and 32 x 3 x 8 x 8 in the"),
        (lambda state: {"vision_model.embeddings.class_embedding": torch.zeros(3)}, "transformers' CLIPModel does"),
        (lambda state: {"epoch": 3}, "not a checkpoint of a kind known here"),
        (lambda state: {"state_dict": {}}, "not a checkpoint of a kind known here"),
        (lambda state: [1, 2], "not a checkpoint of a kind known here"),
    ],
    ids=["prefix", "missing", "extra", "shape", "kernel", "transformers", "no tensors", "empty", "list"],
)
def test_weights_that_do_not_fit_exactly_are_refused(
    change: Callable[[State], Any], message: str, robust: State, tiny_vit_clip_dir: Path, tmp_path: Path
) -> None:
    torch.save(change(robust), tmp_path / "bad.pth")
    with pytest.raises(ModelError, match=message) as caught:
        load_clip(f"local-dir:{tiny_vit_clip_dir}", str(tmp_path / "bad.pth"))
    assert "\n" not in caught.value.message


def test_weights_that_change_nothing_are_refused(tiny_vit_clip: Clip, tiny_vit_clip_dir: Path, tmp_path: Path) -> None:
    torch.save(prompter_file(tower_of(tiny_vit_clip).state_dict()), tmp_path / "same.pth.tar")
    with pytest.raises(ModelError, match="the model has already"):
        load_clip(f"local-dir:{tiny_vit_clip_dir}", str(tmp_path / "same.pth.tar"))


def test_a_tower_that_was_trained_apart_from_the_one_it_replaces_is_warned_of(
    robust: State, tiny_vit_clip_dir: Path, tmp_path: Path
) -> None:
    torch.manual_seed(8)
    torch.save({name: torch.randn_like(t) * t.std().nan_to_num(1) for name, t in robust.items()}, tmp_path / "other.pt")
    with pytest.warns(ModelWarning, match=r"other\.pt does not descend from the one it replaces"):
        load_clip(f"local-dir:{tiny_vit_clip_dir}", str(tmp_path / "other.pt"))


def test_published_weights_may_be_normalised_by_imagenets_statistics(
    robust: State, tiny_vit_clip: Clip, tiny_vit_clip_dir: Path, tmp_path: Path, tiny_images: list[Image.Image]
) -> None:
    torch.save(prompter_file(robust), tmp_path / "release.pth.tar")
    pretrained = f"{tmp_path / 'release.pth.tar'}?normalize=imagenet"
    clip = load_clip(f"local-dir:{tiny_vit_clip_dir}", pretrained)
    assert clip.preprocess.mean == pytest.approx((0.485, 0.456, 0.406))
    assert clip.preprocess.std == pytest.approx((0.229, 0.224, 0.225))
    assert clip.image.mean.flatten().tolist() == pytest.approx([0.485, 0.456, 0.406])
    assert clip.spec.pretrained == pretrained
    assert tiny_vit_clip.preprocess.mean == (0.5, 0.45, 0.4)


def test_the_statistics_are_saved_with_the_model(
    robust: State, tiny_vit_clip_dir: Path, tmp_path: Path, tiny_images: list[Image.Image]
) -> None:
    torch.save(robust, tmp_path / "r.pt")
    clip = load_clip(f"local-dir:{tiny_vit_clip_dir}", f"{tmp_path / 'r.pt'}?normalize=imagenet")
    save_local_dir(clip.open_clip_model, clip.open_clip_config, tmp_path / "saved")
    pixels = to_pixels(tiny_images[0], clip.preprocess)[None]
    assert torch.allclose(load_clip(str(tmp_path / "saved")).image(pixels), clip.image(pixels), atol=1e-6)
    theirs, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{tmp_path / 'saved'}")
    with torch.no_grad():
        expected = theirs.eval().encode_image(preprocess(tiny_images[0])[None], normalize=True)
    assert torch.allclose(clip.image(pixels), expected, atol=1e-6)


def test_a_models_own_weights_may_be_normalised_otherwise_too(tiny_vit_clip_dir: Path) -> None:
    with pytest.raises(ModelError, match="no statistics 'imagnet' to normalise by; there are imagenet, clip"):
        load_clip("ViT-B-32-quickgelu", "openai?normalize=imagnet")
    clip = load_clip(f"local-dir:{tiny_vit_clip_dir}", "?normalize=clip")
    assert clip.preprocess.mean == pytest.approx(open_clip.OPENAI_DATASET_MEAN)


class _Harmful:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("harm-was-done"),))


def test_code_in_a_checkpoint_is_not_run(
    robust: State, tiny_vit_clip_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(prompter_file(robust) | {"args": _Harmful()}, "evil.pth.tar")
    with pytest.raises(ModelError, match="more than tensors"):
        load_clip(f"local-dir:{tiny_vit_clip_dir}", "evil.pth.tar")
    assert not Path("harm-was-done").exists()


@pytest.mark.parametrize(
    "content", [b"", b"hello", b"PK\x03\x04" + b"\x00" * 100, pickle.dumps({"a": 1}, protocol=2)[:-1]]
)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_damaged_file_is_refused_by_name(
    content: bytes, suffix: str, tiny_vit_clip_dir: Path, tmp_path: Path
) -> None:
    file = tmp_path / f"bad{suffix}"
    file.write_bytes(content)
    with pytest.raises(ModelError, match=f"bad{suffix}") as caught:
        load_clip(f"local-dir:{tiny_vit_clip_dir}", str(file))
    assert "\n" not in caught.value.message


def test_a_truncated_checkpoint_is_refused(robust: State, tiny_vit_clip_dir: Path, tmp_path: Path) -> None:
    torch.save(prompter_file(robust), tmp_path / "cut.pth")
    content = (tmp_path / "cut.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(content[: len(content) // 2])
    with pytest.raises(ModelError, match=r"cut\.pth"):
        load_clip(f"local-dir:{tiny_vit_clip_dir}", str(tmp_path / "cut.pth"))


# --- names


@pytest.mark.parametrize(
    ("name", "meant"), [("mimi", "mini"), ("mini-robus", "mini-robust"), ("ViT-B32-quickgelu", "ViT-B-32-quickgelu")]
)
def test_a_mistyped_name_is_answered_with_the_one_that_was_meant(name: str, meant: str) -> None:
    with pytest.raises(ModelError, match=f"did you mean .*{meant}"):
        load_clip(name, "openai")


def test_weights_trained_with_quickgelu_are_refused_without_it() -> None:
    with pytest.raises(ModelError, match="trained with QuickGELU: use model = 'ViT-B-32-quickgelu'"):
        load_clip("ViT-B-32", "openai")


def test_a_model_by_name_is_never_random() -> None:
    with pytest.raises(ModelError, match=r"needs pretrained = one of .*openai"):
        load_clip("ViT-B-32-quickgelu")


def test_an_unknown_tag_is_answered_with_one_that_exists() -> None:
    with pytest.raises(ModelError, match="did you mean openai"):
        load_clip("ViT-B-32-quickgelu", "openia")


def test_weights_that_cannot_be_fetched_are_one_line() -> None:
    with pytest.raises(ModelError) as caught:
        load_clip("hf-hub:nobody/nothing")
    assert "hf-hub:nobody/nothing could not be fetched" in caught.value.message
    assert "\n" not in caught.value.message


def test_an_image_tower_alone_needs_a_text_tower_from_somewhere(robust: State, tmp_path: Path) -> None:
    torch.save(prompter_file(robust), tmp_path / "r.pth.tar")
    with pytest.raises(ModelError, match=r"image tower alone.*openai\+"):
        load_clip("ViT-B-32-quickgelu", str(tmp_path / "r.pth.tar"))


@pytest.fixture
def named_vit(tiny_vit_clip: Clip, monkeypatch: pytest.MonkeyPatch) -> str:
    """The tiny ViT under a name of open_clip's list, with one tag."""
    name = "tiny-vit-for-tests"
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, name, tiny_vit_clip.open_clip_config["model_cfg"])
    return name


def test_a_whole_model_in_a_file_needs_no_tag(named_vit: str, tiny_vit_clip: Clip, tmp_path: Path) -> None:
    file = tmp_path / "whole.safetensors"
    state = tiny_vit_clip.open_clip_model.state_dict()
    safetensors.torch.save_file({name: tensor.clone() for name, tensor in state.items()}, file)
    clip = load_clip(named_vit, str(file))
    assert tensors_hash(clip.open_clip_model) == tensors_hash(tiny_vit_clip.open_clip_model)
    assert clip.preprocess.mean == pytest.approx(open_clip.OPENAI_DATASET_MEAN)
    assert clip.open_clip_config["model_cfg"]["embed_dim"] == clip.embed_dim == 24


@pytest.mark.parametrize(("name", "twin"), [("tiny-vit-for-tests", "-quickgelu"), ("tiny-vit-for-tests-quickgelu", "")])
def test_a_whole_model_in_a_file_is_warned_of_where_the_name_decides_the_activation(
    name: str, twin: str, named_vit: str, tiny_vit_clip: Clip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_vit_clip.open_clip_config["model_cfg"] | {"quick_gelu": True}
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, f"{named_vit}-quickgelu", config)
    monkeypatch.setattr(open_clip, "list_models", lambda: [named_vit, f"{named_vit}-quickgelu"])
    torch.save({n: t.clone() for n, t in tiny_vit_clip.open_clip_model.state_dict().items()}, tmp_path / "whole.pt")
    with pytest.warns(ModelWarning, match=f"does not say which activation.* use {named_vit}{twin}$"):
        load_clip(name, str(tmp_path / "whole.pt"))


@pytest.mark.parametrize("file", ["none.pth", "openai+none.pth", "some/where"])
def test_a_weights_file_that_is_not_there_is_said_so(file: str) -> None:
    with pytest.raises(ModelError, match="no weights file at"):
        load_clip("ViT-B-32-quickgelu", file)


def test_a_shipped_model_takes_no_other_weights() -> None:
    with pytest.raises(ModelError, match="brings its weights"):
        load_clip("mini", "openai")


# --- directories


def test_a_run_is_loaded_by_its_directory(tiny_clip: Clip, tiny_clip_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_clip_dir, tmp_path / "run" / "model")
    for name in (str(tmp_path / "run"), str(tmp_path / "run" / "model"), f"local-dir:{tmp_path / 'run'}"):
        assert tensors_hash(load_clip(name).open_clip_model) == tensors_hash(tiny_clip.open_clip_model)


def test_a_directory_without_a_model_is_said_so(tmp_path: Path) -> None:
    for name in (str(tmp_path), f"local-dir:{tmp_path / 'none'}"):
        with pytest.raises(ModelError, match=r"no open_clip_config\.json"):
            load_clip(name)


@pytest.mark.parametrize(
    "damage",
    [
        lambda d: (d / "open_clip_config.json").write_text("{"),
        lambda d: (d / "open_clip_config.json").write_text("{}"),
        lambda d: (d / "open_clip_config.json").write_text('{"model_cfg": {"embed_dim": 3}}'),
        lambda d: (d / "open_clip_model.safetensors").unlink(),
        lambda d: (d / "open_clip_model.safetensors").write_bytes(b"short"),
        lambda d: safetensors.torch.save_file({"a": torch.zeros(1)}, d / "open_clip_model.safetensors"),
    ],
    ids=["broken config", "empty config", "half config", "no weights", "broken weights", "other weights"],
)
def test_a_damaged_model_directory_is_refused_by_name(
    damage: Callable[[Path], Any], tiny_vit_clip_dir: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_vit_clip_dir, tmp_path / "damaged-model")
    damage(tmp_path / "damaged-model")
    with pytest.raises(ModelError, match="damaged-model") as caught:
        load_clip(str(tmp_path / "damaged-model"))
    assert "\n" not in caught.value.message


def test_what_is_saved_is_what_open_clip_loads(tiny_clip: Clip, tmp_path: Path, tiny_images: list[Image.Image]) -> None:
    save_local_dir(tiny_clip.open_clip_model, tiny_clip.open_clip_config, tmp_path / "saved")
    model, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{tmp_path / 'saved'}")
    model.eval()
    with torch.no_grad():
        theirs = model.encode_image(preprocess(tiny_images[0])[None], normalize=True)
        ours = tiny_clip.image(to_pixels(tiny_images[0], tiny_clip.preprocess)[None])
    assert torch.allclose(ours, theirs, atol=1e-6)


def test_saving_replaces_a_model_whole_and_leaves_nothing_beside_it(
    tiny_clip: Clip, tiny_vit_clip: Clip, tmp_path: Path
) -> None:
    where = tmp_path / "model"
    save_local_dir(tiny_clip.open_clip_model, tiny_clip.open_clip_config, where, tiny_clip.tokenizer)
    save_local_dir(tiny_vit_clip.open_clip_model, tiny_vit_clip.open_clip_config, where)
    assert sorted(path.name for path in where.iterdir()) == ["open_clip_config.json", "open_clip_model.safetensors"]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_save_that_fails_leaves_the_old_model(
    tiny_clip: Clip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = tmp_path / "model"
    save_local_dir(tiny_clip.open_clip_model, tiny_clip.open_clip_config, where)
    before = (where / "open_clip_model.safetensors").read_bytes()

    def full(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(OSError, match="disk full"):
        save_local_dir(tiny_clip.open_clip_model, tiny_clip.open_clip_config, where)
    assert (where / "open_clip_model.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_tokenizer_saved_with_the_model_is_used(tiny_clip: Clip, tmp_path: Path) -> None:
    save_local_dir(tiny_clip.open_clip_model, tiny_clip.open_clip_config, tmp_path / "m", tiny_clip.tokenizer)
    content = json.loads((tmp_path / "m" / "tokenizer.json").read_text())
    content["pmgaft"]["cleaning"] = "whitespace"
    (tmp_path / "m" / "tokenizer.json").write_text(json.dumps(content))
    assert load_clip(str(tmp_path / "m")).tokenizer.cleaning == "whitespace"


def test_a_loaded_model_is_frozen_and_in_eval_mode(tiny_clip: Clip) -> None:
    for module in (tiny_clip.image, tiny_clip.text_tower, tiny_clip.open_clip_model):
        assert not any(parameter.requires_grad for parameter in module.parameters())
        assert not any(part.training for part in module.modules())


def test_the_logit_scale_is_exponentiated(tiny_clip: Clip) -> None:
    assert tiny_clip.logit_scale == pytest.approx(1 / 0.07)


def test_loading_installs_no_log_handler_and_prints_nothing(tiny_clip_dir: Path) -> None:
    import logging

    before = list(logging.root.handlers)
    load_clip(str(tiny_clip_dir))
    assert logging.root.handlers == before
    assert logging.root.manager.disable == 0


# --- hashes


def test_the_hash_tells_models_apart_by_names_shapes_types_and_values() -> None:
    module = nn.Linear(2, 3)
    seen = {tensors_hash(module)}
    assert tensors_hash(copy.deepcopy(module)) in seen
    with torch.no_grad():
        module.weight[0, 0] += 1e-6
    seen.add(tensors_hash(module))
    seen.add(tensors_hash(nn.Sequential(module)))
    seen.add(tensors_hash(copy.deepcopy(module).half()))
    seen.add(tensors_hash(copy.deepcopy(module).bfloat16()))
    module.weight = nn.Parameter(module.weight.view(2, 3).clone())
    seen.add(tensors_hash(module))
    assert len(seen) == 6


# --- the shipped models' form


@pytest.fixture
def zoo_files(tiny_clip: Clip, tiny_clip_dir: Path, tmp_path: Path) -> Path:
    """The tiny CLIP split as the shipped models are: image towers apart, the rest once, half precision."""
    state = {
        name: tensor.half() if tensor.is_floating_point() else tensor
        for name, tensor in tiny_clip.open_clip_model.state_dict().items()
    }
    image = {name: tensor.clone() for name, tensor in state.items() if name.startswith("visual.")}
    rest = {name: tensor.clone() for name, tensor in state.items() if not name.startswith("visual.")}
    safetensors.torch.save_file(image, tmp_path / "mini.safetensors")
    safetensors.torch.save_file(
        {n: t * 2 if t.is_floating_point() else t for n, t in image.items()}, tmp_path / "mini-robust.safetensors"
    )
    safetensors.torch.save_file(rest, tmp_path / "text.safetensors")
    shutil.copy(tiny_clip_dir / "open_clip_config.json", tmp_path)
    return tmp_path


def test_a_shipped_model_is_put_together_from_its_halves(
    zoo_files: Path, tiny_clip: Clip, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zoo, "HERE", zoo_files)
    mini, robust = load_clip("mini"), load_clip("mini-robust")
    for name, tensor in tiny_clip.open_clip_model.state_dict().items():
        loaded = mini.open_clip_model.state_dict()[name]
        assert loaded.dtype == tensor.dtype
        assert torch.allclose(loaded, tensor, atol=1e-3)
    assert torch.equal(mini.text.encode(["cat"]), robust.text.encode(["cat"]))
    assert tensors_hash(mini.image) != tensors_hash(robust.image)
    assert mini.name == "mini"


def test_a_missing_file_of_a_shipped_model_is_named(zoo_files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zoo, "HERE", zoo_files)
    (zoo_files / "text.safetensors").unlink()
    with pytest.raises(ModelError, match=r"text\.safetensors is missing"):
        load_clip("mini")
