"""What a bundle is, and everything that opening one refuses."""

import hashlib
import json
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pmgaft.clip.loading import Clip
from pmgaft.errors import BundleError
from pmgaft_export.build import Evidence, export_bundle
from pmgaft_export.bundle import MANIFEST, MANIFEST_BYTES, Bundle, open_bundle

IMAGE = "torchscript/image.pt"
TEXT = "torchscript/text.pt"


@pytest.fixture(scope="module")
def written(tiny_clip: Clip, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    place = tmp_path_factory.mktemp("written") / "bundle"
    return export_bundle(tiny_clip, place, formats=("torchscript",), evidence=Evidence(parity_images=12))


@pytest.fixture
def bundle(written: Bundle, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(written.directory, tmp_path / "bundle"))


def edit(bundle: Path, change: Callable[[dict[str, Any]], object]) -> None:
    manifest = json.loads((bundle / MANIFEST).read_text())
    change(manifest)
    (bundle / MANIFEST).write_text(json.dumps(manifest))


def relist(bundle: Path, name: str) -> None:
    """Give a file the size and hash that it now has: what an attacker would do."""
    data = (bundle / name).read_bytes()

    def change(manifest: dict[str, Any]) -> None:
        entry = next(entry for entry in manifest["files"] if entry["path"] == name)
        entry.update(size=len(data), sha256=hashlib.sha256(data).hexdigest())

    edit(bundle, change)


def test_a_bundle_opens_wherever_it_is_copied_and_keeps_its_hash(written: Bundle, bundle: Path) -> None:
    opened = open_bundle(bundle)
    assert opened.manifest == written.manifest
    assert opened.hash == written.hash == "sha256:" + hashlib.sha256((bundle / MANIFEST).read_bytes()).hexdigest()


def test_the_manifest_lists_every_file_with_its_size_and_hash(written: Bundle) -> None:
    there = {p.relative_to(written.directory).as_posix() for p in written.directory.rglob("*") if p.is_file()}
    listed = {entry.path: entry for entry in written.manifest.files}
    assert set(listed) == there - {MANIFEST}
    assert {IMAGE, TEXT, "tokenizer.json", "model_card.md"} <= set(listed)
    for name, entry in listed.items():
        data = (written.directory / name).read_bytes()
        assert (entry.size, entry.sha256) == (len(data), hashlib.sha256(data).hexdigest())


def test_a_bundle_says_what_the_clip_said(written: Bundle, tiny_clip: Clip) -> None:
    assert written.preprocess == tiny_clip.preprocess
    assert written.manifest.logit_scale == tiny_clip.logit_scale
    assert written.manifest.embed_dim == tiny_clip.embed_dim
    assert torch.equal(written.tokenizer()(["cat", "a red bicycle"]), tiny_clip.tokenizer(["cat", "a red bicycle"]))


@pytest.mark.parametrize("name", [IMAGE, TEXT, "tokenizer.json", "model_card.md"])
def test_one_flipped_bit_is_refused_by_the_files_name(bundle: Path, name: str) -> None:
    data = bytearray((bundle / name).read_bytes())
    data[len(data) // 2] ^= 1
    (bundle / name).write_bytes(data)
    with pytest.raises(BundleError, match=f"{name} is damaged"):
        open_bundle(bundle)


@pytest.mark.parametrize("size", [0, 10, None])
def test_a_file_of_another_size_is_refused_by_its_name(bundle: Path, size: int | None) -> None:
    data = (bundle / IMAGE).read_bytes()
    (bundle / IMAGE).write_bytes(data + b"more" if size is None else data[:size])
    with pytest.raises(BundleError, match=f"{IMAGE} has .* bytes, and manifest.json says {len(data)}"):
        open_bundle(bundle)


def test_a_missing_file_is_refused_by_its_name(bundle: Path) -> None:
    (bundle / TEXT).unlink()
    with pytest.raises(BundleError, match=f"{TEXT} is missing"):
        open_bundle(bundle)


def test_a_file_that_the_manifest_does_not_name_is_refused(bundle: Path) -> None:
    (bundle / "torchscript" / "more.pt").write_bytes(b"")
    with pytest.raises(BundleError, match=r"torchscript/more.pt is not in manifest.json"):
        open_bundle(bundle)


def test_a_folder_in_a_files_place_is_refused(bundle: Path) -> None:
    (bundle / TEXT).unlink()
    (bundle / TEXT).mkdir()
    with pytest.raises(BundleError, match=f"{TEXT} is not a file"):
        open_bundle(bundle)


def test_symbolic_links_are_refused_even_to_the_right_bytes(bundle: Path, tmp_path: Path) -> None:
    shutil.move(bundle / IMAGE, tmp_path / "image.pt")
    (bundle / IMAGE).symlink_to(tmp_path / "image.pt")
    with pytest.raises(BundleError, match=f"{IMAGE} is a symbolic link"):
        open_bundle(bundle)


def test_a_linked_folder_is_refused_even_with_the_right_files(bundle: Path, tmp_path: Path) -> None:
    shutil.move(bundle / "torchscript", tmp_path / "elsewhere")
    (bundle / "torchscript").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BundleError, match="torchscript is a symbolic link"):
        open_bundle(bundle)


def test_a_linked_manifest_is_refused(bundle: Path, tmp_path: Path) -> None:
    shutil.move(bundle / MANIFEST, tmp_path / MANIFEST)
    (bundle / MANIFEST).symlink_to(tmp_path / MANIFEST)
    with pytest.raises(BundleError, match=r"manifest.json is a symbolic link"):
        open_bundle(bundle)


@pytest.mark.parametrize(
    "path",
    ["../secret", "/etc/passwd", "torchscript/../../secret", "..", "", ".", "a//b", "./a", "a\\..\\b", "C:/b", "a\0b"],
)
def test_a_path_that_leaves_the_bundle_is_refused(bundle: Path, path: str) -> None:
    (bundle.parent / "secret").write_bytes(b"")
    empty = hashlib.sha256(b"").hexdigest()
    edit(bundle, lambda manifest: manifest["files"].append({"path": path, "size": 0, "sha256": empty}))
    with pytest.raises(BundleError, match="is not a plain path inside the bundle"):
        open_bundle(bundle)


@pytest.mark.parametrize("version", [0, 1, 3, "2", 2.0, True, None, [2]])
def test_an_unknown_schema_version_is_refused_and_named(bundle: Path, version: object) -> None:
    edit(bundle, lambda manifest: manifest.update(schema_version=version))
    with pytest.raises(BundleError, match=r"has schema version .*; this pmgaft reads 2"):
        open_bundle(bundle)


@pytest.mark.parametrize("text", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b'{"a": 1} {}'])
def test_a_manifest_that_is_not_json_is_refused(bundle: Path, text: bytes) -> None:
    (bundle / MANIFEST).write_bytes(text)
    with pytest.raises(BundleError, match=r"manifest.json is not JSON"):
        open_bundle(bundle)


