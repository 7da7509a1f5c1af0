"""Each format computes the model's own function, at any batch size and text length, on any device."""

import copy
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor

from pmgaft.clip.loading import Clip, load_clip, save_local_dir
from pmgaft.clip.text import TextEncoder
from pmgaft_export import formats
from pmgaft_export.build import Encoders, prepare
from pmgaft_export.formats import FORMATS, open_onnx, write_onnx
from pmgaft_export.parity import sample_pixels

Encode = Callable[[Tensor], Tensor]
TEXTS = ["a", "cat", "a photo of a dog.", "toaster", "a very long label of one small red bicycle"]


@pytest.fixture(scope="module", params=["tiny_clip", "tiny_vit_clip"])
def clip(request: pytest.FixtureRequest) -> Clip:
    """A convolutional tower with BatchNorm, and a ViT."""
    found = request.getfixturevalue(request.param)
    assert isinstance(found, Clip)
    return found


@pytest.fixture(scope="module")
def encoders(clip: Clip) -> Encoders:
    return prepare(clip)


@pytest.fixture(scope="module")
def all_written(encoders: Encoders, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Path]]:
    """Format -> {"image": file, "text": file}."""
    directory = tmp_path_factory.mktemp("written")
    paths = {}
    for name, chosen in FORMATS.items():
        paths[name] = {kind: directory / f"{kind}{chosen.suffix}" for kind in ("image", "text")}
        chosen.write(encoders.image, paths[name]["image"])
        chosen.write(encoders.text, paths[name]["text"])
    return paths


@pytest.fixture(params=list(FORMATS))
def written(request: pytest.FixtureRequest, all_written: dict[str, dict[str, Path]]) -> dict[str, Path]:
    return all_written[request.param]


def torchscript(path: Path) -> torch.jit.ScriptModule:
    module = FORMATS["torchscript"].open(path)
    assert isinstance(module, torch.jit.ScriptModule)
    return module


def opened(path: Path) -> Encode:
    return next(chosen.open for chosen in FORMATS.values() if chosen.suffix == path.suffix)(path)


def largest(difference: Tensor) -> float:
    return float(difference.abs().max())


@pytest.mark.parametrize("batch", [1, 2, 7, 33])
def test_image_features_equal_the_eager_ones_at_any_batch_size(
    clip: Clip, written: dict[str, Path], batch: int
) -> None:
    pixels = sample_pixels(batch, clip.image.size, seed=batch)
    features = opened(written["image"])(pixels)
    assert features.shape == (batch, clip.embed_dim)
    assert features.dtype == torch.float32
    assert largest(features.norm(dim=1) - 1) < 1e-5
    assert largest(features - clip.image(pixels)) < 1e-5


@pytest.mark.parametrize("texts", [TEXTS[:1], TEXTS[1:2], TEXTS[3:], TEXTS, TEXTS * 7], ids=len)
def test_text_features_equal_the_eager_ones_at_any_number_and_length(
    clip: Clip, written: dict[str, Path], texts: list[str]
) -> None:
    tokens = clip.tokenizer(texts)
    features = opened(written["text"])(tokens)
    assert features.shape == (len(texts), clip.embed_dim)
    assert largest(features - clip.text.encode(texts)) < 1e-5


def test_the_longest_and_the_shortest_text_are_encoded(clip: Clip, written: dict[str, Path]) -> None:
    encode, length = opened(written["text"]), clip.tokenizer.context_length
    for count in (2, length):
        tokens = torch.full((3, count), 320)
        tokens[:, 0], tokens[:, -1] = 49406, 49407
        assert largest(encode(tokens) - clip.text_tower(tokens)) < 1e-5


@pytest.mark.parametrize("batch", [1, 7])
def test_the_torchscript_image_encoder_has_the_eager_input_gradient(
    clip: Clip, all_written: dict[str, dict[str, Path]], batch: int
) -> None:
    encode = torchscript(all_written["torchscript"]["image"])
    direction = torch.randn(clip.embed_dim, generator=torch.Generator().manual_seed(0))

    def gradient(of: Encode) -> Tensor:
        leaf = sample_pixels(batch, clip.image.size, seed=5).requires_grad_()
        (found,) = torch.autograd.grad((of(leaf) @ direction).sum(), leaf)
        return found

    expected = gradient(clip.image)
    for _ in range(4):  # TorchScript compiles itself anew in its first calls
        assert largest(gradient(encode) - expected) < 1e-3 * largest(expected)


