"""One bundle's two encoders, run by TorchScript or by ONNX Runtime.

Letters: B batch, H, W, N texts, L token positions, D features. A new engine is one function and one line in `ENGINES`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pmgaft.device import pick_device
from pmgaft.errors import BundleError, InputError, PmgaftError
from pmgaft_export.bundle import Bundle, load_torchscript

Encode = Callable[[Tensor], Tensor]

logger = logging.getLogger(__name__)


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
    """The engine called `choice`: "torchscript", "onnxruntime" or "auto" (ONNX Runtime on a CPU, TorchScript on a GPU).

    threads: of one call, on a CPU.
    Raises: InputError (engine_invalid) for another name; BundleError if the bundle lacks the engine's format.
    """
    if choice == "auto":
        quick = device.type == "cpu" and "onnx" in bundle.manifest.formats
        choice = "onnxruntime" if quick or "torchscript" not in bundle.manifest.formats else "torchscript"
    if choice not in ENGINES:
        raise InputError(f"engine must be auto, {' or '.join(ENGINES)}", field="engine", code="engine_invalid")
    return ENGINES[choice](bundle, device, threads)


def worker_device(setting: str, gpu_id: int | None) -> torch.device:
    """The device of one worker. setting: as for `pick_device`; gpu_id: the GPU that TorchServe gave this worker.

    "auto" takes TorchServe's GPU if torch can use it, else the CPU; "cuda" takes it too; "cuda:N" is taken as it is.
    Raises: InputError (device_invalid) for a GPU that torch does not see.
    """
    if gpu_id is not None and setting in ("auto", "cuda") and torch.cuda.is_available():
        return pick_device(f"cuda:{gpu_id}")
    return pick_device("cpu" if setting == "auto" and gpu_id is None else setting)


def differentiable(bundle: Bundle, device: torch.device) -> Encode:
    """The image encoder that probes use: takes tensors on the CPU, gives tensors on the CPU, has a derivative."""
    encode = bundle.differentiable(device)
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


def torchscript(bundle: Bundle, device: torch.device, threads: int) -> Engine:
    """By torch, without gradients. Its threads are those of the calling thread."""

    def load(path: Path) -> Encode:
        encode = load_torchscript(path, device)

        def run(values: Tensor) -> Tensor:
            with guarded_memory(), torch.no_grad():  # not inference mode: probes differentiate by text features
                return encode(values.to(device)).float().cpu()

        return run

    entry = _entry(bundle, "torchscript")
    return Engine(name=f"torchscript-{device.type}", format="torchscript", image=load(entry[0]), text=load(entry[1]))


def onnxruntime(bundle: Bundle, device: torch.device, threads: int) -> Engine:
    """By ONNX Runtime: on the GPU if its CUDA provider starts there, else on the CPU; the name says which it became."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    entry = _entry(bundle, "onnx")
    providers = onnx_providers(device, ort.get_available_providers())

    def load(path: Path) -> ort.InferenceSession:
        try:
            return ort.InferenceSession(path, options, providers=providers)
        except Exception as error:
            if len(providers) == 1:
                raise
            logger.warning("ONNX Runtime cannot use the GPU: %s", type(error).__name__)
            return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def encoder(session: ort.InferenceSession) -> Encode:
        def run(values: Tensor) -> Tensor:
            with guarded_memory():
                return torch.from_numpy(session.run(["features"], {"input": values.numpy()})[0])

        return run

    image, text = load(entry[0]), load(entry[1])
    kind = "cuda" if image.get_providers()[0].startswith("CUDA") else "cpu"
    if kind != device.type:
        logger.warning("ONNX Runtime runs on the CPU: its CUDA provider is not usable here")
    return Engine(name=f"onnxruntime-{kind}", format="onnx", image=encoder(image), text=encoder(text))


def onnx_providers(device: torch.device, available: list[str]) -> list[str | tuple[str, dict[str, int]]]:
    """ONNX Runtime's providers to ask for, best first; the CPU is always the last."""
    if device.type == "cuda" and "CUDAExecutionProvider" in available:
        return [("CUDAExecutionProvider", {"device_id": device.index or 0}), "CPUExecutionProvider"]
    return ["CPUExecutionProvider"]


ENGINES: dict[str, Callable[[Bundle, torch.device, int], Engine]] = {
    "torchscript": torchscript,
    "onnxruntime": onnxruntime,
}


def _entry(bundle: Bundle, name: str) -> tuple[Path, Path]:
    formats = bundle.manifest.formats
    if name not in formats:
        raise BundleError(f"bundle {bundle.directory} has no {name} encoders, only {', '.join(formats)}")
    return bundle.path(formats[name].image), bundle.path(formats[name].text)
