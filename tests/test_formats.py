"""Each format computes the model's own function, at any batch size and text length, on any device."""

import copy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor

from pmgaft.clip.loading import Clip, load_clip, save_local_dir, tensors_hash
from pmgaft.clip.text import TextEncoder
from pmgaft.errors import PmgaftError
from pmgaft_export import formats
from pmgaft_export.build import Encoders, Evidence, prepare
from pmgaft_export.bundle import load_torchscript
from pmgaft_export.formats import FORMATS, Encoder, Tools, half, write_onnx, write_pt2
from pmgaft_export.runtime import CPU, open_encoder, target
from pmgaft_export.sample import sample_pixels

Encode = Callable[[Tensor], Tensor]
EXACT = ("torchscript", "onnx")
FEW = Evidence(parity_images=12)
TEXTS = ["a", "cat", "a photo of a dog.", "toaster", "a very long label of one small red bicycle"]


@pytest.fixture(scope="module", params=["tiny_clip", "tiny_vit_clip"])
def clip(request: pytest.FixtureRequest) -> Clip:
    """A convolutional tower with BatchNorm, and a ViT."""
    found = request.getfixturevalue(request.param)
    assert isinstance(found, Clip)
    return found


@pytest.fixture(scope="module")
def encoders(clip: Clip) -> Encoders:
    return prepare(clip, FEW)


@pytest.fixture(scope="module")
def all_written(encoders: Encoders, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Path]]:
    """Format -> {"image": file, "text": file}."""
    directory = tmp_path_factory.mktemp("written")
    paths = {}
    for name in EXACT:
        paths[name] = {kind: directory / f"{kind}{FORMATS[name].suffix}" for kind in ("image", "text")}
        write(name, encoders.image, paths[name]["image"])
        write(name, encoders.text, paths[name]["text"])
    return paths


@pytest.fixture(params=EXACT)
def written(request: pytest.FixtureRequest, all_written: dict[str, dict[str, Path]]) -> dict[str, Path]:
    return all_written[request.param]


def torchscript(path: Path) -> torch.jit.ScriptModule:
    module = load_torchscript(path)
    assert isinstance(module, torch.jit.ScriptModule)
    return module


def no_photographs() -> Tensor:
    pytest.fail("photographs were asked for")


def write(name: str, encoder: Encoder, path: Path, photographs: Callable[[], Tensor] = no_photographs) -> None:
    FORMATS[name].write(encoder, path, Tools(device=CPU, photographs=photographs))


def opened(path: Path) -> Encode:
    return open_encoder(path).run


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


@pytest.mark.parametrize("kind", ["image", "text"])
def test_no_torchscript_encoder_names_a_device(all_written: dict[str, dict[str, Path]], kind: str) -> None:
    module = torchscript(all_written["torchscript"][kind])
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


@pytest.mark.parametrize("name", EXACT)
def test_a_text_tower_that_is_not_causal_takes_the_whole_context(
    tiny_vit_clip: Clip, tmp_path: Path, name: str
) -> None:
    config = copy.deepcopy(tiny_vit_clip.open_clip_config)
    config["model_cfg"]["text_cfg"]["no_causal_mask"] = True
    save_local_dir(tiny_vit_clip.open_clip_model, config, tmp_path / "model")
    clip = load_clip(str(tmp_path / "model"))
    assert not clip.text.causal
    path = tmp_path / f"text{FORMATS[name].suffix}"
    write(name, prepare(clip, FEW).text, path)
    exported = TextEncoder(clip.tokenizer, opened(path), causal=False)
    assert largest(exported.encode(TEXTS) - clip.text.encode(TEXTS)) < 1e-5
    assert largest(clip.text.encode(TEXTS) - tiny_vit_clip.text.encode(TEXTS)) > 1e-3


def test_large_weights_go_to_a_second_file_beside_the_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "ONNX_INLINE_BYTES", 1000)
    module = torch.nn.Linear(64, 16).requires_grad_(False)
    write_onnx(Encoder(module=module, example=torch.rand(2, 64), dynamic={0: "batch"}), tmp_path / "text.onnx")
    assert {path.name for path in tmp_path.iterdir()} == {"text.onnx", "text.onnx.data"}
    values = torch.rand(3, 64)
    assert largest(opened(tmp_path / "text.onnx")(values) - module(values)) < 1e-5


