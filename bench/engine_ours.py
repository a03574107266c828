"""One engine of ours for `bench.engine`, in a process of its own: `python -m bench.engine_ours ENGINE FOLDER`.

Reads `checkpoint.pt` and `images.npy` of the folder: the first half of the images are judged, ranges for int8 are taken
from the others. Writes the maps and scores of the first half, then answers as `peers/anomalib_engine.py` does.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flawstream.calibration import calibrate
from flawstream.engines.choose import make_engine, quiet_torch
from flawstream.fastflow.anomalib import read_anomalib
from flawstream.fastflow.backbone import Backbone
from flawstream.fastflow.head import FastFlowHead
from flawstream.fastflow.score import score_images
from flawstream.imaging.maps import upsample
from schemas.manifest import FlowSpec, Int8Trial, ModelManifest
from schemas.settings import DetectorSettings
from training.steps.quantise import write_version

ENGINES = ("torch f32", "openvino f32", "openvino bf16", "ncnn f32", "openvino int8")

_ANY_CALIBRATION = calibrate(np.arange(20.0), np.arange(20.0), 0.05, 0.03, "int8")
"""Int8 is served where it is calibrated; only speed is measured here."""

Images = NDArray[np.uint8]
Grids = list[NDArray[np.float32]]


def maps_of(grids: Grids, side: int) -> NDArray[np.float32]:
    """Compute what anomalib calls the anomaly map, enlarged as a stream worker enlarges maps."""
    likelihoods = [-np.exp(-grid) for grid in grids]
    return np.stack([upsample([scale[row] for scale in likelihoods], (side, side)) for row in range(len(grids[0]))])


def start(
    name: str, backbone: Backbone, head: FastFlowHead, flow: FlowSpec, others: Images
) -> Callable[[Images], Grids]:
    """Start an engine as the service does, and load the head into it.

    Args:
        name: One of `ENGINES`.
        backbone: The frozen network.
        head: The flows.
        flow: Their shape.
        others: Images that ranges for int8 are taken from.
    """
    kind, precision = name.split()
    said: dict[str, Any] = {"category": "bench", "version": "v1", "backbone": backbone.spec, "flow": flow}
    files: Mapping[str, bytes] = MappingProxyType({})
    if precision == "int8":
        trial: dict[str, Any] = {"scope": "version", "kept": True, "calibration": _ANY_CALIBRATION}
        said["int8"] = (Int8Trial.model_construct(**trial),)
        files = write_version(backbone, head, others)
    settings = {"engine": kind, "precision": "auto" if precision == "int8" else precision}
    engine = make_engine(DetectorSettings.model_validate(settings), lambda: backbone)
    quiet_torch(engine)
    loaded = engine.load(head, ModelManifest.model_construct(**said), files.__getitem__)
    return lambda images: engine.detect(images, [(loaded, np.arange(len(images)))])


def main(name: str, folder: Path) -> None:
    """Get ready, then answer."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    model = read_anomalib(folder / "checkpoint.pt")
    images, others = np.split(np.load(folder / "images.npy"), 2)
    backbone = model.make_backbone()
    judge = start(name, backbone, model.make_head(backbone), model.flow, others)
    side = backbone.spec.input_size
    grids = judge(images)
    np.save(folder / f"maps-{name}.npy", maps_of(grids, side))
    np.save(folder / f"scores-{name}.npy", score_images(grids, 0.03))
    print(json.dumps({"ready": name}), file=answers, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        batch, seconds = images[: asked["batch"]], []
        for _ in range(asked["runs"]):
            started = time.perf_counter()
            maps_of(judge(batch), side)
            seconds.append(time.perf_counter() - started)
        print(json.dumps({"seconds": seconds}), file=answers, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
