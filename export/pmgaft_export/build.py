"""From a CLIP in memory to a bundle on disk: export, compare, seal, rename.

Everything is written to a directory beside the destination, which takes its name when it is whole: a bundle is there
or it is not, whenever the process dies.
"""

import copy
import shutil
import tomllib
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from torch import Tensor

import pmgaft
from pmgaft.clip.image import fold_batchnorm, freeze, frozen_copy
from pmgaft.clip.loading import Clip, tensors_hash
from pmgaft.errors import BundleError, InputError

from .bundle import (
    MANIFEST,
    MODEL_CARD,
    SCHEMA_VERSION,
    TOKENIZER,
    Bundle,
    DifferentiableEntry,
    FormatEntry,
    Manifest,
    PreprocessEntry,
    Source,
    TextEntry,
    load_torchscript,
    seal,
)
from .formats import FORMATS, Encoder, write_torchscript
from .model_card import model_card
from .parity import TEXTS, Reference, enforce, enforce_gradient, measure, measure_gradient, reference, sample_pixels

DEFAULT_FORMATS = ("torchscript", "onnx")
TRACED_BATCH = 2
VERSIONED = ("torch", "open_clip_torch", "timm", "onnx", "onnxscript")

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoders:
    """Both encoders of a CLIP as they are written, and the eager model that they must agree with."""

    image: Encoder
    text: Encoder
    eager: Reference


def export_bundle(
    clip: Clip,
    output_dir: Path,
    formats: Sequence[str] = DEFAULT_FORMATS,
    *,
    source: Source | None = None,
    force: bool = False,
    progress: Progress = lambda step: None,
) -> Bundle:
    """Write `clip` as a bundle, and open it.

    formats: names from `FORMATS`; the differentiable TorchScript image encoder is in every bundle.
    source: where the model came from; by default what `clip` itself knows.  force: replace a bundle that is there.
    progress: called with a few words before each step.
    Raises: InputError for an unknown format; BundleError if `output_dir` is taken; ParityError, with nothing written,
    if an exported encoder does not agree with the eager one.
    """
    check_formats(formats)
    check_free(output_dir, force=force)
    encoders = prepare(clip)
    with _in_place_of(output_dir) as directory:
        progress("differentiable image encoder: torchscript")
        differentiable = _write_differentiable(encoders, directory)
        entries = {}
        for name in dict.fromkeys(formats):
            progress(f"image and text encoder: {name}")
            entries[name] = _write_format(name, encoders, directory)
        clip.tokenizer.save(directory / TOKENIZER)
        manifest = _manifest(clip, source or source_of(clip), differentiable, entries)
        (directory / MODEL_CARD).write_text(model_card(manifest), encoding="utf-8")
        progress("hashes and manifest")
        bundle = seal(directory, manifest)
    return Bundle(directory=output_dir, manifest=bundle.manifest, hash=bundle.hash)


def check_formats(formats: Sequence[str]) -> None:
    """Raise InputError unless there is at least one format and each is known."""
    if unknown := sorted(set(formats) - set(FORMATS)):
        raise InputError(f"unknown format {unknown[0]!r}; known: {', '.join(FORMATS)}", field="format")
    if not formats:
        raise InputError(f"a bundle needs at least one format of {', '.join(FORMATS)}", field="format")


def check_free(output_dir: Path, *, force: bool) -> None:
    """Raise BundleError unless a bundle may be written there: a new or empty place or, by force, a bundle's."""
    if not output_dir.exists() and not output_dir.is_symlink():
        return
    if not output_dir.is_dir() or output_dir.is_symlink():
        raise BundleError(f"{output_dir} exists and is not a directory", field="output_dir")
    if not any(output_dir.iterdir()):
        return
    if not (output_dir / MANIFEST).is_file():
        raise BundleError(f"{output_dir} exists, and is not a bundle: choose another place", field="output_dir")
    if not force:
        raise BundleError(f"{output_dir} already holds a bundle: --force replaces it", field="output_dir")


