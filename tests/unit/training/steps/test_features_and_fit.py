"""Features from files, their cache on disk, the split, and the training of one head."""

import gc
import os
from collections.abc import Generator, Iterator
from functools import partial
from pathlib import Path
from typing import cast, get_args

import cv2
import numpy as np
import pytest
import torch
from helpers.tiny_models import SPEC
from hypothesis import given
from hypothesis import strategies as st

from flawstream.fastflow.backbone import Backbone
from flawstream.fastflow.head import FastFlowHead, FoldedHead
from flawstream.fastflow.score import score_images
from flawstream.fastflow.statistics import FeatureStatistics
from flawstream.imaging.decode import decode_image
from flawstream.imaging.pixels import PixelForm
from schemas.errors import ConfigError, DatasetError
from schemas.manifest import FlowSpec
from schemas.settings import LimitSettings, ModelSettings, Resize, TrainingSettings
from training.steps import fit as fit_module
from training.steps.features import FeatureCache, FeatureExtractor, FeatureStore
from training.steps.fit import FitProgress, fit_head, split_rows, whiten_across_folds

COUNT = 19  # one batch and a part of one
FLOW = FlowSpec(steps=2, hidden_ratio=0.2, conv3x3_only=False, clamp=2.0)
RECIPE = TrainingSettings(epochs=2, batch_size=4)


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return Backbone(ModelSettings(strides=(16, 32), input_size=64))


@pytest.fixture(scope="module")
def extractor(backbone: Backbone) -> FeatureExtractor:
    return FeatureExtractor(backbone, LimitSettings())


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ...]:
    """Write textures as PNG: stripes of some width in noise."""
    folder = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    paths = tuple(folder / f"{number:02}.png" for number in range(COUNT))
    for number, path in enumerate(paths):
        stripes = 128 + 60 * np.sin(np.arange(64) / (2 + number % 3))[None, :, None]
        cv2.imwrite(str(path), np.clip(stripes + generator.normal(0, 12, (64, 64, 3)), 0, 255).astype(np.uint8))
    return paths


@pytest.fixture(scope="module")
def cache(
    tmp_path_factory: pytest.TempPathFactory, paths: tuple[Path, ...], extractor: FeatureExtractor
) -> FeatureCache:
    cache = FeatureCache(tmp_path_factory.mktemp("cache"), paths, extractor)
    assert list(cache.fill()) == [16, 19]
    return cache


