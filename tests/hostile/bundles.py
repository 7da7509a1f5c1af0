"""Bundles that must be refused: name -> (what is done to a good one, what the refusal says).

Each change gets the bundle's directory and, where it is one of `MANIFESTS`, the manifest as JSON. Hashes are put right
again afterwards where an attacker would (`relist`), so that the hash is not what refuses.
"""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

Manifest = dict[str, Any]
IMAGE = "torchscript/image.pt"


def path(text: str) -> Callable[[Manifest], object]:
    """The first file's path in the manifest is this one."""
    return lambda manifest: manifest["files"][0].update(path=text)


def image(text: str) -> Callable[[Manifest], object]:
    """The encoder that probes differentiate lies at this path."""
    return lambda manifest: manifest["differentiable"].update(image=text)


def put(*keys: str, value: Any) -> Callable[[Manifest], object]:
    """One value, somewhere inside, is another one."""

    def change(manifest: Manifest) -> None:
        place = manifest
        for key in keys[:-1]:
            place = place[key]
        place[keys[-1]] = value

    return change


MANIFESTS: dict[str, tuple[Callable[[Manifest], object], str]] = {
    # paths
    "a path that leaves": (path("../outside"), "plain path"),
    "a path that leaves and comes back": (path("torchscript/../../bundle/x"), "plain path"),
    "an absolute path": (path("/etc/passwd"), "plain path"),
    "a path of Windows": (path("C:\\windows\\system.ini"), "plain path"),
    "a path with a stream": (path("model_card.md:hidden"), "plain path"),
    "a path of another machine": (path("\\\\server\\share"), "plain path"),
    "an empty path": (path(""), "plain path"),
    "a path that is a dot": (path("."), "plain path"),
    "a path with a NUL": (path("a\0b"), "plain path"),
    "a path with two slashes": (path("torchscript//image.pt"), "plain path"),
    "a path that ends with a slash": (path("torchscript/"), "plain path"),
    "a path of half a surrogate pair": (path("\ud800"), "Invalid JSON"),
    "an encoder outside": (image("../../image.pt"), "plain path"),
    "an encoder that is not listed": (image("other.pt"), "does not list"),
    "a format's encoder outside": (put("formats", "torchscript", "image", value="/tmp/x.pt"), "plain path"),
    # what it says of itself
    "a schema of the future": (put("schema_version", value=3), "schema version 3"),
    "a schema of the past": (put("schema_version", value=1), "schema version 1"),
    "a schema that is true": (put("schema_version", value=True), "schema version True"),
    "a schema that is a word": (put("schema_version", value="2"), "schema version '2'"),
    "a field of tomorrow": (put("license", value="MIT"), "license"),
    "no files": (put("files", value=[]), "does not list"),
    "files that are an object": (put("files", value={}), "files"),
    "a file twice": (lambda manifest: manifest["files"].append(manifest["files"][0]), "twice"),
    "a negative size": (lambda manifest: manifest["files"][0].update(size=-1), "size"),
    "a size that is a fraction": (lambda manifest: manifest["files"][0].update(size=1.5), "size"),
    "another size": (lambda manifest: manifest["files"][0].update(size=10**30), "bytes, and manifest.json says"),
    "another hash": (lambda manifest: manifest["files"][0].update(sha256="0" * 64), "damaged"),
    "a hash in capitals": (lambda manifest: manifest["files"][0].update(sha256="A" * 64), "sha256"),
    "a hash with a line break": (lambda manifest: manifest["files"][0].update(sha256="0" * 64 + "\n"), "sha256"),
    "a scale that is not a number": (put("logit_scale", value=float("nan")), "logit_scale|not JSON"),
    "a scale without end": (put("logit_scale", value=float("inf")), "logit_scale|not JSON"),
    "a scale of 0": (put("logit_scale", value=0), "logit_scale"),
    "pictures of no pixels": (put("preprocess", "size", value=[0, 0]), "preprocess.size"),
    "pictures by a method that is none": (put("preprocess", "interpolation", value="eval"), "interpolation"),
    "no formats": (put("formats", value={}), "formats"),
    "the quickest is not there": (put("quickest", value={"cpu": "onnx-int4"}), "quickest"),
}


