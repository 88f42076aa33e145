"""System shared memory, with the client's own helpers."""

import os

import numpy as np
import tritonclient.utils.shared_memory as shm
from agent import ARRAYS, both
from tritonclient.utils import serialize_byte_tensor


@both
class Memory:
    def setUp(self):
        self.c = self.client()
        self.addCleanup(self.c.unregister_system_shared_memory)

    def region(self, name, size, register=True):
        """A piece of shared memory, registered under its name."""
        key = f"/dunlin-{os.getpid()}-{name}"
        handle = shm.create_shared_memory_region(name, key, size)
        self.addCleanup(shm.destroy_shared_memory_region, handle)
        if register:
            self.c.register_system_shared_memory(name, key, size)
        return handle, key

    def slice_input(self, name, datatype, shape, region, size, offset=0):
        i = self.lib.InferInput(name, list(shape), datatype)
        i.set_shared_memory(region, size, offset)
        return i

    def slice_output(self, name, region, size, offset=0):
        o = self.lib.InferRequestedOutput(name)
        o.set_shared_memory(region, size, offset)
        return o

    def test_every_type(self):
        for name, array in ARRAYS.items():
            with self.subTest(name):
                content = serialize_byte_tensor(array) if name == "BYTES" else array
                size = len(content.item()) if name == "BYTES" else array.nbytes
                source, _ = self.region("in_" + name, size)
                target, _ = self.region("out_" + name, size + 64)
                shm.set_shared_memory_region(source, [content])
                r = self.c.infer(
                    "identity_" + name.lower(), [self.slice_input("x", name, array.shape, "in_" + name, size)],
                    outputs=[self.slice_output("y", "out_" + name, size + 64)],
                )
                dtype = np.object_ if name == "BYTES" else array.dtype
                got = shm.get_contents_as_numpy(target, dtype, array.shape)
                self.same(np.array(got), array)
                del got
                self.answer_without_data(r, "y", name, array.shape)

    def answer_without_data(self, result, name, datatype, shape):
        out = self.tree(result.get_output(name))
        self.assertEqual((out["datatype"], out["shape"]), (datatype, list(shape)))
        self.assertNotIn("data", out)
        if self.name == "grpc":
            self.assertEqual(list(result.get_response().raw_output_contents), [b""])
        else:  # C++ clients take any parameters to say how many bytes follow
            self.assertNotIn("parameters", out)

    def test_offsets_and_mixture(self):
        """One input and one output in memory, the others in the message."""
        a, b = np.arange(16, dtype=np.int32).reshape(1, 16), np.full((1, 16), 5, np.int32)
        handle, _ = self.region("mixture", 4096)
        shm.set_shared_memory_region(handle, [a], offset=128)
        r = self.c.infer(
            "add_sub", [self.slice_input("INPUT0", "INT32", [1, 16], "mixture", 64, 128), self.array_input("INPUT1", b)],
            outputs=[self.lib.InferRequestedOutput("OUTPUT0"), self.slice_output("OUTPUT1", "mixture", 64, 1024)],
        )
        self.same(r.as_numpy("OUTPUT0"), a + b)
        got = shm.get_contents_as_numpy(handle, np.int32, [1, 16], offset=1024)
        self.same(np.array(got), a - b)
        del got

    def test_region_with_an_offset(self):
        handle, key = self.region("whole", 4096, register=False)
        self.c.register_system_shared_memory("second", key, 2048, offset=2048)
        x = np.array([1, 2], np.float32)
        shm.set_shared_memory_region(handle, [x], offset=2048 + 16)
        r = self.c.infer("versions", [self.slice_input("x", "FP32", [2], "second", 8, 16)])
        self.same(r.as_numpy("y"), x + np.float32(2))

    def test_status(self):
        _, key = self.region("one", 256)
        self.region("two", 512)
        regions = self.regions()
        self.assertEqual(regions["one"], {"name": "one", "key": key, "offset": 0, "byte_size": 256})
        self.assertEqual(set(regions), {"one", "two"})
        self.assertEqual(set(self.regions("two")), {"two"})
        self.c.unregister_system_shared_memory("one")
        self.assertEqual(set(self.regions()), {"two"})
        self.c.unregister_system_shared_memory()
        self.assertEqual(self.regions(), {})
        self.refused(self.NOT_FOUND, ["two"], self.c.get_system_shared_memory_status, "two")

    def regions(self, name=""):
        answer = self.tree(self.c.get_system_shared_memory_status(name))
        return {r["name"]: r for r in answer} if self.name == "http" else answer["regions"]

    def test_key_without_a_slash(self):
        handle, key = self.region("bare", 64, register=False)
        self.c.register_system_shared_memory("bare", key.removeprefix("/"), 64)
        x = np.array([3], np.float32)
        shm.set_shared_memory_region(handle, [x])
        r = self.c.infer("versions", [self.slice_input("x", "FP32", [1], "bare", 4)])
        self.same(r.as_numpy("y"), x + np.float32(2))

    def test_registrations_that_are_wrong(self):
        _, key = self.region("right", 64)
        for what, args in {
            "name twice": ("right", key, 64),
            "no such object": ("other", "/dunlin-nothing", 64),
            "too long": ("other", key, 1 << 20),
            "offset too large": ("other", key, 64, 1 << 20),
            "wraps around": ("other", key, (1 << 63) - 1, (1 << 63) - 1),
            "a path": ("other", "/../../etc/passwd", 64),
            "no key": ("other", "/", 64),
            "empty key": ("other", "", 64),
        }.items():
            with self.subTest(what), self.assertRaises(Exception) as caught:
                self.c.register_system_shared_memory(*args)
            self.assertIn(args[0], caught.exception.message(), what)
        self.assertEqual(set(self.regions()), {"right"})

    def test_slices_that_are_wrong(self):
        self.region("small", 64)
        good = self.array_input("x", np.zeros(2, np.float32))
        for what, i, o in (
            ("unknown region", self.slice_input("x", "FP32", [2], "nothing", 8), None),
            ("past the end", self.slice_input("x", "FP32", [2], "small", 8, 60), None),
            ("offset past the end", self.slice_input("x", "FP32", [2], "small", 8, 1 << 40), None),
            ("size of the tensor", self.slice_input("x", "FP32", [2], "small", 12), None),
            ("unknown region of an output", good, self.slice_output("y", "nothing", 8)),
            ("output past the end", good, self.slice_output("y", "small", 8, 60)),
            ("output too small", good, self.slice_output("y", "small", 4)),
        ):
            with self.subTest(what), self.assertRaises(Exception) as caught:
                self.c.infer("versions", [i], outputs=[o] if o else None)
            self.assertIn(caught.exception.status(), (self.INVALID, self.NOT_FOUND), what)

    def test_unregistered_region(self):
        self.region("gone", 64)
        self.c.unregister_system_shared_memory("gone")
        with self.assertRaises(Exception) as caught:
            self.c.infer("versions", [self.slice_input("x", "FP32", [2], "gone", 8)])
        self.assertIn("gone", caught.exception.message())

    def test_client_that_truncates(self):
        """A mapped object would end the agent by SIGBUS."""
        _, key = self.region("cut", 1 << 16)
        os.truncate("/dev/shm" + key, 100)
        with self.assertRaises(Exception) as caught:
            self.c.infer("versions", [self.slice_input("x", "FP32", [1 << 14], "cut", 1 << 16)])
        self.assertIn("cut", caught.exception.message())
        self.assertTrue(self.c.is_server_live())
        os.truncate("/dev/shm" + key, 1 << 16)  # as the client's own mapping expects it

    def test_cuda(self):
        self.c.unregister_cuda_shared_memory()  # perf_analyzer does so at its start
        self.assertFalse((self.tree(self.c.get_cuda_shared_memory_status()) or {}).get("regions") if self.name == "grpc" else self.c.get_cuda_shared_memory_status())
        self.refused(self.UNSUPPORTED, [], self.c.register_cuda_shared_memory, "gpu", b"AAAA", 0, 64)
