"""What every engine promises: the reference's grids, for any mix of categories and any size of batch."""

import threading
from abc import ABC, abstractmethod
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from helpers.engine_bench import (
    FLOW,
    SIZE,
    Grids,
    Images,
    assert_same,
    judge,
    kept_trial,
    load,
    make_head,
    make_images,
    mixed,
)
from helpers.tiny_models import make_manifest

from flawstream.engines.cuda.engine import CudaEngine
from flawstream.engines.fake_engine import FakeEngine
from flawstream.engines.ncnn import engine as ncnn_engine
from flawstream.engines.ncnn.engine import NcnnEngine
from flawstream.engines.openvino.compile import openvino_is_installed
from flawstream.engines.openvino.engine import OpenvinoEngine
from flawstream.engines.openvino.int8_graph import Int8Flows
from flawstream.engines.protocol import Engine, HeadRows, Loaded
from flawstream.engines.torch_engine import TorchEngine
from flawstream.fastflow.backbone import Backbone
from flawstream.fastflow.head import FastFlowHead, FoldedHead
from flawstream.fastflow.score import score_images
from flawstream.imaging.pixels import Pixels
from schemas.settings import BackboneArithmetic, ModelSettings
from training.steps.quantise import write_flows


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a resnet18 that was never trained, as a file."""
    path = tmp_path_factory.mktemp("weights") / "resnet18.pth"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        torch.save(timm.create_model("resnet18", pretrained=False).state_dict(), path)
    return path


class EngineContract(ABC):
    strides: tuple[int, ...] = (8, 16)
    arithmetic: BackboneArithmetic = "float32"
    tolerance = 1e-3
    """Of a grid's values against plain torch in float32, relative to each and to the largest."""

    @pytest.fixture(scope="class")
    @classmethod
    def settings(cls, weights: Path) -> ModelSettings:
        return ModelSettings(
            backbone="resnet18",
            weights=str(weights),
            strides=cls.strides,
            input_size=SIZE,
            arithmetic=cls.arithmetic,
        )

    @pytest.fixture(scope="class")
    @classmethod
    def reference(cls, settings: ModelSettings) -> Backbone:
        return Backbone(settings)

    @pytest.fixture(scope="class")
    @classmethod
    def heads(cls, reference: Backbone) -> list[FastFlowHead]:
        return [make_head(reference, seed) for seed in range(3)]

    @classmethod
    @abstractmethod
    def make_engine(cls, settings: ModelSettings, reference: Backbone) -> Engine: ...

    def expected(self, reference: Backbone, head: FastFlowHead, images: Images) -> Grids:
        """Compute the grids in plain torch, float32."""
        with torch.no_grad():
            return [grid.numpy() for grid in FoldedHead(head)(reference(torch.from_numpy(images)))]

    @pytest.fixture(scope="class")
    @classmethod
    def engine(cls, settings: ModelSettings, reference: Backbone) -> Engine:
        return cls.make_engine(settings, reference)

    @pytest.fixture(scope="class")
    @classmethod
    def loaded(cls, engine: Engine, heads: list[FastFlowHead]) -> list[Loaded]:
        return [load(engine, head, k) for k, head in enumerate(heads)]

    def test_spec_is_the_backbone_s(self, engine: Engine, reference: Backbone) -> None:
        assert engine.spec == reference.spec

    @pytest.mark.parametrize("count", [1, 2, 5])
    def test_grids_are_the_reference_s(
        self, engine: Engine, reference: Backbone, heads: list[FastFlowHead], loaded: list[Loaded], count: int
    ) -> None:
        images = make_images(count)
        grids = judge(engine, loaded[0], images)
        assert [grid.shape for grid in grids] == [(count, side, side) for side in engine.spec.grid_sizes]
        assert_same(grids, self.expected(reference, heads[0], images), self.tolerance)

    @pytest.mark.parametrize("owners", [[2, 0, 1, 0, 2, 0], [0, 1, 2], [1, 1, 1, 1, 0], [2, 1]])
    def test_mixed_categories_get_what_each_gets_alone(
        self, engine: Engine, loaded: list[Loaded], owners: list[int]
    ) -> None:
        images = make_images(len(owners))
        first_seen = list(dict.fromkeys(owners))
        together = mixed(engine, images, [(loaded[k], np.flatnonzero(np.array(owners) == k)) for k in first_seen])
        for row, owner in enumerate(owners):
            alone = judge(engine, loaded[owner], images[row : row + 1])
            assert_same([grid[row : row + 1] for grid in together], alone, self.tolerance)

    def test_scores_are_those_of_the_grids_with_each_head_s_fraction(
        self, engine: Engine, reference: Backbone, heads: list[FastFlowHead], loaded: list[Loaded]
    ) -> None:
        """Whatever the range of the grids is: a threshold may lie above float16's."""
        images = make_images(5)
        rows = [np.array([0, 3]), np.array([1, 2, 4])]
        fractions = (0.0, 0.5)
        scored = engine.detect(images, [HeadRows(loaded[k], rows[k], fractions[k]) for k in (0, 1)])
        assert scored.scores.dtype == np.float64
        for k in (0, 1):
            expected = score_images(self.expected(reference, heads[k], images[rows[k]]), fractions[k])
            np.testing.assert_allclose(
                scored.scores[rows[k]], expected, rtol=self.tolerance, atol=self.tolerance * expected.max()
            )

    def test_memory_of_a_head_is_not_negative(self, engine: Engine, heads: list[FastFlowHead]) -> None:
        assert engine.memory_of(heads[0]) >= 0
        assert engine.usable

    def test_categories_differ(self, engine: Engine, loaded: list[Loaded]) -> None:
        one, other = (judge(engine, version, make_images(1)) for version in loaded[:2])
        assert not np.allclose(one[0], other[0], rtol=1e-2)

    def test_read_only_images_are_taken_without_a_warning(self, engine: Engine, loaded: list[Loaded]) -> None:
        """As arrays from shared memory are; the whole test run turns warnings into errors."""
        images = make_images(3)
        expected = judge(engine, loaded[0], images)
        frozen = images.copy()
        frozen.flags.writeable = False
        assert_same(judge(engine, loaded[0], frozen), expected)
        assert np.array_equal(frozen, images)

    def test_images_with_gaps_in_memory_are_taken(self, engine: Engine, loaded: list[Loaded]) -> None:
        images = make_images(4)
        expected = judge(engine, loaded[0], np.ascontiguousarray(images[::2]))
        assert_same(judge(engine, loaded[0], images[::2]), expected)

    def test_grids_outlive_the_next_batch(self, engine: Engine, loaded: list[Loaded]) -> None:
        grids = judge(engine, loaded[0], make_images(2, seed=1))
        kept = [grid.copy() for grid in grids]
        judge(engine, loaded[0], make_images(2, seed=2))
        for grid, copy in zip(grids, kept, strict=True):
            assert np.array_equal(grid, copy)

    def test_grids_are_the_caller_s_to_change(self, engine: Engine, loaded: list[Loaded]) -> None:
        images = make_images(2)
        expected = [grid.copy() for grid in judge(engine, loaded[0], images)]
        for grid in judge(engine, loaded[0], images):
            grid[:] = np.nan
        assert_same(judge(engine, loaded[0], images), expected)

    def test_loading_leaves_the_head_as_it_was(
        self, reference: Backbone, heads: list[FastFlowHead], loaded: list[Loaded]
    ) -> None:
        assert loaded
        assert heads[0].to_bytes() == make_head(reference, 0).to_bytes()
        assert all(parameter.requires_grad for parameter in heads[0].parameters())

    def test_version_that_another_replaced_is_judged_by_for_as_long_as_it_is_held(
        self, engine: Engine, heads: list[FastFlowHead], loaded: list[Loaded]
    ) -> None:
        """A batch may hold the version of before."""
        images = make_images(2)
        before = judge(engine, loaded[0], images)
        replaced = load(engine, heads[1], 0, "v2")
        assert_same(judge(engine, replaced, images), judge(engine, loaded[1], images))
        assert_same(judge(engine, loaded[0], images), before)

    def test_loading_in_another_thread_disturbs_no_batch(
        self, engine: Engine, heads: list[FastFlowHead], loaded: list[Loaded]
    ) -> None:
        images = make_images(2)
        expected = judge(engine, loaded[0], images)
        again: list[Loaded] = []
        other = threading.Thread(target=lambda: again.append(load(engine, heads[0], 0, "v3")))
        other.start()
        batches = 0
        while other.is_alive() or batches < 3:
            assert_same(judge(engine, loaded[0], images), expected)
            batches += 1
        other.join()
        assert_same(judge(engine, again[0], images), expected)

    def test_threads_that_judge_at_once_get_what_each_gets_alone(self, engine: Engine, loaded: list[Loaded]) -> None:
        count = engine.concurrent_batches
        jobs = [(loaded[k % len(loaded)], make_images(1 + k % 4, seed=k)) for k in range(4 * count)]
        expected = [judge(engine, version, images) for version, images in jobs]
        with ThreadPoolExecutor(count) as threads:
            found = list(threads.map(lambda job: judge(engine, *job), jobs))
        for grids, alone in zip(found, expected, strict=True):
            assert_same(grids, alone, self.tolerance)


