"""How an encoder becomes a file: one function per format, and the dict that names them.

A new format is one function and one line in `FORMATS`; how its file is run says `runtime`. The text encoder is always
float32: labels are encoded once and kept, so that a quicker one would win nothing, and its error would be in every
answer. So a format names the one whose text encoder stands beside its images', and the bundle holds that file once.
"""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.jit._trace import TracerWarning

from pmgaft.clip.image import PixelEncoder
from pmgaft.clip.loading import quietly
from pmgaft.clip.products import as_products
from pmgaft.errors import PmgaftError, first_line

from .bundle import Precision, quiet_torchscript
from .int8 import quantise

ONNX_INLINE_BYTES = 1_500_000_000  # protobuf ends at 2 GiB: above this the weights go to a second file beside the graph
LARGEST_BATCH = 4096  # of a compiled encoder


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoder:
    """A frozen module on the CPU, one example of its input, and the input's dimensions that may vary, by name.

    The example's varying dimensions are neither 1 nor equal: tracing takes a 1 for a constant.
    """

    module: nn.Module
    example: Tensor
    dynamic: Mapping[int, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tools:
    """What some formats need besides the encoder.

    device: to compile for. photographs: to calibrate with, float32 [n, 3, H, W] in [0, 1]; raises InputError where
    there are none. graph: the encoder's float32 ONNX file, if it is written already.
    """

    device: torch.device
    photographs: Callable[[], Tensor]
    graph: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """One way to write an image encoder to a file.

    precision: of the weights and of most of the arithmetic. text: the format whose text encoder it takes. gpu: made for
    GPUs, so that its parity is measured on one if there is one. compiled: for one kind of machine.
    """

    suffix: str
    write: Callable[[Encoder, Path, Tools], None]
    text: str
    precision: Precision = "float32"
    gpu: bool = False
    compiled: bool = False


def write_torchscript(encoder: Encoder, path: Path) -> None:
    """Trace to TorchScript, as products: the result has a derivative with respect to its input, and none to its
    parameters.

    torch's fused attention for inference has no derivative, and tracing would choose it for good: it is off meanwhile.
    """
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with quiet_torchscript(), torch.no_grad():
            # It warns of sizes that might have become constants: whether they have, other batch sizes show.
            warnings.simplefilter("ignore", TracerWarning)
            module = as_products(copy.deepcopy(encoder.module))
            traced = torch.jit.trace(module, encoder.example, check_trace=False)  # type: ignore[no-untyped-call]
            torch.jit.save(traced, path)
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)


def write_onnx(encoder: Encoder, path: Path) -> None:
    """Export to ONNX, with named dynamic dimensions; input "input", output "features".

    Raises: PmgaftError (onnx_failed) for a model that torch cannot express in ONNX.
    """
    dimensions = dict.fromkeys(encoder.dynamic, torch.export.Dim.DYNAMIC)
    weights = sum(value.nbytes for value in encoder.module.state_dict().values())
    try:
        with warnings.catch_warnings(action="ignore"):  # the exporter's advice on models is not ours to follow
            program = torch.onnx.export(
                encoder.module,
                (encoder.example,),
                dynamo=True,
                dynamic_shapes=(dimensions,),
                input_names=["input"],
                output_names=["features"],
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        raise PmgaftError(f"this model cannot be written as ONNX: {first_line(error)}", code="onnx_failed") from error
    assert program is not None
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()  # the exporter's stack traces: paths of this machine, and half of a small file
    program.save(path, external_data=weights > ONNX_INLINE_BYTES)


def write_int8(encoder: Encoder, path: Path, tools: Tools) -> None:
    """The float32 graph, quantised: see `int8`. Raises: as `write_onnx`; InputError if photographs are missing."""
    if tools.graph is not None:
        quantise(tools.graph, path, tools.photographs)
        return
    with tempfile.TemporaryDirectory(prefix="pmgaft-onnx-") as scratch:
        graph = Path(scratch, "image.onnx")
        write_onnx(encoder, graph)
        quantise(graph, path, tools.photographs)


def write_pt2(encoder: Encoder, path: Path, tools: Tools) -> None:
    """Compile by AOTInductor, for this machine's processor or GPU and no other kind; takes a minute and a C++ compiler.

    Raises: PmgaftError (pt2_failed) for a model that it cannot compile, or where there is no compiler.
    """
    module, example = copy.deepcopy(encoder.module).to(tools.device), encoder.example.to(tools.device)
    dimensions = {
        dimension: torch.export.Dim(name, min=1, max=LARGEST_BATCH) for dimension, name in encoder.dynamic.items()
    }
    try:
        with quietly(), warnings.catch_warnings(action="ignore"), torch.no_grad():
            program = torch.export.export(module, (example,), dynamic_shapes=(dimensions,))
            torch._inductor.aoti_compile_and_package(
                program, package_path=str(path), inductor_configs={"cpp.dynamic_threads": True}
            )
    except Exception as error:  # the compiler's family of errors is as wide as torch
        raise PmgaftError(f"this model cannot be compiled here: {first_line(error)}", code="pt2_failed") from error


class HalfEncoder(nn.Module):
    """A pixel encoder whose tower computes in float16; pixels, normalisation and unit features stay float32."""

    mean: Tensor
    std: Tensor

    def __init__(self, encoder: PixelEncoder) -> None:
        super().__init__()
        self.tower = copy.deepcopy(encoder.tower).half()
        self.register_buffer("mean", encoder.mean.clone(), persistent=False)
        self.register_buffer("std", encoder.std.clone(), persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels: float32 [B, 3, H, W] in [0, 1] -> unit features float32 [B, D]."""
        raw: Tensor = self.tower(((pixels - self.mean) / self.std).half())
        return nn.functional.normalize(raw.float(), dim=-1)


def half(encoder: Encoder, device: torch.device) -> Encoder:
    """The same image encoder in float16, on `device`: a GPU traces it in a moment, a CPU slowly."""
    assert isinstance(encoder.module, PixelEncoder)
    return replace(encoder, module=HalfEncoder(encoder.module).to(device), example=encoder.example.to(device))


FORMATS: dict[str, Format] = {
    "torchscript": Format(
        suffix=".pt", text="torchscript", write=lambda encoder, path, _: write_torchscript(encoder, path)
    ),
    "torchscript-fp16": Format(
        suffix=".pt",
        text="torchscript",
        precision="float16",
        gpu=True,
        write=lambda encoder, path, tools: write_torchscript(half(encoder, tools.device), path),
    ),
    "onnx": Format(suffix=".onnx", text="onnx", write=lambda encoder, path, _: write_onnx(encoder, path)),
    "onnx-fp16": Format(
        suffix=".onnx",
        text="onnx",
        precision="float16",
        gpu=True,
        write=lambda encoder, path, tools: write_onnx(half(encoder, tools.device), path),
    ),
    "onnx-int8": Format(suffix=".onnx", text="onnx", precision="int8", write=write_int8),
    "pt2": Format(suffix=".pt2", text="torchscript", compiled=True, write=write_pt2),
    "pt2-fp16": Format(
        suffix=".pt2",
        text="torchscript",
        precision="float16",
        gpu=True,
        compiled=True,
        write=lambda encoder, path, tools: write_pt2(half(encoder, tools.device), path, tools),
    ),
}
