"""Fit of one category's head on cached features. Knows no Ray, no image files and no test images."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from flawstream.engines.device import open_device
from flawstream.fastflow.head import FastFlowHead
from flawstream.fastflow.loss import negative_log_likelihood
from flawstream.fastflow.statistics import FeatureStatistics
from schemas.errors import ConfigError, DatasetError
from schemas.settings import TrainingSettings
from training.steps.features import FeatureStore
from training.steps.graphed import GraphedStep, one_cycle
from training.steps.stacked import StackedTraining

_WARM_UP_SHARE = 0.3
_MIN_TRAINING_IMAGES = 2
_MANY_IMAGES = 128
"""From this number of training images on, their statistics fit other normal images almost as well (decision 6)."""
_FOLDS = 5
_COPIED_IMAGES = 256
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


def fit_head(
    head: FastFlowHead,
    features: FeatureStore,
    rows: NDArray[np.int64],
    settings: TrainingSettings,
    device: torch.device | None = None,
) -> Iterator[FitProgress]:
    """Train `head` in place, for a fixed number of epochs without early stopping.

    AdamW with a one-cycle learning rate and clipped gradients (docs/decisions/0002). With few images, features are
    whitened across folds and the trained flow is shrunk towards the identity (docs/decisions/0006).

    Args:
        head: A new head.
        features: Features of the category's normal images.
        rows: Rows of the training images, at least two.
        settings: The recipe.
        device: Where to train; None chooses the GPU if there is one.

    Yields:
        The progress after each optimiser step; on a GPU after each epoch.

    Raises:
        ConfigError: The features do not fit in the memory of a GPU.
    """
    device = device or open_device()
    features, rows, few_images = _prepare(head, features, rows, settings)
    epochs = _epochs_on_gpu if device.type == "cuda" else _epochs_on_cpu
    try:
        yield from epochs(head, features, rows, settings, white=few_images, device=device)
    except torch.OutOfMemoryError as error:
        raise _no_memory(len(rows), error) from error
    if few_images:
        head.shrink_flows(_SHRINK_SHARE)
    head.eval()


def _no_memory(images: int, error: torch.OutOfMemoryError) -> ConfigError:
    return ConfigError(
        f"the GPU has no memory to train on {images} images ({error}); train on fewer images, with a smaller "
        "model.input_size or training.batch_size, or on another GPU"
    )


def _prepare(
    head: FastFlowHead, features: FeatureStore, rows: NDArray[np.int64], settings: TrainingSettings
) -> tuple[FeatureStore, NDArray[np.int64], bool]:
    """Compute the head's statistics; return features, the rows to train on, and whether those are few and white."""
    statistics = [module for module in head.statistics if isinstance(module, FeatureStatistics)]
    assert len(statistics) == len(head.flows)  # noqa: S101 - trained heads have them for all scales
    for scale, module in enumerate(statistics):
        module.set_from(partial(features.grid_rows, scale, rows))
    if len(rows) >= _MANY_IMAGES:
        return features, rows, False
    return whiten_across_folds(statistics, features, rows, settings.seed), np.arange(len(rows)), True


def fit_heads(
    heads: Sequence[FastFlowHead],
    features: Sequence[FeatureStore],
    rows: Sequence[NDArray[np.int64]],
    settings: TrainingSettings,
    device: torch.device | None = None,
) -> Iterator[tuple[int, FitProgress]]:
    """Train several categories in place, each as `fit_head` would, in one process and one pass a step.

    A category with fewer images has fewer steps: it then stays as it is. One whose loss is NaN changes no other.

    Args:
        heads: New heads of one configuration.
        features: Features of each category's normal images.
        rows: Rows of the training images of each, at least two.
        settings: The recipe of all.
        device: Where to train; None chooses the GPU if there is one.

    Yields:
        The number of a category, and its progress after each of its epochs.

    Raises:
        ConfigError: The features do not fit in the memory of a GPU.
    """
    device = device or open_device()
    prepared = [_prepare(*one, settings) for one in zip(heads, features, rows, strict=True)]
    try:
        yield from _stacked_epochs(heads, prepared, settings, device)
    except torch.OutOfMemoryError as error:
        raise _no_memory(sum(map(len, rows)), error) from error
    for head, (_, _, few_images) in zip(heads, prepared, strict=True):
        if few_images:
            head.shrink_flows(_SHRINK_SHARE)
        head.eval()


