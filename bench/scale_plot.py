"""The picture of `bench.scale`: load, replicas, backlog and latency of each scenario over time."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import numpy as np
from numpy.typing import NDArray

mpl.use("Agg")
from matplotlib import pyplot as plt

WORKERS, DETECTORS, LATENCY, WAITING, FAULT = "#2b6cb0", "#dd6b20", "#4a5568", "#38a169", "#c53030"
_WINDOW_S = 5.0


@dataclass(frozen=True, slots=True)
class Drawn:
    """What is drawn of a scenario.

    Attributes:
        replicas: (n, 3): time in s, workers, detectors.
        backlog: (n, 2): time in s, images that wait.
        latencies: (n, 2): time in s, seconds from push to result.
        fault_s: When something happened; None for nothing.
    """

    replicas: NDArray[np.float64]
    backlog: NDArray[np.float64]
    latencies: NDArray[np.float64]
    fault_s: float | None


def draw(found: Mapping[str, Drawn], path: Path) -> None:
    """Write a PNG: a column for each scenario, replicas above, latency in the middle, images that wait below.

    Args:
        found: By scenario.
        path: Where to.
    """
    figure, rows = plt.subplots(3, len(found), figsize=(2.6 * len(found), 6.4), sharex="col", sharey="row")
    for (title, one), (replicas, latency, backlog) in zip(found.items(), rows.T, strict=True):
        replicas.step(one.replicas[:, 0], one.replicas[:, 1], where="post", color=WORKERS, label="workers")
        replicas.step(one.replicas[:, 0], one.replicas[:, 2], where="post", color=DETECTORS, label="detectors")
        replicas.set_title(title, fontsize=10)
        times, median, highest = _windows(one.latencies)
        latency.semilogy(times, highest, color=LATENCY, linewidth=1, label="99 %")
        latency.semilogy(times, median, color=LATENCY, linewidth=1, linestyle="dotted", label="median")
        backlog.semilogy(one.backlog[:, 0], np.maximum(one.backlog[:, 1], 1), color=WAITING, linewidth=0.8)
        backlog.set_xlabel("s")
        for axes in (replicas, latency, backlog):
            axes.grid(alpha=0.25)
            if one.fault_s is not None:
                axes.axvline(one.fault_s, color=FAULT, linestyle="dashed", linewidth=0.8)
    first = rows[:, 0]
    for axes, label in zip(first, ("replicas that work", "push to result, s", "images that wait"), strict=True):
        axes.set_ylabel(label)
    first[0].set_ylim(bottom=0)
    for axes in first[:2]:
        axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _windows(
    latencies: NDArray[np.float64],
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Return times, and the median and the 99th percentile of what was completed in each window."""
    times, seconds = latencies.T
    edges = np.arange(0.0, times[-1], _WINDOW_S)
    parts = np.split(seconds, np.searchsorted(times, edges[1:]))
    kept = [
        (edge, np.median(part), np.quantile(part, 0.99)) for edge, part in zip(edges, parts, strict=True) if len(part)
    ]
    found = np.array(kept)
    return found[:, 0], found[:, 1], found[:, 2]
