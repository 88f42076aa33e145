"""Trains the digits example and writes its models and held-out data beside this file.

The networks are small enough to be written out in numpy. Everything is seeded,
single-threaded and float64; the trained weights are rounded to multiples of
2^-12 before export, so that the last bits, in which processors differ, do not
reach the files and a second run writes the same bytes.
"""

import os

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # before numpy is imported

import hashlib
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from sklearn.datasets import load_digits

HERE = Path(__file__).parent
TRAIN = 1197  # the first 1,197 images train, the last 600 are held out
OPSET, IR_VERSION = 17, 8


def softmax(z):
    e = np.exp(z - z.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


class Linear:
    """Softmax regression on the 64 pixels."""

    def __init__(self, rng):
        self.params = {"weight": rng.normal(0, 0.01, (64, 10)), "bias": np.zeros(10)}

    def loss_gradient(self, x, y):
        p = self.params
        x = x.reshape(len(x), 64)
        d = softmax(x @ p["weight"] + p["bias"])
        d[np.arange(len(y)), y] -= 1
        d /= len(y)
        return {"weight": x.T @ d, "bias": d.sum(axis=0)}

    def nodes(self):
        return [
            helper.make_node("Flatten", ["scaled"], ["flat"], axis=1),
            helper.make_node("Gemm", ["flat", "weight", "bias"], ["logits"]),
        ]


def columns(x):
    """[n,c,8,8] -> [n*64, c*9]: the 3x3 neighbourhood of each pixel, zero-padded."""
    n, c = x.shape[:2]
    x = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(x, (3, 3), axis=(2, 3))
    return windows.transpose(0, 2, 3, 1, 4, 5).reshape(n * 64, c * 9)


def convolve(x, weight, bias):
    """3x3 convolution, padding 1. Returns the output [n,out,8,8] and the columns of x."""
    cols = columns(x)
    out = cols @ weight.reshape(len(weight), -1).T + bias
    return out.reshape(len(x), 8, 8, -1).transpose(0, 3, 1, 2), cols


def convolve_gradient(d, cols, weight):
    """Gradients of a convolution's weight, bias and input from that of its output."""
    rows = d.transpose(0, 2, 3, 1).reshape(-1, len(weight))
    flipped = weight.transpose(1, 0, 2, 3)[:, :, ::-1, ::-1]
    back, _ = convolve(d, flipped, 0.0)
    return (rows.T @ cols).reshape(weight.shape), rows.sum(axis=0), back


class Conv:
    """Two 3x3 convolutions, 2x2 max pooling, two dense layers."""

    C1, C2, HIDDEN = 16, 32, 64

    def __init__(self, rng):
        def he(*shape, fan_in):
            return rng.normal(0, np.sqrt(2 / fan_in), shape)

        c1, c2, hidden = self.C1, self.C2, self.HIDDEN
        self.params = {
            "conv1.weight": he(c1, 1, 3, 3, fan_in=9),
            "conv1.bias": np.zeros(c1),
            "conv2.weight": he(c2, c1, 3, 3, fan_in=9 * c1),
            "conv2.bias": np.zeros(c2),
            "dense1.weight": he(c2 * 16, hidden, fan_in=c2 * 16),
            "dense1.bias": np.zeros(hidden),
            "dense2.weight": he(hidden, 10, fan_in=hidden),
            "dense2.bias": np.zeros(10),
        }

    def loss_gradient(self, x, y):
        p, n, g = self.params, len(x), {}
        a1, cols1 = convolve(x, p["conv1.weight"], p["conv1.bias"])
        r1 = np.maximum(a1, 0)
        a2, cols2 = convolve(r1, p["conv2.weight"], p["conv2.bias"])
        r2 = np.maximum(a2, 0)
        blocks = r2.reshape(n, -1, 4, 2, 4, 2).transpose(0, 1, 2, 4, 3, 5).reshape(n, -1, 4, 4, 4)
        winner = blocks.argmax(axis=4)[..., None]
        flat = np.take_along_axis(blocks, winner, axis=4).reshape(n, -1)
        a3 = flat @ p["dense1.weight"] + p["dense1.bias"]
        r3 = np.maximum(a3, 0)
        d = softmax(r3 @ p["dense2.weight"] + p["dense2.bias"])

        d[np.arange(n), y] -= 1
        d /= n
        g["dense2.weight"], g["dense2.bias"] = r3.T @ d, d.sum(axis=0)
        d = (d @ p["dense2.weight"].T) * (a3 > 0)
        g["dense1.weight"], g["dense1.bias"] = flat.T @ d, d.sum(axis=0)
        d = (d @ p["dense1.weight"].T).reshape(n, -1, 4, 4, 1)
        spread = np.zeros_like(blocks)
        np.put_along_axis(spread, winner, d, axis=4)
        d = spread.reshape(n, -1, 4, 4, 2, 2).transpose(0, 1, 2, 4, 3, 5).reshape(r2.shape) * (a2 > 0)
        g["conv2.weight"], g["conv2.bias"], d = convolve_gradient(d, cols2, p["conv2.weight"])
        g["conv1.weight"], g["conv1.bias"], _ = convolve_gradient(d * (a1 > 0), cols1, p["conv1.weight"])
        return g

    def nodes(self):
        conv = {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}
        return [
            helper.make_node("Conv", ["scaled", "conv1.weight", "conv1.bias"], ["a1"], **conv),
            helper.make_node("Relu", ["a1"], ["r1"]),
            helper.make_node("Conv", ["r1", "conv2.weight", "conv2.bias"], ["a2"], **conv),
            helper.make_node("Relu", ["a2"], ["r2"]),
            helper.make_node("MaxPool", ["r2"], ["pooled"], kernel_shape=[2, 2], strides=[2, 2]),
            helper.make_node("Flatten", ["pooled"], ["flat"], axis=1),
            helper.make_node("Gemm", ["flat", "dense1.weight", "dense1.bias"], ["a3"]),
            helper.make_node("Relu", ["a3"], ["r3"]),
            helper.make_node("Gemm", ["r3", "dense2.weight", "dense2.bias"], ["logits"]),
        ]


def shifted(x, rng):
    """Each image moved by -1, 0 or 1 pixel in both directions, zeros coming in."""
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    dy, dx = rng.integers(0, 3, (2, len(x)))
    return np.stack([padded[i, :, dy[i] : dy[i] + 8, dx[i] : dx[i] + 8] for i in range(len(x))])


def train(net, x, y, rng, epochs, rate, augment, batch=64):
    """Adam, its rate falling to 0 along a cosine."""
    m = {k: np.zeros_like(v) for k, v in net.params.items()}
    v = {k: np.zeros_like(p) for k, p in net.params.items()}
    step, steps = 0, epochs * -(-len(x) // batch)
    for _ in range(epochs):
        order = rng.permutation(len(x))
        for start in range(0, len(x), batch):
            pick = order[start : start + batch]
            gradient = net.loss_gradient(shifted(x[pick], rng) if augment else x[pick], y[pick])
            now = rate * (1 + np.cos(np.pi * step / steps)) / 2
            step += 1
            for k, g in gradient.items():
                m[k] += 0.1 * (g - m[k])
                v[k] += 0.001 * (g * g - v[k])
                net.params[k] -= now * (m[k] / (1 - 0.9**step)) / (np.sqrt(v[k] / (1 - 0.999**step)) + 1e-8)


def export(net, path, version, doc):
    def tensor(name, values):
        return numpy_helper.from_array(np.asarray(values, dtype=np.float32), name)

    weights = [tensor("sixteen", 16.0)]
    weights += [tensor(k, np.round(v * 4096) / 4096) for k, v in net.params.items()]
    nodes = [
        helper.make_node("Div", ["image", "sixteen"], ["scaled"]),
        *net.nodes(),
        helper.make_node("Softmax", ["logits"], ["probabilities"], axis=1),
        helper.make_node("ArgMax", ["probabilities"], ["label"], axis=1, keepdims=0),
    ]
    graph = helper.make_graph(
        nodes,
        "digits",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["N", 1, 8, 8])],
        [
            helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["N", 10]),
            helper.make_tensor_value_info("label", TensorProto.INT64, ["N"]),
        ],
        initializer=weights,
    )
    model = helper.make_model(
        graph,
        producer_name="dunlin-examples",
        doc_string=doc,
        model_version=version,
        ir_version=IR_VERSION,
        opset_imports=[helper.make_opsetid("", OPSET)],
    )
    onnx.checker.check_model(model, full_check=True)
    path.write_bytes(model.SerializeToString(deterministic=True))