def test_no_parameter_of_the_torchscript_encoders_requires_a_gradient(all_written: dict[str, dict[str, Path]]) -> None:
    for path in all_written["torchscript"].values():
        module = torchscript(path)
        parameters = list(module.parameters())
        assert parameters
        assert not any(parameter.requires_grad for parameter in parameters)
        assert not module.training


def test_the_torchscript_image_encoder_names_no_device(all_written: dict[str, dict[str, Path]]) -> None:
    module = torchscript(all_written["torchscript"]["image"])
    assert "Device = prim::Constant" not in str(module.inlined_graph)


def test_an_encoder_holds_no_weights_of_the_other_one(clip: Clip, written: dict[str, Path]) -> None:
    for path, module in ((written["image"], clip.image), (written["text"], clip.text_tower)):
        weights = sum(value.nbytes for value in module.state_dict().values())
        assert path.stat().st_size < weights + 400_000


def test_the_onnx_graph_names_its_input_its_output_and_what_may_vary(
    all_written: dict[str, dict[str, Path]],
) -> None:
    graph = onnx.load(all_written["onnx"]["image"]).graph
    assert [value.name for value in graph.input] == ["input"]
    assert [value.name for value in graph.output] == ["features"]
    first, *rest = graph.input[0].type.tensor_type.shape.dim
    assert first.dim_param
    assert [dimension.dim_value for dimension in rest] == [3, 32, 32]


def test_the_onnx_files_tell_nothing_of_the_machine_that_wrote_them(all_written: dict[str, dict[str, Path]]) -> None:
    for path in all_written["onnx"].values():
        assert b".py" not in path.read_bytes()


@pytest.mark.parametrize("name", list(FORMATS))
def test_a_text_tower_that_is_not_causal_takes_the_whole_context(
    tiny_vit_clip: Clip, tmp_path: Path, name: str
) -> None:
    config = copy.deepcopy(tiny_vit_clip.open_clip_config)
    config["model_cfg"]["text_cfg"]["no_causal_mask"] = True
    save_local_dir(tiny_vit_clip.open_clip_model, config, tmp_path / "model")
    clip = load_clip(str(tmp_path / "model"))
    assert not clip.text.causal
    path = tmp_path / f"text{FORMATS[name].suffix}"
    FORMATS[name].write(prepare(clip).text, path)
    exported = TextEncoder(clip.tokenizer, FORMATS[name].open(path), causal=False)
    assert largest(exported.encode(TEXTS) - clip.text.encode(TEXTS)) < 1e-5
    assert largest(clip.text.encode(TEXTS) - tiny_vit_clip.text.encode(TEXTS)) > 1e-3


def test_large_weights_go_to_a_second_file_beside_the_graph(
    clip: Clip, encoders: Encoders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(formats, "ONNX_INLINE_BYTES", 1000)
    write_onnx(encoders.text, tmp_path / "text.onnx")
    assert {path.name for path in tmp_path.iterdir()} == {"text.onnx", "text.onnx.data"}
    tokens = clip.tokenizer(TEXTS)
    assert largest(open_onnx(tmp_path / "text.onnx")(tokens) - clip.text_tower(tokens)) < 1e-5


def test_exporting_changes_neither_the_model_nor_torchs_settings(clip: Clip, tmp_path: Path) -> None:
    before = [(name, value.clone(), value.requires_grad) for name, value in clip.open_clip_model.named_parameters()]
    training = clip.open_clip_model.training
    encoders = prepare(clip)
    for name, chosen in FORMATS.items():
        chosen.write(encoders.image, tmp_path / f"{name}{chosen.suffix}")
    for (name, value, grad), (name_after, value_after) in zip(
        before, clip.open_clip_model.named_parameters(), strict=True
    ):
        assert (name, grad) == (name_after, value_after.requires_grad)
        assert torch.equal(value, value_after)
    assert clip.open_clip_model.training == training
    assert torch.backends.mha.get_fastpath_enabled()


def test_a_failed_trace_leaves_the_fast_path_as_it_was(tmp_path: Path) -> None:
    class Broken(torch.nn.Module):
        def forward(self, pixels: Tensor) -> Tensor:
            raise ValueError("broken")

    encoder = formats.Encoder(module=Broken(), example=torch.zeros(2, 3), dynamic={0: "batch"})
    with pytest.raises(ValueError, match="broken"):
        formats.write_torchscript(encoder, tmp_path / "broken.pt")
    assert torch.backends.mha.get_fastpath_enabled()
