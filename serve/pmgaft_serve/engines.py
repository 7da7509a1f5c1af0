"""Which of a bundle's formats serves, and by what: TorchScript, ONNX Runtime or AOTInductor.

How one file is run stands in `pmgaft_export.runtime`; here a request's memory is guarded, and a choice is made.
Letters: B batch, H, W, N texts, L token positions, D features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from pmgaft.clip.image import FewSizes
from pmgaft.device import pick_device
from pmgaft.errors import BundleError, InputError, PmgaftError
from pmgaft_export.bundle import Bundle, FormatEntry, Manifest
from pmgaft_export.runtime import open_encoder, target

Encode = Callable[[Tensor], Tensor]

AUTO = "auto"
TENSORRT = "tensorrt"
ENGINES = {"torchscript": ".pt", "onnxruntime": ".onnx", TENSORRT: ".onnx", "aotinductor": ".pt2"}
"""Which files each engine runs. TensorRT is a part of ONNX Runtime, used only on request: it compiles for minutes."""

LANES = 2
"""Batches beside each other."""

CHOICES = (AUTO, *ENGINES, "torchscript-fp16", "onnx", "onnx-fp16", "onnx-int8", "pt2", "pt2-fp16")
"""What may be asked for: auto, an engine, or a format."""

PREFERENCES = {
    "cpu": ("onnx", "torchscript", "pt2", "onnx-int8", "onnx-fp16", "torchscript-fp16", "pt2-fp16"),
    "cuda": ("pt2-fp16", "torchscript-fp16", "torchscript", "pt2", "onnx-fp16", "onnx", "onnx-int8"),
}
"""What serves where nothing was measured. On a GPU, torch comes first: ONNX Runtime falls back to the CPU where it was
built for other CUDA libraries than torch's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """Both encoders, ready to run.

    image: float32 [B, 3, H, W] in [0, 1] -> unit features float32 [B, D]; text: int64 [N, L] -> [N, D]; both take and
    give tensors on the CPU. name: such as "onnxruntime-cpu"; format: of the bundle.
    Both raise PmgaftError (out_of_memory) where memory does not suffice.
    """

    name: str
    format: str
    image: Encode
    text: Encode


def open_engine(bundle: Bundle, choice: str, device: torch.device, threads: int) -> Engine:
    """The engine that serves where `choice` was asked for, on this device.

    choice: one of `CHOICES`; see `chosen_format`. threads: of one call, on a CPU.
    Raises: InputError (engine_invalid) for another name; BundleError if the bundle holds nothing that runs here.
    """
    name = chosen_format(bundle.manifest, choice, device)
    entry = bundle.manifest.formats[name]
    path, compiled = bundle.path(entry.image), choice == TENSORRT
    image = open_encoder(path, device, threads, precision=entry.precision, tensorrt=compiled)
    if image.engine.endswith("-cpu") and device.type != "cpu" and entry.precision == "float16":
        raise BundleError(f"{name} is for GPUs, and ONNX Runtime has no provider that is usable on this one")
    text = open_encoder(bundle.path(entry.text), device, threads, crowded=True)
    return Engine(name=image.engine, format=name, image=_guarded(image.run), text=_guarded(text.run))


def open_lane(bundle: Bundle, name: str, device: torch.device, threads: int) -> Encode | None:
    """The image encoder of format `name` once more, for half of the threads; None where it is of no use.

    Two batches beside each other, each by half of the cores, take less time than one after the other by all: whatever a
    single thread does, and threads wait for each other at, leaves no core idle. A second session of ONNX Runtime holds
    the weights a second time.
    """
    entry = bundle.manifest.formats[name]
    path = bundle.path(entry.image)
    if device.type != "cpu" or threads < LANES or path.suffix != ENGINES["onnxruntime"]:
        return None
    return _guarded(open_encoder(path, device, threads // LANES, precision=entry.precision, crowded=True).run)


def chosen_format(manifest: Manifest, choice: str, device: torch.device) -> str:
    """The format to serve: what `choice` names, or the best that it leaves open.

    "auto" leaves open every format; an engine's name, those it runs. Of several the best is what was measured to be the
    quickest on this kind of device, when the bundle was made, else the first in `PREFERENCES`. Compiled formats for
    other machines are passed over.
    Raises: InputError (engine_invalid) for a name that is none; BundleError if no format is left.
    """
    formats = manifest.formats
    if choice not in CHOICES and choice not in formats:
        raise InputError(f"engine must be one of {', '.join(CHOICES)}", field="engine", code="engine_invalid")
    if choice == AUTO:
        fitting = list(formats)
    elif choice in ENGINES:
        fitting = [name for name, entry in formats.items() if Path(entry.image).suffix == ENGINES[choice]]
    else:
        fitting = [name for name in formats if name == choice]
    if not fitting:
        raise BundleError(f"the bundle {manifest.name} has nothing for {choice}: it holds {', '.join(formats)}")
    here = [name for name in fitting if runs_on(formats[name], device)]
    if not here:
        compiled_for = formats[fitting[0]].target
        message = f"{fitting[0]} was compiled for {compiled_for}, and this is {target(device)}: export it here"
        raise BundleError(message, field="engine")
    kind: Literal["cpu", "cuda"] = "cuda" if device.type == "cuda" else "cpu"
    best = [manifest.quickest[kind]] if kind in manifest.quickest else []
    return next(name for name in [*best, *PREFERENCES[kind], *here] if name in here)


def runs_on(entry: FormatEntry, device: torch.device) -> bool:
    """Whether a format is for every machine, or was compiled for this one."""
    return entry.target is None or entry.target == target(device)


def worker_device(setting: str, gpu_id: int | None) -> torch.device:
    """The device of one worker. setting: as for `pick_device`; gpu_id: the GPU that TorchServe gave this worker.

    "auto" takes TorchServe's GPU if torch can use it, else the CPU; "cuda" takes it too; "cuda:N" is taken as it is.
    Raises: InputError (device_invalid) for a GPU that torch does not see.
    """
    if gpu_id is not None and setting in ("auto", "cuda") and torch.cuda.is_available():
        return pick_device(f"cuda:{gpu_id}")
    return pick_device("cpu" if setting == "auto" and gpu_id is None else setting)


def differentiable(bundle: Bundle, device: torch.device) -> Encode:
    """The image encoder that probes use: takes tensors on the CPU, gives tensors on the CPU, has a derivative.

    On a GPU it meets few batch sizes, since rows leave an attack as they break.
    """
    encode = bundle.differentiable(device)
    if device.type == "cuda":
        encode = FewSizes(encode)
    return lambda pixels: encode(pixels.to(device)).cpu()


@contextmanager
def guarded_memory() -> Iterator[None]:
    """Every way of running out of memory becomes one error: PmgaftError (out_of_memory)."""
    try:
        yield
    except Exception as error:
        if not out_of_memory(error):
            raise
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        raise PmgaftError("there is not enough memory for this request", code="out_of_memory") from error


def out_of_memory(error: BaseException) -> bool:
    """Whether torch, ONNX Runtime or Python ran out of memory; only some say so by type."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    said = str(error).lower()
    signs = (
        "out of memory",
        "failed to allocate memory",
        "bad_alloc",
        "can't allocate memory",
        "cublas_status_alloc_failed",
    )
    return isinstance(error, RuntimeError) and any(sign in said for sign in signs)


def _guarded(encode: Encode) -> Encode:
    def run(values: Tensor) -> Tensor:
        with guarded_memory():
            return encode(values)

    return run
