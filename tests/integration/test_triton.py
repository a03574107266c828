"""The Triton engine on a real tritonserver and a repository that was exported for it, held to the engines' contract.

Skipped without the server's environment: it wants another NumPy than ours and some 400 MB, so `make test` alone, as
continuous integration calls it, goes without. What is written into the repository is tested in any case, in
`tests/unit/flawstream/export/test_export.py`.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from contracts.test_engine_contract import EngineContract
from contracts.test_engine_contract import weights as weights  # noqa: PLC0414 - a fixture of the contract
from helpers.engine_bench import FLOW, Grids, Images, assert_same, judge, load, make_images, mixed
from helpers.tiny_models import make_manifest
from helpers.triton_server import PYTHON, TritonServer
from numpy.typing import NDArray
from tritonclient.grpc import InferenceServerClient, InferInput
from tritonclient.utils import InferenceServerException

from flawstream.engines.protocol import Loaded
from flawstream.engines.torch_engine import TorchEngine
from flawstream.engines.triton_engine import TritonEngine
from flawstream.export.graph import ExtraOutputs
from flawstream.export.triton import BACKBONE, FRONT, TritonOptions, write_triton
from flawstream.fastflow.backbone import Backbone
from flawstream.fastflow.head import FastFlowHead
from flawstream.fastflow.score import image_scores
from schemas.errors import ConfigError, RegistryError, TransientError
from schemas.settings import ModelSettings

pytestmark = [
    pytest.mark.skipif(not PYTHON.exists(), reason="no tritonserver here: `make test-triton` sets one up"),
    pytest.mark.timeout(900),
]

SMALL_BATCH = 4
"""The server's largest: batches of the contract are larger."""
TOP_FRACTION = 0.03
PATIENT_S = 120.0
VERSIONS = (("category-0", "v1", 0), ("category-1", "v1", 1), ("category-2", "v1", 2))
REPLACED = (("category-0", "v2", 1), ("category-0", "v3", 0))
"""What the contract loads later: category, version, and whose head it has."""


def scores(grids: Grids) -> NDArray[np.float32]:
    result: NDArray[np.float32] = image_scores([torch.from_numpy(grid) for grid in grids], TOP_FRACTION).numpy()
    return result


def ask(address: str, images: Images, models: list[str]) -> NDArray[np.float32]:
    """Ask for image scores as a program that knows nothing of us would."""
    with InferenceServerClient(address) as client:
        pixels = InferInput("images", images.shape, "UINT8")
        pixels.set_data_from_numpy(images)
        named = InferInput("model", [len(models), 1], "BYTES")
        named.set_data_from_numpy(np.array([[model.encode()] for model in models], object))
        answered: NDArray[np.float32] = client.infer(FRONT, [pixels, named]).as_numpy("score")
    return answered[:, 0]