def source_of(clip: Clip, run: Path | None = None) -> Source:
    """Where `clip` came from; with a run directory, its name and its recipe too."""
    recipe = run / "recipe.toml" if run else None
    return Source(
        model=clip.spec.model,
        pretrained=clip.spec.pretrained,
        run=run.resolve().name if run else None,
        recipe=tomllib.loads(recipe.read_text(encoding="utf-8")) if recipe and recipe.is_file() else None,
        tensors=tensors_hash(clip.open_clip_model),
    )


def prepare(clip: Clip) -> Encoders:
    """Frozen copies on the CPU, with examples to trace, and the eager reference with its inputs.

    BatchNorm is folded into its convolutions: the same function, faster. The reference is not folded.
    """
    eager_image = frozen_copy(clip.image).cpu()
    text = freeze(copy.deepcopy(clip.text_tower)).cpu()
    length = None if clip.text.causal else clip.tokenizer.context_length

    def tokens(texts: Sequence[str]) -> Tensor:
        return clip.tokenizer.pad(clip.tokenizer.ids(texts), length)

    return Encoders(
        image=Encoder(
            module=freeze(fold_batchnorm(eager_image)),
            example=sample_pixels(TRACED_BATCH, eager_image.size, seed=0),
            dynamic={0: "batch"},
        ),
        text=Encoder(
            module=text,
            example=tokens(TEXTS[:TRACED_BATCH]),
            dynamic={0: "batch", 1: "length"} if clip.text.causal else {0: "batch"},
        ),
        eager=reference(eager_image, text, tokens, eager_image.size),
    )


def _write_differentiable(encoders: Encoders, directory: Path) -> DifferentiableEntry:
    path = _encoder_path(directory, "torchscript", "image")
    write_torchscript(encoders.image, path)
    entry = path.relative_to(directory).as_posix()
    found = measure_gradient(encoders.eager, encoders.image.module, load_torchscript(path), entry)
    enforce_gradient(found)
    return found


def _write_format(name: str, encoders: Encoders, directory: Path) -> FormatEntry:
    chosen = FORMATS[name]
    image, text = _encoder_path(directory, name, "image"), _encoder_path(directory, name, "text")
    if not image.exists():  # the differentiable encoder is TorchScript's own
        chosen.write(encoders.image, image)
    chosen.write(encoders.text, text)
    found = measure(encoders.eager, chosen.open(image), chosen.open(text))
    enforce(name, found)
    return FormatEntry(
        image=image.relative_to(directory).as_posix(), text=text.relative_to(directory).as_posix(), parity=found
    )


def _encoder_path(directory: Path, name: str, kind: str) -> Path:
    path = directory / name / f"{kind}{FORMATS[name].suffix}"
    path.parent.mkdir(exist_ok=True)
    return path


def _manifest(
    clip: Clip, source: Source, differentiable: DifferentiableEntry, formats: dict[str, FormatEntry]
) -> Manifest:
    """The manifest, its list of files still empty."""
    return Manifest(
        schema_version=SCHEMA_VERSION,
        name=source.run or Path(clip.name).name,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        source=source,
        preprocess=PreprocessEntry(**asdict(clip.preprocess)),
        text=TextEntry(context_length=clip.tokenizer.context_length, causal=clip.text.causal),
        logit_scale=clip.logit_scale,
        embed_dim=clip.embed_dim,
        differentiable=differentiable,
        formats=formats,
        files=(),
        versions={"pmgaft": pmgaft.__version__} | {name: version(name) for name in VERSIONED},
    )


@contextmanager
def _in_place_of(destination: Path) -> Iterator[Path]:
    """A new directory beside `destination`, which takes its place at the end, or vanishes if anything goes wrong."""
    destination = destination.absolute()
    destination.parent.mkdir(parents=True, exist_ok=True)
    partial = destination.with_name(f".{destination.name}.{uuid.uuid4().hex[:8]}.partial")
    partial.mkdir()
    try:
        yield partial
        if destination.exists():
            old = partial.with_suffix(".old")
            destination.rename(old)
            partial.rename(destination)
            shutil.rmtree(old)
        else:
            partial.rename(destination)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