def test_exporting_changes_neither_the_model_nor_torchs_settings(
    clip: Clip, encoders: Encoders, all_written: dict[str, dict[str, Path]], tmp_path: Path
) -> None:
    fresh = load_clip(clip.name)
    write("torchscript-fp16", encoders.image, tmp_path / "half.pt")
    assert tensors_hash(clip.open_clip_model) == tensors_hash(fresh.open_clip_model)
    assert not any(value.requires_grad for value in clip.open_clip_model.parameters())
    assert clip.open_clip_model.training == fresh.open_clip_model.training
    assert torch.backends.mha.get_fastpath_enabled()


def test_a_failed_trace_leaves_the_fast_path_as_it_was(tmp_path: Path) -> None:
    class Broken(torch.nn.Module):
        def forward(self, pixels: Tensor) -> Tensor:
            raise ValueError("broken")

    encoder = Encoder(module=Broken(), example=torch.zeros(2, 3), dynamic={0: "batch"})
    with pytest.raises(ValueError, match="broken"):
        formats.write_torchscript(encoder, tmp_path / "broken.pt")
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize("name", ["torchscript-fp16", "onnx-fp16"])
def test_half_precision_halves_the_weights_and_keeps_the_features(
    tiny_vit_clip: Clip, tmp_path: Path, name: str
) -> None:
    clip, encoders = tiny_vit_clip, prepare(tiny_vit_clip, FEW)
    path = tmp_path / f"image{FORMATS[name].suffix}"
    write(name, encoders.image, path)
    if path.suffix == ".pt":
        kept = {value.dtype for value in torchscript(path).parameters()}
        assert kept == {torch.float16}
    else:
        large = {tensor.data_type for tensor in onnx.load(path).graph.initializer if len(tensor.raw_data) > 100}
        assert large == {onnx.TensorProto.FLOAT16}
    pixels = sample_pixels(3, clip.image.size, seed=4)
    features, expected = open_encoder(path, precision="float16").run(pixels), clip.image(pixels)
    assert features.dtype == torch.float32
    assert largest(features.norm(dim=1) - 1) < 1e-5
    assert 1e-6 < largest(features - expected) < 5e-3


def test_half_precision_leaves_the_original_as_it_was(encoders: Encoders) -> None:
    halved = half(encoders.image, CPU).module
    assert {value.dtype for value in halved.parameters()} == {torch.float16}
    assert {value.dtype for value in encoders.image.module.parameters()} == {torch.float32}


class Doubled(torch.nn.Module):
    """The smallest module that has a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor([2.0, 2.0, 2.0]), requires_grad=False)

    def forward(self, values: Tensor) -> Tensor:
        return values * self.weight


doubled = Encoder(module=Doubled(), example=torch.ones(2, 3), dynamic={0: "batch"})
tools = Tools(device=CPU, photographs=no_photographs)


@pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor needs a C++ compiler")
def test_a_compiled_encoder_runs_at_any_batch_size_without_the_compiler_and_without_unpickling(tmp_path: Path) -> None:
    path = tmp_path / "doubled.pt2"
    write_pt2(doubled, path, tools)
    encode = open_encoder(path)
    assert encode.engine == "aotinductor-cpu"
    for batch in (1, 2, 33):
        for values in (torch.rand(batch, 3), torch.rand(3, batch).T):
            assert torch.equal(encode.run(values), 2 * values)
    program = f"""
import pickle, sys
from pathlib import Path
import torch
from pmgaft_export.runtime import open_encoder
def alarm(*_, **__): raise SystemExit("unpickled")
pickle.load = pickle.loads = torch.load = alarm
print(open_encoder(Path({str(path)!r})).run(torch.ones(1, 3)).tolist(), "torch._inductor.compile_fx" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[[2.0, 2.0, 2.0]] False"


def test_what_cannot_be_compiled_is_one_error_of_our_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no C++ compiler found\nsecond line")

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", fail)
    with pytest.raises(PmgaftError, match=r"cannot be compiled here: no C\+\+ compiler found$") as caught:
        write_pt2(doubled, tmp_path / "doubled.pt2", tools)
    assert caught.value.code == "pt2_failed"


def test_a_target_names_the_processor_and_the_version_of_torch() -> None:
    kind, _, release = target(CPU).rpartition(", ")
    assert kind.startswith("cpu ")
    assert len(kind) > len("cpu ")
    assert release == "torch " + ".".join(torch.__version__.split(".")[:2])
