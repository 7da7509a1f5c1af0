"""Which format serves where, by what, and that every engine computes the model's own features."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pmgaft.clip.loading import Clip
from pmgaft.errors import BundleError, InputError, PmgaftError
from pmgaft_export import runtime
from pmgaft_export.build import Evidence, export_bundle
from pmgaft_export.bundle import Bundle, Manifest
from pmgaft_export.formats import FORMATS
from pmgaft_export.runtime import bound, onnx_providers, open_encoder, session_options
from pmgaft_export.sample import sample_pixels
from pmgaft_serve import command, engines
from pmgaft_serve.engines import (
    CHOICES,
    ENGINES,
    PREFERENCES,
    chosen_format,
    guarded_memory,
    open_engine,
    open_lane,
    worker_device,
)

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
HERE = "cuda sm_90, torch 2.99"


@pytest.fixture(scope="module")
def bundle(tiny_clip: Clip, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return export_bundle(tiny_clip, tmp_path_factory.mktemp("serve") / "bundle", evidence=Evidence(parity_images=12))


@pytest.mark.parametrize(
    ("choice", "name", "form"),
    [
        ("auto", "onnxruntime-cpu", "onnx"),
        ("onnxruntime", "onnxruntime-cpu", "onnx"),
        ("tensorrt", "onnxruntime-cpu", "onnx"),
        ("onnx", "onnxruntime-cpu", "onnx"),
        ("torchscript", "torchscript-cpu", "torchscript"),
    ],
)
def test_every_engine_gives_the_models_features(
    bundle: Bundle, tiny_clip: Clip, choice: str, name: str, form: str
) -> None:
    engine = open_engine(bundle, choice, CPU, threads=1)
    assert (engine.name, engine.format) == (name, form)
    pixels = torch.rand(3, 3, 32, 32)
    tokens = tiny_clip.tokenizer(["a cat", "a very large dog"])
    with torch.no_grad():
        torch.testing.assert_close(engine.image(pixels), tiny_clip.image(pixels), atol=1e-4, rtol=0)
        torch.testing.assert_close(engine.text(tokens), tiny_clip.text_tower(tokens), atol=1e-4, rtol=0)


def test_a_lane_gives_the_same_features_by_half_of_the_threads(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[int | None] = []

    def opened(path: Path, device: torch.device, count: int | None = None, **options: Any) -> Any:
        threads.append(count)
        return open_encoder(path, device, count, **options)

    monkeypatch.setattr(engines, "open_encoder", opened)
    lane = open_lane(bundle, "onnx", CPU, 4)
    assert lane is not None
    assert threads == [2]
    pixels = torch.rand(3, 3, 32, 32)
    torch.testing.assert_close(lane(pixels), open_engine(bundle, "onnx", CPU, 1).image(pixels), atol=1e-6, rtol=0)


def test_there_is_no_lane_where_it_is_of_no_use(bundle: Bundle) -> None:
    assert open_lane(bundle, "onnx", CPU, 1) is None  # one core
    assert open_lane(bundle, "onnx", torch.device("cuda"), 4) is None  # a GPU takes the larger batch
    assert open_lane(bundle, "torchscript", CPU, 4) is None  # its threads are the calling thread's


def test_the_probes_encoder_has_the_models_derivative(bundle: Bundle, tiny_clip: Clip) -> None:
    pixels = torch.rand(2, 3, 32, 32, requires_grad=True)
    gradients = [
        torch.autograd.grad(encode(pixels)[:, 0].sum(), pixels)[0]
        for encode in (engines.differentiable(bundle, CPU), tiny_clip.image)
    ]
    torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-2)


def test_input_and_output_bound_to_memory_give_what_a_plain_call_gives(bundle: Bundle, tiny_clip: Clip) -> None:
    ort = pytest.importorskip("onnxruntime")
    entry = bundle.manifest.formats["onnx"]
    for name, values in (
        (entry.image, sample_pixels(5, (32, 32), seed=0)),
        (entry.image, sample_pixels(4, (32, 64), seed=0)[:, :, :, ::2]),  # not contiguous
        (entry.text, tiny_clip.tokenizer(["a cat", "a very large dog"])),
    ):
        session = ort.InferenceSession(
            bundle.path(name), session_options(1, "float32"), providers=["CPUExecutionProvider"]
        )
        plain = torch.from_numpy(session.run(["features"], {"input": values.numpy()})[0])
        assert torch.equal(bound(session, CPU)(values), plain)


# which format serves


def holding(bundle: Bundle, *names: str, quickest: dict[str, str] | None = None, target: str | None = None) -> Manifest:
    """A manifest with these formats; compiled ones are for `target`."""
    model = bundle.manifest.formats["onnx"]
    entries = {
        name: model.model_copy(
            update={
                "image": f"{name}/image{FORMATS[name].suffix}",
                "precision": FORMATS[name].precision,
                "target": target if FORMATS[name].compiled else None,
            }
        )
        for name in names
    }
    return bundle.manifest.model_copy(update={"formats": entries, "quickest": quickest or {}})


@pytest.fixture(autouse=True)
def one_kind_of_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "target", lambda device: HERE if device.type == "cuda" else "cpu any, torch 2.99")


DEFAULT = ("torchscript", "onnx")
ALL = tuple(FORMATS)


@pytest.mark.parametrize(
    ("choice", "device", "names", "chosen"),
    [
        ("auto", CPU, DEFAULT, "onnx"),
        ("auto", GPU, DEFAULT, "torchscript"),
        ("auto", CPU, ALL, "onnx"),
        ("auto", GPU, ALL, "pt2-fp16"),
        ("auto", GPU, ("torchscript", "torchscript-fp16"), "torchscript-fp16"),
        ("auto", CPU, ("torchscript", "torchscript-fp16"), "torchscript"),
        ("auto", CPU, ("torchscript-fp16",), "torchscript-fp16"),
        ("auto", CPU, ("onnx-int8", "torchscript"), "torchscript"),
        ("onnxruntime", CPU, ALL, "onnx"),
        ("onnxruntime", GPU, ALL, "onnx-fp16"),
        ("tensorrt", GPU, ALL, "onnx-fp16"),
        ("torchscript", CPU, ALL, "torchscript"),
        ("torchscript", GPU, ALL, "torchscript-fp16"),
        ("aotinductor", GPU, ALL, "pt2-fp16"),
        ("onnx-int8", CPU, ALL, "onnx-int8"),
        ("pt2", GPU, ALL, "pt2"),
    ],
)
def test_the_choice_and_the_device_decide_which_format_serves(
    bundle: Bundle, choice: str, device: torch.device, names: tuple[str, ...], chosen: str
) -> None:
    assert chosen_format(holding(bundle, *names, target=HERE), choice, device) == chosen


def test_what_was_measured_to_be_quickest_on_such_a_device_is_preferred(bundle: Bundle) -> None:
    manifest = holding(bundle, *DEFAULT, "onnx-int8", quickest={"cpu": "onnx-int8"})
    assert chosen_format(manifest, "auto", CPU) == chosen_format(manifest, "onnxruntime", CPU) == "onnx-int8"
    assert chosen_format(manifest, "torchscript", CPU) == "torchscript"
    assert chosen_format(manifest, "auto", GPU) == "torchscript"
    assert chosen_format(manifest, "onnx", CPU) == "onnx"


def test_a_format_compiled_for_another_machine_is_passed_over_and_named_when_asked_for(bundle: Bundle) -> None:
    elsewhere = "cuda sm_80, torch 2.99"
    manifest = holding(bundle, *DEFAULT, "pt2-fp16", quickest={"cuda": "pt2-fp16"}, target=elsewhere)
    assert chosen_format(manifest, "auto", GPU) == "torchscript"
    assert chosen_format(manifest, "auto", CPU) == "onnx"
    for choice in ("aotinductor", "pt2-fp16"):
        with pytest.raises(BundleError, match=f"pt2-fp16 was compiled for {elsewhere}, and this is {HERE}"):
            chosen_format(manifest, choice, GPU)


@pytest.mark.parametrize("choice", ["onnxruntime", "onnx", "aotinductor", "torchscript-fp16"])
def test_a_bundle_says_what_it_lacks(bundle: Bundle, choice: str) -> None:
    with pytest.raises(BundleError, match=f"has nothing for {choice}: it holds torchscript$"):
        chosen_format(holding(bundle, "torchscript"), choice, CPU)


def test_an_unknown_engine_is_refused(bundle: Bundle) -> None:
    with pytest.raises(InputError, match="one of auto, torchscript, onnxruntime, tensorrt, aotinductor") as caught:
        open_engine(bundle, "openvino", CPU, threads=1)
    assert caught.value.code == "engine_invalid"


def test_every_format_and_engine_may_be_asked_for_and_has_its_place_on_every_device() -> None:
    assert set(CHOICES) == {"auto", *ENGINES, *FORMATS}
    assert set(command.ENGINES) == set(CHOICES)
    for order in PREFERENCES.values():
        assert sorted(order) == sorted(FORMATS)
    assert {chosen.suffix for chosen in FORMATS.values()} == set(ENGINES.values())


# on a GPU


@pytest.fixture
def opened_on(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What `open_encoder` is asked for, instead of opening it."""
    asked: list[tuple[Any, ...]] = []

    def open_encoder(path: Path, device: torch.device, threads: int, **options: Any) -> runtime.Opened:
        asked.append((path.parent.name, path.name, str(device), options))
        kind = "cpu" if path.suffix == ".onnx" else device.type
        return runtime.Opened(run=lambda values: values, engine=f"fake-{kind}")

    monkeypatch.setattr(engines, "open_encoder", open_encoder)
    return asked


