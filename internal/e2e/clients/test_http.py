"""What only HTTP has: JSON tensors, compression of answers, raw requests, headers."""

import gzip
import http.client
import json
import zlib

import numpy as np
import tritonclient.http as httpclient
from agent import ARRAYS, HTTP, JSON_ARRAYS, PATIENCE, Case
from tritonclient.utils import np_to_triton_dtype


def json_input(name, array):
    i = httpclient.InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))
    return i.set_data_from_numpy(array, binary_data=False)


JSON_Y = httpclient.InferRequestedOutput("y", binary_data=False)
BINARY_Y = httpclient.InferRequestedOutput("y", binary_data=True)


class JSON(HTTP, Case):
    def test_every_type(self):
        c = self.client()
        for name, array in JSON_ARRAYS.items():
            with self.subTest(name):
                model = "identity_" + name.lower()
                r = c.infer(model, [json_input("x", array)], outputs=[JSON_Y])
                self.same(r.as_numpy("y"), array, "JSON to JSON")
                self.assertNotIn("parameters", r.get_output("y"))
                self.assertEqual(len(r.get_output("y")["data"]), 6, "data must be flat")
                r = c.infer(model, [json_input("x", array)], outputs=[BINARY_Y])
                self.same(r.as_numpy("y"), array, "JSON to binary")
                r = c.infer(model, [self.array_input("x", array)], outputs=[JSON_Y])
                self.same(r.as_numpy("y"), array, "binary to JSON")

    def test_zero_elements(self):
        c = self.client()
        for name, array in JSON_ARRAYS.items():
            with self.subTest(name):
                r = c.infer("identity_" + name.lower(), [json_input("x", array[:0])], outputs=[JSON_Y])
                self.assertEqual(r.get_output("y")["data"], [])
                self.assertEqual(r.get_output("y")["shape"], [0, 2])

    def test_scalars(self):
        x, n = np.array(2.5, np.float32), np.array(-7, np.int64)
        outputs = [httpclient.InferRequestedOutput(o, binary_data=False) for o in ("y", "m")]
        r = self.client().infer("scalars", [json_input("x", x), json_input("n", n)], outputs=outputs)
        self.same(r.as_numpy("y"), x)
        self.same(r.as_numpy("m"), n)

    def test_nested_data(self):
        body = {"inputs": [{"name": "x", "shape": [2, 2], "datatype": "INT32", "data": [[1, 2], [3, 4]]}]}
        status, _, answer = post("identity_int32", json.dumps(body))
        self.assertEqual(status, 200, answer)
        self.assertEqual(json.loads(answer)["outputs"][0]["data"], [1, 2, 3, 4])

    def test_half_floats_are_refused(self):
        x = np.zeros((1, 2), np.float16)
        self.refused("400", ["FP16", "x"], self.client().infer, "identity_fp16", [json_input("x", x)])
        for name in ("FP16", "BF16"):
            call = self.client().infer
            self.refused("400", [name, "y"], call, "identity_" + name.lower(), [self.array_input("x", ARRAYS[name])], outputs=[JSON_Y])

    def test_bytes_that_are_not_text(self):
        x = np.array([[b"\xff\xfe", b"a"]], np.object_)
        self.refused("400", ["y"], self.client().infer, "identity_bytes", [self.array_input("x", x)], outputs=[JSON_Y])

    def test_mixed_request(self):
        a, b = np.ones((1, 16), np.int32), np.full((1, 16), 4, np.int32)
        outputs = [httpclient.InferRequestedOutput("OUTPUT0", binary_data=False), httpclient.InferRequestedOutput("OUTPUT1")]
        r = self.client().infer("add_sub", [json_input("INPUT0", a), self.array_input("INPUT1", b)], outputs=outputs)
        self.same(r.as_numpy("OUTPUT0"), a + b)
        self.same(r.as_numpy("OUTPUT1"), a - b)

    def test_classification_as_json(self):
        x = np.array([[1, 2, 3, 4]], np.float32)
        outputs = [httpclient.InferRequestedOutput("scores", binary_data=False, class_count=1)]
        r = self.client().infer("classes", [self.array_input("x", x)], outputs=outputs)
        self.assertEqual(r.get_output("scores"), {"name": "scores", "datatype": "BYTES", "shape": [1, 1], "data": ["4.000000:3:mule"]})

    def test_numbers_out_of_range(self):
        for datatype, value in (("INT8", 128), ("UINT8", -1), ("INT32", 1.5), ("UINT64", 1 << 64), ("BOOL", 7), ("FP32", "1"), ("BYTES", 1)):
            with self.subTest(datatype):
                body = {"inputs": [{"name": "x", "shape": [1, 2], "datatype": datatype, "data": [value, value]}]}
                status, _, answer = post("identity_" + datatype.lower(), json.dumps(body))
                self.assertEqual(status, 400, answer)
                self.assertIn("x", json.loads(answer)["error"])

    def test_data_in_two_ways(self):
        body = {"inputs": [{"name": "x", "shape": [1, 2], "datatype": "INT8", "data": [1, 2], "parameters": {"binary_data_size": 2}}]}
        head = json.dumps(body).encode()
        status, _, answer = post("identity_int8", head + b"\1\2", {"Inference-Header-Content-Length": str(len(head))})
        self.assertEqual(status, 400, answer)
        self.assertIn("x", json.loads(answer)["error"])


