"""Speed of the engine for GPUs, by batch size and by number of categories."""

import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

from flawstream.engines.cuda.engine import CudaEngine
from flawstream.engines.device import open_device
from flawstream.engines.protocol import HeadRows
from flawstream.fastflow.backbone import Backbone
from flawstream.fastflow.head import FastFlowHead, FoldedHead
from schemas.manifest import FlowSpec
from schemas.presets import PresetName
from schemas.settings import ModelSettings

PRESETS: tuple[PresetName, ...] = ("efficientnet_lite0", "resnet18")
BATCHES = (1, 8, 32, 128)
CATEGORIES = (1, 4, 8, 32)
SECONDS = 1.0
PROFILED_CALLS = 10
TOP_FRACTION = 0.03
MIXED_BATCH = 32
TURNS = 4


class Loaded:
    """An engine with some categories, ready.

    Args:
        preset: Backbone and flows; random weights.
        categories: How many.
        half: In float16, else in float32.
        folder: For the weights' file.
    """

    def __init__(self, preset: PresetName, categories: int, folder: Path, *, half: bool) -> None:
        self.model = random_model(preset, folder)
        self.backbone = Backbone(self.model)
        side = self.backbone.spec.input_size
        self.images = np.random.default_rng(0).integers(0, 256, (max(BATCHES), side, side, 3), np.uint8)
        self.engine = CudaEngine(self.backbone, half=half, max_batch=max(BATCHES), device=open_device())
        heads = [FastFlowHead(self.backbone.spec, FlowSpec.of(self.model), seed=seed) for seed in range(categories)]
        load = self.engine.load_for_trial if half else lambda head: self.engine.load(head, None)
        self.loaded = [load(head.eval()) for head in heads]
        began_s = time.perf_counter()
        self.engine.warm_up()
        self.warm_up_s = time.perf_counter() - began_s

    def judge(self, batch: int, categories: int = 1) -> None:
        """Judge a batch of so many categories in turn."""
        owners = np.arange(batch) % categories
        heads = [HeadRows(self.loaded[k], np.flatnonzero(owners == k), TOP_FRACTION) for k in range(categories)]
        self.engine.detect(self.images[:batch], heads)

    def gflop(self) -> float:
        """Count the arithmetic of one image, 10^9 operations."""
        head = FoldedHead(FastFlowHead(self.backbone.spec, FlowSpec.of(self.model)), by_index=True)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            head(self.backbone(torch.from_numpy(self.images[:1])))
        return float(counter.get_total_flops()) / 1e9


def random_model(preset: PresetName, folder: Path) -> ModelSettings:
    """Return a preset's settings, with a file of random weights."""
    path = folder / f"{preset}.pth"
    backbone = ModelSettings(preset=preset).backbone
    if not path.exists():
        torch.manual_seed(0)
        torch.save(timm.create_model(backbone, pretrained=False).state_dict(), path)
    return ModelSettings(preset=preset, weights=str(path))


def seconds_of(call: Callable[[], None], seconds: float = SECONDS) -> list[float]:
    """Time calls for a while."""
    times: list[float] = []
    end_s = time.perf_counter() + seconds
    while time.perf_counter() < end_s or len(times) < 5:  # noqa: PLR2004 - a median
        began_s = time.perf_counter()
        call()
        times.append(time.perf_counter() - began_s)
    return times


def overlapped_rate(one: Loaded, batch: int) -> float:
    """Return images a second with as many batches in flight as the detector keeps."""
    count = one.engine.concurrent_batches
    with ThreadPoolExecutor(count) as threads:
        began_s = time.perf_counter()
        calls = sum(map(len, threads.map(lambda _: seconds_of(partial(one.judge, batch)), range(count))))
    return batch * calls / (time.perf_counter() - began_s)


def measure(folder: Path) -> dict[str, Any]:
    """Measure both presets at all batch sizes."""
    found: dict[str, Any] = {}
    for preset in PRESETS:
        name = ModelSettings(preset=preset).backbone
        found[name] = _measure_preset(preset, folder, half=True) | _measure_preset(preset, folder, half=False)
    return found


def _measure_preset(preset: PresetName, folder: Path, *, half: bool) -> dict[str, Any]:
    one = Loaded(preset, 1, folder, half=half)
    title = f"  {one.backbone.spec.name} {'float16' if half else 'float32'}"
    speeds: dict[str, dict[str, float]] = {}
    for batch in BATCHES:
        first, *rest = seconds_of(partial(one.judge, batch))
        median = statistics.median(rest)
        speeds[str(batch)] = {
            "one at a time": round(batch / median, 1),
            "two in flight": round(overlapped_rate(one, batch), 1),
            "first call over median": round(first / median, 2),
        }
    for kind in ("one at a time", "two in flight"):
        rates = ", ".join(f"{batch}: {speed[kind]:,.0f}" for batch, speed in speeds.items())
        print(f"{title}, {kind}, img/s by batch: {rates}", flush=True)
    slowest = max(speed["first call over median"] for speed in speeds.values())
    print(f"{title}: warm-up {one.warm_up_s:.1f} s, slowest first call {slowest:.1f} medians")
    return {"float16": speeds, **_use_of_the_gpu(one, speeds)} if half else {"float32": speeds}


def _use_of_the_gpu(one: Loaded, speeds: dict[str, dict[str, float]]) -> dict[str, float]:
    """Profile a few calls of a batch of 32: kernels, share of the time that any runs, arithmetic a second."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        began_s = time.perf_counter()
        for _ in range(PROFILED_CALLS):
            one.judge(MIXED_BATCH)
        wall_s = time.perf_counter() - began_s
    events = [event for event in profile.events() if event.device_type.name == "CUDA"]
    busy = sum(event.device_time_total for event in events) / 1e6 / wall_s
    tflops = one.gflop() * speeds[str(MIXED_BATCH)]["one at a time"] / 1e3
    kernels = len(events) / PROFILED_CALLS
    print(
        f"  batch of {MIXED_BATCH}: {kernels:.0f} kernels and copies a call, GPU busy {busy:.0%}, {tflops:.1f} TFLOP/s"
    )
    return {"kernels": kernels, "busy": round(busy, 3), "tflops": round(tflops, 2)}


def measure_mixed(folder: Path) -> dict[str, Any]:
    """Measure a batch of several categories beside one of a single category, in turns."""
    return {ModelSettings(preset=preset).backbone: _measure_mixed_preset(preset, folder) for preset in PRESETS}


def _measure_mixed_preset(preset: PresetName, folder: Path) -> dict[str, Any]:
    one = Loaded(preset, max(CATEGORIES), folder, half=True)
    times: dict[int, list[float]] = {count: [] for count in CATEGORIES}
    for _ in range(TURNS):
        for count in CATEGORIES:
            times[count] += seconds_of(partial(one.judge, MIXED_BATCH, count), SECONDS / TURNS)
    rates = {str(count): round(MIXED_BATCH / statistics.median(taken), 1) for count, taken in times.items()}
    share = round(rates[str(max(CATEGORIES))] / rates["1"], 3)
    name = one.backbone.spec.name
    print(f"  {name}, batch of {MIXED_BATCH}, img/s by categories: {rates}; most over one: {share:.2f}", flush=True)
    return {"images_per_s": rates, "share": share}
