"""One encoder file, run: by TorchScript, ONNX Runtime or AOTInductor, as the file's name ends.

The same code checks an encoder when it is exported, measures it, and serves it. Nothing here unpickles anything.
Letters: B batch, H, W, N texts, L token positions, D features.
"""

from __future__ import annotations

import logging
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from platformdirs import user_cache_path
from torch import Tensor

from pmgaft.errors import BundleError, first_line

from .bundle import Precision, load_torchscript

Encode = Callable[[Tensor], Tensor]

CPU = torch.device("cpu")

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """An encoder, ready to run. run: takes and gives tensors on the CPU. engine: such as "onnxruntime-cuda"."""

    run: Encode
    engine: str


def open_encoder(
    path: Path,
    device: torch.device = CPU,
    threads: int | None = None,
    *,
    precision: Precision = "float32",
    tensorrt: bool = False,
    crowded: bool = False,
) -> Opened:
    """Open an encoder that a bundle's hashes were found right for.

    threads: of one call, on a CPU; None: as many as torch uses. precision: of the file, as its format says. crowded:
    others want the processor during calls. tensorrt:
    ONNX Runtime shall compile the graph for this GPU; the first time, that takes minutes. Float32 means float32 on a
    GPU too: TF32 is switched off in this process, since a parity measured on a CPU would say nothing about it.
    Raises: BundleError for a compiled encoder of another kind of machine.
    """
    if device.type == "cuda":
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cuda.matmul.allow_tf32 = False
    if path.suffix == ".onnx":
        options = session_options(threads or torch.get_num_threads(), precision, crowded)
        return _onnxruntime(path, device, options, tensorrt)
    return (_aotinductor if path.suffix == ".pt2" else _torchscript)(path, device)


def target(device: torch.device) -> str:
    """The kind of machine that a compiled encoder is for: its processor and the version of torch."""
    release = ".".join(torch.__version__.split(".")[:2])
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return f"cuda sm_{major}{minor}, torch {release}"
    return f"cpu {processor()}, torch {release}"


def machine(device: torch.device) -> str:
    """The processor or GPU by its name, and the threads torch uses: what a measured speed holds for."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{processor()}, {torch.get_num_threads()} threads"


def processor() -> str:
    """The processor's name, as exactly as the system knows it."""
    return next(iter(_cpuinfo("model name")), "") or platform.processor() or platform.machine()


def saturates() -> bool:
    """Whether this processor's plain 8-bit products overflow 16 bits: x86 without VNNI, or where that is not known."""
    flags = next(iter(_cpuinfo("flags")), "").split()
    return platform.machine() in ("x86_64", "AMD64") and not {"avx512_vnni", "avx_vnni"} & set(flags)


def _cpuinfo(key: str) -> list[str]:
    """Linux's values for `key`, one a processor; elsewhere none."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    pairs = (line.partition(":") for line in lines)
    return [value.strip() for name, _, value in pairs if name.strip() == key]


def _torchscript(path: Path, device: torch.device) -> Opened:
    """Its threads are those of the calling thread."""
    encode = load_torchscript(path, device)

    def run(values: Tensor) -> Tensor:
        with torch.no_grad():  # not inference mode: probes differentiate by text features
            return encode(values.to(device)).float().cpu()

    return Opened(run=run, engine=f"torchscript-{device.type}")


def _aotinductor(path: Path, device: torch.device) -> Opened:
    """By torch's C++ loader: the Python one would also unpickle what a package may hold beside its compiled model."""
    try:
        index = -1 if device.index is None else device.index
        loader: Any = torch._C._aoti.AOTIModelPackageLoader(str(path), "model", False, 1, index)
    except RuntimeError as error:
        raise BundleError(f"{path.name} cannot be run on this machine: {first_line(error)}") from error

    def run(values: Tensor) -> Tensor:
        with torch.no_grad():
            there = values.to(device).contiguous()  # compiled code takes strides for granted, and does not check them
            return cast(Tensor, loader.boxed_run([there])[0]).float().cpu()

    return Opened(run=run, engine=f"aotinductor-{device.type}")


def _onnxruntime(path: Path, device: torch.device, options: Any, tensorrt: bool) -> Opened:
    """On the GPU if a provider for it starts there, else on the CPU; the name says which it became."""
    import onnxruntime as ort

    providers = onnx_providers(device, ort.get_available_providers(), tensorrt)
    try:
        session = ort.InferenceSession(path, options, providers=providers)
    except Exception as error:
        if len(providers) == 1:
            raise
        logger.warning("ONNX Runtime cannot use the GPU: %s", type(error).__name__)
        session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    kind = session.get_providers()[0].removesuffix("ExecutionProvider").lower()
    if kind == "cpu":
        if device.type != "cpu":
            logger.warning("ONNX Runtime runs on the CPU: it has no provider for this GPU that is usable here")
        return Opened(run=_plainly(session), engine="onnxruntime-cpu")
    return Opened(run=bound(session, device), engine=f"onnxruntime-{kind}")


def session_options(threads: int, precision: Precision, crowded: bool = False) -> Any:
    """What every session of ONNX Runtime is opened with. threads: of one call. crowded: as for `open_encoder`."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # Threads that spin while they wait for each other save a tenth to a quarter of a call's time, and take the cores
    # from decoding threads and other workers: a third of the throughput. Between calls they must not spin.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0" if crowded else "1")
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if precision == "int8" and saturates():  # a slower way of multiplying, and the right answers
        options.add_session_config_entry("session.x64quantprecision", "1")
    if precision == "float16":  # laying float16 convolutions out for the CPU crashes 1.31
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    return options


def onnx_providers(
    device: torch.device, available: list[str], tensorrt: bool = False
) -> list[str | tuple[str, dict[str, object]]]:
    """ONNX Runtime's providers to ask for, best first; the CPU is always the last."""
    providers: list[str | tuple[str, dict[str, object]]] = []
    if device.type == "cuda":
        index = device.index or 0
        if tensorrt and "TensorrtExecutionProvider" in available:
            cache = os.environ.get("PMGAFT_CACHE") or str(user_cache_path("pmgaft"))
            options: dict[str, object] = {
                "device_id": index,
                "trt_engine_cache_enable": True,
                "trt_engine_cache_path": f"{cache}/tensorrt",
            }
            providers.append(("TensorrtExecutionProvider", options))
        if "CUDAExecutionProvider" in available:
            providers.append(("CUDAExecutionProvider", {"device_id": index, "use_tf32": 0}))
    return [*providers, "CPUExecutionProvider"]


def _plainly(session: Any) -> Encode:
    return lambda values: torch.from_numpy(session.run(["features"], {"input": values.numpy()})[0])


def bound(session: Any, device: torch.device) -> Encode:
    """Input and output bound to the device's memory, so that ONNX Runtime itself copies neither of them about."""
    index = device.index or 0
    kinds = {torch.float32: np.float32, torch.int64: np.int64}

    def run(values: Tensor) -> Tensor:
        there = values.to(device).contiguous()
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()  # ONNX Runtime computes on a stream of its own
        binding = session.io_binding()
        binding.bind_input("input", device.type, index, kinds[values.dtype], tuple(there.shape), there.data_ptr())
        binding.bind_output("features", device.type, index)
        session.run_with_iobinding(binding)
        return torch.from_numpy(binding.copy_outputs_to_cpu()[0])

    return run