def test_json_that_is_not_an_object_is_refused(bundle: Path) -> None:
    (bundle / MANIFEST).write_text("[]")
    with pytest.raises(BundleError, match="schema version None"):
        open_bundle(bundle)


def test_a_giant_manifest_is_refused_unread(bundle: Path) -> None:
    with (bundle / MANIFEST).open("wb") as file:
        file.truncate(MANIFEST_BYTES + 1)
    with pytest.raises(BundleError, match=r"manifest.json has \d+ bytes"):
        open_bundle(bundle)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.pop("logit_scale"), "logit_scale"),
        (lambda m: m.update(logit_scale=float("nan")), "logit_scale"),
        (lambda m: m.update(logit_scale=-1.0), "logit_scale"),
        (lambda m: m.update(embed_dim="32"), "embed_dim"),
        (lambda m: m.update(surprise=1), "surprise"),
        (lambda m: m.update(formats={}), "formats"),
        (lambda m: m["preprocess"].update(size=[0, 32]), "preprocess.size"),
        (lambda m: m["files"][0].update(sha256="0" * 63), r"files\.0\.sha256"),
        (lambda m: m["files"][0].update(size=-1), r"files\.0\.size"),
        (lambda m: m["files"].append(m["files"][0]), "twice"),
        (lambda m: m["formats"]["torchscript"].update(text="torchscript/other.pt"), "uses torchscript/other.pt"),
        (lambda m: m["differentiable"].update(image="other.pt"), r"uses other.pt and does not list it"),
        (lambda m: m.update(quickest={"cpu": "onnx"}), "calls onnx the quickest and does not hold it"),
        (lambda m: m.update(quickest={"tpu": "torchscript"}), "quickest"),
        (lambda m: m["formats"]["torchscript"].update(precision="int4"), "formats.torchscript.precision"),
    ],
)
def test_a_manifest_with_a_mistake_is_refused_by_the_fields_name(
    bundle: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    edit(bundle, change)
    with pytest.raises(BundleError, match=message):
        open_bundle(bundle)


def test_a_directory_without_a_manifest_is_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"manifest.json is missing"):
        open_bundle(tmp_path)
    with pytest.raises(BundleError, match="not a directory"):
        open_bundle(tmp_path / "nowhere")


class Bomb:
    """Unpickled, it raises the alarm."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return pytest.fail, ("a bundle's file was unpickled",)


@pytest.mark.parametrize("wrap", [pickle.dumps, None], ids=["pickle", "torch.save"])
def test_a_pickle_in_an_encoders_place_is_never_unpickled(bundle: Path, wrap: Callable[[object], bytes] | None) -> None:
    if wrap:
        (bundle / IMAGE).write_bytes(wrap(Bomb()))
    else:
        torch.save(Bomb(), bundle / IMAGE)
    with pytest.raises(BundleError):
        open_bundle(bundle)
    relist(bundle, IMAGE)
    opened = open_bundle(bundle)
    with pytest.raises(RuntimeError):
        opened.differentiable()


def test_no_encoder_is_opened_before_its_hash_is_found_right(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def alarm(*_: object, **__: object) -> None:
        pytest.fail("an encoder of a damaged bundle was opened")

    monkeypatch.setattr(torch.jit, "load", alarm)
    monkeypatch.setattr(torch, "load", alarm)
    (bundle / TEXT).write_bytes((bundle / TEXT).read_bytes()[::-1])
    with pytest.raises(BundleError, match=f"{TEXT} is damaged"):
        open_bundle(bundle)


def test_opening_a_bundle_needs_no_training_or_export_library(bundle: Path) -> None:
    heavy = [
        "open_clip",
        "timm",
        "torchvision",
        "huggingface_hub",
        "onnx",
        "onnxscript",
        "onnxruntime",
        "torch.onnx._internal.exporter",
    ]
    program = f"""
import sys
from pathlib import Path
from pmgaft_export.bundle import open_bundle
bundle = open_bundle(Path({str(bundle)!r}))
bundle.tokenizer()(["cat"]), bundle.preprocess, bundle.differentiable()
print(sorted(set({heavy!r}) & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
