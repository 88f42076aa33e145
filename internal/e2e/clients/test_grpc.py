"""What only gRPC has: streams, cancellation, deadlines, its compression."""

import queue
import time

import grpc
import numpy as np
import tritonclient.grpc as grpcclient
from agent import ARRAYS, GRPC, PATIENCE, Case, metric, metrics
from tritonclient.grpc import service_pb2
from tritonclient.utils import InferenceServerException

# At a deadline a server in Go resets the stream, which the client may see just
# before its own clock says so.
TIMED_OUT = ("StatusCode.DEADLINE_EXCEEDED", "StatusCode.CANCELLED")


class Streams(GRPC, Case):
    def setUp(self):
        self.c = self.client()
        self.answers = queue.Queue()
        self.c.start_stream(lambda result, error: self.answers.put((result, error)))

    def send(self, n, model="versions", **kwargs):
        x = np.array([n], np.float32).reshape((1, 1) if model == "slow" else 1)
        self.c.async_stream_infer(model, [self.array_input("x", x)], request_id=str(n), **kwargs)

    def receive(self, n):
        result, error = self.answers.get(timeout=PATIENCE)
        self.assertIsNone(error)
        self.assertEqual(result.get_response().id, str(n))
        self.same(result.as_numpy("y"), np.array([n + 2], np.float32))
        return result

    def test_order(self):
        for n in range(300):
            self.send(n)
        for n in range(300):
            self.receive(n)
        self.c.stop_stream()

    def test_one_after_the_other(self):
        for n in range(5):
            self.send(n)
            self.receive(n)

    def test_errors_leave_it_open(self):
        wrong = [
            (dict(model="nobody"), "nobody"),
            (dict(model="add_sub"), "add_sub"),
            (dict(model_version="9"), "9"),
            (dict(model_version="one"), "one"),
        ]
        for n, (kwargs, word) in enumerate(wrong):
            self.send(100)
            self.send(n, **kwargs)
            self.send(101)
            self.receive(100)
            result, error = self.answers.get(timeout=PATIENCE)
            self.assertIsNone(result)
            self.assertIn(word, error.message())
            self.receive(101)

    def test_failed_request_is_named(self):
        """The client drops the id of an error, so this reads the stream itself."""
        request = service_pb2.ModelInferRequest(model_name="nobody", id="seven")
        (answer,) = self.c._client_stub.ModelStreamInfer(iter([request]), timeout=PATIENCE)
        self.assertIn("nobody", answer.error_message)
        self.assertEqual(answer.infer_response.id, "seven")

    def test_final_response(self):
        self.send(1, enable_empty_final_response=True)
        self.receive(1)
        self.c.stop_stream()
        self.assertTrue(self.answers.empty(), "a model that answers once sends nothing more")

    def test_stop_waits_for_answers(self):
        for n in range(20):
            self.send(n)
        self.c.stop_stream()
        self.assertEqual(self.answers.qsize(), 20)

    def test_cancel(self):
        self.send(0, model="slow")
        self.until("running", lambda: metric(metrics(), "dunlin_requests_running", model="slow") == 1)
        self.c.stop_stream(cancel_requests=True)
        _, error = self.answers.get(timeout=PATIENCE)
        self.assertEqual(error.status(), "StatusCode.CANCELLED")
        self.until("idle", lambda: metric(metrics(), "dunlin_requests_running", model="slow") == 0)

    def test_compression(self):
        c = self.client()
        x = np.zeros((4096, 2), np.float32)
        for algorithm in ("gzip", "deflate"):
            answers = queue.Queue()
            c.start_stream(lambda result, error: answers.put((result, error)), compression_algorithm=algorithm)
            c.async_stream_infer("identity_fp32", [self.array_input("x", x)])
            result, error = answers.get(timeout=PATIENCE)
            self.assertIsNone(error)
            self.same(result.as_numpy("y"), x)
            c.stop_stream()

    def test_several_at_once(self):
        clients = [self.client() for _ in range(4)]
        answers = [queue.Queue() for _ in clients]
        for c, q in zip(clients, answers):
            c.start_stream(lambda result, error, q=q: q.put((result, error)))
        for n in range(50):
            for c in clients:
                c.async_stream_infer("versions", [self.array_input("x", np.array([n], np.float32))], request_id=str(n))
        for q in answers:
            for n in range(50):
                result, error = q.get(timeout=PATIENCE)
                self.assertIsNone(error)
                self.assertEqual(result.get_response().id, str(n))

    def test_deadline(self):
        c = self.client()
        answers = queue.Queue()
        c.start_stream(lambda result, error: answers.put((result, error)), stream_timeout=0.2)
        c.async_stream_infer("slow", [self.array_input("x", np.zeros((1, 1), np.float32))])
        _, error = answers.get(timeout=PATIENCE)
        # Once it knows how long runs take, the agent refuses at once, by a
        # message; so it does where its clock is the first to see the end.
        if error.status() is None:
            self.assertRegex(error.message(), "time is out|deadline exceeded")
        else:
            self.assertIn(error.status(), TIMED_OUT, str(error))
        self.until("idle", lambda: metric(metrics(), "dunlin_requests_running", model="slow") == 0)


