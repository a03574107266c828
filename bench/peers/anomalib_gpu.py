"""In an environment with anomalib: how fast its FastFlow judges and trains on the GPU. Run by `bench.gpu`.

    python anomalib_gpu.py JOB.json RESULT.json

The job is `{"configurations": [{"backbone", "input_size", "strides", "flow_steps", "conv3x3_only", "hidden_ratio"}],
"batches": [..], "seconds": S, "train_images": N}`. The result has img/s by backbone, way and batch, and the seconds of
a training epoch. Weights are random: speed does not depend on them. A call takes uint8 images in the host's memory and
gives image scores there; its maps, of the images' size, stay on the GPU. Knows nothing of flawstream.
"""

import json
import math
import statistics
import sys
import time
import unittest.mock
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from anomalib.models.image.fastflow.loss import FastflowLoss
from anomalib.models.image.fastflow.torch_model import FastflowModel
from timm import create_model

BATCH = 32  # anomalib's default in training, as are rate and decay below
LEARNING_RATE, WEIGHT_DECAY = 1e-3, 1e-5
WARM_UP_CALLS = 3

Judge = Callable[[torch.Tensor], torch.Tensor]


def make_model(configuration: dict[str, Any]) -> torch.nn.Module:
    """Make anomalib's model; a backbone that it does not offer is handed to it where it asks timm for `resnet18`.

    What lies behind the last scale of such a backbone is cut off, as it is in ours.
    """
    side = configuration["input_size"]
    stages = [int(math.log2(stride)) - 1 for stride in configuration["strides"]]

    def create(_: str, **options: Any) -> torch.nn.Module:
        return create_model(configuration["backbone"], **options | {"pretrained": False, "out_indices": stages})

    with unittest.mock.patch.object(timm, "create_model", create):
        model = FastflowModel(
            (side, side),
            "resnet18",
            pre_trained=False,
            flow_steps=configuration["flow_steps"],
            conv3x3_only=configuration["conv3x3_only"],
            hidden_ratio=configuration["hidden_ratio"],
        )
    network = model.feature_extractor
    if hasattr(network, "blocks"):
        network.blocks = network.blocks[: max(stage["stage"] for stage in network.feature_info.get_dicts())]
    return model.cuda()


def eager(model: torch.nn.Module, dtype: torch.dtype = torch.float32) -> Judge:
    """Return a function from pixels to scores, in the host's memory; maps stay on the GPU, which costs it nothing."""
    model = model.to(dtype)

    @torch.inference_mode()
    def judge(images: torch.Tensor) -> torch.Tensor:
        return model(to_float(images.cuda(non_blocking=True), dtype)).pred_score.cpu()

    return judge


def graphed(model: torch.nn.Module) -> Judge:
    """Return the same in float16 and channels-last, as a CUDA graph for each batch size: more than anomalib offers."""
    model = model.half().to(memory_format=torch.channels_last)
    torch.backends.cudnn.benchmark = True
    captured: dict[int, tuple[torch.cuda.CUDAGraph, torch.Tensor, torch.Tensor]] = {}

    @torch.inference_mode()
    def judge(images: torch.Tensor) -> torch.Tensor:
        count = len(images)
        if count not in captured:
            pixels = images.cuda()
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(WARM_UP_CALLS):
                    model(to_float(pixels, torch.float16))
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                scores = model(to_float(pixels, torch.float16)).pred_score
            captured[count] = graph, pixels, scores
        graph, pixels, scores = captured[count]
        pixels.copy_(images, non_blocking=True)
        graph.replay()
        return scores.cpu()

    return judge


def to_float(images: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Turn (B, S, S, 3) uint8 into (B, 3, S, S) in [0, 1]."""
    return images.permute(0, 3, 1, 2).to(dtype) / 255


def rate(judge: Judge, images: torch.Tensor, seconds: float) -> float:
    """Return images a second: the batch over the median of its calls."""
    for _ in range(WARM_UP_CALLS):
        judge(images)
    times = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < WARM_UP_CALLS:
        began = time.perf_counter()
        judge(images)
        times.append(time.perf_counter() - began)
    return len(images) / statistics.median(times)


def train_epoch_s(model: torch.nn.Module, images: torch.Tensor) -> float:
    """Return the seconds of an epoch, the second of two."""
    optimiser = torch.optim.Adam(
        [one for one in model.parameters() if one.requires_grad], lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY
    )
    loss_of = FastflowLoss()
    model.train()
    took = 0.0
    for _ in range(2):
        torch.cuda.synchronize()
        began = time.perf_counter()
        for rows in torch.randperm(len(images)).split(BATCH):
            loss = loss_of(*model(images[rows].cuda().permute(0, 3, 1, 2).float() / 255))
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        torch.cuda.synchronize()
        took = time.perf_counter() - began
    return took


def main(job_file: str, result_file: str) -> None:
    """Do the job. A way that fails is left out, and its error is printed."""
    job = json.loads(Path(job_file).read_text())
    found: dict[str, Any] = {"speed": {}, "train_epoch_s": {}}
    for configuration in job["configurations"]:
        side, name = configuration["input_size"], configuration["backbone"]
        images = torch.randint(0, 256, (max(*job["batches"], job["train_images"]), side, side, 3), dtype=torch.uint8)
        model = make_model(configuration).eval()
        ways: dict[str, Callable[[], Judge]] = {
            "eager": lambda: eager(model),  # noqa: B023 - called in this turn
            "compiled, CUDA graphs": lambda: eager(torch.compile(model, mode="reduce-overhead", dynamic=False)),  # noqa: B023
            "eager float16": lambda: eager(model, torch.float16),  # noqa: B023
            "float16, channels last, CUDA graphs": lambda: graphed(model),  # noqa: B023
        }
        speeds = found["speed"].setdefault(name, {})
        for way, make in ways.items():
            try:
                judge = make()
                speeds[way] = {
                    batch: rate(judge, images[:batch].pin_memory(), job["seconds"]) for batch in job["batches"]
                }
            except Exception as error:  # noqa: BLE001 - the others are measured all the same
                print(f"anomalib {name} {way}: {type(error).__name__}: {str(error)[:300]}", file=sys.stderr)
        if job["train_images"]:
            found["train_epoch_s"][name] = train_epoch_s(make_model(configuration), images[: job["train_images"]])
        Path(result_file).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
