"""Health, metadata, configuration, statistics, the model repository, settings."""

import glob
import json
import os
import queue
import time

import numpy as np
import tritonclient.grpc as grpcclient
from agent import GRPC, PATIENCE, array_input, both, model_file

DURATIONS = ["success", "fail", "queue", "compute_input", "compute_infer", "compute_output", "cache_hit", "cache_miss"]


@both
class Health:
    def test_server(self):
        c = self.client()
        self.assertTrue(c.is_server_live())
        self.assertTrue(c.is_server_ready())

    def test_models(self):
        c = self.client()
        self.assertTrue(c.is_model_ready("add_sub"))
        self.assertTrue(c.is_model_ready("versions", "1"))
        for name, version in (("nobody", ""), ("versions", "3"), ("broken", "")):
            self.assertFalse(c.is_model_ready(name, version), name)


@both
class Metadata:
    def test_server(self):
        m = self.tree(self.client().get_server_metadata())
        self.assertEqual(m["name"], "dunlin")
        self.assertTrue(m["version"])
        self.assertGreaterEqual(
            set(m["extensions"]),
            {"classification", "model_repository", "model_configuration", "system_shared_memory", "binary_tensor_data", "parameters", "statistics", "trace", "logging"},
        )
        self.assertNotIn("sequence", m["extensions"])

    def test_model(self):
        m = self.tree(self.client().get_model_metadata("add_sub"))
        tensor = lambda name: {"name": name, "datatype": "INT32", "shape": [-1, 16]}
        self.assertEqual((m["name"], m["versions"]), ("add_sub", ["1"]))
        self.assertTrue(m["platform"])
        self.assertEqual(m["inputs"], [tensor("INPUT0"), tensor("INPUT1")])
        self.assertEqual(m["outputs"], [tensor("OUTPUT0"), tensor("OUTPUT1")])

    def test_scalars(self):
        m = self.tree(self.client().get_model_metadata("scalars"))
        self.assertEqual(m["inputs"], [{"name": "x", "datatype": "FP32", "shape": []}, {"name": "n", "datatype": "INT64", "shape": []}])

    def test_versions(self):
        c = self.client()
        self.assertEqual(sorted(self.tree(c.get_model_metadata("versions"))["versions"]), ["1", "2"])
        self.assertEqual(self.tree(c.get_model_metadata("versions", "1"))["versions"], ["1"])

    def test_unknown(self):
        c = self.client()
        for call in (c.get_model_metadata, c.get_model_config, c.get_inference_statistics):
            self.refused(self.NOT_FOUND, ["nobody"], call, "nobody")
            self.refused(self.NOT_FOUND, ["versions", "9"], call, "versions", "9")


@both
class Config:
    def config(self, name):
        c = self.tree(self.client().get_model_config(name))
        return c["config"] if self.name == "grpc" else c

    def test_as_written(self):
        c = self.config("add_sub")
        self.assertEqual((c["name"], c["max_batch_size"]), ("add_sub", 8))
        self.assertEqual([(t["name"], t["data_type"], t["dims"]) for t in c["input"]], [("INPUT0", "TYPE_INT32", [16]), ("INPUT1", "TYPE_INT32", [16])])
        self.assertEqual([(t["name"], t["data_type"], t["dims"]) for t in c["output"]], [("OUTPUT0", "TYPE_INT32", [16]), ("OUTPUT1", "TYPE_INT32", [16])])
        self.assertEqual(c["dynamic_batching"]["max_queue_delay_microseconds"], 100)
        self.assertEqual(c["instance_group"][0]["count"], 1)
        for absent in ("sequence_batching", "ensemble_scheduling", "response_cache"):
            self.assertNotIn(absent, c)

    def test_default_values_are_there(self):
        c = self.config("identity_fp32")
        self.assertEqual(c["name"], "identity_fp32")
        self.assertEqual(type(c["max_batch_size"]), int)
        self.assertEqual([t["name"] for t in c["input"]], ["x"])
        self.assertEqual(c["input"][0]["optional"], False)
        self.assertEqual(c["input"][0]["is_shape_tensor"], False)

    def test_matches_metadata(self):
        """perf_analyzer counts on it for every model."""
        for name in ("add_sub", "classes", "types", "scalars", "versions", "identity_bytes"):
            c, m = self.config(name), self.tree(self.client().get_model_metadata(name))
            for part, parts in (("input", "inputs"), ("output", "outputs")):
                batch = [-1] if c["max_batch_size"] > 0 else []
                self.assertEqual(
                    [(t["name"], t["data_type"].replace("TYPE_", "").replace("STRING", "BYTES"), batch + t["dims"]) for t in c[part]],
                    [(t["name"], t["datatype"], t["shape"]) for t in m[parts]],
                    name,
                )