def test_cached_features_are_the_backbone_s_but_for_float16(
    cache: FeatureCache, backbone: Backbone, paths: tuple[Path, ...]
) -> None:
    rows = np.array([18, 0, 7])
    images = np.stack([np.asarray(cv2.imread(str(paths[row]), cv2.IMREAD_COLOR_RGB)) for row in rows])
    for cached, direct in zip(cache.take(rows), backbone(torch.from_numpy(images)), strict=True):
        assert cached.dtype == torch.float32
        torch.testing.assert_close(cached, direct, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("resize", get_args(Resize))
def test_features_are_of_the_pixels_that_serving_sees(resize: Resize, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (90, 150, 3), np.uint8)
    cv2.imwrite(str(tmp_path / "a.jpg"), noise)
    backbone = Backbone(ModelSettings(strides=(16, 32), input_size=64, resize=resize))
    [(images, features)] = FeatureExtractor(backbone, LimitSettings()).batches([tmp_path / "a.jpg"])
    served = decode_image((tmp_path / "a.jpg").read_bytes(), PixelForm.of(backbone.spec), LimitSettings())
    np.testing.assert_array_equal(images[0].pixels, served.pixels)
    for scale, direct in zip(features, backbone(torch.from_numpy(served.pixels)[None]), strict=True):
        torch.testing.assert_close(scale.cpu(), direct, rtol=1e-3, atol=1e-3)


def test_grid_rows_are_those_of_the_images(cache: FeatureCache) -> None:
    images = np.array([1, 4, 5])
    for scale, expected in enumerate(cache.take(images)):
        rows = list(cache.grid_rows(scale, images))
        assert all(row.dtype == torch.float32 for row in rows)
        assert torch.equal(torch.stack(rows, dim=2), expected)


def test_cache_has_no_files_that_could_be_left_behind(
    tmp_path: Path, paths: tuple[Path, ...], extractor: FeatureExtractor
) -> None:
    filling = FeatureCache(tmp_path, paths, extractor).fill()
    assert next(filling) == 16
    assert list(tmp_path.iterdir()) == []
    cast("Generator[int]", filling).close()


def test_room_of_a_cache_is_free_again_when_it_is_gone(
    tmp_path: Path, paths: tuple[Path, ...], extractor: FeatureExtractor
) -> None:
    def mapped() -> int:
        return Path("/proc/self/maps").read_text(encoding="utf-8").count(str(tmp_path))

    cache = FeatureCache(tmp_path, paths, extractor)
    assert mapped() == 2
    del cache
    gc.collect()
    assert mapped() == 0


def test_full_disk_is_told_before_anything_is_computed(
    tmp_path: Path, paths: tuple[Path, ...], extractor: FeatureExtractor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with pytest.raises(ConfigError, match=r"no space for .* MB of features \(No space left on device\).*TMPDIR"):
        FeatureCache(tmp_path, paths, extractor)


@pytest.mark.parametrize("data", [b"no image", b""])
def test_corrupt_image_is_refused_by_name(
    tmp_path: Path, paths: tuple[Path, ...], extractor: FeatureExtractor, data: bytes
) -> None:
    (tmp_path / "broken.png").write_bytes(data)
    with pytest.raises(DatasetError, match=r"broken\.png"):
        list(extractor.batches([*paths, tmp_path / "broken.png"]))


def test_half_an_image_is_refused_by_name(tmp_path: Path, paths: tuple[Path, ...], extractor: FeatureExtractor) -> None:
    whole = paths[0].read_bytes()
    (tmp_path / "half.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DatasetError, match=r"half\.png"):
        list(extractor.batches([tmp_path / "half.png"]))


def test_missing_file_is_refused_by_name(tmp_path: Path, extractor: FeatureExtractor) -> None:
    with pytest.raises(DatasetError, match=r"gone\.png: No such file"):
        list(extractor.batches([tmp_path / "gone.png"]))


def test_consumer_between_two_batches_can_train(paths: tuple[Path, ...], extractor: FeatureExtractor) -> None:
    """Inference mode must not leak out of a generator that waits."""
    batches = extractor.batches(paths)
    next(batches)
    assert not torch.is_inference_mode_enabled()
    assert torch.is_grad_enabled()
    cast("Generator[object]", batches).close()


def fit(cache: FeatureCache, extractor: FeatureExtractor, recipe: TrainingSettings) -> tuple[bytes, list[FitProgress]]:
    head = FastFlowHead(extractor.spec, FLOW, seed=recipe.seed)
    rows, _ = split_rows(COUNT, recipe)
    steps = list(fit_head(head, cache, rows, recipe))
    return head.to_bytes(), steps


def test_same_seed_gives_the_same_head_and_another_seed_another(
    cache: FeatureCache, extractor: FeatureExtractor
) -> None:
    one, _ = fit(cache, extractor, RECIPE)
    torch.rand(3)  # whatever else draws
    same, _ = fit(cache, extractor, RECIPE)
    other, _ = fit(cache, extractor, RECIPE.model_copy(update={"seed": 1}))
    assert one == same
    assert one != other


def test_steps_add_up(cache: FeatureCache, extractor: FeatureExtractor) -> None:
    """19 images, 4 of which calibrate: 15 train, in 4 steps an epoch."""
    _, steps = fit(cache, extractor, RECIPE)
    assert [step.images for step in steps] == [4, 8, 12, 15, 19, 23, 27, 30]
    assert [step.epoch for step in steps] == [1] * 4 + [2] * 4


def test_loss_falls(cache: FeatureCache, extractor: FeatureExtractor) -> None:
    _, steps = fit(cache, extractor, RECIPE.model_copy(update={"epochs": 5}))
    assert steps[-1].loss < steps[0].loss


def test_last_epoch_remains(many: None, cache: FeatureCache, extractor: FeatureExtractor) -> None:
    """Whatever its loss: the recipe's rate is so high that later epochs are worse than the first."""
    del many
    recipe = RECIPE.model_copy(update={"epochs": 3, "learning_rate": 0.3, "batch_size": 16})
    head = FastFlowHead(extractor.spec, FLOW)
    rows, _ = split_rows(COUNT, recipe)
    after_steps, losses = [], []
    for step in fit_head(head, cache, rows, recipe):
        after_steps.append(head.to_bytes())
        losses.append(step.loss)
    assert losses[-1] > min(losses)
    assert head.to_bytes() == after_steps[-1]
    assert len(set(after_steps)) == 3
    assert not head.training


@pytest.fixture
def many(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have so few images count as many."""
    monkeypatch.setattr(fit_module, "_MANY_IMAGES", 2)


def test_only_the_rows_given_train(many: None, cache: FeatureCache, extractor: FeatureExtractor) -> None:
    del many
    seen: list[int] = []
    for_statistics: set[int] = set()

    class Watched(FeatureCache):
        def __init__(self) -> None:
            pass

        def take(self, rows: np.ndarray) -> list[torch.Tensor]:
            seen.extend(rows.tolist())
            return cache.take(rows)

        def grid_rows(self, scale: int, images: np.ndarray) -> Iterator[torch.Tensor]:
            for_statistics.update(images.tolist())
            return cache.grid_rows(scale, images)

    rows, held_out = split_rows(COUNT, RECIPE)
    list(fit_head(FastFlowHead(extractor.spec, FLOW), Watched(), rows, RECIPE))
    assert set(seen) == for_statistics == set(rows.tolist())
    assert not set(seen) & set(held_out.tolist())
    assert all(seen.count(row) == RECIPE.epochs for row in rows)


def test_of_few_images_each_is_made_white_by_others(cache: FeatureCache, extractor: FeatureExtractor) -> None:
    """Whatever an image is itself, its white features are what the others' statistics make of it."""
    head = FastFlowHead(extractor.spec, FLOW)
    statistics = [one for one in head.statistics if isinstance(one, FeatureStatistics)]
    rows, _ = split_rows(COUNT, RECIPE)
    white = whiten_across_folds(statistics, cache, rows, seed=0).take(np.arange(len(rows)))
    for one, scale in zip(statistics, range(len(white)), strict=True):
        one.set_from(partial(cache.grid_rows, scale, rows))
    own = [one(scale) for one, scale in zip(statistics, cache.take(rows), strict=True)]
    for others, by_itself in zip(white, own, strict=True):
        assert others.square().mean() > 1.5 * by_itself.square().mean()  # an image flatters its own statistics


@pytest.mark.parametrize("count", [2, 3, 4])
def test_hardly_any_images_train_all_the_same(count: int, cache: FeatureCache, extractor: FeatureExtractor) -> None:
    head = FastFlowHead(extractor.spec, FLOW)
    list(fit_head(head, cache, np.arange(count), RECIPE))
    latents, log_dets = head(cache.take(np.arange(COUNT)))
    assert all(torch.isfinite(one).all() for one in (*latents, *log_dets))


def test_scores_of_few_images_stay_in_the_range_of_many(tmp_path: Path) -> None:
    """Features of 32 causes in noise: of 13 images, held-out ones scored 22 times what they score with 300."""
    generator = torch.Generator().manual_seed(0)
    spec = SPEC.model_copy(update={"channels": (64,), "strides": (8,)})
    mixing = torch.randn(64, 32, generator=generator)

    def draw(count: int) -> torch.Tensor:
        causes = torch.randn(count, 32, 1, 1, generator=generator)
        causes = causes + 0.3 * torch.randn(count, 32, 8, 8, generator=generator)
        return torch.einsum("ck,nkhw->nchw", mixing, causes) + 0.1 * torch.randn(count, 64, 8, 8, generator=generator)

    held_out = draw(40)
    found = []
    for count in (13, 300):
        store = FeatureStore(tmp_path, count, spec.feature_shapes)
        store.put(slice(0, count), [draw(count)])
        head = FastFlowHead(spec, FlowSpec(steps=8, hidden_ratio=1.0, conv3x3_only=False, clamp=2.0))
        list(fit_head(head, store, np.arange(count), TrainingSettings(epochs=20)))
        with torch.no_grad():
            (grids,) = FoldedHead(head)([held_out])
        found.append(float(np.quantile(score_images([grids.numpy()], 0.03), 0.95)))
    assert found[0] < 10 * found[1]


@given(count=st.integers(3, 500), fraction=st.floats(0.01, 0.33), seed=st.integers(0, 2**32))
def test_split_is_disjoint_and_complete(count: int, fraction: float, seed: int) -> None:
    recipe = TrainingSettings(calibration_fraction=fraction, seed=seed)
    rows, held_out = split_rows(count, recipe)
    assert len(held_out) == max(1, round(count * fraction))
    assert sorted([*rows.tolist(), *held_out.tolist()]) == list(range(count))
    again, _ = split_rows(count, recipe)
    assert np.array_equal(rows, again)


@pytest.mark.parametrize(("count", "fraction"), [(1, 0.2), (2, 0.2), (20, 0.99)])
def test_split_that_leaves_nothing_to_train_is_refused(count: int, fraction: float) -> None:
    with pytest.raises(DatasetError, match="2 are needed"):
        split_rows(count, TrainingSettings(calibration_fraction=fraction))


def test_images_that_are_all_alike_are_refused_with_the_cause(tmp_path: Path, extractor: FeatureExtractor) -> None:
    (tmp_path / "black.png").write_bytes(cv2.imencode(".png", np.zeros((64, 64), np.uint8))[1].tobytes())
    alike = FeatureCache(tmp_path, COUNT * [tmp_path / "black.png"], extractor)
    assert list(alike.fill()) == [16, 19]
    head = FastFlowHead(extractor.spec, FLOW, seed=0)
    with pytest.raises(DatasetError, match="the 19 normal training images are alike"):
        next(fit_head(head, alike, np.arange(COUNT), RECIPE))
