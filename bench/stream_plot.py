"""The picture of `bench.stream`: what is left of the engine's speed, and how long images take at partial load."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import numpy as np

mpl.use("Agg")
from matplotlib import pyplot as plt

COLOURS = ("#4a5568", "#2b6cb0", "#90cdf4")


@dataclass(frozen=True, slots=True)
class Drawn:
    """What is drawn of a backbone.

    Attributes:
        rates: img/s by layout, a row each: engine, one category, mixed.
        least: Share of the engine's that is asked for.
        batch_times: Latencies at partial load, in batch times.
    """

    rates: Mapping[str, Sequence[float]]
    least: float
    batch_times: Sequence[float]


def draw(found: Mapping[str, Drawn], load: float, most_batch_times: float, path: Path) -> None:
    """Write a PNG.

    Args:
        found: By backbone.
        load: Share of what could be taken that latencies are of.
        most_batch_times: What is asked of the 99th percentile.
        path: Where to.
    """
    figure, (*bars, latency) = plt.subplots(1, len(found) + 1, figsize=(4 * len(found) + 4.5, 3.6))
    for axes, (backbone, one) in zip(bars, found.items(), strict=True):
        places = np.arange(len(one.rates))
        for shift, (label, colour) in enumerate(zip(("bare engine", "one category", "32 mixed"), COLOURS, strict=True)):
            values = [rates[shift] for rates in one.rates.values()]
            drawn = axes.bar(places + (shift - 1) * 0.27, values, 0.25, label=label, color=colour)
            axes.bar_label(drawn, fmt="%.0f", fontsize=8)
        for place, rates in zip(places, one.rates.values(), strict=True):
            asked = one.least * rates[0]
            axes.hlines(asked, place - 0.15, place + 0.42, colors="#c53030", linestyles="dashed", linewidth=1)
        axes.set(title=backbone, xticks=places, xticklabels=one.rates, ylabel="images a second")
        axes.margins(y=0.15)
    bars[0].legend(fontsize=8, loc="lower left", framealpha=0.9)
    for (backbone, one), colour in zip(found.items(), COLOURS, strict=False):
        times = np.sort(one.batch_times)
        latency.plot(times, np.arange(1, len(times) + 1) / len(times), label=backbone, color=colour)
    latency.axvline(most_batch_times, color="#c53030", linestyle="dashed", linewidth=1)
    latency.axhline(0.99, color="#a0aec0", linewidth=0.8)
    latency.set(
        title=f"push to result at {load:.0%} load",
        xlabel="batch times of 16 images",
        ylabel="share of images",
        ylim=(0, 1.01),
    )
    latency.set_xlim(left=0)
    latency.legend(fontsize=8, loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