@both
class Statistics:
    def test_members_and_types(self):
        s = self.statistics(self.client(), "add_sub", "1")
        self.assertEqual((s["name"], s["version"]), ("add_sub", "1"))
        for member in ("last_inference", "inference_count", "execution_count"):
            self.assertEqual(type(s[member]), int, member)
        for member in DURATIONS:
            d = s["inference_stats"][member]
            self.assertEqual((type(d["count"]), type(d["ns"])), (int, int), member)
        self.assertIn("batch_stats", s)

    def test_counts(self):
        c = self.client()
        before = self.statistics(c, "add_sub")
        for rows in (1, 2, 2, 5):
            a = np.zeros((rows, 16), np.int32)
            c.infer("add_sub", [self.array_input("INPUT0", a), self.array_input("INPUT1", a)])
        after = self.statistics(c, "add_sub")
        self.assertEqual(after["inference_count"] - before["inference_count"], 10)
        self.assertEqual(after["execution_count"] - before["execution_count"], 4)
        grown = lambda member, part: after["inference_stats"][member][part] - before["inference_stats"][member][part]
        for member in ("success", "queue", "compute_input", "compute_infer", "compute_output"):
            self.assertEqual(grown(member, "count"), 4, member)
        for member in ("success", "compute_infer"):
            self.assertGreater(grown(member, "ns"), 0, member)
        self.assertGreaterEqual(grown("success", "ns"), grown("queue", "ns") + grown("compute_infer", "ns"))
        self.assertEqual(grown("cache_hit", "count"), 0)
        self.assertLess(abs(time.time() * 1000 - after["last_inference"]), 60_000)
        batches = lambda s: {b["batch_size"]: b["compute_infer"]["count"] for b in s["batch_stats"]}
        for size, count in ((1, 1), (2, 2), (5, 1)):
            self.assertEqual(batches(after)[size] - batches(before).get(size, 0), count, size)
        self.assertEqual(sum(n * count for n, count in batches(after).items()), after["inference_count"])

    def test_failures(self):
        """Only a request that the model took can fail there; one that is wrong never gets to it."""
        c = self.client()
        before = self.statistics(c, "add_sub")["inference_stats"]
        wrong = self.array_input("INPUT0", np.zeros((1, 3), np.int32))
        self.refused(self.INVALID, ["INPUT"], c.infer, "add_sub", [wrong])
        after = self.statistics(c, "add_sub")["inference_stats"]
        self.assertEqual(after["success"]["count"], before["success"]["count"])

    def test_all_models(self):
        stats = self.tree(self.client().get_inference_statistics())["model_stats"]
        have = {(s["name"], s["version"]) for s in stats}
        self.assertGreaterEqual(have, {("add_sub", "1"), ("versions", "1"), ("versions", "2"), ("scalars", "1")})
        self.assertEqual(len(have), len(stats))

    def test_requests_run_together(self):
        c = self.client()
        before = self.statistics(c, "batched")
        done = queue.Queue()
        sender = grpcclient.InferenceServerClient(GRPC.url)
        self.addCleanup(sender.close)
        for n in range(4):
            x = np.full((1, 4), n, np.float32)
            sender.async_infer("batched", [array_input(grpcclient, "x", x)], lambda result, error: done.put((result, error)), request_id=str(n))
        for _ in range(4):
            result, error = done.get(timeout=PATIENCE)
            self.assertIsNone(error)
            self.same(result.as_numpy("y"), np.full((1, 4), float(result.get_response().id), np.float32))
        after = self.statistics(c, "batched")
        self.assertEqual(after["inference_count"] - before["inference_count"], 4)
        self.assertEqual(after["execution_count"] - before["execution_count"], 1)
        sizes = {b["batch_size"]: b["compute_infer"]["count"] for b in after["batch_stats"]}
        self.assertGreaterEqual(sizes.get(4, 0), 1)