class Calls(GRPC, Case):
    x = np.zeros((1, 1), np.float32)

    def test_cancel(self):
        """The run itself ends when its caller cancels."""
        ended = queue.Queue()
        call = self.client().async_infer("slow", [self.array_input("x", self.x)], lambda result, error: ended.put(error))
        self.until("running", lambda: metric(metrics(), "dunlin_requests_running", model="slow") == 1)
        call.cancel()
        self.assertEqual(ended.get(timeout=PATIENCE).status(), "StatusCode.CANCELLED")
        self.until("idle", lambda: metric(metrics(), "dunlin_requests_running", model="slow") == 0)

    def test_client_timeout(self):
        began = time.monotonic()
        with self.assertRaises(InferenceServerException) as caught:
            self.client().infer("slow", [self.array_input("x", self.x)], client_timeout=0.2)
        self.assertIn(caught.exception.status(), TIMED_OUT, str(caught.exception))
        self.assertLess(time.monotonic() - began, PATIENCE)
        self.until("idle", lambda: metric(metrics(), "dunlin_requests_running", model="slow") == 0)

    def test_compression(self):
        x = np.zeros((4096, 2), np.float32)
        c = self.client()
        for algorithm in ("gzip", "deflate"):
            r = c.infer("identity_fp32", [self.array_input("x", x)], compression_algorithm=algorithm)
            self.same(r.as_numpy("y"), x)

    def test_contents_instead_of_raw(self):
        """Tensors as lists of numbers, which other clients send."""
        fields = {
            "BOOL": "bool_contents", "INT8": "int_contents", "INT16": "int_contents", "INT32": "int_contents", "INT64": "int64_contents",
            "UINT8": "uint_contents", "UINT16": "uint_contents", "UINT32": "uint_contents", "UINT64": "uint64_contents",
            "FP32": "fp32_contents", "FP64": "fp64_contents", "BYTES": "bytes_contents",
        }
        stub = self.client()._client_stub
        for name, field in fields.items():
            with self.subTest(name):
                array = ARRAYS[name]
                request = service_pb2.ModelInferRequest(model_name="identity_" + name.lower())
                i = request.inputs.add(name="x", datatype=name, shape=array.shape)
                getattr(i.contents, field).extend(v if name == "BYTES" else v.item() for v in array.flatten())
                self.same(grpcclient.InferResult(stub.ModelInfer(request)).as_numpy("y"), array)

    def test_contents_that_are_wrong(self):
        stub = self.client()._client_stub

        def int8(**contents):
            request = service_pb2.ModelInferRequest(model_name="identity_int8")
            i = request.inputs.add(name="x", datatype="INT8", shape=[1, 2])
            for field, values in contents.items():
                getattr(i.contents, field).extend(values)
            return request

        both = int8(int_contents=[1, 2])
        both.raw_input_contents.append(b"\1\2")
        spare = int8()
        spare.raw_input_contents.extend([b"\1\2", b"\3"])
        for what, request in {
            "none": int8(), "too few": int8(int_contents=[1]), "too many": int8(int_contents=[1, 2, 3]), "out of range": int8(int_contents=[1, 128]),
            "other type": int8(fp32_contents=[1, 2]), "both": both, "one raw too many": spare,
        }.items():
            with self.subTest(what), self.assertRaises(grpc.RpcError) as caught:
                stub.ModelInfer(request)
            self.assertEqual(caught.exception.code(), grpc.StatusCode.INVALID_ARGUMENT, what)

    def test_one_raw_output_for_each_output(self):
        """C++ clients index them without looking."""
        r = self.client().infer("identity_fp32", [self.array_input("x", np.zeros((0, 2), np.float32))])
        self.assertEqual(list(r.get_response().raw_output_contents), [b""])

    def test_too_large(self):
        request = service_pb2.ModelInferRequest(model_name="identity_int8")
        request.inputs.add(name="x", datatype="INT8", shape=[33 << 20, 2])
        request.raw_input_contents.append(bytes(66 << 20))
        with self.assertRaises(grpc.RpcError) as caught:
            self.client()._client_stub.ModelInfer(request)
        self.assertEqual(caught.exception.code(), grpc.StatusCode.RESOURCE_EXHAUSTED)