def test_a_bundle_made_on_a_cpu_is_opened_on_the_gpu_and_back(bundle: Bundle, opened_on: list[tuple[Any, ...]]) -> None:
    assert open_engine(bundle, "auto", GPU, threads=1).name == "fake-cuda"
    assert open_engine(bundle, "auto", CPU, threads=1).name == "fake-cpu"
    exact, beside = {"precision": "float32", "tensorrt": False}, {"crowded": True}
    assert opened_on == [
        ("torchscript", "image.pt", "cuda:0", exact),
        ("torchscript", "text.pt", "cuda:0", beside),
        ("onnx", "image.onnx", "cpu", exact),
        ("onnx", "text.onnx", "cpu", beside),
    ]


def test_tensorrt_compiles_the_image_encoder_alone(bundle: Bundle, opened_on: list[tuple[Any, ...]]) -> None:
    open_engine(bundle, "tensorrt", GPU, threads=1)
    assert [options.get("tensorrt") for *_, options in opened_on] == [True, None]


def test_half_precision_that_would_run_on_the_cpu_of_a_gpu_machine_is_refused(
    bundle: Bundle, opened_on: list[tuple[Any, ...]]
) -> None:
    half = holding(bundle, "onnx-fp16")
    with pytest.raises(BundleError, match="onnx-fp16 is for GPUs, and ONNX Runtime has no provider"):
        open_engine(replace(bundle, manifest=half), "auto", GPU, threads=1)
    assert open_engine(bundle, "onnx", GPU, threads=1).name == "fake-cpu"


