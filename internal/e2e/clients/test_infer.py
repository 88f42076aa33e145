"""Inference over HTTP and gRPC: types, shapes, outputs, parameters, errors."""

import queue

import numpy as np
import tritonclient.grpc as grpcclient
from agent import ARRAYS, GRPC, PATIENCE, array_input, both, metric, metrics
from tritonclient.utils import InferenceServerException, triton_to_np_dtype


@both
class Types:
    def test_every_type(self):
        c = self.client()
        for name, array in ARRAYS.items():
            with self.subTest(name):
                r = c.infer("identity_" + name.lower(), [self.array_input("x", array)])
                self.same(r.as_numpy("y"), array)
                self.assertEqual(self.output(r, "y")["datatype"], name)

    def test_all_types_in_one_request(self):
        inputs = [self.array_input("x_" + n.lower(), a.reshape(6)) for n, a in ARRAYS.items()]
        r = self.client().infer("types", inputs)
        for name, array in ARRAYS.items():
            self.same(r.as_numpy("y_" + name.lower()), array.reshape(6), name)

    def test_zero_elements(self):
        c = self.client()
        for name, array in ARRAYS.items():
            with self.subTest(name):
                empty = array[:0]
                r = c.infer("identity_" + name.lower(), [self.array_input("x", empty)])
                self.same(r.as_numpy("y"), np.empty((0, 2), triton_to_np_dtype(name)))

    def test_scalars(self):
        x, n = np.array(2.5, np.float32), np.array(-7, np.int64)
        r = self.client().infer("scalars", [self.array_input("x", x), self.array_input("n", n)])
        self.same(r.as_numpy("y"), x)
        self.same(r.as_numpy("m"), n)

    def test_bytes_of_numpy_strings(self):
        array = np.array([[b"a", b"bc"]])  # numpy.bytes_, of a fixed width
        r = self.client().infer("identity_bytes", [self.array_input("x", array)])
        self.same(r.as_numpy("y"), array.astype(np.object_))

    def test_large_tensor(self):
        array = np.arange(20 << 18, dtype=np.float32).reshape(-1, 2)  # 20 MiB
        r = self.client().infer("identity_fp32", [self.array_input("x", array)])
        self.same(r.as_numpy("y"), array)

    def output(self, result, name):
        return self.tree(result.get_output(name))


@both
class Requests:
    def add_sub(self, rows=1):
        a = np.arange(16 * rows, dtype=np.int32).reshape(rows, 16)
        b = np.full((rows, 16), 3, np.int32)
        return a, b, [self.array_input("INPUT0", a), self.array_input("INPUT1", b)]

    def test_several_outputs(self):
        a, b, inputs = self.add_sub(rows=2)
        r = self.client().infer("add_sub", inputs)
        self.same(r.as_numpy("OUTPUT0"), a + b)
        self.same(r.as_numpy("OUTPUT1"), a - b)
        self.assertIsNone(r.as_numpy("OUTPUT2"))

    def test_subset_of_outputs(self):
        a, b, inputs = self.add_sub()
        r = self.client().infer("add_sub", inputs, outputs=[self.lib.InferRequestedOutput("OUTPUT1")])
        self.same(r.as_numpy("OUTPUT1"), a - b)
        self.assertIsNone(r.as_numpy("OUTPUT0"))

    def test_order_of_outputs_and_inputs(self):
        a, b, inputs = self.add_sub()
        outputs = [self.lib.InferRequestedOutput(n) for n in ("OUTPUT1", "OUTPUT0")]
        r = self.client().infer("add_sub", inputs[::-1], outputs=outputs)
        self.same(r.as_numpy("OUTPUT0"), a + b)
        self.same(r.as_numpy("OUTPUT1"), a - b)

    def test_request_id_and_version(self):
        c = self.client()
        _, _, inputs = self.add_sub()
        r = self.response(c.infer("add_sub", inputs, request_id="id ž/1"))
        self.assertEqual((r["id"], r["model_name"], r["model_version"]), ("id ž/1", "add_sub", "1"))
        r = self.response(c.infer("add_sub", inputs))
        self.assertFalse(r.get("id"))

    def test_versions(self):
        c = self.client()
        x = np.array([1, 2], np.float32)
        for version, plus, answers in (("1", 1, "1"), ("2", 2, "2"), ("", 2, "2")):
            r = c.infer("versions", [self.array_input("x", x)], model_version=version)
            self.same(r.as_numpy("y"), x + np.float32(plus), version)
            self.assertEqual(self.response(r)["model_version"], answers)

    def test_parameters(self):
        _, _, inputs = self.add_sub()
        parameters = {"text": "a", "flag": True, "count": 3, "share": 0.5}
        r = self.client().infer("add_sub", inputs, priority=1, timeout=30_000_000, parameters=parameters)
        self.assertIsNotNone(r.as_numpy("OUTPUT0"))

    def test_headers(self):
        _, _, inputs = self.add_sub()
        r = self.client().infer("add_sub", inputs, headers={"x-request-origin": "test"})
        self.assertIsNotNone(r.as_numpy("OUTPUT0"))

    def test_concurrent_clients(self):
        want = []
        if self.name == "http":
            c = self.client(concurrency=8)
            calls = []
            for n in range(64):
                a, b, inputs = self.add_sub()
                inputs[0] = self.array_input("INPUT0", a + n)
                calls.append(c.async_infer("add_sub", inputs, request_id=str(n)))
                want.append(a + n + b)
            results = [call.get_result(timeout=PATIENCE) for call in calls]
        else:
            clients = [self.client() for _ in range(4)]
            done = queue.Queue()
            for n in range(64):
                a, b, inputs = self.add_sub()
                inputs[0] = self.array_input("INPUT0", a + n)
                clients[n % 4].async_infer("add_sub", inputs, lambda result, error: done.put((result, error)), request_id=str(n))
                want.append(a + n + b)
            results = [None] * 64
            for _ in range(64):
                result, error = done.get(timeout=PATIENCE)
                self.assertIsNone(error)
                results[int(self.response(result)["id"])] = result
        for n, r in enumerate(results):
            self.assertEqual(self.response(r)["id"], str(n))
            self.same(r.as_numpy("OUTPUT0"), want[n])

    def response(self, result):
        r = result.get_response()
        if self.name == "http":
            return r
        return {"id": r.id, "model_name": r.model_name, "model_version": r.model_version}