class Compression(HTTP, Case):
    x = np.zeros((4096, 2), np.float32)

    def test_requests_and_answers(self):
        c = self.client()
        for request in (None, "gzip", "deflate"):
            for response in (None, "gzip", "deflate"):
                for make in (self.array_input, json_input):
                    with self.subTest(f"{request} {response} {make.__name__}"):
                        r = c.infer(
                            "identity_fp32", [make("x", self.x)],
                            request_compression_algorithm=request, response_compression_algorithm=response,
                        )
                        self.same(r.as_numpy("y"), self.x)

    def test_answer_is_compressed(self):
        body, header = httpclient.InferenceServerClient.generate_request_body([self.array_input("x", self.x)])
        for encoding, unpack in (("gzip", gzip.decompress), ("deflate", zlib.decompress)):
            headers = {"Inference-Header-Content-Length": str(header), "Accept-Encoding": encoding}
            status, got, answer = post("identity_fp32", body, headers)
            self.assertEqual((status, got["Content-Encoding"]), (200, encoding))
            self.assertLess(len(answer), self.x.nbytes / 4)
            r = httpclient.InferenceServerClient.parse_response_body(
                answer, header_length=int(got["Inference-Header-Content-Length"]), content_encoding=encoding)
            self.same(r.as_numpy("y"), self.x)
            self.assertEqual(unpack(answer)[int(got["Inference-Header-Content-Length"]) :], self.x.tobytes())

    def test_preferences(self):
        body, header = httpclient.InferenceServerClient.generate_request_body([self.array_input("x", self.x)])
        for accept, encoding in (("identity", None), ("br", None), ("gzip;q=0", None), ("br, deflate;q=0.5, gzip;q=0.9", "gzip"), ("gzip;q=0.2, deflate;q=0.8", "deflate")):
            status, got, _ = post("identity_fp32", body, {"Inference-Header-Content-Length": str(header), "Accept-Encoding": accept})
            self.assertEqual((status, got["Content-Encoding"]), (200, encoding), accept)

    def test_encodings_that_are_wrong(self):
        body = json.dumps({"inputs": [{"name": "x", "shape": [1, 2], "datatype": "INT8", "data": [1, 2]}]}).encode()
        for encoding, sent in (("br", body), ("gzip", body), ("gzip", gzip.compress(body)[:-9]), ("deflate", zlib.compress(body)[:-5])):
            status, _, answer = post("identity_int8", sent, {"Content-Encoding": encoding})
            self.assertIn(status, (400, 415), (encoding, answer))
            self.assertTrue(json.loads(answer)["error"])


