"""The model that clients call: runs the backbone once per batch, then each version's head on its rows.

A request may mix categories, and the server batches requests of many clients. Needs only numpy.
"""

import asyncio
import json
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    """Calls the other models of the repository (business logic scripting, BLS); has no weights."""

    def initialize(self, args: dict[str, str]) -> None:
        """Read the name of the backbone, its features and the outputs from the configuration."""
        config = json.loads(args["model_config"])
        self._backbone = config["parameters"]["backbone"]["string_value"]
        self._features = config["parameters"]["features"]["string_value"].split()
        self._outputs = [output["name"] for output in config["output"]]

    async def execute(self, requests: list[Any]) -> list[Any]:
        """Answer every request; a failing version fails only the requests that use it."""
        images = [pb_utils.get_input_tensor_by_name(request, "images").as_numpy() for request in requests]
        models_of_requests = [
            pb_utils.get_input_tensor_by_name(request, "model").as_numpy()[:, 0] for request in requests
        ]
        pixels = pb_utils.Tensor("images", np.concatenate(images))
        features, error = await _call(self._backbone, [pixels], self._features)
        if error is not None:
            return [pb_utils.InferenceResponse(error=pb_utils.TritonError(error)) for _ in requests]
        model_of_row = np.concatenate(models_of_requests)
        models = sorted(set(model_of_row))
        rows = [np.flatnonzero(model_of_row == model) for model in models]
        answers = await asyncio.gather(
            *(
                _call(
                    model.decode(),
                    [pb_utils.Tensor(name, scale[model_rows]) for name, scale in features.items()],
                    self._outputs,
                )
                for model, model_rows in zip(models, rows, strict=True)
            )
        )
        outputs = self._merge(len(model_of_row), rows, [part for part, _ in answers])
        errors = {model: error for model, (_, error) in zip(models, answers, strict=True) if error is not None}
        responses, start = [], 0
        for request, request_models in zip(requests, models_of_requests, strict=True):
            end = start + len(request_models)
            request_errors = [errors[model] for model in request_models if model in errors]
            wanted = [name for name in self._outputs if name in request.requested_output_names()]
            responses.append(
                pb_utils.InferenceResponse(error=pb_utils.TritonError(request_errors[0]))
                if request_errors
                else pb_utils.InferenceResponse([pb_utils.Tensor(name, outputs[name][start:end]) for name in wanted])
            )
            start = end
        return responses

    def _merge(self, count: int, rows: list[np.ndarray], parts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        """Put the outputs of each head into its rows of the batch."""
        outputs: dict[str, np.ndarray] = {}
        for model_rows, part in zip(rows, parts, strict=True):
            for name, values in part.items():
                whole = outputs.setdefault(name, np.zeros((count, *values.shape[1:]), values.dtype))
                whole[model_rows] = values
        return outputs


async def _call(model: str, inputs: list[Any], outputs: list[str]) -> tuple[dict[str, np.ndarray], str | None]:
    """Run a model of this server; return its outputs by name, or an error text."""
    response = await pb_utils.InferenceRequest(
        model_name=model,
        inputs=inputs,
        requested_output_names=outputs,
        # rows are selected with numpy, which cannot read GPU memory
        preferred_memory=pb_utils.PreferredMemory(pb_utils.TRITONSERVER_MEMORY_CPU),
    ).async_exec()
    if response.has_error():
        return {}, response.error().message()  # copied: the error's memory belongs to the response
    return {tensor.name(): tensor.as_numpy() for tensor in response.output_tensors()}, None
