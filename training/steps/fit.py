"""Fit of heads on cached features, of one category or of several together. Knows no Ray, image files or test images."""

import copy
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from flawstream.engines.cuda.errors import cuda_errors
from flawstream.engines.device import open_device
from flawstream.fastflow.head import FastFlowHead
from flawstream.fastflow.loss import negative_log_likelihood
from flawstream.fastflow.statistics import FeatureStatistics
from schemas.errors import DatasetError
from schemas.settings import TrainingSettings
from training.datasets.samples import NO_VARIATION
from training.steps.features import FeatureStore
from training.steps.graphed import one_cycle
from training.steps.stacked import CategoryStep, StackedTraining

_WARM_UP_SHARE = 0.3
_MIN_TRAINING_IMAGES = 2
_MANY_IMAGES = 128
"""From this number of training images on, their statistics fit other normal images almost as well (decision 6)."""
_FOLDS = 5
_COPIED_IMAGES = 256
_LEAST_VARIATION = 1e-4
"""Of features, as a share of their size; below, images are alike, and noise of the arithmetic would be all there is."""
_SHRINK_SHARE = 0.25
"""The share of itself that a flow trained on fewer images keeps; the rest is the identity: `FlowStep.shrink`."""


@dataclass(frozen=True, slots=True)
class FitProgress:
    """Progress of a fit after an optimiser step.

    Attributes:
        images: Images processed, over all epochs.
        epoch: The current epoch, from 1.
        loss: Mean loss of the current epoch, nats per value summed over the scales.
    """

    images: int
    epoch: int
    loss: float