SPARE = {
    "name": "spare", "backend": "onnxruntime", "max_batch_size": 4,
    "input": [{"name": "x", "data_type": "TYPE_FP32", "dims": [4]}],
    "output": [{"name": "y", "data_type": "TYPE_FP32", "dims": [4]}],
}
ADDER = {
    "backend": "onnxruntime", "max_batch_size": 0,
    "input": [{"name": "x", "data_type": "TYPE_FP32", "dims": [-1]}],
    "output": [{"name": "y", "data_type": "TYPE_FP32", "dims": [-1]}],
}


@both
class Repository:
    def setUp(self):
        self.c = self.client()

    def index(self, name):
        answer = self.tree(self.c.get_model_repository_index())
        models = answer["models"] if self.name == "grpc" else answer
        return [m for m in models if m["name"] == name]

    def spare(self, rows=1):
        x = np.ones((rows, 4), np.float32)
        return self.c.infer("spare", [self.array_input("x", x)])

    def test_index(self):
        (m,) = self.index("add_sub")
        self.assertEqual((m["version"], m["state"], m.get("reason", "")), ("1", "READY", ""))
        self.assertEqual(sorted((m["version"], m["state"]) for m in self.index("versions")), [("1", "READY"), ("2", "READY")])
        self.assertNotIn("READY", [m.get("state") for m in self.index("spare")])
        self.assertEqual(self.index("nobody"), [])

    def test_load_and_unload(self):
        self.c.load_model("spare")
        self.addCleanup(self.c.unload_model, "spare")
        self.assertTrue(self.c.is_model_ready("spare"))
        self.assertEqual([m["state"] for m in self.index("spare")], ["READY"])
        self.same(self.spare().as_numpy("y"), np.ones((1, 4), np.float32))
        self.c.unload_model("spare")
        self.assertFalse(self.c.is_model_ready("spare"))
        for m in self.index("spare"):
            self.assertEqual((m["state"], m["reason"]), ("UNAVAILABLE", "unloaded"))
        with self.assertRaises(Exception) as caught:
            self.spare()
        self.error(caught.exception, self.NOT_FOUND, ["spare"])
        self.assertNotIn("spare", [s["name"] for s in self.tree(self.c.get_inference_statistics())["model_stats"]])

    def test_load_again(self):
        self.c.load_model("versions")
        self.assertEqual(sorted(m["state"] for m in self.index("versions")), ["READY", "READY"])

    def test_config_for_one_load(self):
        self.addCleanup(self.c.unload_model, "spare")
        self.c.load_model("spare", config=json.dumps(SPARE))
        self.assertEqual(self.max_batch_size("spare"), 4)
        self.assertEqual(self.spare(rows=4).as_numpy("y").shape, (4, 4))
        self.c.load_model("spare")
        self.assertEqual(self.max_batch_size("spare"), 2)
        self.refused(self.INVALID, ["4", "2"], self.spare, rows=4)

    def test_files_for_one_load(self):
        self.addCleanup(self.c.unload_model, "spare")
        self.c.load_model("spare", config=json.dumps(ADDER), files={"file:3/model.onnx": model_file("versions/1/model.onnx")})
        self.assertEqual(self.tree(self.c.get_model_metadata("spare"))["versions"], ["3"])
        x = np.array([1, 2], np.float32)
        r = self.c.infer("spare", [self.array_input("x", x)])
        self.same(r.as_numpy("y"), x + np.float32(1))
        self.c.load_model("spare")
        self.assertEqual(self.tree(self.c.get_model_metadata("spare"))["versions"], ["1"])

    def test_model_that_the_client_brings(self):
        name = "brought_" + self.name
        self.addCleanup(self.c.unload_model, name)
        self.c.load_model(name, config=json.dumps(ADDER), files={"file:1/model.onnx": model_file("versions/2/model.onnx")})
        x = np.array([1, 2], np.float32)
        self.same(self.c.infer(name, [self.array_input("x", x)]).as_numpy("y"), x + np.float32(2))

    def test_overrides_that_are_wrong(self):
        model = model_file("versions/1/model.onnx")
        for what, kwargs in {
            "no config": dict(files={"file:1/model.onnx": model}),
            "outside": dict(config=json.dumps(ADDER), files={"file:../escaped/1/model.onnx": model}),
            "absolute": dict(config=json.dumps(ADDER), files={"file:/tmp/model.onnx": model}),
            "not JSON": dict(config="{"),
            "unknown field": dict(config='{"max_batch_sizes": 3}'),
        }.items():
            with self.subTest(what), self.assertRaises(Exception) as caught:
                self.c.load_model("spare", **kwargs)
            self.assertEqual(caught.exception.status(), self.INVALID, (what, str(caught.exception)))
        self.assertFalse(self.c.is_model_ready("spare"))

    def test_model_that_does_not_load(self):
        with self.assertRaises(Exception) as caught:
            self.c.load_model("broken")
        self.assertIn("broken", caught.exception.message())
        self.assertFalse(self.c.is_model_ready("broken"))
        (m,) = self.index("broken")
        self.assertEqual(m["state"], "UNAVAILABLE")
        self.assertTrue(m["reason"])
        self.assertTrue(self.c.is_server_live())

    def test_override_that_does_not_load_leaves_the_old_one(self):
        self.c.load_model("spare")
        self.addCleanup(self.c.unload_model, "spare")
        with self.assertRaises(Exception) as caught:
            self.c.load_model("spare", config=json.dumps(ADDER), files={"file:1/model.onnx": b"no model"})
        self.assertIn("spare", caught.exception.message())
        self.same(self.spare().as_numpy("y"), np.ones((1, 4), np.float32))

    def test_unknown_model(self):
        with self.assertRaises(Exception) as caught:
            self.c.load_model("nobody")
        self.assertIn("nobody", caught.exception.message())

    def max_batch_size(self, name):
        c = self.tree(self.c.get_model_config(name))
        return (c["config"] if self.name == "grpc" else c)["max_batch_size"]


