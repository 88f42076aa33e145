"""Puts pre- and post-processing into a model's graph.

    pip install onnx
    python docs/examples/preprocess.py models/examples/digits/v2.onnx models/examples/digits/labels.txt camera.onnx

The digits model takes 8x8 images of FP32, 0 (empty) to 16 (full). The new one
takes grey images of UINT8, 0 (black) to 255 (white), of any size, and answers
with the name of the digit in place of its index: what a camera gives goes in,
what a person reads comes out, and every caller gets the same steps.
"""

import sys

import onnx
from onnx import TensorProto, compose, helper, numpy_helper
import numpy as np


def before() -> onnx.ModelProto:
    """camera [N,height,width] UINT8 -> image [N,1,8,8] FP32, 0 to 16."""
    constants = {
        "channel": np.array([1], np.int64),
        "size": np.array([8, 8], np.int64),
        "scale": np.array(16 / 255, np.float32),
    }
    nodes = [
        helper.make_node("Cast", ["camera"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["float", "channel"], ["planes"]),
        helper.make_node("Shape", ["planes"], ["batch_and_channel"], start=0, end=2),
        helper.make_node("Concat", ["batch_and_channel", "size"], ["sizes"], axis=0),
        helper.make_node("Resize", ["planes", "", "", "sizes"], ["small"], mode="linear", coordinate_transformation_mode="half_pixel"),
        helper.make_node("Mul", ["small", "scale"], ["scaled"]),
    ]
    return model("before", nodes, constants,
                 [helper.make_tensor_value_info("camera", TensorProto.UINT8, ["N", "height", "width"])],
                 [helper.make_tensor_value_info("scaled", TensorProto.FLOAT, ["N", 1, 8, 8])])


def after(names: list[str]) -> onnx.ModelProto:
    """index [N] INT64 -> name [N] BYTES."""
    constants = {"names": np.array(names, object)}
    nodes = [helper.make_node("Gather", ["names", "index"], ["name"])]
    return model("after", nodes, constants,
                 [helper.make_tensor_value_info("index", TensorProto.INT64, ["N"])],
                 [helper.make_tensor_value_info("name", TensorProto.STRING, ["N"])])


def model(name, nodes, constants, inputs, outputs) -> onnx.ModelProto:
    weights = [numpy_helper.from_array(value, key) for key, value in constants.items()]
    graph = helper.make_graph(nodes, name, inputs, outputs, weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def main() -> None:
    source, labels, target = sys.argv[1:]
    digits = onnx.load(source)
    with open(labels, encoding="utf-8") as lines:
        names = lines.read().split()
    whole = compose.merge_models(before(), compose.add_prefix(digits, "digits/"), io_map=[("scaled", "digits/image")])
    whole = compose.merge_models(whole, after(names), io_map=[("digits/label", "index")],
                                 outputs=["digits/probabilities", "name"])
    onnx.checker.check_model(whole, full_check=True)
    onnx.save(whole, target)


main()
