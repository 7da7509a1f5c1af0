"""A bundle: a directory with everything needed to serve one CLIP, and a manifest that names every byte of it.

    BUNDLE/
      manifest.json          written last; lists every other file with its size and sha256
      FORMAT/image.*         pixels float32 [B, 3, H, W] in [0, 1] -> unit features float32 [B, D]
      FORMAT/text.*          tokens int64 [N, L] -> unit features float32 [N, D]; several formats may share one
      tokenizer.json         strings -> tokens, for the `tokenizers` library
      model_card.md          what this model is, for people

Refused by name: a file that is missing, damaged, of another size, a symbolic link, or not in the manifest; a path that
leaves the directory; a manifest that is not JSON, of an unknown schema version, or that names a file it does not list.
Nothing here is ever unpickled. A TorchScript or AOTInductor file is a program, opened only after its hash was found
right: serve only bundles whose source you trust.
"""

import hashlib
import json
import math
import stat
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal, cast

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, ValidationError
from torch import Tensor

from pmgaft.clip.preprocess import PreprocessSpec
from pmgaft.clip.text import Tokenizer
from pmgaft.errors import BundleError

SCHEMA_VERSION: Literal[2] = 2
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"
MODEL_CARD = "model_card.md"
MANIFEST_BYTES = 4 * 2**20  # far above any honest manifest; refused before it is read


def _inside(path: str) -> str:
    """A relative POSIX path that stays in the bundle, or ValueError."""
    parts = PurePosixPath(path).parts
    if not parts or "\\" in path or ":" in path or "\0" in path or path != "/".join(parts) or {"..", "/"} & set(parts):
        raise ValueError(f"{path!r} is not a plain path inside the bundle")
    return path


InsidePath = Annotated[str, AfterValidator(_inside)]
Precision = Literal["float32", "float16", "int8"]
Sha256 = Annotated[str, Field(pattern=r"\A[0-9a-f]{64}\z")]


class Entry(BaseModel):
    """What every part of a manifest has in common: frozen, and no field that this version does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class FileEntry(Entry):
    """One file of the bundle: its path from the bundle's root, its bytes, their sha256 in hexadecimal."""

    path: InsidePath
    size: Annotated[int, Field(ge=0)]
    sha256: Sha256


class Source(Entry):
    """Where the model came from: what was loaded, the run that made it with its recipe, the hash of its tensors."""

    model: str
    pretrained: str | None = None
    run: str | None = None
    recipe: dict[str, Any] | None = None
    tensors: str


class PreprocessEntry(Entry):
    """How an image file becomes pixels (`pmgaft.clip.preprocess`); size is (H, W)."""

    size: tuple[PositiveInt, PositiveInt]
    mean: tuple[float, float, float]
    std: tuple[PositiveFloat, PositiveFloat, PositiveFloat]
    interpolation: Literal["bicubic", "bilinear"]
    resize_mode: Literal["shortest", "squash", "longest"]


class TextEntry(Entry):
    """What the text encoder takes: at most `context_length` tokens; exactly so many where it is not causal."""

    context_length: PositiveInt
    causal: bool


class Parity(Entry):
    """Exported against eager: features over all batch sizes tried and the sample, answers over the sample.

    image_difference, text_difference: largest difference of one component of a unit feature.
    cosine, cosine_mean: of an image's exported and eager features, the lowest and the mean.
    sample: the data set of the pictures, or "shapes", which are made up; images: how many of them.
    top1_agreement: share of them with the same best text, texts that tie within float32's tolerance counting as the
    same. accuracy: share that the eager model answers rightly; None where the pictures have no labels. lost, won: how
    many only the eager, only the exported encoders answer rightly. machine: that ran the exported ones.
    """

    model_config = ConfigDict(allow_inf_nan=True)  # what the gate then refuses must be expressible

    batches: tuple[PositiveInt, ...]
    image_difference: float
    text_difference: float
    cosine: float
    cosine_mean: float
    sample: str
    images: PositiveInt
    top1_agreement: float
    accuracy: float | None
    lost: Annotated[int, Field(ge=0)]
    won: Annotated[int, Field(ge=0)]
    machine: str

    @property
    def cost_points(self) -> float:
        """Clean accuracy that the format costs on the sample, in percentage points."""
        return 100 * (self.lost - self.won) / self.images

    @property
    def cost_error_points(self) -> float:
        """The standard error of that, as the two models' answers are paired."""
        return 100 * math.sqrt(self.lost + self.won) / self.images


