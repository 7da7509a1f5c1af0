"""How an encoder becomes a file: one pair of functions per format, and the dict that names them.

A new format is two functions and one line in `FORMATS`. Both encoders of a CLIP are written by the same function: an
`Encoder` says what goes in and which of its dimensions may vary.
"""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.jit._trace import TracerWarning

from pmgaft.errors import PmgaftError

from .bundle import load_torchscript, quiet_torchscript

ONNX_INLINE_BYTES = 1_500_000_000  # protobuf ends at 2 GiB: above this the weights go to a second file beside the graph


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoder:
    """A frozen module on the CPU, one example of its input, and the input's dimensions that may vary, by name.

    The example's varying dimensions are neither 1 nor equal: tracing takes a 1 for a constant.
    """

    module: nn.Module
    example: Tensor
    dynamic: Mapping[int, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """One way to write an encoder to a file and to run it again on the CPU."""

    suffix: str
    write: Callable[[Encoder, Path], None]
    open: Callable[[Path], Callable[[Tensor], Tensor]]


def write_torchscript(encoder: Encoder, path: Path) -> None:
    """Trace to TorchScript: the result has a derivative with respect to its input, and none to its parameters.

    torch's fused attention for inference has no derivative, and tracing would choose it for good: it is off meanwhile.
    """
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with quiet_torchscript(), torch.no_grad():
            # It warns of sizes that might have become constants: whether they have, other batch sizes show.
            warnings.simplefilter("ignore", TracerWarning)
            traced = torch.jit.trace(encoder.module, encoder.example, check_trace=False)  # type: ignore[no-untyped-call]
            torch.jit.save(traced, path)
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)


def write_onnx(encoder: Encoder, path: Path) -> None:
    """Export to ONNX, fp32, with named dynamic dimensions; input "input", output "features".

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
        raise PmgaftError(f"this model cannot be written as ONNX: {_first_line(error)}", code="onnx_failed") from error
    assert program is not None
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()  # the exporter's stack traces: paths of this machine, and half of a small file
    program.save(path, external_data=weights > ONNX_INLINE_BYTES)


def open_onnx(path: Path) -> Callable[[Tensor], Tensor]:
    """Run an ONNX encoder by ONNX Runtime on the CPU: to check it, not to serve it."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def encode(values: Tensor) -> Tensor:
        return torch.from_numpy(session.run(["features"], {"input": values.numpy()})[0])

    return encode


FORMATS: dict[str, Format] = {
    "torchscript": Format(suffix=".pt", write=write_torchscript, open=load_torchscript),
    "onnx": Format(suffix=".onnx", write=write_onnx, open=open_onnx),
}


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
