"""What `pmgaft serve` makes of its options, without starting anything."""

import re
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner, Result

from pmgaft.cli import main
from pmgaft.clip.preprocess import ImageLimits
from pmgaft_serve import command
from pmgaft_serve.protocol import Limits
from pmgaft_serve.torchserve import ServeOptions

Serve = Callable[..., ServeOptions]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[ServeOptions]:
    """What would have been served."""
    seen: list[ServeOptions] = []
    bundle = SimpleNamespace(directory=Path("/bundle"), manifest=SimpleNamespace(name="fake"))
    monkeypatch.setattr("pmgaft_export.shipped.bundle_for", lambda name, progress: Path("/bundle"))
    monkeypatch.setattr("pmgaft_export.bundle.open_bundle", lambda directory: bundle)
    monkeypatch.setattr(command, "_serve", lambda options, name: seen.append(options))
    monkeypatch.setattr(command, "_cores", lambda: 8)
    return seen


@pytest.fixture
def serve(asked: list[ServeOptions]) -> Serve:
    def run(*arguments: str) -> ServeOptions:
        result = invoke(*arguments)
        assert result.exit_code == 0, result.output
        return asked[-1]

    return run


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["serve", "fake", *arguments])


def pretend_gpus(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


def test_workers_share_the_cores(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpus(monkeypatch, 0)
    for arguments, expected in (
        ((), (1, 8, 8)),
        (("--workers", "2"), (2, 4, 4)),
        (("--workers", "3"), (3, 2, 2)),
        (("--workers", "64"), (64, 1, 1)),
        (("--threads", "3"), (1, 3, 3)),
        (("--threads", "3", "--decoders", "5"), (1, 3, 5)),
    ):
        options = serve(*arguments)
        assert (options.workers, options.settings.threads, options.settings.decoders) == expected


@pytest.mark.parametrize(
    ("gpus", "arguments", "workers"),
    [
        (0, (), 1),
        (4, (), 4),
        (4, ("--device", "cuda"), 4),
        (4, ("--device", "cuda:1"), 1),
        (4, ("--device", "cpu"), 1),
        (4, ("--workers", "2"), 2),
    ],
)
def test_each_gpu_that_is_used_gets_a_worker(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, gpus: int, arguments: tuple[str, ...], workers: int
) -> None:
    pretend_gpus(monkeypatch, gpus)
    assert serve(*arguments).workers == workers


IMAGE_LIMITS = {"image_bytes": "bytes", "image_pixels": "pixels", "decoded_pixels": "decoded"}


def test_every_limit_can_be_set_and_its_default_stands_in_the_help(serve: Serve) -> None:
    told = re.sub(r"\s+", " ", CliRunner().invoke(main, ["serve", "--help"]).stdout)
    assert sorted(IMAGE_LIMITS.values()) == sorted(one.name for one in fields(ImageLimits))
    image = {name: getattr(Limits().image, field) for name, field in IMAGE_LIMITS.items()}
    defaults = {one.name: one.default for one in fields(Limits) if one.name != "image"} | image
    for number, (name, default) in enumerate(defaults.items(), start=7):
        assert f"{name} {default}" in told
        limits = serve("--limit", f"{name}={number}").settings.limits
        value = getattr(limits.image, IMAGE_LIMITS[name]) if name in image else getattr(limits, name)
        assert value == number
    assert serve().settings.limits == Limits()


def test_the_operators_guide_names_every_option_and_every_limit_with_its_default() -> None:
    guide = (Path(__file__).parents[1] / "docs" / "serving.md").read_text(encoding="utf-8")
    limits = [one for one in fields(Limits) if one.name not in ("image", "steps", "restarts")]
    for name, default in [(one.name, one.default) for one in limits] + [
        (name, getattr(Limits().image, field)) for name, field in IMAGE_LIMITS.items()
    ]:
        assert f"| `{name}` | {default} |" in guide
    assert f"| `steps`, `restarts` | {Limits().steps}, {Limits().restarts} |" in guide
    told = CliRunner().invoke(main, ["serve", "--help"]).stdout
    options = set(re.findall(r"^  (--[a-z-]+)", told, re.MULTILINE)) - {"--help"}
    assert [option for option in sorted(options) if option not in guide] == []


@pytest.mark.parametrize("text", ["labels", "labels=", "labels=0", "labels=-1", "labels=many", "label=3", "image=3"])
def test_a_limit_that_is_none_is_refused_with_all_names(asked: list[ServeOptions], text: str) -> None:
    result = invoke("--limit", text)
    assert result.exit_code == 2
    assert "image_pixels" in result.stderr
    assert asked == []


def test_label_sets_and_warm_labels_are_read_before_anything_starts(serve: Serve, tmp_path: Path) -> None:
    (tmp_path / "pets.txt").write_text("cat\ndog\n")
    (tmp_path / "warm.json").write_text('{"labels": ["a", "b"], "templates": "simple"}')
    options = serve(
        *("--label-set", f"pets={tmp_path / 'pets.txt'}"),
        *("--warm-labels", str(tmp_path / "warm.json"), "--label-cache", "7"),
    )
    assert [(one.name, one.labels) for one in options.sets] == [("pets", ("cat", "dog"))]
    assert len(options.warm[0].templates) == 7
    assert options.settings.cache_bytes == 7 * 2**20
    twice = invoke("--label-set", f"p={tmp_path / 'pets.txt'}", "--label-set", f"p={tmp_path / 'pets.txt'}")
    assert "given twice" in twice.stderr
    (tmp_path / "pets.txt").write_text("cat\nCAT\n")
    wrong = invoke("--label-set", f"pets={tmp_path / 'pets.txt'}")
    assert wrong.exit_code == 2
    assert "pets.txt" in wrong.stderr


def test_requests_are_logged_as_text_unless_asked_otherwise(serve: Serve) -> None:
    assert serve().log == "text"
    assert serve("--log-format", "json").log == "json"
    assert ServeOptions(bundle=Path("/bundle")).log == "none"
