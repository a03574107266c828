"""Train one category's head on cached features. One recipe for all categories; no Ray, no files, no test images."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from flawstream.fastflow.head import FastFlowHead
from flawstream.fastflow.loss import negative_log_likelihood
from flawstream.fastflow.statistics import FeatureStatistics
from schemas.errors import DatasetError
from schemas.settings import TrainingSettings
from training.steps.features import FeatureStore

_WARM_UP_SHARE = 0.3
_FEWEST_TRAINING = 2
_MANY_IMAGES = 128
"""From so many training images on, their own statistics fit other normal images almost as well (decision 6)."""
_FOLDS = 5
_SHARE_OF_FEW = 0.25
"""What a flow of fewer images keeps of itself; the rest is the identity, which leaves white features as they are."""


@dataclass(frozen=True, slots=True)
class Step:
    """Where training stands after an optimiser step.

    Attributes:
        images: Images seen, over all epochs.
        epoch: The epoch under way, from 1.
        loss: Mean over the epoch so far, nats per value summed over the scales.
    """

    images: int
    epoch: int
    loss: float


def split_rows(count: int, settings: TrainingSettings) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Split normal images into those that train the flow and those that calibrate it; at least one calibrates.

    Raises:
        DatasetError: Fewer than two are left to train; their deviation needs two.
    """
    order = np.random.default_rng(settings.seed).permutation(count)
    held_out = max(1, round(count * settings.calibration_fraction))
    if count - held_out < _FEWEST_TRAINING:
        raise DatasetError(
            f"of {count} normal images training.calibration_fraction={settings.calibration_fraction:g} leaves "
            f"{max(0, count - held_out)} to train and {_FEWEST_TRAINING} are needed; add normal images or lower it"
        )
    return np.sort(order[held_out:]), np.sort(order[:held_out])


def fit_head(
    head: FastFlowHead, features: FeatureStore, rows: NDArray[np.int64], settings: TrainingSettings
) -> Iterator[Step]:
    """Train `head` in place. The last epoch is what remains; no epoch is chosen.

    AdamW with a one-cycle learning rate and clipped gradients (docs/decisions/0002). With few images, the flow is
    trained on features that are white by the statistics of other images, and keeps a share of itself alone
    (docs/decisions/0006).

    Args:
        head: Freshly made.
        features: Of the category's normal images.
        rows: Which of them train, at least two.
        settings: The recipe.

    Yields:
        The state after each optimiser step.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    statistics = [one for one in head.statistics if isinstance(one, FeatureStatistics)]
    assert len(statistics) == len(head.flows)  # noqa: S101 - a head that is trained has them
    for scale, one in enumerate(statistics):
        one.set_from(partial(features.grid_rows, scale, rows))
    few = len(rows) < _MANY_IMAGES
    if few:
        features = whiten_across_folds(statistics, features, rows, settings.seed)
        rows = np.arange(len(rows))
    head.to(device)
    head.to(memory_format=torch.channels_last)
    head.train()
    steps_an_epoch = -(-len(rows) // settings.batch_size)
    optimiser = torch.optim.AdamW(
        head.parameters(), settings.learning_rate, weight_decay=settings.weight_decay, fused=device.type == "cuda"
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, settings.learning_rate, total_steps=steps_an_epoch * settings.epochs, pct_start=_WARM_UP_SHARE
    )
    order = np.random.default_rng(settings.seed + 1)
    images = 0
    for epoch in range(1, settings.epochs + 1):
        shuffled = order.permutation(rows)
        total_loss, seen = 0.0, 0
        for start in range(0, len(shuffled), settings.batch_size):
            batch = shuffled[start : start + settings.batch_size]
            scales = [scale.to(device, memory_format=torch.channels_last) for scale in features.take(batch)]
            loss = negative_log_likelihood(*(head.transform(scales) if few else head(scales)))
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]  # torch
            nn.utils.clip_grad_norm_(head.parameters(), settings.clip_norm)
            optimiser.step()
            schedule.step()
            total_loss += loss.item() * len(batch)
            seen += len(batch)
            images += len(batch)
            yield Step(images, epoch, total_loss / seen)
    head.to("cpu")
    head.to(memory_format=torch.contiguous_format)
    if few:
        head.shrink_flows(_SHARE_OF_FEW)
    head.eval()


def whiten_across_folds(
    statistics: Sequence[FeatureStatistics], features: FeatureStore, rows: NDArray[np.int64], seed: int
) -> FeatureStore:
    """Make features white, each image by the statistics of the images outside its fold.

    An image is closer to statistics that it had a part in than any other normal image is: of few images, a flow that is
    trained on what these leave learns to enlarge it, and enlarges every image that comes later by orders of magnitude.

    Args:
        statistics: One per scale, for their shape; left as they are.
        features: Of the images, as the backbone gives them.
        rows: Which images, at least three; of two, both are white by their own statistics.
        seed: Of the folds.

    Returns:
        White features of these images, in their order.
    """
    white = features.empty_like(len(rows))
    order = np.random.default_rng(seed).permutation(len(rows))
    folds = np.array_split(order, min(_FOLDS, len(rows))) if len(rows) > _FEWEST_TRAINING else [order]
    for fold in folds:
        others = rows if len(folds) == 1 else np.delete(rows, fold)
        parts = []
        for scale, (whole, raw) in enumerate(zip(statistics, features.take(rows[fold]), strict=True)):
            of_others = FeatureStatistics(whole.mean.shape[0], whole.mean.shape[1])
            of_others.set_from(partial(features.grid_rows, scale, others))
            parts.append(of_others(raw))
        white.put(fold, parts)
    return white
