"""Runs an ONNX model in Triton's Python backend, for servers without the onnxruntime backend. Needs onnxruntime."""

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    """Runs `model.onnx` from this folder, once for all requests of a batch."""

    def initialize(self, args: dict[str, str]) -> None:
        """Open the model."""
        file = Path(args["model_repository"]) / args["model_version"] / "model.onnx"
        self._session = onnxruntime.InferenceSession(file, providers=onnxruntime.get_available_providers())
        self._inputs = [tensor.name for tensor in self._session.get_inputs()]
        self._outputs = [tensor.name for tensor in self._session.get_outputs()]

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer every request with its rows of the outputs."""
        parts = [
            [pb_utils.get_input_tensor_by_name(request, name).as_numpy() for name in self._inputs]
            for request in requests
        ]
        inputs = {name: np.concatenate([part[index] for part in parts]) for index, name in enumerate(self._inputs)}
        outputs = self._session.run(self._outputs, inputs)
        ends = np.cumsum([len(part[0]) for part in parts])[:-1]
        rows = zip(*(np.split(output, ends) for output in outputs), strict=True)
        return [
            pb_utils.InferenceResponse(
                [pb_utils.Tensor(*pair) for pair in zip(self._outputs, request_rows, strict=True)]
            )
            for request_rows in rows
        ]
