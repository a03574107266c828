"""In anomalib's environment: its FastFlow in torch and exported to OpenVINO, timed when asked to.

anomalib offers FastFlow for two convolutional backbones. Another is handed to it where it asks timm for `resnet18`,
cut at the strides that were asked for; all else of the model, its norms, flows and maps, is built by anomalib.

Run by `bench.engine`. Reads one JSON object a line, `{"how": "torch" | "openvino", "batch": B, "runs": N}`, and answers
with one, `{"seconds": [...]}`; the first answer is `{"precision": ...}` once both are ready. Writes the first
images' maps as `maps-torch.npy` and `maps-openvino.npy`. Knows nothing of flawstream.
"""

import argparse
import contextlib
import json
import logging
import math
import os
import sys
import time
import unittest.mock
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from anomalib.deploy import OpenVINOInferencer
from anomalib.models import Fastflow
from numpy.typing import NDArray
from timm import create_model

OWN_BACKBONES = ("resnet18", "wide_resnet50_2")

Judge = Callable[[NDArray[np.uint8]], NDArray[np.float32]]


def make_model(configuration: dict[str, Any], checkpoint: Path | None) -> Fastflow:
    """Make anomalib's model with its own pre-processor.

    Args:
        configuration: Arguments of Fastflow, and input_size and strides.
        checkpoint: Has weights for it; without, it keeps the random ones that it is made with.
    """
    side, strides = configuration.pop("input_size"), configuration.pop("strides")

    def create(_: str, **options: Any) -> torch.nn.Module:
        stages = [int(math.log2(stride)) - 1 for stride in strides]
        return create_model(configuration["backbone"], **options | {"pretrained": False, "out_indices": stages})

    known = configuration["backbone"] in OWN_BACKBONES
    patch = contextlib.nullcontext() if known else unittest.mock.patch.object(timm, "create_model", create)
    with patch:
        lightning = Fastflow(
            pre_trained=False,
            pre_processor=Fastflow.configure_pre_processor(image_size=(side, side)),
            post_processor=False,
            **configuration if known else configuration | {"backbone": "resnet18"},
        )
    assert lightning.model.feature_extractor.feature_info.reduction() == strides  # noqa: S101 - the same work as ours
    if checkpoint is not None:
        lightning.model.load_state_dict(torch.load(checkpoint, weights_only=True))
    return lightning.eval()


def to_float(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Turn (B, S, S, 3) uint8 into (B, 3, S, S) float32 in [0, 1], as anomalib's inferencers do for one image."""
    return np.ascontiguousarray((images / np.float32(255)).transpose(0, 3, 1, 2))


def in_torch(model: Fastflow) -> Judge:
    """Judge images as anomalib does in torch."""

    def judge(images: NDArray[np.uint8]) -> NDArray[np.float32]:
        with torch.inference_mode():
            return model(torch.from_numpy(to_float(images))).anomaly_map.numpy()

    return judge


def in_openvino(model: Fastflow, folder: Path, side: int) -> tuple[Judge, str]:
    """Export by anomalib's `to_openvino` and open by its `OpenVINOInferencer`, both as they are by default."""
    path = model.to_openvino(folder / "export", input_size=(side, side))
    here = Path.cwd()
    os.chdir(folder)  # it makes a cache folder where it stands
    inferencer = OpenVINOInferencer(path, device="CPU")
    os.chdir(here)
    compiled = inferencer.model
    output = next(port for port in compiled.outputs if "anomaly_map" in port.names)

    def judge(images: NDArray[np.uint8]) -> NDArray[np.float32]:
        return compiled(to_float(images))[output]

    return judge, compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()


def main() -> None:
    """Get both ready, then answer."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="Has images.npy.")
    parser.add_argument("--configuration", required=True, help="As JSON: `make_model`.")
    parser.add_argument("--checkpoint", type=Path, help="The model's weights; random ones without.")
    parser.add_argument("--threads", type=int, required=True)
    arguments = parser.parse_args()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    logging.disable(logging.WARNING)
    torch.set_num_threads(arguments.threads)
    configuration = json.loads(arguments.configuration)
    side = configuration["input_size"]
    model = make_model(configuration, arguments.checkpoint)
    compiled, precision = in_openvino(model, arguments.folder, side)
    judges = {"torch": in_torch(model), "openvino": compiled}
    images = np.load(arguments.folder / "images.npy")
    for how, judge in judges.items():
        np.save(
            arguments.folder / f"maps-{how}.npy", np.concatenate([judge(images[k : k + 1]) for k in range(8)])[:, 0]
        )
    print(json.dumps({"precision": precision}), file=answers, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        batch, judge = images[: asked["batch"]], judges[asked["how"]]
        seconds = []
        for _ in range(asked["runs"]):
            started = time.perf_counter()
            judge(batch)
            seconds.append(time.perf_counter() - started)
        print(json.dumps({"seconds": seconds}), file=answers, flush=True)


if __name__ == "__main__":
    main()