class Raw(HTTP, Case):
    """A body that is nothing but the one input."""

    def test_numbers(self):
        x = np.array([1, 2, 3], np.float32)
        status, headers, answer = post("versions", x.tobytes(), {"Inference-Header-Content-Length": "0"})
        self.assertEqual(status, 200, answer)
        r = httpclient.InferenceServerClient.parse_response_body(answer, header_length=int(headers["Inference-Header-Content-Length"]))
        self.same(r.as_numpy("y"), x + np.float32(2))

    def test_batch_of_one(self):
        x = np.array([1, 2, 3, 4], np.float32)
        status, headers, answer = post("classes", x.tobytes(), {"Inference-Header-Content-Length": "0"})
        self.assertEqual(status, 200, answer)
        r = httpclient.InferenceServerClient.parse_response_body(answer, header_length=int(headers["Inference-Header-Content-Length"]))
        self.same(r.as_numpy("scores"), x.reshape(1, 4))

    def test_model_with_two_inputs(self):
        status, _, answer = post("add_sub", bytes(128), {"Inference-Header-Content-Length": "0"})
        self.assertEqual(status, 400, answer)
        self.assertIn("one input", json.loads(answer)["error"])

    def test_half_an_element(self):
        status, _, answer = post("versions", bytes(5), {"Inference-Header-Content-Length": "0"})
        self.assertEqual(status, 400, answer)
        self.assertIn("x", json.loads(answer)["error"])


class Transport(HTTP, Case):
    """Requests as other clients send them."""

    body = json.dumps({"id": "1", "inputs": [{"name": "x", "shape": [1, 2], "datatype": "INT8", "data": [1, 2]}]}).encode()

    def test_answer_is_json_unless_asked(self):
        status, headers, answer = post("identity_int8", self.body)
        self.assertEqual((status, headers["Content-Type"]), (200, "application/json"))
        self.assertIsNone(headers["Inference-Header-Content-Length"])
        self.assertEqual(
            json.loads(answer),
            {"id": "1", "model_name": "identity_int8", "model_version": "1", "outputs": [{"name": "y", "datatype": "INT8", "shape": [1, 2], "data": [1, 2]}]},
        )

    def test_header_length_of_plain_json(self):
        status, _, answer = post("identity_int8", self.body, {"Inference-Header-Content-Length": str(len(self.body))})
        self.assertEqual(status, 200, answer)

    def test_chunks(self):
        c = http.client.HTTPConnection(HTTP.url, timeout=PATIENCE)
        self.addCleanup(c.close)
        c.request("POST", "/v2/models/identity_int8/infer", body=iter([self.body[:9], self.body[9:]]), encode_chunked=True, headers={"Transfer-Encoding": "chunked"})
        r = c.getresponse()
        self.assertEqual(r.status, 200, r.read())

    def test_wrong_headers(self):
        for length in ("-1", "x", str(len(self.body) + 1), "99999999999999999999"):
            status, _, answer = post("identity_int8", self.body, {"Inference-Header-Content-Length": length})
            self.assertEqual(status, 400, answer)
            self.assertIn("Inference-Header-Content-Length".lower(), json.loads(answer)["error"].lower())

    def test_body_too_large(self):
        status, _, answer = post("identity_int8", b" " * (65 << 20))
        self.assertEqual(status, 413, answer)

    def test_not_json(self):
        for body in (b"", b"{", b"[]", b"null", b'{"inputs": 3}', b"\xff"):
            status, _, answer = post("identity_int8", body)
            self.assertEqual(status, 400, (body, answer))
            self.assertTrue(json.loads(answer)["error"])

    def test_method_and_path(self):
        c = self.client()
        r = c._get("v2/models/identity_int8/infer", None, None)
        self.assertEqual(r.status_code, 405)
        self.assertTrue(json.loads(r.read())["error"])
        r = c._get("v2/models/identity_int8/nothing", None, None)
        self.assertEqual(r.status_code, 404)
        self.assertTrue(json.loads(r.read())["error"])

    def test_query(self):
        self.assertTrue(self.client().is_server_ready(query_params={"a": ["1", "2"]}))


def post(model, body, headers={}):
    """Sends an inference and gives status, headers and body of the answer."""
    c = http.client.HTTPConnection(HTTP.url, timeout=PATIENCE)
    try:
        c.request("POST", f"/v2/models/{model}/infer", body=body, headers=headers)
        r = c.getresponse()
        return r.status, r.headers, r.read()
    finally:
        c.close()
