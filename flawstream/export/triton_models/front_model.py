"""The model that clients of a Triton server call: the backbone once for a whole batch, each version's head on its rows.

Rows of any mix of categories may be in one request, and the server batches requests of many clients. Needs numpy alone.
"""

import asyncio
import json
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    """Calls the other models of the repository (business logic scripting) and holds no weights."""

    def initialize(self, args: dict[str, str]) -> None:
        """Read from the configuration what the backbone is called and what comes out."""
        config = json.loads(args["model_config"])
        self._backbone = config["parameters"]["backbone"]["string_value"]
        self._features = config["parameters"]["features"]["string_value"].split()
        self._outputs = [output["name"] for output in config["output"]]

    async def execute(self, requests: list[Any]) -> list[Any]:
        """Answer every request; a version that fails fails those requests alone that have a row of it."""
        images = [pb_utils.get_input_tensor_by_name(request, "images").as_numpy() for request in requests]
        named = [pb_utils.get_input_tensor_by_name(request, "model").as_numpy()[:, 0] for request in requests]
        pixels = pb_utils.Tensor("images", np.concatenate(images))
        features, why = await _call(self._backbone, [pixels], self._features)
        if why is not None:
            return [pb_utils.InferenceResponse(error=pb_utils.TritonError(why)) for _ in requests]
        owners = np.concatenate(named)
        models = sorted(set(owners))
        rows = [np.flatnonzero(owners == model) for model in models]
        answers = await asyncio.gather(
            *(
                _call(
                    model.decode(),
                    [pb_utils.Tensor(name, scale[own]) for name, scale in features.items()],
                    self._outputs,
                )
                for model, own in zip(models, rows, strict=True)
            )
        )
        outputs = self._together(len(owners), rows, [part for part, _ in answers])
        failed = {model: why for model, (_, why) in zip(models, answers, strict=True) if why is not None}
        responses, start = [], 0
        for request, own_models in zip(requests, named, strict=True):
            end = start + len(own_models)
            reasons = [failed[model] for model in own_models if model in failed]
            wanted = [name for name in self._outputs if name in request.requested_output_names()]
            responses.append(
                pb_utils.InferenceResponse(error=pb_utils.TritonError(reasons[0]))
                if reasons
                else pb_utils.InferenceResponse([pb_utils.Tensor(name, outputs[name][start:end]) for name in wanted])
            )
            start = end
        return responses

    def _together(
        self, count: int, rows: list[np.ndarray], parts: list[dict[str, np.ndarray]]
    ) -> dict[str, np.ndarray]:
        """Put what each head gave where its rows were."""
        outputs: dict[str, np.ndarray] = {}
        for own, part in zip(rows, parts, strict=True):
            for name, values in part.items():
                whole = outputs.setdefault(name, np.zeros((count, *values.shape[1:]), values.dtype))
                whole[own] = values
        return outputs


async def _call(model: str, inputs: list[Any], outputs: list[str]) -> tuple[dict[str, np.ndarray], str | None]:
    """Run a model of this server; what it gave by name, or nothing and why."""
    response = await pb_utils.InferenceRequest(
        model_name=model,
        inputs=inputs,
        requested_output_names=outputs,
        # rows are picked with numpy, which does not reach into a GPU's memory
        preferred_memory=pb_utils.PreferredMemory(pb_utils.TRITONSERVER_MEMORY_CPU),
    ).async_exec()
    if response.has_error():
        return {}, response.error().message()  # a copy: the error's own text goes with the response
    return {tensor.name(): tensor.as_numpy() for tensor in response.output_tensors()}, None