def split_rows(count: int, settings: TrainingSettings) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Split normal images into training and held-out images; at least one is held out.

    Returns:
        Rows of training images and of held-out images.

    Raises:
        DatasetError: Fewer than two are left to train, too few for a standard deviation.
    """
    order = np.random.default_rng(settings.seed).permutation(count)
    held_out = max(1, round(count * settings.calibration_fraction))
    if count - held_out < _MIN_TRAINING_IMAGES:
        raise DatasetError(
            f"of {count} normal images training.calibration_fraction={settings.calibration_fraction:g} leaves "
            f"{max(0, count - held_out)} to train, but {_MIN_TRAINING_IMAGES} are needed; add normal images or lower it"
        )
    return np.sort(order[held_out:]), np.sort(order[:held_out])


@dataclass(frozen=True, slots=True)
class CategoryFit:
    """A head that has its statistics, and what its flows are trained on.

    Attributes:
        head: A new head.
        features: Features of the category's images; white ones if the training images are few.
        rows: Rows of the training images in `features`.
        white: Whether the features are white.
        settings: The recipe.
    """

    head: FastFlowHead
    features: FeatureStore
    rows: NDArray[np.int64]
    white: bool
    settings: TrainingSettings


def prepare_fit(
    head: FastFlowHead, features: FeatureStore, rows: NDArray[np.int64], settings: TrainingSettings
) -> CategoryFit:
    """Compute the head's statistics; with few images, whiten features across folds (docs/decisions/0006).

    Args:
        head: A new head.
        features: Features of the category's normal images.
        rows: Rows of the training images, at least two.
        settings: The recipe.

    Raises:
        DatasetError: The training images are alike.
        ConfigError: The disk has too little space.
    """
    statistics = statistics_of(head)
    for scale, module in enumerate(statistics):
        module.set_from(partial(features.grid_rows, scale, rows))
    if all(module.deviation.mean() <= _LEAST_VARIATION * module.mean.abs().mean() for module in statistics):
        raise DatasetError(f"the {len(rows)} normal training images are alike, {NO_VARIATION}")
    if len(rows) >= _MANY_IMAGES:
        return CategoryFit(head, features, rows, white=False, settings=settings)
    white = whiten_across_folds(statistics, features, rows, settings.seed)
    return CategoryFit(head, white, np.arange(len(rows)), white=True, settings=settings)


def statistics_of(head: FastFlowHead) -> list[FeatureStatistics]:
    """Return the normalisation of each scale of a head that is trained here."""
    statistics = [module for module in head.statistics if isinstance(module, FeatureStatistics)]
    assert len(statistics) == len(head.flows)  # noqa: S101 - trained heads have them for all scales
    return statistics


def fit_head(
    head: FastFlowHead,
    features: FeatureStore,
    rows: NDArray[np.int64],
    settings: TrainingSettings,
    device: torch.device | None = None,
) -> Iterator[FitProgress]:
    """Train one head in place: `prepare_fit` and `fit_heads`."""
    for _, progress in fit_heads([prepare_fit(head, features, rows, settings)], device):
        yield progress


def fit_heads(fits: Sequence[CategoryFit], device: torch.device | None = None) -> Iterator[tuple[int, FitProgress]]:
    """Train heads in place, for a fixed number of epochs without early stopping; several in one pass a step.

    AdamW with a one-cycle learning rate and clipped gradients (docs/decisions/0002). With few images, the trained flow
    is shrunk towards the identity (docs/decisions/0006). Each category becomes what it becomes alone: one with fewer
    images has fewer steps, and then stays as it is; one whose loss is NaN changes no other.

    Args:
        fits: Of one configuration and one recipe, except for its seed. Heads are not changed if this fails.
        device: Where to train; None chooses the GPU if there is one.

    Yields:
        The number of a category, and its progress after each epoch; on a CPU, of one category, after each step.

    Raises:
        MemoryError: The GPU has too little memory.
        DeviceLostError: The GPU failed; this process cannot use it any more.
    """
    device = device or open_device()
    if device.type == "cpu" and len(fits) == 1:  # a stack of one has other weights in the last bits, and is slower
        yield from ((0, progress) for progress in _epochs(fits[0]))
    else:
        with cuda_errors():
            yield from _stacked_epochs(fits, device)
    for fit in fits:
        if fit.white:
            fit.head.shrink_flows(_SHRINK_SHARE)
        fit.head.eval()


def _epochs(fit: CategoryFit) -> Iterator[FitProgress]:
    """Read the features of every step from their store; report every step."""
    head, settings = fit.head, fit.settings
    head.train()
    optimiser = torch.optim.AdamW(head.parameters(), settings.learning_rate, weight_decay=settings.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, settings.learning_rate, total_steps=_steps(len(fit.rows), settings), pct_start=_WARM_UP_SHARE
    )
    images = 0
    for epoch, batches in _shuffled(fit.rows, settings):
        total_loss, seen = 0.0, 0
        for batch in batches:
            scales = fit.features.take(batch)
            loss = negative_log_likelihood(*(head.transform(scales) if fit.white else head(scales)))
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]  # torch
            nn.utils.clip_grad_norm_(head.parameters(), settings.clip_norm)
            optimiser.step()
            schedule.step()
            total_loss += loss.item() * len(batch)
            seen += len(batch)
            images += len(batch)
            yield FitProgress(images, epoch, total_loss / seen)


def _stacked_epochs(fits: Sequence[CategoryFit], device: torch.device) -> Iterator[tuple[int, FitProgress]]:
    """Take the steps of all categories together; the host waits once an epoch of the largest, to report."""
    settings = fits[0].settings
    counts = [len(fit.rows) for fit in fits]
    starts = [0, *itertools.accumulate(counts)]
    steps = StackedTraining(
        [fit.head.flows for fit in fits],
        _white_features(fits, starts, device),
        batch_size=min(settings.batch_size, max(counts)),
        epochs=settings.epochs,
        weight_decay=settings.weight_decay,
        clip_norm=settings.clip_norm,
    )
    plans = [
        _plan(np.arange(start, end), fit.settings)
        for fit, (start, end) in zip(fits, itertools.pairwise(starts), strict=True)
    ]
    longest = max(map(len, plans))
    reported = [0] * len(fits)
    for number in range(longest):
        steps.run([plan[number] if number < len(plan) else None for plan in plans])
        if (number + 1) % (longest // settings.epochs):
            continue
        sums = steps.total_losses()
        for category, (count, plan) in enumerate(zip(counts, plans, strict=True)):
            finished = min(number + 1, len(plan)) * settings.epochs // len(plan)
            for epoch in range(reported[category] + 1, finished + 1):
                yield category, FitProgress(epoch * count, epoch, float(sums[category, epoch - 1]) / count)
            reported[category] = finished
    steps.write()


def _plan(rows: NDArray[np.int64], settings: TrainingSettings) -> list[CategoryStep]:
    """List all steps of a category."""
    rates, momenta = one_cycle(settings.learning_rate, _steps(len(rows), settings), _WARM_UP_SHARE)
    batches = [(epoch - 1, batch) for epoch, parts in _shuffled(rows, settings) for batch in parts]
    return [
        CategoryStep(*batch, *cycle) for batch, cycle in zip(batches, zip(rates, momenta, strict=True), strict=True)
    ]


@torch.no_grad()
def _white_features(fits: Sequence[CategoryFit], starts: Sequence[int], device: torch.device) -> list[Tensor]:
    """Copy the features of all categories to the device, white: one (N, C_s, H_s, W_s) float32 tensor per scale."""
    white = [torch.empty((starts[-1], *one.mean.shape), device=device) for one in statistics_of(fits[0].head)]
    for fit, start in zip(fits, starts[:-1], strict=True):
        statistics = [] if fit.white else [copy.deepcopy(one).to(device) for one in statistics_of(fit.head)]
        for first in range(0, len(fit.rows), _COPIED_IMAGES):
            chunk = [scale.to(device) for scale in fit.features.take(fit.rows[first : first + _COPIED_IMAGES])]
            if statistics:
                chunk = [one(scale) for one, scale in zip(statistics, chunk, strict=True)]
            for all_images, scale in zip(white, chunk, strict=True):
                all_images[start + first : start + first + len(scale)] = scale
    return white


def _steps(images: int, settings: TrainingSettings) -> int:
    return -(-images // settings.batch_size) * settings.epochs


def _shuffled(rows: NDArray[np.int64], settings: TrainingSettings) -> Iterator[tuple[int, Iterator[NDArray[np.int64]]]]:
    """Yield each epoch, from 1, and its batches, in an order that depends on nothing but the seed."""
    generator = np.random.default_rng(settings.seed + 1)
    for epoch in range(1, settings.epochs + 1):
        shuffled = generator.permutation(rows)
        yield (
            epoch,
            (shuffled[start : start + settings.batch_size] for start in range(0, len(rows), settings.batch_size)),
        )


def whiten_across_folds(
    statistics: Sequence[FeatureStatistics], features: FeatureStore, rows: NDArray[np.int64], seed: int
) -> FeatureStore:
    """Whiten features, each image with the statistics of the images outside its fold.

    Whitened with statistics that include it, an image has smaller values than a new normal image. With few images, a
    flow trained on such features learns to enlarge them, and enlarges new images by orders of magnitude.

    Args:
        statistics: One per scale, for their shapes; not changed.
        features: Output of the backbone.
        rows: Rows of the images, at least three; two images are both whitened with their own statistics.
        seed: Seed of the folds.

    Returns:
        White features of these images, in order.
    """
    white = features.empty_like(len(rows))
    order = np.random.default_rng(seed).permutation(len(rows))
    folds = np.array_split(order, min(_FOLDS, len(rows))) if len(rows) > _MIN_TRAINING_IMAGES else [order]
    for fold in folds:
        others = rows if len(folds) == 1 else np.delete(rows, fold)
        parts = []
        for scale, (whole, raw) in enumerate(zip(statistics, features.take(rows[fold]), strict=True)):
            fold_statistics = FeatureStatistics(whole.mean.shape[0], whole.mean.shape[1])
            fold_statistics.set_from(partial(features.grid_rows, scale, others))
            parts.append(fold_statistics(raw))
        white.put(fold, parts)
    return white
