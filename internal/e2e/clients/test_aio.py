"""The asyncio clients."""

import asyncio
import unittest

import numpy as np
import tritonclient.grpc.aio
import tritonclient.http.aio
from agent import ARRAYS, GRPC, HTTP, PATIENCE, Case, array_input, metric, metrics
from tritonclient.utils import InferenceServerException


class Asynchronous(Case, unittest.IsolatedAsyncioTestCase):
    async def running(self, want):
        """Waits until so many requests of the slow model run."""
        async with asyncio.timeout(PATIENCE):
            while metric(await asyncio.to_thread(metrics), "dunlin_requests_running", model="slow") != want:
                await asyncio.sleep(0.01)


class HTTPClient(Asynchronous):
    async def asyncSetUp(self):
        self.c = tritonclient.http.aio.InferenceServerClient(HTTP.url, conn_limit=16, conn_timeout=PATIENCE)
        self.addAsyncCleanup(self.c.close)

    async def test_management(self):
        """aiohttp asks for compressed answers; the client expects only those of infer to be."""
        c = self.c
        self.assertTrue(await c.is_server_live())
        self.assertTrue(await c.is_server_ready())
        self.assertTrue(await c.is_model_ready("add_sub"))
        self.assertEqual((await c.get_server_metadata())["name"], "dunlin")
        self.assertEqual((await c.get_model_metadata("types"))["name"], "types")
        self.assertEqual((await c.get_model_config("types"))["name"], "types")
        self.assertTrue((await c.get_inference_statistics())["model_stats"])
        self.assertTrue(await c.get_model_repository_index())
        self.assertTrue(await c.get_trace_settings())
        self.assertTrue(await c.get_log_settings())
        self.assertEqual(await c.get_system_shared_memory_status(), [])
        await c.load_model("spare")
        await c.unload_model("spare")

    async def test_every_type(self):
        for name, array in ARRAYS.items():
            with self.subTest(name):
                r = await self.c.infer("identity_" + name.lower(), [array_input(HTTP.lib, "x", array)])
                self.same(r.as_numpy("y"), array)

    async def test_many_at_once(self):
        arrays = [np.array([n, 1], np.float32) for n in range(100)]
        results = await asyncio.gather(*(self.c.infer("versions", [array_input(HTTP.lib, "x", x)]) for x in arrays))
        for x, r in zip(arrays, results):
            self.same(r.as_numpy("y"), x + np.float32(2))

    async def test_compression(self):
        x = np.zeros((4096, 2), np.float32)
        for algorithm in ("gzip", "deflate"):
            r = await self.c.infer(
                "identity_fp32", [array_input(HTTP.lib, "x", x)],
                request_compression_algorithm=algorithm, response_compression_algorithm=algorithm,
            )
            self.same(r.as_numpy("y"), x)

    async def test_error(self):
        with self.assertRaises(InferenceServerException) as caught:
            await self.c.infer("nobody", [array_input(HTTP.lib, "x", ARRAYS["FP32"])])
        self.error(caught.exception, "404", ["nobody"])

    async def test_caller_that_goes_away(self):
        call = asyncio.create_task(self.c.infer("slow", [array_input(HTTP.lib, "x", np.zeros((1, 1), np.float32))]))
        await self.running(1)
        call.cancel()
        await self.running(0)


class GRPCClient(Asynchronous):
    async def asyncSetUp(self):
        self.c = tritonclient.grpc.aio.InferenceServerClient(GRPC.url)
        self.addAsyncCleanup(self.c.close)

    async def test_management(self):
        self.assertTrue(await self.c.is_server_ready())
        self.assertEqual((await self.c.get_model_metadata("types")).name, "types")
        self.assertTrue((await self.c.get_inference_statistics()).model_stats)

    async def test_every_type(self):
        for name, array in ARRAYS.items():
            with self.subTest(name):
                r = await self.c.infer("identity_" + name.lower(), [array_input(GRPC.lib, "x", array)])
                self.same(r.as_numpy("y"), array)

    async def test_many_at_once(self):
        arrays = [np.array([n, 1], np.float32) for n in range(100)]
        results = await asyncio.gather(*(self.c.infer("versions", [array_input(GRPC.lib, "x", x)]) for x in arrays))
        for x, r in zip(arrays, results):
            self.same(r.as_numpy("y"), x + np.float32(2))

    async def test_stream(self):
        async def requests():
            for n in range(50):
                model = "nobody" if n == 25 else "versions"
                yield {"model_name": model, "inputs": [array_input(GRPC.lib, "x", np.array([n], np.float32))], "request_id": str(n)}

        n = 0
        async for result, error in self.c.stream_infer(requests()):
            if n == 25:
                self.assertIn("nobody", error.message())
            else:
                self.assertIsNone(error)
                self.assertEqual(result.get_response().id, str(n))
                self.same(result.as_numpy("y"), np.array([n + 2], np.float32))
            n += 1
        self.assertEqual(n, 50)

    async def test_error(self):
        with self.assertRaises(InferenceServerException) as caught:
            await self.c.infer("nobody", [array_input(GRPC.lib, "x", ARRAYS["FP32"])])
        self.error(caught.exception, "StatusCode.NOT_FOUND", ["nobody"])

    async def test_cancel(self):
        call = asyncio.create_task(self.c.infer("slow", [array_input(GRPC.lib, "x", np.zeros((1, 1), np.float32))]))
        await self.running(1)
        call.cancel()
        with self.assertRaises(asyncio.CancelledError):
            await call
        await self.running(0)