def test_onnx_runtime_asks_for_the_gpu_only_where_it_has_it_and_always_for_the_cpu_last(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PMGAFT_CACHE", "/cache")
    gpu = torch.device("cuda", 2)
    every = ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]
    cuda = ("CUDAExecutionProvider", {"device_id": 2, "use_tf32": 0})
    assert onnx_providers(CPU, every, tensorrt=True) == ["CPUExecutionProvider"]
    assert onnx_providers(gpu, every[2:], tensorrt=True) == ["CPUExecutionProvider"]
    assert onnx_providers(gpu, every) == [cuda, "CPUExecutionProvider"]
    first, *others = onnx_providers(gpu, every, tensorrt=True)
    assert others == [cuda, "CPUExecutionProvider"]
    assert first[0] == "TensorrtExecutionProvider"
    assert isinstance(first[1], dict)
    assert first[1]["trt_engine_cache_path"] == "/cache/tensorrt"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_onnx_runtime_cannot_use_falls_back_to_the_cpu_and_is_named_so(bundle: Bundle) -> None:
    path = bundle.path(bundle.manifest.formats["onnx"].image)
    assert open_encoder(path, GPU, threads=1).engine == "onnxruntime-cpu"


def test_float32_is_float32_on_a_gpu_too(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "_torchscript", lambda path, device: None)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    open_encoder(bundle.path("torchscript/image.pt"), GPU)
    assert not torch.backends.cudnn.allow_tf32
    assert not torch.backends.cuda.matmul.allow_tf32