class FormatEntry(Entry):
    """One format: its two encoders, how they are written, and how well they agree with the model that was exported.

    target: the kind of machine (`runtime.target`) that a compiled encoder is for; None: any.
    calibration: the data set that int8 scales were measured on; None where none were needed.
    """

    image: InsidePath
    text: InsidePath
    precision: Precision
    target: str | None = None
    calibration: str | None = None
    parity: Parity


class SpeedEntry(Entry):
    """Images a second of one format's image encoder in batches of `batch`, on the machine named."""

    format: str
    device: Literal["cpu", "cuda"]
    machine: str
    batch: PositiveInt
    images_per_second: PositiveFloat


class DifferentiableEntry(Entry):
    """The TorchScript image encoder that probes differentiate, with its parity.

    gradient_difference: length of (exported - eager) input gradient over the eager one's, the worst image's.
    """

    model_config = ConfigDict(allow_inf_nan=True)

    image: InsidePath
    batches: tuple[PositiveInt, ...]
    image_difference: float
    gradient_difference: float


class Manifest(Entry):
    """Everything about a bundle that is not in its encoders.

    name: of the run, or the model's without its place.  logit_scale: the factor itself, not its logarithm.
    quickest: for a kind of device, the format that was measured to be the quickest there; speeds: what was measured,
    also of formats that are not in the bundle.
    """

    schema_version: Literal[2]
    name: str
    created: str
    source: Source
    preprocess: PreprocessEntry
    text: TextEntry
    logit_scale: PositiveFloat
    embed_dim: PositiveInt
    differentiable: DifferentiableEntry
    formats: Annotated[dict[str, FormatEntry], Field(min_length=1)]
    quickest: dict[Literal["cpu", "cuda"], str] = {}
    speeds: tuple[SpeedEntry, ...] = ()
    files: tuple[FileEntry, ...]
    versions: dict[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Bundle:
    """An opened bundle: every file was there, and every hash right, when `open_bundle` made this.

    `hash` is "sha256:" and the hash of manifest.json, and so of everything.
    """

    directory: Path
    manifest: Manifest
    hash: str

    def path(self, entry: str) -> Path:
        """The file that the manifest calls `entry`."""
        return self.directory / entry

    @property
    def preprocess(self) -> PreprocessSpec:
        """How an image file becomes this model's pixels."""
        return PreprocessSpec(**self.manifest.preprocess.model_dump())

    def tokenizer(self) -> Tokenizer:
        """Strings -> tokens int64 [N, L]."""
        return Tokenizer.load(self.path(TOKENIZER), self.manifest.text.context_length)

    def differentiable(self, device: torch.device | str = "cpu") -> Callable[[Tensor], Tensor]:
        """Pixels float32 [B, 3, H, W] in [0, 1] -> unit features [B, D], with a derivative, parameters frozen."""
        return load_torchscript(self.path(self.manifest.differentiable.image), device)


def open_bundle(directory: Path) -> Bundle:
    """Open a bundle after checking every byte of it.

    Raises: BundleError naming what is wrong: the module's docstring lists what is refused.
    """
    root = Path(directory)
    if not root.is_dir():
        raise BundleError(f"no bundle at {root}: it is not a directory")
    data = _read_manifest(root / MANIFEST)
    manifest = _parse(data, root)
    _check_names(manifest, root)
    for entry in manifest.files:
        _check_file(root, entry)
    if strangers := sorted(set(_names(root)) - {entry.path for entry in manifest.files}):
        raise BundleError(f"bundle {root}: {strangers[0]} is not in manifest.json")
    return Bundle(directory=root, manifest=manifest, hash=f"sha256:{hashlib.sha256(data).hexdigest()}")


def seal(directory: Path, manifest: Manifest) -> Bundle:
    """Write `manifest`, its list of files replaced by all that are in `directory` now, and open the result."""
    files = tuple(
        FileEntry(path=name, size=(directory / name).stat().st_size, sha256=sha256_file(directory / name))
        for name in _names(directory)
    )
    sealed = manifest.model_copy(update={"files": files})
    (directory / MANIFEST).write_text(sealed.model_dump_json(indent=2) + "\n", encoding="utf-8")
    return open_bundle(directory)


def load_torchscript(path: Path, device: torch.device | str = "cpu") -> Callable[[Tensor], Tensor]:
    """One encoder of an opened bundle, on `device`, wherever it was exported."""
    with quiet_torchscript():
        module = torch.jit.load(path, map_location=device)  # type: ignore[no-untyped-call]
    if torch.device(device).type == "cpu":  # convolutions and their gradients take a quarter less time so
        module = module.to(memory_format=torch.channels_last)
    return cast(Callable[[Tensor], Tensor], module.eval())


@contextmanager
def quiet_torchscript() -> Iterator[None]:
    """Silence torch's notice that TorchScript is deprecated, and no other warning.

    It works, a bundle must be differentiable without Python source, and its successor names one device.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"`torch\.jit\.\w+` is deprecated", FutureWarning)
        yield


def sha256_file(path: Path) -> str:
    """The sha256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_manifest(path: Path) -> bytes:
    size = _regular_size(path, "manifest.json")
    if size > MANIFEST_BYTES:
        raise BundleError(f"bundle {path.parent}: manifest.json has {size} bytes, more than {MANIFEST_BYTES}")
    return path.read_bytes()


def _parse(data: bytes, root: Path) -> Manifest:
    try:
        raw = json.loads(data, object_pairs_hook=_distinct)
    except (ValueError, RecursionError):
        raise BundleError(f"bundle {root}: manifest.json is not JSON") from None
    version = raw.get("schema_version") if isinstance(raw, dict) else None
    if type(version) is not int or version != SCHEMA_VERSION:
        raise BundleError(
            f"bundle {root}: manifest.json has schema version {version!r}; this pmgaft reads {SCHEMA_VERSION}. "
            "Export the model again, or use the pmgaft that wrote it"
        )
    try:
        return Manifest.model_validate_json(data, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise BundleError(f"bundle {root}: manifest.json: {where}: {first['msg']}") from None


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object in which no key stands twice: readers would not agree about its value."""
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise BundleError(f"manifest.json: the key {twice[:60]!r} is there twice")
    return content


def _check_names(manifest: Manifest, root: Path) -> None:
    """Every file is listed once, and what is used is listed."""
    listed = [entry.path for entry in manifest.files]
    if twice := sorted({name for name in listed if listed.count(name) > 1}):
        raise BundleError(f"bundle {root}: manifest.json lists {twice[0]} twice")
    used = {TOKENIZER, MODEL_CARD, manifest.differentiable.image}
    used.update(name for entry in manifest.formats.values() for name in (entry.image, entry.text))
    if unlisted := sorted(used - set(listed)):
        raise BundleError(f"bundle {root}: manifest.json uses {unlisted[0]} and does not list it")
    if strange := sorted(set(manifest.quickest.values()) - set(manifest.formats)):
        raise BundleError(f"bundle {root}: manifest.json calls {strange[0]} the quickest and does not hold it")


def _names(directory: Path) -> list[str]:
    """Every file below `directory` but the manifest, as sorted POSIX paths."""
    paths = (path.relative_to(directory).as_posix() for path in directory.rglob("*") if not _is_plain_directory(path))
    return sorted(name for name in paths if name != MANIFEST)


def _is_plain_directory(path: Path) -> bool:
    return stat.S_ISDIR(path.lstat().st_mode)


def _check_file(root: Path, entry: FileEntry) -> None:
    path = root / entry.path
    for parent in path.relative_to(root).parents[:-1]:
        if (root / parent).is_symlink():
            raise BundleError(f"bundle {root}: {parent} is a symbolic link")
    size = _regular_size(path, entry.path)
    if size != entry.size:
        raise BundleError(f"bundle {root}: {entry.path} has {size} bytes, and manifest.json says {entry.size}")
    if sha256_file(path) != entry.sha256:
        raise BundleError(f"bundle {root}: {entry.path} is damaged: its sha256 is not the one in manifest.json")


def _regular_size(path: Path, name: str) -> int:
    """Bytes of a regular file that is no link, looked at without following."""
    root = path.as_posix().removesuffix(f"/{name}")
    try:
        status = path.lstat()
    except OSError:
        raise BundleError(f"bundle {root}: {name} is missing") from None
    if stat.S_ISLNK(status.st_mode):
        raise BundleError(f"bundle {root}: {name} is a symbolic link")
    if not stat.S_ISREG(status.st_mode):
        raise BundleError(f"bundle {root}: {name} is not a file")
    return status.st_size
