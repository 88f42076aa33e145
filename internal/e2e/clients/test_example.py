"""The documents' example that puts pre- and post-processing into a model."""

import os
import pathlib
import subprocess
import sys
import unittest

import numpy as np
import tritonclient.http as httpclient

ROOT = pathlib.Path(__file__).resolve().parents[3]
DIGITS = ROOT / "models/examples/digits"


class Preprocess(unittest.TestCase):
    def test_camera_images(self):
        model = pathlib.Path(os.environ["MODELS"]) / "camera/1/model.onnx"
        model.parent.mkdir(parents=True)
        subprocess.run([sys.executable, ROOT / "docs/examples/preprocess.py", DIGITS / "v2.onnx", DIGITS / "labels.txt", model], check=True)
        client = httpclient.InferenceServerClient(os.environ["HTTP"])
        self.addCleanup(client.close)
        client.load_model("camera")
        self.addCleanup(client.unload_model, "camera")
        small, labels = np.load(DIGITS / "heldout-images.npy"), np.load(DIGITS / "heldout-labels.npy")
        names = (DIGITS / "labels.txt").read_text().split()
        large = np.kron(small.astype(np.float32) * 255 / 16, np.ones((1, 10, 10), np.float32)).astype(np.uint8)
        camera = httpclient.InferInput("camera", large.shape, "UINT8")
        camera.set_data_from_numpy(large)
        answer = client.infer("camera", [camera])
        self.assertEqual(answer.as_numpy("digits/probabilities").shape, (600, 10))
        right = sum(name.decode() == names[label] for name, label in zip(answer.as_numpy("name"), labels))
        self.assertGreater(right, 580, "of 600; the model alone has 589")