def accuracy(path, images, labels):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    probabilities, label = session.run(None, {"image": images.reshape(-1, 1, 8, 8).astype(np.float32)})
    assert np.array_equal(probabilities.argmax(axis=1), label)
    return int((label == labels).sum()), len(labels)


def cascade_bound(path, images):
    """The highest multiple of 0.05 at which the model is as sure of 3/4 of the images."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    sure = session.run(None, {"image": images.reshape(-1, 1, 8, 8).astype(np.float32)})[0].max(axis=1)
    return max(b / 20 for b in range(10, 20) if (sure >= b / 20).mean() >= 0.75)


def main():
    digits = load_digits()
    images, labels = digits.images.astype(np.uint8), digits.target.astype(np.uint8)
    assert images.shape == (1797, 8, 8) and np.array_equal(images, digits.images)
    held_images, held_labels = images[TRAIN:], labels[TRAIN:]
    np.save(HERE / "heldout-images.npy", held_images)
    np.save(HERE / "heldout-labels.npy", held_labels)
    (HERE / "labels.txt").write_text("".join(f"{i}\n" for i in range(10)))

    x, y = images[:TRAIN, None].astype(np.float64) / 16, labels[:TRAIN].astype(np.int64)
    wrong = np.random.default_rng(3).permutation(y)

    rng = np.random.default_rng(1)
    v1 = Linear(rng)
    train(v1, x, y, rng, epochs=60, rate=0.02, augment=False)
    export(v1, HERE / "v1.onnx", 1, "Digits: linear classifier.")

    for name, version, target, doc in [
        ("v2.onnx", 2, y, "Digits: convolutional net."),
        ("v3-bad.onnx", 3, wrong, "Digits: convolutional net trained on shuffled labels, bad on purpose."),
    ]:
        rng = np.random.default_rng(2)
        net = Conv(rng)
        train(net, x, target, rng, epochs=40, rate=0.003, augment=True)
        export(net, HERE / name, version, doc)

    for name in ["v1.onnx", "v2.onnx", "v3-bad.onnx", "heldout-images.npy", "heldout-labels.npy", "labels.txt"]:
        path = HERE / name
        line = f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {name}"
        if path.suffix == ".onnx":
            right, total = accuracy(path, held_images, held_labels)
            line += f"  {path.stat().st_size} bytes, held out {right}/{total} = {right / total:.1%}"
        print(line)
    bound = cascade_bound(HERE / "v1.onnx", images[:TRAIN])
    print(f"v1 answers instead of v2 where its largest probability is {bound} or more")


if __name__ == "__main__":
    main()
