"""A custom MLServer runtime that calls onnxruntime."""

import os

import onnxruntime
from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceRequest, InferenceResponse


class Tiny(MLModel):
    async def load(self) -> bool:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1  # the net is too small for more
        path = os.path.join(os.path.dirname(__file__), "mlp.onnx")
        self._session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        inputs = {i.name: NumpyCodec.decode_input(i) for i in payload.inputs}
        (output,) = self._session.run(["output"], inputs)
        return InferenceResponse(model_name=self.name, outputs=[NumpyCodec.encode_output("output", output)])
