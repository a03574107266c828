"""How exact and how fast flawstream is on a GPU, beside anomalib's FastFlow on the same card.

    make bench-gpu                                        all parts, in under six minutes
    make bench-gpu ARGS="--parts engine mixed"            some of them
    make bench-gpu ARGS="--peer-python PYTHON"            PYTHON has anomalib; without it there is no peer

Parts, each measured on its own:
    correctness   a version is trained on solar cells; verdicts in float32 and in what `auto` chose, beside a CPU's
    engine        images a second by batch size, of both presets; first calls; share of the time that the GPU is busy
    mixed         a batch of 32 with 1 to 32 categories
    training      seconds of an epoch of one category, and of 16 trained together
    stream        JPEGs through Valkey and `flawstream worker`: one process, and several

Weights of the backbone are random except in `correctness`: speed does not depend on them. Nothing is downloaded, and
Ray is not used. anomalib takes some minutes more, as it compiles. Its training epoch runs its backbone every time; ours
has the features of all epochs from one pass, which the epoch does not count. Exit code 2: there is no GPU. The last
line is JSON; `--out FILE` has it after each part.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from bench import gpu_correctness, gpu_engine, gpu_stream, gpu_training
from bench.gpu_peer import run_peer

PARTS: Mapping[str, Callable[[Path], dict[str, Any]]] = {
    "correctness": gpu_correctness.measure,
    "engine": gpu_engine.measure,
    "mixed": gpu_engine.measure_mixed,
    "training": gpu_training.measure,
    "stream": gpu_stream.measure,
}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--peer-python", help="Python of an environment that has anomalib and torch for this GPU")
    parser.add_argument("--out", type=Path, help="file for the JSON, written after each part")
    asked = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench-gpu needs an NVIDIA GPU that torch can use, and there is none here", file=sys.stderr)
        sys.exit(2)
    found: dict[str, Any] = {"bench": "gpu", "device": torch.cuda.get_device_name(), "torch": torch.__version__}
    print(f"{found['device']}, torch {found['torch']}")
    with tempfile.TemporaryDirectory(prefix="flawstream-gpu-") as name:
        for part in asked.parts:
            began_s = time.perf_counter()
            print(f"\n{part}", flush=True)
            found[part] = PARTS[part](Path(name))
            if asked.out is not None:
                asked.out.write_text(json.dumps(found))
            print(f"  ({time.perf_counter() - began_s:.0f} s)", flush=True)
        if asked.peer_python is not None:
            print("\nanomalib", flush=True)
            found["anomalib"] = run_peer(asked.peer_python, Path(name), training="training" in asked.parts)
            found["ratio"] = ratios(found)
            for name_of_ratio, value in found["ratio"].items():
                print(f"  flawstream over anomalib's best, {name_of_ratio}: {value}")
    if asked.out is not None:
        asked.out.write_text(json.dumps(found))
    print(json.dumps(found))


def ratios(found: Mapping[str, Any]) -> dict[str, Any]:
    """Divide ours by the best of anomalib's: speed by backbone and batch; of training the seconds of an image."""
    result: dict[str, Any] = {}
    peer = found["anomalib"]
    for backbone, ways in peer["speed"].items():
        ours = found.get("engine", {}).get(backbone, {}).get("float16", {})
        result[backbone] = {
            batch: round(speed["one at a time"] / max(way[batch] for way in ways.values()), 2)
            for batch, speed in ours.items()
            if ways and all(batch in way for way in ways.values())
        }
    for backbone, seconds in peer["train_epoch_s"].items():
        ours = found.get("training", {}).get(backbone)
        if ours is not None:
            result[f"training time of an image and epoch, {backbone}"] = round(
                ours["epoch_s"] / ours["images"] / (seconds / peer["train_images"]), 3
            )
    return result


if __name__ == "__main__":
    main()