@pytest.mark.parametrize(
    ("machine", "flags", "expected"),
    [
        ("x86_64", ["fpu sse avx2 avx512_vnni"], False),
        ("x86_64", ["fpu avx_vnni"], False),
        ("x86_64", ["fpu sse avx2"], True),
        ("AMD64", [], True),  # Windows does not say
        ("aarch64", [], False),
    ],
)
def test_int8_is_multiplied_the_slower_way_only_where_it_would_saturate(
    monkeypatch: pytest.MonkeyPatch, machine: str, flags: list[str], expected: bool
) -> None:
    monkeypatch.setattr("platform.machine", lambda: machine)
    monkeypatch.setattr(runtime, "_cpuinfo", lambda key: flags if key == "flags" else [])
    assert runtime.saturates() is expected
    key = "session.x64quantprecision"
    options = session_options(1, "int8")
    if expected:
        assert options.get_session_config_entry(key) == "1"
    else:
        with pytest.raises(RuntimeError):
            options.get_session_config_entry(key)


@pytest.mark.parametrize("crowded", [False, True])
def test_threads_spin_within_a_call_that_has_the_cores_for_itself_and_never_between_calls(crowded: bool) -> None:
    options = session_options(2, "float32", crowded)
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == ("0" if crowded else "1")
    assert options.get_session_config_entry("session.force_spinning_stop") == "1"


def test_a_damaged_compiled_encoder_is_a_bundle_error(tmp_path: Path) -> None:
    (tmp_path / "image.pt2").write_bytes(b"not a package")
    with pytest.raises(BundleError, match=r"image\.pt2 cannot be run on this machine"):
        open_encoder(tmp_path / "image.pt2")


def test_onnx_runtime_does_not_send_usage_data_to_its_maker() -> None:
    script = "import os, pmgaft_serve.engines; print(os.environ['ORT_DISABLE_TELEMETRY'])"
    environment = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "1"


def pretend_gpus(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


@pytest.mark.parametrize(
    ("gpus", "setting", "gpu_id", "expected"),
    [
        (0, "auto", None, "cpu"),
        (0, "auto", 0, "cpu"),  # nvidia-smi is there, and torch is a CPU build
        (2, "auto", None, "cpu"),  # TorchServe gave this worker no GPU
        (2, "auto", 1, "cuda:1"),
        (2, "cpu", 1, "cpu"),
        (2, "cuda", 1, "cuda:1"),
        (2, "cuda:0", 1, "cuda:0"),
    ],
)
def test_a_worker_takes_the_device_it_was_given(
    monkeypatch: pytest.MonkeyPatch, gpus: int, setting: str, gpu_id: int | None, expected: str
) -> None:
    pretend_gpus(monkeypatch, gpus)
    assert str(worker_device(setting, gpu_id)) == expected


def test_a_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpus(monkeypatch, 1)
    with pytest.raises(InputError, match="cuda:1"):
        worker_device("cuda:1", None)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried ..."),
        RuntimeError("[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : BFCArena: Failed to allocate memory for 4096"),
        RuntimeError("std::bad_alloc"),
    ],
)
def test_every_way_of_running_out_of_memory_is_one_error(error: Exception) -> None:
    with pytest.raises(PmgaftError) as found, guarded_memory():
        raise error
    assert found.value.code == "out_of_memory"


def test_another_error_stays_what_it_is() -> None:
    with pytest.raises(RuntimeError, match="shape"), guarded_memory():
        raise RuntimeError("shape mismatch")