def _stacked_epochs(
    heads: Sequence[FastFlowHead],
    prepared: Sequence[tuple[FeatureStore, NDArray[np.int64], bool]],
    settings: TrainingSettings,
    device: torch.device,
) -> Iterator[tuple[int, FitProgress]]:
    """Take the steps of all categories together; the host waits once an epoch of the largest, to report."""
    counts = [len(rows) for _, rows, _ in prepared]
    starts = [sum(counts[:category]) for category in range(len(heads))]
    on_device = _empty_scales(heads[0], sum(counts), device, torch.contiguous_format)
    for head, start, (features, rows, few_images) in zip(heads, starts, prepared, strict=True):
        head.to(device)
        own = [scale[start : start + len(rows)] for scale in on_device]
        _fill_white(own, head, features, rows, white=few_images)
        head.statistics.to("cpu")  # a matrix for each position: not needed any more, and large
    steps = StackedTraining(
        heads,
        on_device,
        batch_size=min(settings.batch_size, max(counts)),
        epochs=settings.epochs,
        weight_decay=settings.weight_decay,
        clip_norm=settings.clip_norm,
    )
    totals = [_steps(count, settings) for count in counts]
    cycles = [one_cycle(settings.learning_rate, total, _WARM_UP_SHARE) for total in totals]
    batches = [
        [(epoch, batch) for epoch, parts in _shuffled(np.arange(start, start + count), settings) for batch in parts]
        for start, count in zip(starts, counts, strict=True)
    ]
    reported = [0] * len(heads)
    nothing = (1, np.zeros(0, np.int64))
    for number in range(max(totals)):
        now = [own[number] if number < len(own) else nothing for own in batches]
        last = [min(number, total - 1) for total in totals]
        steps.run(
            [batch for _, batch in now],
            [epoch - 1 for epoch, _ in now],
            [rates[one] for (rates, _), one in zip(cycles, last, strict=True)],
            [momenta[one] for (_, momenta), one in zip(cycles, last, strict=True)],
        )
        if (number + 1) % (max(totals) // settings.epochs):
            continue
        sums = steps.total_losses()
        for category, (count, total) in enumerate(zip(counts, totals, strict=True)):
            finished = min(number + 1, total) * settings.epochs // total
            for epoch in range(reported[category] + 1, finished + 1):
                yield category, FitProgress(epoch * count, epoch, float(sums[category, epoch - 1]) / count)
            reported[category] = finished
    steps.write()
    for head in heads:
        head.to("cpu")


def _epochs_on_cpu(
    head: FastFlowHead,
    features: FeatureStore,
    rows: NDArray[np.int64],
    settings: TrainingSettings,
    *,
    white: bool,
    device: torch.device,
) -> Iterator[FitProgress]:
    """Read the features of every step from their store; report every step."""
    del device
    head.train()
    optimiser = torch.optim.AdamW(head.parameters(), settings.learning_rate, weight_decay=settings.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, settings.learning_rate, total_steps=_steps(len(rows), settings), pct_start=_WARM_UP_SHARE
    )
    images = 0
    for epoch, batches in _shuffled(rows, settings):
        total_loss, seen = 0.0, 0
        for batch in batches:
            scales = features.take(batch)
            loss = negative_log_likelihood(*(head.transform(scales) if white else head(scales)))
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]  # torch
            nn.utils.clip_grad_norm_(head.parameters(), settings.clip_norm)
            optimiser.step()
            schedule.step()
            total_loss += loss.item() * len(batch)
            seen += len(batch)
            images += len(batch)
            yield FitProgress(images, epoch, total_loss / seen)


def _epochs_on_gpu(
    head: FastFlowHead,
    features: FeatureStore,
    rows: NDArray[np.int64],
    settings: TrainingSettings,
    *,
    white: bool,
    device: torch.device,
) -> Iterator[FitProgress]:
    """Keep white features on the device; each step is one graph, and the host waits once an epoch, to report."""
    head.to(device)
    head.to(memory_format=torch.channels_last)
    head.train()
    total = _steps(len(rows), settings)
    rates, momenta = one_cycle(settings.learning_rate, total, _WARM_UP_SHARE)
    on_device = _empty_scales(head, len(rows), device, torch.channels_last)
    _fill_white(on_device, head, features, rows, white=white)
    step = GraphedStep(head, on_device, settings.weight_decay, settings.clip_norm)
    position_of = np.zeros(int(rows.max()) + 1, np.int64)
    position_of[rows] = np.arange(len(rows))
    number = images = 0
    for epoch, batches in _shuffled(rows, settings):
        for batch in batches:
            step.run(position_of[batch], rates[number], momenta[number])
            number += 1
            images += len(batch)
        yield FitProgress(images, epoch, step.take_total_loss() / len(rows))
    head.to("cpu")
    head.to(memory_format=torch.contiguous_format)


def _empty_scales(head: FastFlowHead, images: int, device: torch.device, layout: torch.memory_format) -> list[Tensor]:
    """Allocate one (N, C_s, H_s, W_s) float32 tensor per scale."""
    return [
        torch.empty((images, *module.mean.shape), device=device, memory_format=layout)
        for module in head.statistics
        if isinstance(module, FeatureStatistics)
    ]


@torch.no_grad()
def _fill_white(
    scales: Sequence[Tensor], head: FastFlowHead, features: FeatureStore, rows: NDArray[np.int64], *, white: bool
) -> None:
    """Copy features to the device and whiten them there, into one (N, C_s, H_s, W_s) tensor per scale."""
    for start in range(0, len(rows), _COPIED_IMAGES):
        chunk = [scale.to(scales[0].device) for scale in features.take(rows[start : start + _COPIED_IMAGES])]
        if not white:
            chunk = [statistics(scale) for statistics, scale in zip(head.statistics, chunk, strict=True)]
        for all_images, scale in zip(scales, chunk, strict=True):
            all_images[start : start + len(scale)] = scale


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
