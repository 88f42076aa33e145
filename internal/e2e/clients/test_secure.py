"""An agent that speaks TLS, wants an API key, and lets nobody load, register or trace."""

import os
import queue
import ssl

import tritonclient.grpc as grpcclient
import tritonclient.http as httpclient
from agent import ARRAYS, GRPC, PATIENCE, Case, both
from tritonclient.grpc.auth import BasicAuth as GRPCBasicAuth
from tritonclient.http.auth import BasicAuth as HTTPBasicAuth

CA, KEY = os.environ["CA"], os.environ["KEY"]
LIMITED_KEY, SLOW_KEY = os.environ["LIMITED_KEY"], os.environ["SLOW_KEY"]
CLIENT_CERT, CLIENT_KEY = os.environ["CLIENT_CERT"], os.environ["CLIENT_KEY"]
HTTP_URL, GRPC_URL = os.environ["SECURE_HTTP"], os.environ["SECURE_GRPC"]


@both
class Secure:
    def secure(self, ca=CA):
        if self.name == "http":
            trust = (lambda: ssl.create_default_context(cafile=ca)) if ca else ssl.create_default_context
            c = httpclient.InferenceServerClient(HTTP_URL, ssl=True, ssl_context_factory=trust)
        else:
            c = grpcclient.InferenceServerClient(GRPC_URL, ssl=True, root_certificates=ca)
        self.addCleanup(c.close)
        return c

    def certified(self):
        """A client with a certificate of its own."""
        if self.name == "http":

            def trust():
                context = ssl.create_default_context(cafile=CA)
                context.minimum_version = ssl.TLSVersion.TLSv1_3
                context.load_cert_chain(CLIENT_CERT, CLIENT_KEY)
                return context

            c = httpclient.InferenceServerClient(HTTP_URL, ssl=True, ssl_context_factory=trust)
        else:
            c = grpcclient.InferenceServerClient(
                GRPC_URL, ssl=True, root_certificates=CA, private_key=CLIENT_KEY, certificate_chain=CLIENT_CERT
            )
        self.addCleanup(c.close)
        return c

    def headers(self, key):
        return {"authorization": f"Bearer {key}"}  # gRPC has header names in lower case only

    def infer(self, c, **kwargs):
        return c.infer("identity_fp32", [self.array_input("x", ARRAYS["FP32"])], **kwargs)

    def test_key(self):
        c = self.secure()
        self.same(self.infer(c, headers=self.headers(KEY)).as_numpy("y"), ARRAYS["FP32"])
        self.assertTrue(self.tree(c.get_model_metadata("identity_fp32", headers=self.headers(KEY)))["inputs"])

    def test_plugin(self):
        c = self.secure()
        c.register_plugin((HTTPBasicAuth if self.name == "http" else GRPCBasicAuth)("anybody", KEY))
        self.same(self.infer(c).as_numpy("y"), ARRAYS["FP32"])

    def test_no_key(self):
        c = self.secure()
        status = "401" if self.name == "http" else "StatusCode.UNAUTHENTICATED"
        self.refused(status, ["API key"], self.infer, c)
        self.refused(status, ["API key"], self.infer, c, headers=self.headers(KEY + "x"))
        for call in (c.get_server_metadata, c.get_model_repository_index, c.get_inference_statistics, c.get_log_settings):
            self.refused(status, ["API key"], call)

    def test_client_certificate(self):
        c = self.certified()
        self.same(self.infer(c).as_numpy("y"), ARRAYS["FP32"])
        self.assertTrue(self.tree(c.get_model_metadata("identity_fp32"))["inputs"])
        self.refused(self.FORBIDDEN, ["other", "camera-1"], c.get_model_metadata, "other")

    def test_models_of_a_key(self):
        c, headers = self.secure(), self.headers(LIMITED_KEY)
        self.same(self.infer(c, headers=headers).as_numpy("y"), ARRAYS["FP32"])
        for call in (c.get_model_metadata, c.get_model_config, c.get_inference_statistics, c.load_model, c.unload_model):
            self.refused(self.FORBIDDEN, ["other", "limited"], call, "other", headers=headers)
        index = self.tree(c.get_model_repository_index(headers=headers))
        self.assertEqual([m["name"] for m in (index["models"] if self.name == "grpc" else index)], ["identity_fp32"])

    def test_rate_of_a_key(self):
        c, headers = self.secure(), self.headers(SLOW_KEY)
        status = "429" if self.name == "http" else "StatusCode.RESOURCE_EXHAUSTED"
        try:  # the other protocol may have been first
            self.infer(c, headers=headers)
        except Exception as e:
            self.assertIn("1/h", str(e))
        self.refused(status, ["slow", "1/h"], self.infer, c, headers=headers)

    def test_health_needs_no_key(self):
        c = self.secure()
        self.assertTrue(c.is_server_live())
        self.assertTrue(c.is_server_ready())

    def test_certificate_is_checked(self):
        with self.assertRaises(Exception) as caught:
            self.secure(ca=None).is_server_live()
        self.assertIn("certificate", str(caught.exception).lower())

    def test_no_plain_text(self):
        if self.name == "http":
            c = httpclient.InferenceServerClient(HTTP_URL)
            self.addCleanup(c.close)
            try:
                self.assertFalse(c.is_server_live())
            except Exception as e:
                self.assertNotIsInstance(e, AssertionError)
        else:
            c = grpcclient.InferenceServerClient(GRPC_URL)
            self.addCleanup(c.close)
            self.refused("StatusCode.UNAVAILABLE", [], c.is_server_live)

    def test_what_is_off(self):
        c, headers = self.secure(), self.headers(KEY)
        self.refused(self.FORBIDDEN, ["identity_fp32", "model-control"], c.load_model, "identity_fp32", headers=headers)
        self.refused(self.FORBIDDEN, ["identity_fp32", "model-control"], c.unload_model, "identity_fp32", headers=headers)
        self.assertTrue(c.is_model_ready("identity_fp32", headers=headers))
        self.refused(self.UNSUPPORTED, ["shared memory"], c.register_system_shared_memory, "r", "/r", 64, headers=headers)
        extensions = self.tree(c.get_server_metadata(headers=headers))["extensions"]
        self.assertNotIn("system_shared_memory", extensions)
        self.assertNotIn("trace", extensions)


class Streams(GRPC, Case):
    def test_stream(self):
        c = grpcclient.InferenceServerClient(GRPC_URL, ssl=True, root_certificates=CA)
        self.addCleanup(c.close)
        answers = queue.Queue()
        c.start_stream(lambda result, error: answers.put((result, error)), headers={"authorization": "Bearer " + KEY})
        c.async_stream_infer("identity_fp32", [self.array_input("x", ARRAYS["FP32"])])
        result, error = answers.get(timeout=PATIENCE)
        self.assertIsNone(error)
        self.same(result.as_numpy("y"), ARRAYS["FP32"])
        c.stop_stream()
        c.start_stream(lambda result, error: answers.put((result, error)))
        _, error = answers.get(timeout=PATIENCE)
        self.assertEqual(error.status(), "StatusCode.UNAUTHENTICATED")
