"""Int8 graphs: what rounding takes from a convolution's mean output, its bias gives back."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from pmgaft_export.int8 import FLOAT32_CONVOLUTIONS, correct_biases, is_convolutional, quantise, rounded
from pmgaft_export.runtime import open_encoder

Floats = NDArray[np.float32]
rng = np.random.default_rng(0)
PHOTOGRAPHS = torch.rand(10, 3, 6, 6, generator=torch.Generator().manual_seed(0)) ** 3


def random(*shape: int) -> Floats:
    return rng.normal(size=shape).astype(np.float32)


def graph(layers: Sequence[tuple[Floats, Floats | None, int]], outputs: int) -> Any:
    """Convolutions (weight, bias, groups) after each other, ReLU between, then the mean over places: [B, outputs]."""
    nodes, constants, last = [], [], "input"
    for number, (weight, bias, groups) in enumerate(layers):
        names = [last, f"w{number}", *([] if bias is None else [f"b{number}"])]
        constants += [numpy_helper.from_array(x, n) for x, n in zip((weight, bias), names[1:], strict=False)]  # type: ignore[arg-type]
        nodes.append(helper.make_node("Conv", names, [f"c{number}"], name=f"conv{number}", group=groups))
        nodes.append(helper.make_node("Relu", [f"c{number}"], [f"r{number}"], name=f"relu{number}"))
        last = f"r{number}"
    nodes[-1:] = []
    nodes.append(helper.make_node("ReduceMean", [nodes[-1].output[0], "axes"], ["features"], name="mean", keepdims=0))
    constants.append(numpy_helper.from_array(np.array([2, 3]), "axes"))
    made = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 3, 6, 6])],
        [helper.make_tensor_value_info("features", TensorProto.FLOAT, ["batch", outputs])],
        constants,
    )
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def run(model: Any, path: Path, pixels: Tensor = PHOTOGRAPHS) -> Tensor:
    onnx.save(model, path)
    return open_encoder(path).run(pixels)


def with_rounded_weights(model: Any) -> Any:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for tensor in copy.graph.initializer:
        if tensor.name.startswith("w"):
            weight = rounded(numpy_helper.to_array(tensor).astype(np.float64))
            tensor.CopyFrom(numpy_helper.from_array(weight.astype(np.float32), tensor.name))
    return copy


def test_weights_that_8_bits_can_say_are_not_rounded_and_others_by_half_a_step_at_most() -> None:
    weight = np.array([[[[-127.0]], [[3.0]]], [[[0.5]], [[-0.25]]], [[[0.0]], [[0.0]]]])
    kept = rounded(weight)
    assert kept[0].tolist() == weight[0].tolist()
    assert kept[2].tolist() == weight[2].tolist()
    np.testing.assert_allclose(kept[1, 1], -64 * 0.5 / 127)
    noise = rng.normal(size=(5, 4, 3, 3)) * 10.0 ** np.arange(5)[:, None, None, None]
    step = np.abs(noise).max(axis=(1, 2, 3), keepdims=True) / 127
    assert (np.abs(noise - rounded(noise)) <= step / 2 * (1 + 1e-9)).all()


@pytest.mark.parametrize(
    ("weight", "bias", "groups"),
    [
        (random(4, 3, 2, 2), random(4), 1),
        (random(4, 3, 2, 2), None, 1),
        (random(6, 1, 2, 2), random(6), 3),
        (random(3, 1, 2, 2) * np.array([1, 100, 0.01], dtype=np.float32)[:, None, None, None], random(3), 3),
    ],
    ids=["dense", "no bias", "two a group", "depthwise"],
)
def test_a_corrected_bias_restores_the_mean_output_exactly(
    tmp_path: Path, weight: Floats, bias: Floats | None, groups: int
) -> None:
    plain = PHOTOGRAPHS.mean(dim=(2, 3), keepdim=True).expand(-1, -1, 6, 6).contiguous()  # so that places are alike
    original = graph([(weight, bias, groups)], len(weight))
    expected = run(original, tmp_path / "a.onnx", plain).mean(dim=0)
    uncorrected = run(with_rounded_weights(original), tmp_path / "b.onnx", plain).mean(dim=0)
    correct_biases(original, plain, skip=[])
    corrected = run(with_rounded_weights(original), tmp_path / "c.onnx", plain).mean(dim=0)
    off = (uncorrected - expected).abs()
    assert (off > 0).all()
    assert ((corrected - expected).abs() < 1e-3 * off + 1e-6 * expected.abs()).all()


def test_a_convolution_that_stays_float32_keeps_its_bias() -> None:
    model = graph([(random(3, 3, 1, 1), random(3), 1), (random(3, 3, 1, 1), random(3), 1)], 3)
    correct_biases(model, PHOTOGRAPHS, skip=["conv0"])
    assert [node.input[2] for node in model.graph.node if node.op_type == "Conv"] == ["b0", "conv1.corrected_bias"]
    assert {tensor.name for tensor in model.graph.initializer} == {"w0", "b0", "w1", "conv1.corrected_bias", "axes"}


def test_a_convolutional_tower_becomes_int8_behind_its_first_convolutions(tmp_path: Path) -> None:
    layers = [(random(3, 3, 1, 1), random(3), 1) for _ in range(FLOAT32_CONVOLUTIONS)]
    layers += [(random(8, 3, 3, 3), random(8), 1), (random(4, 8, 1, 1), random(4), 1)]
    expected = run(graph(layers, 4), tmp_path / "float32.onnx")
    quantise(tmp_path / "float32.onnx", tmp_path / "int8.onnx", lambda: PHOTOGRAPHS)
    model = onnx.load(tmp_path / "int8.onnx")
    kinds = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    assert kinds["w0"] == kinds["w1"] == TensorProto.FLOAT
    assert kinds["w2_quantized"] == kinds["w3_quantized"] == TensorProto.INT8
    (scales,) = (numpy_helper.to_array(t) for t in model.graph.initializer if t.name == "w2_scale")
    np.testing.assert_allclose(scales, np.abs(layers[2][0]).max(axis=(1, 2, 3)) / 127, rtol=1e-5)
    found = open_encoder(tmp_path / "int8.onnx", precision="int8").run(PHOTOGRAPHS)
    assert 0 < (found - expected).abs().max() < 0.05 * expected.abs().max()


def test_matrix_products_are_quantised_without_any_photograph(tmp_path: Path) -> None:
    weight = random(3 * 6 * 6, 5)
    nodes = [
        helper.make_node("Flatten", ["input"], ["flat"]),
        helper.make_node("MatMul", ["flat", "weight"], ["features"], name="product"),
    ]
    made = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 3, 6, 6])],
        [helper.make_tensor_value_info("features", TensorProto.FLOAT, ["batch", 5])],
        [numpy_helper.from_array(weight, "weight")],
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    assert not is_convolutional(model)
    expected = run(model, tmp_path / "float32.onnx")
    quantise(tmp_path / "float32.onnx", tmp_path / "int8.onnx", lambda: pytest.fail("photographs were asked for"))
    assert "MatMulInteger" in {node.op_type for node in onnx.load(tmp_path / "int8.onnx").graph.node}
    found = open_encoder(tmp_path / "int8.onnx", precision="int8").run(PHOTOGRAPHS)
    assert 0 < (found - expected).abs().max() < 0.05 * expected.abs().max()