class TrialContract(EngineContract):
    """Versions that passed a trial beside one that did not: that is loaded in float32, where grids differ."""

    def test_version_that_another_replaced_is_judged_by_for_as_long_as_it_is_held(
        self, engine: Engine, heads: list[FastFlowHead], loaded: list[Loaded]
    ) -> None:
        images = make_images(2)
        before = judge(engine, loaded[0], images)
        load(engine, heads[1], 0, "v2")
        assert_same(judge(engine, loaded[0], images), before)

    def test_loading_in_another_thread_disturbs_no_batch(
        self, engine: Engine, heads: list[FastFlowHead], loaded: list[Loaded]
    ) -> None:
        images = make_images(2)
        expected = judge(engine, loaded[1], images)
        other = threading.Thread(target=lambda: load(engine, heads[0], 0, "v3"))
        other.start()
        while other.is_alive():
            assert_same(judge(engine, loaded[1], images), expected)
        other.join()


class TestTorchEngine(EngineContract):
    @classmethod
    def make_engine(cls, settings: ModelSettings, reference: Backbone) -> Engine:
        del reference
        return TorchEngine(Backbone(settings))


class TestTorchEngineOnOneScale(TestTorchEngine):
    strides = (16,)


class TestOpenvinoEngine(EngineContract):
    @classmethod
    def make_engine(cls, settings: ModelSettings, reference: Backbone) -> Engine:
        del reference
        pytest.importorskip("openvino")
        return OpenvinoEngine(Backbone(settings))


