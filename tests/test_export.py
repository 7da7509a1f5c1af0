"""`pmgaft export`: all or nothing, and never over anything else."""

import re
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import click
import pytest
import torch
from click.testing import CliRunner, Result
from torch import Tensor

from pmgaft.cli import main
from pmgaft.clip import loading, zoo
from pmgaft.clip.loading import Clip, save_local_dir
from pmgaft.clip.text import TextEncoder, label_features
from pmgaft.errors import BundleError, InputError, ModelError, ParityError
from pmgaft_export import build, shipped
from pmgaft_export.build import AUTO, CANDIDATES, Evidence, source_of
from pmgaft_export.bundle import MANIFEST, Bundle, Manifest, open_bundle, seal
from pmgaft_export.command import export
from pmgaft_export.formats import FORMATS, Encoder, Format, Tools, write_torchscript
from pmgaft_export.runtime import open_encoder
from pmgaft_export.sample import sample_pixels
from pmgaft_export.shipped import bundle_for
from pmgaft_export.speed import Rates

QUICK = ("torchscript",)
FEW = Evidence(parity_images=12)
export_bundle = partial(build.export_bundle, evidence=FEW)


@pytest.fixture(scope="module")
def whole(tiny_clip: Clip, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle with every default format, and one that takes another's text encoder."""
    place = tmp_path_factory.mktemp("whole") / "bundle"
    return export_bundle(tiny_clip, place, formats=(*build.DEFAULT_FORMATS, "onnx-int8"))


@pytest.fixture
def run(tiny_clip: Clip, tmp_path: Path) -> Path:
    """What `pmgaft train` leaves, as far as an export looks at it."""
    save_local_dir(tiny_clip.open_clip_model, tiny_clip.open_clip_config, tmp_path / "run" / "model")
    (tmp_path / "run" / "recipe.toml").write_text('model = "mini"\n[attack]\nsteps = 2\n')
    return tmp_path / "run"


def files(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def pmgaft(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def damaging(damage: Callable[[Encoder], Encoder]) -> Format:
    """TorchScript, but of another encoder."""

    def write(encoder: Encoder, path: Path, _: Tools | None = None) -> None:
        write_torchscript(damage(encoder), path)

    return Format(suffix=".pt", text="bad", write=write)


class Shifted(torch.nn.Module):
    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, values: Tensor) -> Tensor:
        features: Tensor = self.module(values)
        return features + 0.001


def shifted(encoder: Encoder) -> Encoder:
    return Encoder(module=Shifted(encoder.module), example=encoder.example, dynamic=encoder.dynamic)


def test_a_bundle_classifies_as_the_model_it_came_from(whole: Bundle, tiny_clip: Clip) -> None:
    labels = ["cat", "dog", "toaster", "a red bicycle"]
    pixels = sample_pixels(5, tiny_clip.image.size, seed=9)
    expected = tiny_clip.logits(pixels, label_features(tiny_clip.text.encode, labels))
    for name in ("torchscript", "onnx"):
        entry = whole.manifest.formats[name]
        tower = open_encoder(whole.path(entry.text)).run
        text = TextEncoder(whole.tokenizer(), tower, whole.manifest.text.causal)
        features = open_encoder(whole.path(entry.image)).run(pixels)
        logits = whole.manifest.logit_scale * features @ label_features(text.encode, labels).T
        assert torch.allclose(logits, expected, atol=1e-3)


def test_every_formats_parity_stands_in_the_manifest(whole: Bundle) -> None:
    assert set(whole.manifest.formats) == {"torchscript", "onnx", "onnx-int8"}
    for name, entry in whole.manifest.formats.items():
        parity = entry.parity
        assert len(parity.batches) == 2
        assert parity.machine
        assert (parity.sample, parity.images) == ("skimage", 12)
        assert 0 <= parity.text_difference < 1e-5
        assert parity.accuracy is not None
        if name == "onnx-int8":
            assert entry.calibration == "skimage"
            assert 1e-4 < parity.image_difference < 0.1
            assert 0.9 < parity.cosine < 1
        else:
            assert entry.calibration is None
            assert 0 <= parity.image_difference < 1e-5
            assert parity.top1_agreement == 1
    assert 0 <= whole.manifest.differentiable.gradient_difference < 1e-2


def test_a_format_that_has_no_text_encoder_of_its_own_shares_anothers_file(whole: Bundle) -> None:
    assert whole.manifest.formats["onnx-int8"].text == whole.manifest.formats["onnx"].text == "onnx/text.onnx"
    assert [path.name for path in whole.path("onnx-int8").iterdir()] == ["image.onnx"]


def test_the_model_card_names_the_model_its_parity_and_what_a_verdict_does_not_say(whole: Bundle) -> None:
    card = whole.path("model_card.md").read_text()
    assert card.startswith(f"# {whole.manifest.name}\n")
    words = ("| onnx |", "| onnx-int8 |", "| torchscript |", "12 of skimage", "not_broken", "at most 16 tokens")
    for said in (whole.manifest.source.tensors, *words):
        assert said in card


def test_the_differentiable_encoder_is_there_whatever_the_format(
    tiny_clip: Clip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(FORMATS, "bad", damaging(lambda encoder: encoder))
    bundle = export_bundle(tiny_clip, tmp_path / "bundle", formats=("bad",))
    assert set(bundle.manifest.formats) == {"bad"}
    pixels = sample_pixels(3, tiny_clip.image.size, seed=1).requires_grad_()
    (gradient,) = torch.autograd.grad(bundle.differentiable()(pixels).sum(), pixels)
    assert gradient.abs().max() > 0


@pytest.mark.parametrize("damage_image", [True, False], ids=["image", "text"])
def test_an_encoder_that_disagrees_is_refused_and_nothing_is_left(
    tiny_clip: Clip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage_image: bool
) -> None:
    def damage(encoder: Encoder) -> Encoder:
        return shifted(encoder) if (encoder.example.dim() == 4) == damage_image else encoder

    monkeypatch.setitem(FORMATS, "bad", damaging(damage))
    with pytest.raises(ParityError, match=f"bad: {'image' if damage_image else 'text'} features: 0.001 away"):
        export_bundle(tiny_clip, tmp_path / "bundle", formats=("bad",))
    assert list(tmp_path.iterdir()) == []


def test_a_differentiable_encoder_with_another_function_is_refused_and_nothing_is_left(
    tiny_clip: Clip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "write_torchscript", damaging(shifted).write)
    with pytest.raises(ParityError, match=r"torchscript/image.pt: image features"):
        export_bundle(tiny_clip, tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("failure", [KeyboardInterrupt, OSError, MemoryError])
def test_whatever_interrupts_an_export_nothing_half_written_stays(
    tiny_clip: Clip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: type[BaseException]
) -> None:
    def fail(*_: object) -> None:
        assert len(list(tmp_path.iterdir())) == 1, "the export writes beside its destination"
        assert not (tmp_path / "bundle").exists()
        raise failure

    monkeypatch.setattr(build, "seal", fail)
    with pytest.raises(failure):
        export_bundle(tiny_clip, tmp_path / "bundle", formats=QUICK)
    assert list(tmp_path.iterdir()) == []


def test_the_manifest_is_written_when_all_else_is_there(
    tiny_clip: Clip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[set[str]] = []

    def watched(directory: Path, manifest: Manifest) -> Bundle:
        seen.append(set(files(directory)))
        return seal(directory, manifest)

    monkeypatch.setattr(build, "seal", watched)
    bundle = export_bundle(tiny_clip, tmp_path / "bundle", formats=QUICK)
    assert seen == [set(files(bundle.directory)) - {MANIFEST}]


def test_a_bundle_is_replaced_by_force_alone(tiny_clip: Clip, tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    export_bundle(tiny_clip, target, formats=QUICK)
    (target / "note.txt").write_text("old")
    before = files(target)
    with pytest.raises(BundleError, match="already holds a bundle: --force replaces it"):
        export_bundle(tiny_clip, target, formats=QUICK)
    assert files(target) == before
    export_bundle(tiny_clip, target, formats=QUICK, force=True)
    assert open_bundle(target).manifest.name == "tiny-efficientnet"
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_a_failed_replacement_leaves_the_old_bundle(
    tiny_clip: Clip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export_bundle(tiny_clip, tmp_path / "bundle", formats=QUICK)
    before = files(tmp_path)
    monkeypatch.setattr(build, "write_torchscript", damaging(shifted).write)
    with pytest.raises(ParityError):
        export_bundle(tiny_clip, tmp_path / "bundle", formats=QUICK, force=True)
    assert files(tmp_path) == before


@pytest.mark.parametrize("force", [False, True])
def test_what_is_not_a_bundle_is_never_replaced(tiny_clip: Clip, tmp_path: Path, force: bool) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("precious")
    (tmp_path / "file").write_text("precious")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    before = files(tmp_path)
    for name in ("home", "file", "link"):
        with pytest.raises(BundleError, match=f"{name} exists"):
            export_bundle(tiny_clip, tmp_path / name, formats=QUICK, force=force)
    assert files(tmp_path) == before


def test_an_empty_directory_is_a_free_place(tiny_clip: Clip, tmp_path: Path) -> None:
    (tmp_path / "bundle").mkdir()
    export_bundle(tiny_clip, tmp_path / "bundle", formats=QUICK)
    assert open_bundle(tmp_path / "bundle").manifest.formats.keys() == {"torchscript"}


@pytest.mark.parametrize("formats", [("torchscript", "tflite"), ()])
def test_unknown_and_no_formats_are_refused_before_anything_is_done(
    tiny_clip: Clip, tmp_path: Path, formats: tuple[str, ...]
) -> None:
    with pytest.raises(InputError, match="torchscript, torchscript-fp16, onnx"):
        export_bundle(tiny_clip, tmp_path / "bundle", formats=formats)
    assert list(tmp_path.iterdir()) == []


def test_the_command_exports_a_run_with_its_recipe_and_prints_the_parity(run: Path, tmp_path: Path) -> None:
    result = pmgaft("export", run, "--output-dir", tmp_path / "out" / "bundle", "--format", "torchscript")
    assert result.exit_code == 0, result.output
    bundle = open_bundle(tmp_path / "out" / "bundle")
    assert bundle.manifest.name == bundle.manifest.source.run == "run"
    assert bundle.manifest.source.recipe == {"model": "mini", "attack": {"steps": 2}}
    assert "batches of 1 and 7" in result.stdout
    for name in ("torchscript", "probe"):
        assert re.search(rf"{name} .* \d\.\de-\d\d", result.stdout)
    assert bundle.hash in result.stdout
    assert f"pmgaft serve {tmp_path / 'out' / 'bundle'}" in result.stdout


def test_the_command_writes_the_default_formats() -> None:
    (option,) = (parameter for parameter in export.params if parameter.name == "formats")
    assert option.default == build.DEFAULT_FORMATS == ("torchscript", "onnx")


def test_the_commands_help_names_every_format() -> None:
    (option,) = (parameter for parameter in export.params if parameter.name == "formats")
    assert isinstance(option, click.Option)
    assert set(re.findall(r"[a-z][\w-]*", option.help or "")) >= {AUTO, *FORMATS}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nowhere",), "nowhere"),
        (("mini", "--format", "tflite"), "unknown format 'tflite'; known: auto, torchscript, torchscript-fp16, onnx"),
        (("mini", "--format", "auto", "--format", "onnx"), "auto chooses the formats itself"),
    ],
)
def test_a_mistake_ends_in_one_line_and_code_2(tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    result = pmgaft("export", *arguments, "--output-dir", tmp_path / "bundle")
    assert result.exit_code == 2
    *progress, error = result.stderr.splitlines()
    assert error.startswith("pmgaft: error: ")
    assert message in error
    assert progress == [f"loading {arguments[0]}"]
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_device_and_data_set_are_told_before_anything_is_written(tmp_path: Path) -> None:
    place = ("--output-dir", tmp_path / "bundle")
    assert "device must be auto, cpu, cuda or cuda:N" in pmgaft("export", "mini", *place, "--device", "tpu").stderr
    assert "there is no data set 'nowhere'" in pmgaft("export", "mini", *place, "--parity-data", "nowhere").stderr
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def rates(monkeypatch: pytest.MonkeyPatch) -> Rates:
    """Instead of measured speeds, these; the formats that "auto" tries are two that are written quickly."""
    monkeypatch.setitem(FORMATS, "other", FORMATS["torchscript"])
    monkeypatch.setitem(CANDIDATES, "cpu", ("torchscript", "other"))
    found = {"torchscript": {1: 10.0, 16: 20.0}, "other": {1: 30.0, 16: 40.0}}
    monkeypatch.setattr(build, "measure_speed", lambda encoders, size: {name: found[name] for name in encoders})
    return found


def test_auto_keeps_the_quickest_and_torchscript_and_records_what_it_measured(
    tiny_clip: Clip, tmp_path: Path, rates: Rates
) -> None:
    bundle = export_bundle(tiny_clip, tmp_path / "bundle", formats=(AUTO,))
    manifest = bundle.manifest
    assert set(manifest.formats) == {"torchscript", "other"}
    assert manifest.quickest == {"cpu": "other"}
    assert {(one.format, one.batch): one.images_per_second for one in manifest.speeds} == {
        ("torchscript", 1): 10, ("torchscript", 16): 20, ("other", 1): 30, ("other", 16): 40,
    }  # fmt: skip
    assert all(one.device == "cpu" and one.machine for one in manifest.speeds)
    assert "| other |" in bundle.path("model_card.md").read_text()


def test_auto_leaves_no_file_of_a_slower_format(tiny_clip: Clip, tmp_path: Path, rates: Rates) -> None:
    rates["other"] = {1: 1.0, 16: 1.0}
    bundle = export_bundle(tiny_clip, tmp_path / "bundle", formats=(AUTO,))
    assert bundle.manifest.quickest == {"cpu": "torchscript"}
    assert set(files(bundle.directory)) == {
        "torchscript/image.pt", "torchscript/text.pt", "tokenizer.json", "model_card.md", MANIFEST,
    }  # fmt: skip
    assert {one.format for one in bundle.manifest.speeds} == {"torchscript", "other"}


def test_auto_leaves_out_a_format_that_misses_its_gate_and_says_so(
    tiny_clip: Clip, tmp_path: Path, rates: Rates, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(FORMATS, "other", replace(damaging(shifted), text="torchscript"))
    steps: list[str] = []
    bundle = export_bundle(tiny_clip, tmp_path / "bundle", formats=(AUTO,), progress=steps.append)
    assert set(bundle.manifest.formats) == {"torchscript"}
    assert any(step.startswith("left out: other: image features: 0.001 away") for step in steps)
    assert {one.format for one in bundle.manifest.speeds} == {"torchscript"}


def test_every_candidate_of_auto_is_a_format_and_the_first_serves_probes() -> None:
    for names in CANDIDATES.values():
        assert set(names) <= set(FORMATS)
        assert names[0] == "torchscript"


def test_the_source_is_the_clips_own_where_no_run_is_given(tiny_clip: Clip) -> None:
    source = source_of(tiny_clip)
    assert source.model == tiny_clip.spec.model
    assert source.run is None
    assert source.recipe is None
    assert source.tensors == loading.tensors_hash(tiny_clip.open_clip_model)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own, and exports that write one format only."""
    monkeypatch.setenv("PMGAFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(build, "export_bundle", partial(export_bundle, formats=QUICK))
    return tmp_path / "cache"


def bundles_in(cache: Path) -> list[Path]:
    return sorted(path for path in cache.iterdir() if path.is_dir())


def test_a_bundle_is_served_from_where_it_is(whole: Bundle, cache: Path) -> None:
    assert bundle_for(str(whole.directory)) == whole.directory
    assert not cache.exists()


def test_a_run_is_exported_once_and_again_when_its_weights_change(run: Path, cache: Path, tiny_clip: Clip) -> None:
    steps: list[str] = []
    first = bundle_for(str(run), steps.append)
    assert open_bundle(first).manifest.source.recipe == {"model": "mini", "attack": {"steps": 2}}
    assert steps
    steps.clear()
    assert bundle_for(str(run), steps.append) == first
    assert steps == []
    weights = run / "model" / loading.WEIGHTS_FILE
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    second = bundle_for(str(run))
    assert bundles_in(cache) == sorted([first, second])
    assert open_bundle(first).manifest.source.tensors != open_bundle(second).manifest.source.tensors


def test_another_version_of_the_package_exports_anew(run: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = bundle_for(str(run))
    monkeypatch.setattr("pmgaft.__version__", "9.9.9")
    assert bundle_for(str(run)) != first


def test_a_damaged_bundle_in_the_cache_is_exported_anew(run: Path, cache: Path) -> None:
    first = bundle_for(str(run))
    (first / "tokenizer.json").write_text("{}")
    assert bundle_for(str(run)) == first
    open_bundle(first)


def test_what_is_neither_bundle_nor_run_nor_shipped_is_refused(cache: Path, tmp_path: Path) -> None:
    for name in ("nothing", str(tmp_path), "ViT-B-32"):
        with pytest.raises(ModelError, match=r"is neither a bundle nor a run nor one of mini, mini-robust"):
            bundle_for(name)


@pytest.mark.parametrize("name", zoo.NAMES)
def test_a_shipped_models_files_are_its_own_tower_and_the_shared_text(name: str) -> None:
    assert [path.name for path in shipped.model_files(name)] == [
        "open_clip_config.json", "text.safetensors", f"{name}.safetensors",
    ]  # fmt: skip


def test_the_torchscript_notice_is_silenced_and_no_other_warning_is() -> None:
    from pmgaft_export.bundle import quiet_torchscript

    with quiet_torchscript():
        warnings.warn("`torch.jit.trace` is deprecated. Please switch", FutureWarning, stacklevel=1)
        with pytest.raises(FutureWarning):
            warnings.warn("`torch.load` is deprecated", FutureWarning, stacklevel=1)