@both
class Classification:
    scores = np.array([[0.1, 0.9, 0.25, -1], [4, 3, 2, 1]], np.float32)

    def classes(self, k, scores=scores, model="classes", output="scores"):
        outputs = [self.lib.InferRequestedOutput(output, class_count=k)]
        r = self.client().infer(model, [self.array_input("x", scores)], outputs=outputs)
        return r.as_numpy(output)

    def test_labels(self):
        self.assertEqual(
            self.classes(2).tolist(),
            [[b"0.900000:1:horse", b"0.250000:2:donkey"], [b"4.000000:0:zebra", b"3.000000:1:horse"]],
        )

    def test_no_labels(self):
        self.assertEqual(self.classes(1, output="negated").tolist(), [[b"1.000000:3"], [b"-1.000000:3"]])

    def test_more_than_there_are(self):
        self.assertEqual(self.classes(9, self.scores[1:]).tolist(), [[b"4.000000:0:zebra", b"3.000000:1:horse", b"2.000000:2:donkey", b"1.000000:3:mule"]])

    def test_model_without_batches(self):
        x = np.array([5, 7, 6], np.float32)
        self.assertEqual(self.classes(2, x, "versions", "y").tolist(), [b"9.000000:1", b"8.000000:2"])

    def test_integers(self):
        x = np.array([[5, -6]], np.int64)
        self.assertEqual(self.classes(2, x, "identity_int64", "y").tolist(), [[b"5:0", b"-6:1"]])

    def test_other_outputs_stay(self):
        outputs = [self.lib.InferRequestedOutput("scores", class_count=1), self.lib.InferRequestedOutput("negated")]
        r = self.client().infer("classes", [self.array_input("x", self.scores)], outputs=outputs)
        self.assertEqual(r.as_numpy("scores").tolist(), [[b"0.900000:1:horse"], [b"4.000000:0:zebra"]])
        self.same(r.as_numpy("negated"), -self.scores)

    def test_type_that_has_no_order(self):
        self.refused(self.INVALID, ["y", "BYTES"], self.classes, 1, ARRAYS["BYTES"], "identity_bytes", "y")