class TestOpenvinoEngineOnOneScale(TestOpenvinoEngine):
    strides = (16,)


class TestOpenvinoEngineWithInt8Backbone(TestOpenvinoEngine):
    """A value between two steps of int8 may go either way, in torch and in OpenVINO."""

    arithmetic = "int8"
    tolerance = 3e-2


class TestNcnnEngine(EngineContract):
    @classmethod
    def make_engine(cls, settings: ModelSettings, reference: Backbone) -> Engine:
        del reference
        pytest.importorskip("ncnn")
        return NcnnEngine(Backbone(settings))


class TestNcnnEngineOnOneScale(TestNcnnEngine):
    strides = (16,)


class TestNcnnEngineOnThreeScales(TestNcnnEngine):
    """With two CPUs one scale is left over, which a lone image runs on both."""

    strides = (4, 8, 16)


class TestNcnnEngineBehindOpenvino(TestNcnnEngine):
    """A backbone of other convolutions than ncnn is fast at."""

    @classmethod
    def make_engine(cls, settings: ModelSettings, reference: Backbone) -> Engine:
        pytest.importorskip("openvino")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ncnn_engine, "is_mostly_3x3", lambda _: False)
            return super().make_engine(settings, reference)


class TestNcnnEngineWithInt8Backbone(TestNcnnEngine):
    arithmetic = "int8"
    tolerance = 3e-2

    @classmethod
    def make_engine(cls, settings: ModelSettings, reference: Backbone) -> Engine:
        pytest.importorskip("openvino")
        return super().make_engine(settings, reference)


class TestCudaEngine(EngineContract):
    """The program that a GPU captures, on a CPU."""

    @classmethod
    def make_engine(cls, settings: ModelSettings, reference: Backbone) -> Engine:
        del reference
        return CudaEngine(Backbone(settings), half=False, max_batch=4, device=torch.device("cpu"))


class TestCudaEngineOnOneScale(TestCudaEngine):
    strides = (16,)


