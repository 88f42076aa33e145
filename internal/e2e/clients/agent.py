"""The agent under test, as the two clients see it, and what the tests share.

models_test.go writes the models.
"""

import os
import sys
import time
import unittest
import urllib.request

import ml_dtypes
import numpy as np
import tritonclient.grpc as grpcclient
import tritonclient.http as httpclient
from google.protobuf.json_format import MessageToDict
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

PATIENCE = 60  # seconds until something that must happen is missed

FLOATS = [0.0, -1.5, 3.25, 1e4, float("inf"), float("nan")]

# An array [3,2] of each element type, with the ends of its range.
ARRAYS = {
    "BOOL": np.array([[True, False], [False, True], [True, True]]),
    "FP16": np.array(FLOATS, np.float16).reshape(3, 2),
    "BF16": np.array(FLOATS, ml_dtypes.bfloat16).reshape(3, 2),
    "FP32": np.array(FLOATS, np.float32).reshape(3, 2),
    "FP64": np.array(FLOATS, np.float64).reshape(3, 2),
    "BYTES": np.array(
        [b"", b"plain", b"\x00\x01\xff\x00", "žluťoučký".encode(), b"x" * 70000, b"\n\"\\"], np.object_
    ).reshape(3, 2),
}
for _bits in (8, 16, 32, 64):
    for _dtype in (f"int{_bits}", f"uint{_bits}"):
        _ends = np.iinfo(_dtype)
        ARRAYS[_dtype.upper()] = np.array([[_ends.min, _ends.max], [0, 1], [2, 3]], _dtype)

# What JSON can carry of it.
JSON_ARRAYS = {name: a for name, a in ARRAYS.items() if name not in ("FP16", "BF16")}
JSON_ARRAYS["FP32"] = np.array([0, -0.0, 0.1, 3.4e38, 1e-40, 16777217], np.float32).reshape(3, 2)
JSON_ARRAYS["FP64"] = np.array([0, -0.0, 0.1, 1.7e308, 5e-324, 2**53 - 1], np.float64).reshape(3, 2)
JSON_ARRAYS["BYTES"] = np.array(["", "plain", "žluťoučký kůň", "\u2028\U0001f40e", "a\x00b", "\n\"\\/"], np.object_).reshape(3, 2)


def model_file(path):
    """The content of a file of the repository."""
    with open(os.path.join(os.environ["MODELS"], path), "rb") as f:
        return f.read()


class HTTP:
    """The HTTP client, and what is particular to it."""

    name = "http"
    lib = httpclient
    url = os.environ["HTTP"]
    INVALID, NOT_FOUND, UNAVAILABLE, UNSUPPORTED, EXPIRED, FORBIDDEN = "400", "404", "503", "501", "503", "403"

    def client(self, **options):
        c = httpclient.InferenceServerClient(self.url, **options)
        self.addCleanup(c.close)
        return c

    def tree(self, message):
        return message

    def array_input(self, name, array, datatype=None, shape=None):
        return array_input(httpclient, name, array, datatype, shape)


class GRPC:
    """The gRPC client, and what is particular to it."""

    name = "grpc"
    lib = grpcclient
    url = os.environ["GRPC"]
    INVALID, NOT_FOUND = "StatusCode.INVALID_ARGUMENT", "StatusCode.NOT_FOUND"
    UNAVAILABLE, UNSUPPORTED = "StatusCode.UNAVAILABLE", "StatusCode.UNIMPLEMENTED"
    EXPIRED, FORBIDDEN = "StatusCode.DEADLINE_EXCEEDED", "StatusCode.PERMISSION_DENIED"

    def client(self, **options):
        c = grpcclient.InferenceServerClient(self.url, **options)
        self.addCleanup(c.close)
        return c

    def tree(self, message):
        """The message as HTTP would give it, default values included."""
        return numbers(MessageToDict(message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True))

    def array_input(self, name, array, datatype=None, shape=None):
        return array_input(grpcclient, name, array, datatype, shape)


def numbers(tree):
    """Protobuf's JSON has 64-bit integers as strings; names and versions stay strings."""
    if isinstance(tree, dict):
        return {k: v if k in ("name", "version", "versions", "key") else numbers(v) for k, v in tree.items()}
    if isinstance(tree, list):
        return [numbers(v) for v in tree]
    if isinstance(tree, str) and tree.lstrip("-").isdigit():
        return int(tree)
    return tree


def array_input(lib, name, array, datatype=None, shape=None):
    """An input with the bytes of an array, under any type and shape."""
    i = lib.InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))
    i.set_data_from_numpy(array)
    if shape is not None:
        i.set_shape(shape)
    if datatype is not None:
        if lib is httpclient:
            i._datatype = datatype
        else:
            i._input.datatype = datatype
    return i


class Case(unittest.TestCase):
    """A test against the agent. Subclasses add HTTP or GRPC, or neither."""

    maxDiff = None

    def same(self, got, want, where=""):
        """got has the elements of want, bit by bit."""
        self.assertIsNotNone(got, where)
        self.assertEqual(list(got.shape), list(want.shape), where)
        if want.dtype == np.object_:
            plain = lambda v: v.encode() if isinstance(v, str) else v
            self.assertEqual([plain(v) for v in got.flatten()], [plain(v) for v in want.flatten()], where)
        else:
            self.assertEqual(got.dtype, want.dtype, where)
            self.assertEqual(got.tobytes(), want.tobytes(), where)

    def refused(self, status, words, call, *args, **kwargs):
        """The call fails with a status and a message that holds each of the words."""
        with self.assertRaises(InferenceServerException) as caught:
            call(*args, **kwargs)
        self.error(caught.exception, status, words)

    def error(self, e, status, words):
        self.assertIsInstance(e, InferenceServerException)
        self.assertEqual(e.status(), status, str(e))
        for w in words:
            self.assertIn(w, e.message() or "")

    def until(self, what, condition):
        """Waits for a condition that gives something."""
        end = time.monotonic() + PATIENCE
        while True:
            got = condition()
            if got:
                return got
            if time.monotonic() > end:
                self.fail(f"after {PATIENCE} s: not {what}")
            time.sleep(0.01)

    def statistics(self, client, model, version=""):
        """The figures of the one version."""
        stats = self.tree(client.get_inference_statistics(model, version))["model_stats"]
        self.assertEqual(len(stats), 1, stats)
        return stats[0]


def metrics():
    """What Prometheus would read."""
    with urllib.request.urlopen(f"http://{HTTP.url}/metrics", timeout=PATIENCE) as r:
        return r.read().decode()


def metric(text, name, **labels):
    """The sum of the samples of a metric that have the labels."""
    total = 0.0
    for line in text.splitlines():
        sample, _, value = line.rpartition(" ")
        if sample.split("{")[0] == name and all(f'{k}="{v}"' in sample for k, v in labels.items()):
            total += float(value)
    return total


def both(cls):
    """Decorates a class of tests: the module gets them once for each protocol."""
    module = sys.modules[cls.__module__]
    for protocol in (HTTP, GRPC):
        name = f"{cls.__name__}_{protocol.name}"
        setattr(module, name, type(name, (protocol, cls, Case), {"__module__": cls.__module__}))
    return cls
