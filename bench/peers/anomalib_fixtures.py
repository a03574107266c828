"""In anomalib's environment: write `tests/data/anomalib_*.safetensors`, small checkpoints with anomalib's own maps.

    .venv-anomalib/bin/python bench/peers/anomalib_fixtures.py

The networks are anomalib's with few channels (`tests/helpers/small_backbones.py`). The maps are of pixels, and of a
JPEG and a PNG that anomalib reads and resizes. Weights are rounded to float16 before anything is computed, so that the
files are small and nothing is lost.
"""

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from anomalib.models.image.fastflow import torch_model
from anomalib_maps import compute_file_maps, compute_maps, make_images, scatter
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

TESTS = Path(__file__).parents[2] / "tests"
sys.path.insert(0, str(TESTS))
from helpers.small_backbones import SIDE, SMALL, shrink  # noqa: E402 - found on the path that the line above adds

FIXTURES: dict[str, dict[str, Any]] = {
    "resnet18": {"flow_steps": 3, "hidden_ratio": 0.5},
    "deit_base_distilled_patch16_384": {"flow_steps": 4, "hidden_ratio": 0.3},
    "cait_m48_448": {"flow_steps": 2, "hidden_ratio": 1.0, "conv3x3_only": True},
}


def narrow(create_block: Callable[..., Any], name: str) -> Callable[..., Any]:
    """Wrap anomalib's maker of flows, which takes every transformer to have 768 channels."""

    def create(input_dimensions: list[int], **arguments: Any) -> Any:
        channels = SMALL[name].get("embed_dim", input_dimensions[0])
        return create_block(input_dimensions=[channels, *input_dimensions[1:]], **arguments)

    return create


def read_files(model: torch_model.FastflowModel, seed: int) -> dict[str, Tensor]:
    """Make an image as JPEG and as PNG; give the bytes of each file and the (S, S) map of what anomalib reads."""
    picture = Image.fromarray(make_images(1, 160, seed)[0, :110])
    tensors: dict[str, Tensor] = {}
    with tempfile.TemporaryDirectory() as folder:
        for kind in ("jpeg", "png"):
            path = Path(folder) / f"image.{kind}"
            picture.save(path)
            tensors[kind] = torch.from_numpy(np.fromfile(path, np.uint8))
            tensors[f"{kind}_map"] = compute_file_maps(model, [path], SIDE)[0]
    return tensors


def main() -> None:
    """Write all fixtures."""
    create_block = torch_model.create_fast_flow_block
    timm.create_model = shrink(timm.create_model)
    for seed, (name, arguments) in enumerate(FIXTURES.items()):
        torch.manual_seed(seed)
        torch_model.create_fast_flow_block = narrow(create_block, name)
        model = torch_model.FastflowModel(input_size=(SIDE, SIDE), backbone=name, pre_trained=False, **arguments)
        scatter(model, seed)
        model.half().float()
        images = make_images(1, SIDE, seed)
        maps = compute_maps(model, images)
        tensors: dict[str, Tensor] = {
            f"model.{key}": (tensor.half() if tensor.is_floating_point() else tensor).contiguous()
            for key, tensor in model.state_dict().items()
            if not key.endswith(".w_perm_inv") and ".head" not in key and "token_only" not in key
        }
        path = TESTS / "data" / f"anomalib_{name.partition('_')[0]}.safetensors"
        more = {"images": torch.from_numpy(images), "maps": maps, **read_files(model, seed)}
        save_file({**tensors, **more}, path)
        spread = f"maps {maps.min():.3f} to {maps.max():.3f}, std {maps.std():.3f}"
        sys.stderr.write(f"{path.name}: {path.stat().st_size:,} bytes; {spread}\n")


if __name__ == "__main__":
    main()