class TestTritonEngine(EngineContract):
    server: TritonServer
    repository: Path

    @pytest.fixture(scope="class")
    @classmethod
    def engine(
        cls,
        settings: ModelSettings,
        reference: Backbone,
        heads: list[FastFlowHead],
        tmp_path_factory: pytest.TempPathFactory,
    ) -> Iterator[TritonEngine]:
        cls.repository = tmp_path_factory.mktemp("triton") / "repository"
        for category, version, head in VERSIONS + REPLACED:
            write_triton(
                cls.repository,
                make_manifest(category, version, spec=reference.spec, flow=FLOW),
                reference,
                heads[head],
                extra_outputs=ExtraOutputs(TOP_FRACTION),
                options=TritonOptions("python", max_batch_images=SMALL_BATCH),
            )
        with TritonServer(cls.repository, tmp_path_factory.mktemp("server")) as cls.server:
            yield cls.make_engine(settings, reference)

    @classmethod
    def make_engine(cls, settings: ModelSettings, reference: Backbone) -> TritonEngine:
        del settings, reference
        return TritonEngine(f"grpc://{cls.server.address}", PATIENT_S)

    def test_scores_are_the_torch_engine_s(
        self, engine: TritonEngine, settings: ModelSettings, heads: list[FastFlowHead], loaded: list[Loaded]
    ) -> None:
        torch_engine = TorchEngine(Backbone(settings))
        images = make_images(4, seed=3)
        for k, version in enumerate(loaded):
            expected = scores(judge(torch_engine, load(torch_engine, heads[k], k), images))
            assert expected.std() > 0.01 * expected.mean()
            np.testing.assert_allclose(scores(judge(engine, version, images)), expected, rtol=1e-3)
            np.testing.assert_allclose(ask(self.server.address, images, [version] * 4), expected, rtol=1e-3)

    def test_backbone_runs_once_for_a_request_of_mixed_categories(
        self, engine: TritonEngine, loaded: list[Loaded]
    ) -> None:
        def runs() -> int:
            with InferenceServerClient(self.server.address) as client:
                statistics = client.get_inference_statistics(BACKBONE).model_stats[0]
            return int(statistics.execution_count)

        before = runs()
        mixed(engine, make_images(3), [(version, np.array([k])) for k, version in enumerate(loaded)])
        assert runs() - before == 1

    def test_request_for_a_version_that_is_not_there_fails_alone(
        self, engine: TritonEngine, loaded: list[Loaded]
    ) -> None:
        images = make_images(1)
        expected = scores(judge(engine, loaded[0], images))

        def outcome(model: str) -> NDArray[np.float32] | str:
            try:
                return ask(self.server.address, images, [model])
            except InferenceServerException as error:
                return str(error.message())

        with ThreadPoolExecutor(8) as pool:
            outcomes = list(pool.map(outcome, [loaded[0], "category-0@v9"] * 12))
        for good, bad in zip(outcomes[::2], outcomes[1::2], strict=True):
            np.testing.assert_allclose(np.asarray(good, np.float32), expected, rtol=1e-3)
            assert "category-0@v9" in str(bad)

    def test_version_that_the_server_lacks_is_refused(self, engine: TritonEngine, heads: list[FastFlowHead]) -> None:
        with pytest.raises(RegistryError, match=r"does not have category-9@v1 .* models export category-9@v1"):
            load(engine, heads[0], 9)

    def test_version_of_other_weights_than_the_registry_s_is_refused(
        self, engine: TritonEngine, heads: list[FastFlowHead]
    ) -> None:
        changed = make_manifest("category-0", spec=engine.spec, flow=FLOW, files={"flow.safetensors": b"other"})
        with pytest.raises(RegistryError, match="other weights for category-0@v1"):
            engine.load(heads[0], changed)

    def test_version_that_a_restart_lost_is_loaded_again(self, engine: TritonEngine, loaded: list[Loaded]) -> None:
        images = make_images(2)
        expected = judge(engine, loaded[2], images)
        with InferenceServerClient(self.server.address) as client:
            client.unload_model(loaded[2])
        assert_same(judge(engine, loaded[2], images), expected)

    def test_answer_that_comes_too_late_may_be_asked_for_again(self, engine: TritonEngine) -> None:
        assert engine
        with self.server.paused(), pytest.raises(TransientError, match="DEADLINE_EXCEEDED"):
            TritonEngine(f"grpc://{self.server.address}", 0.5)

    def test_lost_server_is_waited_for(
        self, engine: TritonEngine, heads: list[FastFlowHead], tmp_path_factory: pytest.TempPathFactory
    ) -> None:
        assert engine
        with TritonServer(self.repository, tmp_path_factory.mktemp("doomed")) as doomed:
            url = f"grpc://{doomed.address}"
            other = TritonEngine(url, PATIENT_S)
            version = load(other, heads[0], 0)
            with InferenceServerClient(doomed.address) as client:
                client.unload_model(FRONT)
            with pytest.raises(ConfigError, match="no model 'flawstream'"):
                TritonEngine(url, PATIENT_S)
            doomed.stop()
            for call in (
                lambda: judge(other, version, make_images(1)),
                lambda: load(other, heads[1], 1),
                lambda: TritonEngine(url, PATIENT_S),
            ):
                with pytest.raises(TransientError, match="UNAVAILABLE"):
                    call()