def link(target: str, name: str = "extra") -> Callable[[Path], object]:
    return lambda bundle: os.symlink(target, bundle / name)


def replace_by_link(bundle: Path) -> None:
    (bundle / IMAGE).rename(bundle.parent / "image.pt")
    (bundle / IMAGE).symlink_to(bundle.parent / "image.pt")


def replace_by_pipe(bundle: Path) -> None:
    (bundle / "model_card.md").unlink()
    os.mkfifo(bundle / "model_card.md")


def write(name: str, data: bytes) -> Callable[[Path], object]:
    return lambda bundle: (bundle / name).write_bytes(data)


def _twice(bundle: Path) -> None:
    """A manifest in which one key stands twice: readers that take the first and the last would differ."""
    text = (bundle / "manifest.json").read_text()
    (bundle / "manifest.json").write_text('{"schema_version": 2, ' + text.lstrip()[1:])


FOLDERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a file that nobody listed": (write("extra.pt", b"x"), "not in manifest.json"),
    "a hidden file that nobody listed": (write(".hidden", b"x"), "not in manifest.json"),
    "a link to a folder outside": (link("/etc"), "not in manifest.json"),
    "a link to nowhere": (link("nowhere"), "not in manifest.json"),
    "a link to itself": (link("extra"), "not in manifest.json"),
    "an encoder that is a link": (replace_by_link, "symbolic link"),
    "a pipe that would block for ever": (replace_by_pipe, "not a file"),
    "an encoder that is empty": (write(IMAGE, b""), "bytes, and manifest.json says"),
    "no manifest": (lambda bundle: (bundle / "manifest.json").unlink(), "manifest.json is missing"),
    "a manifest that is a link": (
        lambda bundle: [(bundle / "manifest.json").rename(bundle.parent / "m"), link("../m", "manifest.json")(bundle)],
        "symbolic link",
    ),
    "a manifest of 5 MB": (write("manifest.json", b" " * 5 * 2**20), "more than"),
    "a manifest of brackets": (write("manifest.json", b"[" * 100_000), "not JSON"),
    "a manifest that is a list": (write("manifest.json", b"[]"), "schema version None"),
    "a manifest that is not text": (write("manifest.json", b"\xff\xfe{}"), "not JSON"),
    "a manifest that is a pickle": (write("manifest.json", b"\x80\x04\x95"), "not JSON"),
    "a manifest that is empty": (write("manifest.json", b""), "not JSON"),
    "a manifest with a key twice": (_twice, "twice"),
}

_ENTRY = {"path": IMAGE, "size": 1, "sha256": hashlib.sha256(b"x").hexdigest()}
_PARITY = {
    "batches": [1], "image_difference": 0.0, "text_difference": 0.0, "cosine": 1.0, "cosine_mean": 1.0,
    "sample": "shapes", "images": 1, "top1_agreement": 1.0, "accuracy": None, "lost": 0, "won": 0, "machine": "x",
}  # fmt: skip
GOOD: Manifest = {
    "schema_version": 2, "name": "m", "created": "2026", "source": {"model": "m", "tensors": "x"},
    "preprocess": {"size": [32, 32], "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic",
                   "resize_mode": "shortest"},
    "text": {"context_length": 16, "causal": True}, "logit_scale": 10.0, "embed_dim": 24,
    "differentiable": {"image": IMAGE, "batches": [1], "image_difference": 0.0, "gradient_difference": 0.0},
    "formats": {"torchscript": {"image": IMAGE, "text": IMAGE, "precision": "float32", "parity": _PARITY}},
    "files": [_ENTRY, _ENTRY | {"path": "tokenizer.json"}, _ENTRY | {"path": "model_card.md"}],
    "versions": {"pmgaft": "0"},
}  # fmt: skip
SEEDS: dict[str, bytes] = {"good": json.dumps(GOOD).encode(), "empty": b"{}"}
"""What fuzzing of the manifest starts from."""
