"""In anomalib's environment: its own FastFlow, moved away from where it starts, as a checkpoint with images and maps.

The maps are of pixels, which the model takes as they are, and of JPEG and PNG files, which anomalib reads and resizes.

Run by `bench.parity` and, for small networks, by `anomalib_fixtures.py`. Knows nothing of flawstream.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import skimage.data
import torch
from anomalib.data.utils import read_image
from anomalib.models import Fastflow
from anomalib.models.image.fastflow.torch_model import FastflowModel
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""ImageNet's: what anomalib's pre-processor and timm's configuration of all four backbones have."""


def scatter(model: FastflowModel, seed: int) -> None:
    """Move every weight that training would, and those that start as almost nothing, to where it counts."""
    generator = torch.Generator().manual_seed(seed)

    def noise(like: Tensor, deviation: float) -> Tensor:
        return torch.randn(like.shape, generator=generator) * deviation

    moves: dict[str, Callable[[Tensor], Tensor]] = {  # the first whose pattern is found in a name is taken
        r"^feature_extractor\..*gamma_": lambda old: 0.2 + noise(old, 0.05),  # CaiT's blocks start as almost nothing
        r"^feature_extractor\.norm\.weight": lambda old: _unit(noise(old, 1.2).exp()),  # else all places look alike
        r"^feature_extractor\..*running_var": lambda old: old * noise(old, 0.2).exp(),
        r"^feature_extractor\..*(running_mean|norm\d?\.|bn\d\.|bias)": lambda old: old + noise(old, 0.1),
        r"^norms\.": lambda old: old + noise(old, 0.3),
        r"global_scale": lambda old: old + noise(old, 1.0),
        r"global_offset": lambda old: old + noise(old, 0.1),
        r"\.subnet\.": lambda old: 2 * old + noise(old, 0.01),
    }
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            for pattern, move in moves.items():
                if tensor.is_floating_point() and re.search(pattern, name):
                    tensor.copy_(move(tensor))
                    break


def _unit(weights: Tensor) -> Tensor:
    return weights / weights.square().mean().sqrt()


def make_images(count: int, side: int, seed: int) -> NDArray[np.uint8]:
    """Make (count, side, side, 3) images of even patches of colour, half of each under noise."""
    random = np.random.RandomState(seed)  # its stream is frozen: fixtures can be made again
    patches = random.randint(0, 256, (count, 8, 8, 3)).repeat(side // 8, axis=1).repeat(side // 8, axis=2)
    grain = random.normal(0, 40, (count, side, side, 3)) * (np.arange(side) < side // 2)[:, None]
    return np.asarray((patches + grain).clip(0, 255), np.uint8)


def compute_maps(model: FastflowModel, images: NDArray[np.uint8]) -> Tensor:
    """Compute anomalib's anomaly maps; (B, S, S, 3) uint8 to (B, S, S) float32."""
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2) / 255
    normalised = (pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    with torch.inference_mode():
        maps: Tensor = model.eval()(normalised).anomaly_map
    return maps[:, 0]


def write_files(folder: Path) -> None:
    """Write photographs of several sizes into a folder, each as JPEG and as PNG."""
    wall = np.tile(np.hstack([_photograph("brick.png"), _photograph("gravel.png")]), (3, 2, 1))
    pictures = {
        "700x500": wall[:500, 200:900],
        "2000x1500": wall[:1500, :2000],
        "300x900": wall[200:1100, 400:700],
        "200x150": _photograph("coffee.png")[100:250, 100:300],
    }
    for name, pixels in pictures.items():
        Image.fromarray(pixels).save(folder / f"{name}.jpg", quality=90)
        Image.fromarray(pixels).save(folder / f"{name}.png")


def _photograph(name: str) -> NDArray[np.uint8]:
    return np.asarray(Image.open(Path(skimage.data.__file__).parent / name).convert("RGB"))


def compute_file_maps(model: FastflowModel, paths: list[Path], side: int) -> Tensor:
    """Compute anomalib's anomaly maps of files, read and pre-processed by anomalib; (N, S, S) float32."""
    transform = Fastflow.configure_pre_processor((side, side)).transform
    with torch.inference_mode():
        maps = [model.eval()(transform(read_image(path, as_tensor=True)[None])).anomaly_map[:, 0] for path in paths]
    return torch.cat(maps)


def main() -> None:
    """Write `checkpoint.pt`, `images.npy`, `maps.npy`, `files/` and `file_maps.npy` for one configuration."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--configuration", required=True, help="Arguments of FastflowModel as JSON.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--images", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    configuration = json.loads(arguments.configuration)
    side = configuration.pop("input_size")
    model = FastflowModel(input_size=(side, side), pre_trained=False, **configuration)
    scatter(model, arguments.seed)
    images = make_images(arguments.images, side, arguments.seed)
    np.save(arguments.out / "images.npy", images)
    np.save(arguments.out / "maps.npy", compute_maps(model, images).numpy())
    files = arguments.out / "files"
    files.mkdir()
    write_files(files)
    np.save(arguments.out / "file_maps.npy", compute_file_maps(model, sorted(files.iterdir()), side).numpy())
    torch.save(model.state_dict(), arguments.out / "checkpoint.pt")
    sys.stderr.write(f"anomalib: {configuration['backbone']} done\n")


if __name__ == "__main__":
    main()