@both
class Trace:
    def settings(self, call, *args, **kwargs):
        t = self.tree(call(*args, **kwargs))
        if self.name == "http":
            return t
        # trace_level is the only one with several values.
        return {k: v["value"] if k == "trace_level" else str(v["value"][0]) for k, v in t["settings"].items()}

    def setUp(self):
        self.c = self.client()

    clear = {"trace_level": None, "trace_rate": None, "trace_count": None, "log_frequency": None}

    def test_defaults(self):
        s = self.settings(self.c.update_trace_settings, settings=self.clear)
        self.assertEqual((s["trace_level"], s["trace_rate"], s["trace_count"], s["log_frequency"]), (["OFF"], "1000", "-1", "0"))
        self.assertEqual(s["trace_file"], os.environ["TRACE"])

    def test_update_and_clear(self):
        self.addCleanup(self.c.update_trace_settings, settings=self.clear)
        self.addCleanup(self.c.update_trace_settings, "add_sub", self.clear)
        s = self.settings(self.c.update_trace_settings, "add_sub", {"trace_rate": "7", "trace_count": "3"})
        self.assertEqual((s["trace_rate"], s["trace_count"], s["trace_level"]), ("7", "3", ["OFF"]))
        self.assertEqual(self.settings(self.c.get_trace_settings)["trace_rate"], "1000")
        s = self.settings(self.c.update_trace_settings, settings={"trace_rate": "500"})
        self.assertEqual(s["trace_rate"], "500")
        self.assertEqual(self.settings(self.c.get_trace_settings, "add_sub")["trace_rate"], "7")
        s = self.settings(self.c.update_trace_settings, "add_sub", {"trace_rate": None})
        self.assertEqual((s["trace_rate"], s["trace_count"]), ("500", "3"))
        s = self.settings(self.c.update_trace_settings, settings=self.clear)
        self.assertEqual(s["trace_rate"], "1000")

    def test_wrong(self):
        for setting, value in (("trace_rate", "x"), ("trace_count", "-2"), ("trace_level", ["OFF", "TIMESTAMPS"]), ("trace_level", ["LOUD"]), ("log_frequency", "-1"), ("nothing", "1")):
            with self.subTest(setting):
                self.refused(self.INVALID, [setting], self.c.update_trace_settings, settings={setting: value})
        self.refused(self.UNSUPPORTED, ["trace"], self.c.update_trace_settings, settings={"trace_file": "/tmp/other"})
        for call in (self.c.get_trace_settings, self.c.update_trace_settings):
            with self.assertRaises(Exception) as caught:
                call("nobody")
            self.assertIn("nobody", caught.exception.message())

    def test_requests_are_traced(self):
        model = "identity_int8" if self.name == "http" else "identity_uint8"
        self.addCleanup(self.c.update_trace_settings, model, self.clear)
        self.c.update_trace_settings(model, {"trace_level": ["TIMESTAMPS"], "trace_rate": "1", "trace_count": "2", "log_frequency": "1"})
        x = np.zeros((1, 2), model.removeprefix("identity_"))
        for _ in range(3):
            self.c.infer(model, [self.array_input("x", x)])

        def traced():
            text = ""
            for path in glob.glob(os.environ["TRACE"] + "*"):
                with open(path) as f:
                    text += f.read()
            return text if model in text else None

        self.assertIn("timestamps", self.until("traced", traced))


