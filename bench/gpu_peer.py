"""anomalib's part of `bench.gpu`, in a process of its own."""

import json
import subprocess
from pathlib import Path
from typing import Any

from bench.gpu_engine import BATCHES, PRESETS
from schemas.settings import ModelSettings

SECONDS = 1.0
TIMEOUT_S = 400.0
TRAIN_IMAGES = 412


def run_peer(python: str, folder: Path, *, training: bool) -> dict[str, Any]:
    """Measure anomalib with the same backbones, scales and flows.

    Args:
        python: Of an environment that has anomalib.
        folder: For the job and its result.
        training: Whether to train as well.
    """
    models = [ModelSettings(preset=preset) for preset in PRESETS]
    fields = ("backbone", "input_size", "strides", "flow_steps", "conv3x3_only", "hidden_ratio")
    job = {
        "configurations": [{name: getattr(model, name) for name in fields} for model in models],
        "batches": BATCHES,
        "seconds": SECONDS,
        "train_images": TRAIN_IMAGES if training else 0,
    }
    job_file, result_file = folder / "peer.json", folder / "peer-result.json"
    job_file.write_text(json.dumps(job))
    script = Path(__file__).parent / "peers" / "anomalib_gpu.py"
    command = [python, "-W", "ignore", str(script), str(job_file), str(result_file)]
    try:
        subprocess.run(command, check=True, timeout=TIMEOUT_S)  # noqa: S603 - our own script
    except subprocess.TimeoutExpired:
        print(f"  stopped after {TIMEOUT_S:g} s; what it had measured by then counts")
    found: dict[str, Any] = json.loads(result_file.read_text())
    for backbone, ways in found["speed"].items():
        for way, speeds in ways.items():
            rates = ", ".join(f"{batch}: {speed:,.0f}" for batch, speed in speeds.items())
            print(f"  {backbone}, {way}, img/s by batch: {rates}")
    for backbone, seconds in found["train_epoch_s"].items():
        print(f"  {backbone}, an epoch of {TRAIN_IMAGES} images: {seconds:.2f} s")
    return found | {"train_images": TRAIN_IMAGES}