class TestCudaEngineInFloat16(TrialContract):
    """Two versions that passed the trial of float16 and one that did not, in the same batches."""

    tolerance = 0.02

    @classmethod
    def make_engine(cls, settings: ModelSettings, reference: Backbone) -> Engine:
        del reference
        return CudaEngine(Backbone(settings), half=True, device=torch.device("cpu"))

    @pytest.fixture(scope="class")
    @classmethod
    def loaded(cls, engine: Engine, heads: list[FastFlowHead]) -> list[Loaded]:
        found = []
        for k, head in enumerate(heads[:2]):
            manifest = make_manifest(f"category-{k}", "v1", spec=engine.spec, flow=FLOW)
            trial = kept_trial(manifest.calibration, "float16")
            found.append(engine.load(head, manifest.model_copy(update={"trials": (trial,)})))
        return [*found, load(engine, heads[2], 2)]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
class TestCudaEngineOnAGpu(TestCudaEngine):
    @classmethod
    def make_engine(cls, settings: ModelSettings, reference: Backbone) -> Engine:
        del reference
        return CudaEngine(Backbone(settings), half=False, max_batch=4)


class TestFakeEngine(EngineContract):
    @classmethod
    def make_engine(cls, settings: ModelSettings, reference: Backbone) -> Engine:
        del settings
        return FakeEngine(reference.spec)

    def expected(self, reference: Backbone, head: FastFlowHead, images: Images) -> Grids:
        """Compute cell by cell what the engine computes at once."""
        grids = []
        for side, statistics in zip(reference.spec.grid_sizes, head.statistics, strict=True):
            cell = SIZE // side
            mean = float(statistics.get_buffer("mean").mean())
            grids.append(
                np.array(
                    [
                        [
                            [
                                abs(image[y * cell : (y + 1) * cell, x * cell : (x + 1) * cell].mean() / 255 - mean)
                                for x in range(side)
                            ]
                            for y in range(side)
                        ]
                        for image in images
                    ],
                    np.float32,
                )
            )
        return grids


@pytest.mark.parametrize(
    "contract", [TestTorchEngine, TestOpenvinoEngine, TestNcnnEngine, TestNcnnEngineBehindOpenvino]
)
def test_pixels_between_grey_levels_count(contract: type[EngineContract], weights: Path) -> None:
    settings = ModelSettings(backbone="resnet18", weights=str(weights), input_size=SIZE, resize="antialias")
    reference = Backbone(settings)
    engine = contract.make_engine(settings, reference)
    head = make_head(reference, 0)
    version = load(engine, head, 0)
    images: Pixels = (make_images(3) * np.float32(0.9) + np.float32(0.4)).astype(np.float32)
    with torch.no_grad():
        expected, rounded = (
            [grid.numpy() for grid in FoldedHead(head)(reference(torch.from_numpy(pixels)))]
            for pixels in (images, images.round())
        )
    for rows in (slice(None), slice(1)):  # a batch, and an image alone
        grids = judge(engine, version, images[rows])
        for grid, exact, coarse in zip(grids, expected, rounded, strict=True):
            error = np.abs(grid - exact[rows]).max()
            assert error <= 1e-3 * exact.max()
            assert error <= 0.1 * np.abs(coarse[rows] - exact[rows]).max()


@pytest.mark.skipif(not openvino_is_installed(), reason="OpenVINO is not installed")
class Int8Contract(TrialContract):
    """Two versions with flows in int8 and one in float32: as any others, but for what int8 loses."""

    tolerance = 0.1

    @pytest.fixture(scope="class")
    @classmethod
    def loaded(cls, engine: Engine, reference: Backbone, heads: list[FastFlowHead]) -> list[Loaded]:
        with torch.no_grad():
            features = reference(torch.from_numpy(make_images(8, seed=7)))
        found = []
        for k, head in enumerate(heads[:2]):
            manifest = make_manifest(f"category-{k}", "v1", spec=engine.spec, flow=FLOW)
            trials = (kept_trial(manifest.calibration, "int8"),)
            files = write_flows(head, features)
            found.append(engine.load(head, manifest.model_copy(update={"trials": trials}), files.__getitem__))
        assert [type(version) for version in found] == [Int8Flows, Int8Flows]
        return [*found, load(engine, heads[2], 2)]


class TestOpenvinoEngineInt8(Int8Contract):
    @classmethod
    def make_engine(cls, settings: ModelSettings, reference: Backbone) -> Engine:
        del reference
        return OpenvinoEngine(Backbone(settings), int8=True)


class TestNcnnEngineInt8(Int8Contract):
    @classmethod
    def make_engine(cls, settings: ModelSettings, reference: Backbone) -> Engine:
        del reference
        pytest.importorskip("ncnn")
        return NcnnEngine(Backbone(settings), int8=True)
