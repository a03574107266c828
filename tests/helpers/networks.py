"""Whole networks of timm with weights that nobody else has."""

from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import timm
import torch
from torch import Tensor, nn

from schemas.settings import ModelSettings


def settings(**changes: object) -> ModelSettings:
    return ModelSettings.model_validate({"strides": (8, 16, 32), "input_size": 64, **changes})


def pixels(count: int = 1, side: int = 64) -> Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (count, side, side, 3), np.uint8))


def make_network(name: str = "resnet18", seed: int = 0, **arguments: Any) -> nn.Module:
    """A whole network with weights that nobody else has."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network: nn.Module = timm.create_model(name, pretrained=False, **arguments).eval()
        for buffer_name, buffer in network.named_buffers():
            if buffer_name.endswith("running_mean"):
                buffer.normal_(std=0.1)
    return network


def save(network: nn.Module, path: Path, wrapper: str | None = None) -> Path:
    state = network.state_dict()
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(state, path)
    else:
        torch.save({wrapper: state, "epoch": 3} if wrapper else state, path)
    return path