@both
class Errors:
    def infer(self, *inputs, model="add_sub", **kwargs):
        return self.client().infer(model, list(inputs), **kwargs)

    def setUp(self):
        self.a = np.zeros((1, 16), np.int32)
        self.i0, self.i1 = self.array_input("INPUT0", self.a), self.array_input("INPUT1", self.a)

    def test_shape(self):
        wrong = self.array_input("INPUT1", np.zeros((1, 15), np.int32))
        self.refused(self.INVALID, ["INPUT1", "15"], self.infer, self.i0, wrong)

    def test_rank(self):
        wrong = self.array_input("INPUT1", np.zeros(16, np.int32))
        self.refused(self.INVALID, ["INPUT1"], self.infer, self.i0, wrong)

    def test_rows_differ(self):
        wrong = self.array_input("INPUT1", np.zeros((2, 16), np.int32))
        self.refused(self.INVALID, ["INPUT"], self.infer, self.i0, wrong)

    def test_batch_too_large(self):
        a = np.zeros((9, 16), np.int32)
        self.refused(self.INVALID, ["9", "8"], self.infer, self.array_input("INPUT0", a), self.array_input("INPUT1", a))

    def test_type(self):
        wrong = self.array_input("INPUT1", np.zeros((1, 16), np.float32))
        self.refused(self.INVALID, ["INPUT1", "FP32", "INT32"], self.infer, self.i0, wrong)

    def test_type_that_does_not_exist(self):
        wrong = self.array_input("INPUT1", self.a, datatype="INT31")
        self.refused(self.INVALID, ["INT31"], self.infer, self.i0, wrong)

    def test_byte_count(self):
        for shape in ([2, 16], [1, 8], [1, 1 << 62]):
            with self.subTest(shape):
                wrong = self.array_input("x", np.zeros((1, 2), np.float32), shape=shape)
                self.refused(self.INVALID, ["x"], self.infer, wrong, model="identity_fp32")

    def test_overflow(self):
        wrong = self.array_input("x", np.zeros((1, 2), np.float32), shape=[1 << 62, 16])
        self.refused(self.INVALID, ["x"], self.infer, wrong, model="identity_fp32")

    def test_bytes_cut_off(self):
        good = self.array_input("x", np.array([[b"abcdef", b"g"]], np.object_))
        if self.name == "http":
            good._raw_data = good._raw_data[:-1]
            good._parameters["binary_data_size"] -= 1
        else:
            good._raw_content = good._raw_content[:-1]
        self.refused(self.INVALID, ["x"], self.infer, good, model="identity_bytes")

    def test_input_name(self):
        self.refused(self.INVALID, ["INPUT9"], self.infer, self.i0, self.i1, self.array_input("INPUT9", self.a))

    def test_input_twice(self):
        self.refused(self.INVALID, ["INPUT0"], self.infer, self.i0, self.i0, self.i1)

    def test_input_missing(self):
        self.refused(self.INVALID, ["INPUT1"], self.infer, self.i0)

    def test_no_inputs(self):
        self.refused(self.INVALID, ["INPUT0"], self.infer)

    def test_output_name(self):
        outputs = [self.lib.InferRequestedOutput("OUTPUT9")]
        self.refused(self.INVALID, ["OUTPUT9"], self.infer, self.i0, self.i1, outputs=outputs)

    def test_model(self):
        self.refused(self.NOT_FOUND, ["nobody"], self.infer, self.i0, model="nobody")

    def test_version(self):
        self.refused(self.NOT_FOUND, ["add_sub", "7"], self.infer, self.i0, self.i1, model_version="7")

    def test_version_that_is_none(self):
        status = self.NOT_FOUND if self.name == "http" else self.INVALID
        with self.assertRaises(Exception) as caught:
            self.infer(self.i0, self.i1, model_version="one")
        # Over HTTP, Triton has no such path; a server may as well say that it is invalid.
        self.assertIn(caught.exception.status(), (status, self.INVALID))

    def test_agent_goes_on(self):
        self.refused(self.INVALID, ["INPUT1"], self.infer, self.i0)
        self.assertIsNotNone(self.infer(self.i0, self.i1).as_numpy("OUTPUT0"))


@both
class Queues:
    """Timeouts and limits of the queue, behind a run that takes long."""

    x = np.zeros((1, 1), np.float32)

    def setUp(self):
        for model in ("slow", "busy"):
            self.addCleanup(self.until, "idle", lambda model=model: metric(metrics(), "dunlin_requests_running", model=model) == 0)

    def test_timeout(self):
        self.occupy("slow")
        with self.assertRaises(InferenceServerException) as caught:
            self.client().infer("slow", [self.array_input("x", self.x)], timeout=50_000)
        self.assertIn(caught.exception.status(), (self.EXPIRED, self.UNAVAILABLE), str(caught.exception))

    def test_queue_is_full(self):
        self.occupy("busy")
        self.wait("busy")
        self.refused(self.UNAVAILABLE, ["busy"], self.client().infer, "busy", [self.array_input("x", self.x)])

    def test_metrics(self):
        self.occupy("slow")
        self.wait("slow")
        text = metrics()
        self.assertEqual(metric(text, "nv_inference_pending_request_count", model="slow"), 1)
        self.assertGreater(metric(text, "nv_inference_request_success", model="identity_fp32"), 0)

    def occupy(self, model):
        """Keeps the only instance of a model busy until the test ends."""
        self.send(model)
        self.until("running", lambda: metric(metrics(), "dunlin_requests_running", model=model) == 1)

    def wait(self, model):
        """Has one request wait in a model's queue until the test ends."""
        self.send(model)
        self.until("waiting", lambda: metric(metrics(), "dunlin_queue_length", model=model) == 1)

    def send(self, model):
        c = grpcclient.InferenceServerClient(GRPC.url)
        ended = queue.Queue()
        call = c.async_infer(model, [array_input(grpcclient, "x", self.x)], lambda result, error: ended.put(error))
        self.addCleanup(c.close)
        self.addCleanup(ended.get, timeout=PATIENCE)
        self.addCleanup(call.cancel)
