"""One engine of ours for `bench.engine`, in a process of its own: `python -m bench.engine_ours JOB`.

The job is JSON: `{"root", "category", "weights", "engine", "precision", "images", "out"}`. The current version of the
category is loaded as the detector loads it. Writes the maps and scores of the images, then answers as
`peers/anomalib_engine.py` does; the first answer is `{"engine": ..., "arithmetic": ...}`.
"""

import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from flawstream.engines.choose import make_engine, quiet_torch
from flawstream.engines.protocol import HeadRows, ScoredBatch, arithmetic_of
from flawstream.imaging.maps import Grid, upsample
from flawstream.registry.registry import Registry
from flawstream.registry.versions import open_backbone
from schemas.settings import DetectorSettings, ModelSettings
from serving.engines import Engines
from serving.model_store import ModelStore

TOP_FRACTION = 0.03
_ANY_SIZE = 1 << 40


def maps_of(grids: Sequence[Grid], side: int) -> NDArray[np.float32]:
    """Compute what anomalib calls the anomaly map, enlarged as a stream worker enlarges maps."""
    likelihoods = [-np.exp(-grid) for grid in grids]
    return np.stack([upsample([scale[row] for scale in likelihoods], (side, side)) for row in range(len(grids[0]))])


def main(text: str) -> None:
    """Load the version, then answer."""
    job = json.loads(text)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    registry = Registry(job["root"])
    manifest = registry.manifest(job["category"], registry.current(job["category"]) or "")
    backbone = open_backbone(registry, manifest, ModelSettings(weights=job["weights"]))
    settings = DetectorSettings.model_validate({"engine": job["engine"], "precision": job["precision"]})
    engine = make_engine(settings, lambda: backbone)
    quiet_torch(engine)
    loaded = ModelStore(registry, Engines(engine), _ANY_SIZE).load(job["category"]).loaded
    images = np.load(job["images"])
    side = engine.spec.input_size

    def judge(batch: NDArray[np.uint8]) -> ScoredBatch:
        return engine.detect(batch, [HeadRows(loaded, np.arange(len(batch)), TOP_FRACTION)])

    judged = judge(images)
    np.save(Path(job["out"]) / "maps.npy", maps_of(judged.grids, side))
    np.save(Path(job["out"]) / "scores.npy", judged.scores)
    name = type(engine).__name__.removesuffix("Engine").lower()
    print(json.dumps({"engine": name, "arithmetic": arithmetic_of(engine, manifest)}), file=answers, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        batch, seconds = images[: asked["batch"]], []
        for _ in range(asked["runs"]):
            started = time.perf_counter()
            maps_of(judge(batch).grids, side)
            seconds.append(time.perf_counter() - started)
        print(json.dumps({"seconds": seconds}), file=answers, flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