@both
class Logging:
    def settings(self, answer):
        t = self.tree(answer)
        if self.name == "http":
            return t
        return {k: next(v for kind, v in one.items() if kind.endswith("_param")) for k, one in t["settings"].items()}

    def setUp(self):
        self.c = self.client()

    def test_defaults(self):
        s = self.settings(self.c.get_log_settings())
        self.assertEqual(s, {"log_file": "", "log_info": True, "log_warning": True, "log_error": True, "log_verbose_level": 0, "log_format": s["log_format"]})
        self.assertIn(s["log_format"], ("default", "ISO8601"))

    def test_update(self):
        self.addCleanup(self.c.update_log_settings, {"log_verbose_level": 0, "log_info": True})
        s = self.settings(self.c.update_log_settings({"log_verbose_level": 1}))
        self.assertEqual((s["log_verbose_level"], s["log_info"]), (1, True))
        s = self.settings(self.c.update_log_settings({"log_verbose_level": 0, "log_info": False}))
        self.assertEqual((s["log_verbose_level"], s["log_info"]), (0, False))
        self.assertEqual(self.settings(self.c.get_log_settings()), s)

    def test_wrong(self):
        self.refused(self.UNSUPPORTED, ["log"], self.c.update_log_settings, {"log_file": "/tmp/other"})
        if self.name == "http":  # over gRPC, the client itself checks the types
            for setting, value in (("log_info", "yes"), ("log_verbose_level", -1), ("log_format", 3), ("log_format", "loud")):
                with self.subTest(setting), self.assertRaises(Exception) as caught:
                    self.c.update_log_settings({setting: value})
                self.assertIn(caught.exception.status(), ("400", "503"))
