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
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

import pmgaft
from pmgaft.clip.image import fold_batchnorm, freeze, frozen_copy
from pmgaft.clip.loading import Clip, tensors_hash
from pmgaft.errors import BundleError, InputError, PmgaftError
from pmgaft.evaluation.run import nothing_in_place

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
    SpeedEntry,
    TextEntry,
    load_torchscript,
    seal,
)
from .formats import FORMATS, Encoder, Tools, write_torchscript
from .model_card import model_card
from .parity import Reference, enforce, enforce_gradient, measure, measure_gradient, reference
from .runtime import CPU, machine, open_encoder, target
from .sample import BUILT_IN, TEXTS, comparison_sample, photographs, sample_pixels
from .speed import measure_speed, quickest

AUTO = "auto"
DEFAULT_FORMATS = ("torchscript", "onnx")
CANDIDATES = {
    "cpu": ("torchscript", "onnx", "onnx-int8"),
    "cuda": ("torchscript", "torchscript-fp16", "onnx-fp16", "pt2-fp16"),
}
"""What "auto" tries on each kind of device. The first is kept whatever is found: it runs everywhere and probes need it.
On CPUs a compiled format is slower than ONNX Runtime and takes a minute to make, so it is written by name alone."""

PARITY_IMAGES = 120
SLOW_PARITY_IMAGES = 16  # for torch's half precision on a CPU, which is ten times slower than float32
TRACED_BATCH = 2
VERSIONED = ("torch", "open_clip_torch", "timm", "onnx", "onnxscript")

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """What formats are judged by.

    parity_data, calibration: data sets as `open_dataset` takes them, to compare on and to measure int8 scales on; None:
    the built-in photographs. parity_images: at most so many of the former. device: to measure and to compile for.
    """

    parity_data: str | None = None
    parity_images: int = PARITY_IMAGES
    calibration: str | None = None
    device: torch.device = CPU


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoders:
    """Both encoders of a CLIP as they are written, and the eager model that they must agree with."""

    image: Encoder
    text: Encoder
    eager: Reference


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """The formats of a bundle and, where they were timed, which one is the quickest on what kind of device."""

    entries: dict[str, FormatEntry]
    quickest: dict[Literal["cpu", "cuda"], str] = field(default_factory=dict)
    speeds: tuple[SpeedEntry, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """One export under way."""

    clip: Clip
    encoders: Encoders
    directory: Path
    evidence: Evidence
    progress: Progress


def export_bundle(
    clip: Clip,
    output_dir: Path,
    formats: Sequence[str] = DEFAULT_FORMATS,
    *,
    source: Source | None = None,
    evidence: Evidence | None = None,
    force: bool = False,
    progress: Progress = lambda step: None,
) -> Bundle:
    """Write `clip` as a bundle, and open it.

    formats: names from `FORMATS`, or "auto" alone: those that suit the device are tried, and the quickest is kept.
    The differentiable TorchScript image encoder is in every bundle.
    source: where the model came from; by default what `clip` itself knows.  force: replace a bundle that is there.
    progress: called with a few words before each step.
    Raises: InputError for an unknown format; BundleError if `output_dir` is taken; ParityError, with nothing written,
    if an exported encoder does not agree with the eager one.
    """
    check_formats(formats)
    check_free(output_dir, force=force)
    evidence = evidence or Evidence()
    encoders = prepare(clip, evidence)
    with _in_place_of(output_dir) as directory:
        work = Work(clip=clip, encoders=encoders, directory=directory, evidence=evidence, progress=progress)
        progress("differentiable image encoder: torchscript")
        differentiable = _write_differentiable(encoders, directory)
        chosen = _choose(work) if AUTO in formats else Chosen(entries=_entries(work, formats))
        clip.tokenizer.save(directory / TOKENIZER)
        manifest = _manifest(clip, source or source_of(clip), differentiable, chosen)
        (directory / MODEL_CARD).write_text(model_card(manifest), encoding="utf-8")
        progress("hashes and manifest")
        bundle = seal(directory, manifest)
    return Bundle(directory=output_dir, manifest=bundle.manifest, hash=bundle.hash)


def check_formats(formats: Sequence[str]) -> None:
    """Raise InputError unless there is at least one format and each is known, or "auto" stands alone."""
    if AUTO in formats:
        if set(formats) != {AUTO}:
            raise InputError("auto chooses the formats itself: name it alone, or name formats", field="format")
        return
    if unknown := sorted(set(formats) - set(FORMATS)):
        raise InputError(f"unknown format {unknown[0]!r}; known: {AUTO}, {', '.join(FORMATS)}", field="format")
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


def prepare(clip: Clip, evidence: Evidence) -> Encoders:
    """Frozen copies on the CPU, with examples to trace, and what the eager model answers.

    BatchNorm is folded into its convolutions, and nothing is computed in place: the same function, faster to run, to
    differentiate and to export. The reference is as it was trained.
    """
    eager_image = frozen_copy(clip.image).cpu()
    text = freeze(copy.deepcopy(clip.text_tower)).cpu()
    length = None if clip.text.causal else clip.tokenizer.context_length

    def tokens(texts: Sequence[str]) -> Tensor:
        return clip.tokenizer.pad(clip.tokenizer.ids(texts), length)

    return Encoders(
        image=Encoder(
            module=nothing_in_place(freeze(fold_batchnorm(eager_image))),
            example=sample_pixels(TRACED_BATCH, eager_image.size, seed=0),
            dynamic={0: "batch"},
        ),
        text=Encoder(
            module=text,
            example=tokens(TEXTS[:TRACED_BATCH]),
            dynamic={0: "batch", 1: "length"} if clip.text.causal else {0: "batch"},
        ),
        eager=reference(
            eager_image,
            text,
            tokens,
            eager_image.size,
            comparison_sample(clip.preprocess, evidence.parity_data, evidence.parity_images),
        ),
    )


def _write_differentiable(encoders: Encoders, directory: Path) -> DifferentiableEntry:
    path = _encoder_path(directory, "torchscript", "image")
    write_torchscript(encoders.image, path)
    entry = path.relative_to(directory).as_posix()
    found = measure_gradient(encoders.eager, encoders.image.module, load_torchscript(path), entry)
    enforce_gradient(found)
    return found


def _entries(work: Work, formats: Sequence[str]) -> dict[str, FormatEntry]:
    """Write every format, those first on whose files others build."""
    entries = {}
    for name in (name for name in FORMATS if name in formats):
        work.progress(f"image and text encoder: {name}")
        entries[name] = _write_format(name, work)
    return entries


def _choose(work: Work) -> Chosen:
    """Write every candidate that can be written and agrees, time them, and keep the first and the quickest."""
    device, directory = work.evidence.device, work.directory
    kind: Literal["cpu", "cuda"] = "cuda" if device.type == "cuda" else "cpu"
    first, *others = CANDIDATES[kind]
    entries = _entries(work, [first])
    for name in others:
        try:
            entries |= _entries(work, [name])
        except PmgaftError as error:
            work.progress(f"left out: {error.message}")
    work.progress(f"timing {', '.join(entries)}")
    opened = {
        name: open_encoder(directory / entry.image, device, precision=entry.precision).run
        for name, entry in entries.items()
    }
    rates = measure_speed(opened, work.clip.image.size)
    best = quickest(rates)
    work.progress(f"the quickest is {best}")
    kept = {name: entries[name] for name in dict.fromkeys((first, best))}
    _keep_only(directory, {path for entry in kept.values() for path in (entry.image, entry.text)})
    return Chosen(
        entries=kept,
        quickest={kind: best},
        speeds=tuple(
            SpeedEntry(format=name, device=kind, machine=machine(device), batch=batch, images_per_second=round(rate, 2))
            for name, found in rates.items()
            for batch, rate in found.items()
        ),
    )


def _keep_only(directory: Path, used: set[str]) -> None:
    """Delete all encoders but those named, with the weights beside them."""
    for path in directory.rglob("*"):
        if path.is_file() and path.relative_to(directory).as_posix().removesuffix(".data") not in used:
            path.unlink()
    for path in directory.iterdir():
        if not any(path.iterdir()):
            path.rmdir()


def _write_format(name: str, work: Work) -> FormatEntry:
    chosen, directory, evidence = FORMATS[name], work.directory, work.evidence
    image, text = _encoder_path(directory, name, "image"), _encoder_path(directory, chosen.text, "text")
    graph = directory / "onnx" / "image.onnx"
    calibrated: list[str] = []

    def pictures() -> Tensor:
        calibrated.append(evidence.calibration or BUILT_IN)
        return photographs(work.clip.preprocess, evidence.calibration)

    tools = Tools(device=evidence.device, photographs=pictures, graph=graph if graph.exists() else None)
    if not image.exists():  # the differentiable encoder is TorchScript's own
        chosen.write(work.encoders.image, image, tools)
    if not text.exists():
        FORMATS[chosen.text].write(work.encoders.text, text, tools)
    device = evidence.device if chosen.gpu or chosen.compiled else CPU
    slow = chosen.precision == "float16" and chosen.suffix != ".onnx" and device.type == "cpu"
    found = measure(
        work.encoders.eager,
        open_encoder(image, device, precision=chosen.precision).run,
        open_encoder(text, device).run,
        images=SLOW_PARITY_IMAGES if slow else None,
        device=device,
    )
    enforce(name, chosen.precision, found)
    return FormatEntry(
        image=image.relative_to(directory).as_posix(),
        text=text.relative_to(directory).as_posix(),
        precision=chosen.precision,
        target=target(device) if chosen.compiled else None,
        calibration=calibrated[0] if calibrated else None,
        parity=found,
    )


def _encoder_path(directory: Path, name: str, kind: str) -> Path:
    path = directory / name / f"{kind}{FORMATS[name].suffix}"
    path.parent.mkdir(exist_ok=True)
    return path


def _manifest(clip: Clip, source: Source, differentiable: DifferentiableEntry, chosen: Chosen) -> Manifest:
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
        formats=chosen.entries,
        quickest=chosen.quickest,
        speeds=chosen.speeds,
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
