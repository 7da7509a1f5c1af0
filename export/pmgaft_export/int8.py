"""A float32 ONNX graph -> one that computes mostly in 8-bit integers, for CPUs.

Where most weights belong to matrix products (transformers), these are quantised dynamically: weights once, per output
channel; activations at run time, with a scale of each tensor's own. It needs no data.

Where most belong to convolutions, that would do nothing, and activations get scales from photographs (static, QDQ):
weights symmetric and per output channel, activations unsigned with a zero point and per tensor. Two things keep the
answers. The first convolutions stay float32: they see the pixels themselves, decide most of the error and are a few
percent of the work. And each bias is corrected by what rounding the weights shifts its output on average: with inputs
of mean E[x], b + sum over k of (w - round(w))_k E[x]_k (Nagel et al. 2019, "Data-free quantization through weight
equalization and bias correction", section 4.2; E[x] measured here).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import numpy_helper
from torch import Tensor

from pmgaft.clip.loading import quietly

FLOAT32_CONVOLUTIONS = 2  # the first ones of a convolutional tower
CALIBRATION_BATCH = 4
_INT8_MAX = 127

Floats = NDArray[np.float64]


def quantise(graph: Path, path: Path, photographs: Callable[[], Tensor]) -> None:
    """Write the int8 form of `graph` to `path`.

    photographs: float32 [n, 3, H, W] in [0, 1], asked for if the tower is convolutional.
    """
    model = onnx.load(graph)
    del model.graph.value_info[:]  # quantising transposes some weights, which the exporter's shapes would contradict
    if is_convolutional(model):
        _write_static(model, path, photographs())
    else:
        _write_dynamic(model, path)


def is_convolutional(model: Any) -> bool:
    """Whether convolutions hold more weights than matrix products do."""
    sizes = {tensor.name: int(np.prod(tensor.dims)) for tensor in model.graph.initializer}
    weights = {"Conv": 0, "MatMul": 0, "Gemm": 0}
    for node in model.graph.node:
        if node.op_type in weights:
            weights[node.op_type] += sizes.get(node.input[1], 0)
    return weights["Conv"] > weights["MatMul"] + weights["Gemm"]


def _write_dynamic(model: Any, path: Path) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with quietly():
        quantize_dynamic(
            model, path, op_types_to_quantize=["MatMul", "Gemm"], per_channel=True, weight_type=QuantType.QInt8
        )


def _write_static(model: Any, path: Path, photographs: Tensor) -> None:
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static

    first = [node.name for node in model.graph.node if node.op_type == "Conv"][:FLOAT32_CONVOLUTIONS]
    correct_biases(model, photographs, first)
    with quietly():
        quantize_static(
            model,
            path,
            _Reader(photographs),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=["Conv", "Relu", "Clip", "Add", "MaxPool"],
            nodes_to_exclude=first,
            per_channel=True,
            activation_type=QuantType.QUInt8,  # with signed weights, what x86 and ARM have instructions for
            weight_type=QuantType.QInt8,
        )


def correct_biases(model: Any, photographs: Tensor, skip: list[str]) -> None:
    """Add to each convolution's bias, in `model` itself, what rounding its weights will take from its mean output.

    skip: names of convolutions that will not be rounded.
    """
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    convolutions = [
        node
        for node in model.graph.node
        if node.op_type == "Conv" and node.name not in skip and node.input[1] in tensors
    ]
    means = input_means(model, photographs, [node.input[0] for node in convolutions])
    for node in convolutions:
        weight = numpy_helper.to_array(tensors[node.input[1]]).astype(np.float64)
        lost = weight - rounded(weight)
        groups = next((attribute.i for attribute in node.attribute if attribute.name == "group"), 1)
        shift = _response(lost, means[node.input[0]], groups)
        old = numpy_helper.to_array(tensors[node.input[2]]) if len(node.input) > 2 else np.zeros(len(weight))
        name = f"{node.name}.corrected_bias"  # of its own: a tensor may be several convolutions' bias
        model.graph.initializer.append(numpy_helper.from_array((old + shift).astype(np.float32), name))
        del node.input[2:]
        node.input.append(name)
    _drop_unused(model)


def _drop_unused(model: Any) -> None:
    """Constants that no node takes any more."""
    used = {name for node in model.graph.node for name in node.input}
    kept = [tensor for tensor in model.graph.initializer if tensor.name in used]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)


def rounded(weight: Floats) -> Floats:
    """The nearest weights that 8 bits can say, symmetric, with a scale for each output channel (the first axis)."""
    largest = np.abs(weight).max(axis=tuple(range(1, weight.ndim)), keepdims=True)
    scale = np.maximum(largest, np.finfo(np.float32).tiny) / _INT8_MAX
    nearest: Floats = np.round(weight / scale) * scale
    return nearest


def _response(weight: Floats, mean: Floats, groups: int) -> Floats:
    """A convolution's answer [O] to constant inputs `mean` [I], with `weight` [O, I / groups, ...] and no bias."""
    kernel = weight.sum(axis=tuple(range(2, weight.ndim))).reshape(groups, -1, weight.shape[1])
    answer: Floats = np.einsum("goi,gi->go", kernel, mean.reshape(groups, -1)).reshape(-1)
    return answer


def input_means(model: Any, photographs: Tensor, names: list[str]) -> dict[str, Floats]:
    """The mean of each named tensor [B, C, H, W] over photographs and places, float64 [C]."""
    import onnxruntime as ort

    watched = onnx.ModelProto()
    watched.CopyFrom(model)
    axes = numpy_helper.from_array(np.array([0, 2, 3]), "pmgaft.axes")
    watched.graph.initializer.append(axes)
    del watched.graph.output[:]
    names = list(dict.fromkeys(names))
    for name in names:
        node = onnx.helper.make_node("ReduceMean", [name, axes.name], [f"{name}.mean"], keepdims=0)
        watched.graph.node.append(node)
        watched.graph.output.append(onnx.helper.make_tensor_value_info(f"{name}.mean", onnx.TensorProto.FLOAT, None))
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(watched.SerializeToString(), options, providers=["CPUExecutionProvider"])
    totals = {name: np.zeros(1) for name in names}
    for batch in _batches(photographs):
        for name, mean in zip(names, session.run(None, batch), strict=True):
            totals[name] = totals[name] + mean.astype(np.float64) * len(batch["input"])
    return {name: total / len(photographs) for name, total in totals.items()}


def _batches(photographs: Tensor) -> Iterator[dict[str, NDArray[np.float32]]]:
    return ({"input": batch.numpy()} for batch in torch.split(photographs, CALIBRATION_BATCH))


class _Reader:
    """Photographs as ONNX Runtime's calibration asks for them."""

    def __init__(self, photographs: Tensor) -> None:
        self._batches = _batches(photographs)

    def get_next(self) -> dict[str, NDArray[np.float32]] | None:
        return next(self._batches, None)
