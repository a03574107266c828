"""What `detector.precision` and `detector.device` mean, as far as it shows without a GPU."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from helpers.fakes import png
from pydantic import ValidationError

from flawstream.engines.choose import make_engine, resolve_engine
from flawstream.engines.device import open_device
from flawstream.engines.torch_engine import TorchEngine
from flawstream.fastflow.backbone import Backbone
from schemas.errors import ConfigError
from schemas.settings import DetectorSettings, LimitSettings, ModelSettings
from training.steps.features import FeatureExtractor

SMALL = ModelSettings(input_size=64)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Have torch report a GPU, with TF32 allowed as it is by default; what is changed is set back."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    before = tf32_allowed()
    allow_tf32(convolutions=True, products=True)
    yield
    allow_tf32(**before)


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have torch report no GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def allow_tf32(*, convolutions: bool, products: bool) -> None:
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = convolutions, products


def tf32_allowed() -> dict[str, bool]:
    return {"convolutions": torch.backends.cudnn.allow_tf32, "products": torch.backends.cuda.matmul.allow_tf32}


@pytest.mark.parametrize("precision", ["bf16", "f16"])
def test_precision_that_nothing_proves_is_no_setting(precision: str) -> None:
    with pytest.raises(ValidationError, match="Input should be 'auto' or 'f32'"):
        DetectorSettings.model_validate({"precision": precision})


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize("settings", [{"engine": "cuda"}, {"device": "cuda"}, {"engine": "torch", "device": "cuda:1"}])
def test_gpu_that_is_not_there_is_refused_before_weights_are_loaded(settings: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=r"needs a GPU|cannot be used \(.+\); set it to auto or cpu"):
        make_engine(DetectorSettings.model_validate(settings), lambda: pytest.fail("the backbone was loaded"))


@pytest.mark.usefixtures("gpu")
def test_gpu_that_the_machine_does_not_have_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert open_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(ConfigError, match=r"detector\.device=cuda:2, but there are 2 GPUs"):
        open_device("cuda:2")


@pytest.mark.usefixtures("gpu")
def test_auto_is_the_engine_for_gpus_unless_the_cpu_is_asked_for() -> None:
    assert resolve_engine("auto") == "cuda"
    assert resolve_engine("auto", "cpu") != "cuda"


@pytest.mark.usefixtures("no_gpu")
def test_device_is_the_cpu_where_there_is_no_gpu() -> None:
    before = tf32_allowed()
    assert open_device() == torch.device("cpu")
    assert tf32_allowed() == before


@pytest.mark.usefixtures("gpu")
def test_tf32_is_off_on_a_gpu_and_modules_can_still_be_exported() -> None:
    assert open_device() == torch.device("cuda")
    assert tf32_allowed() == {"convolutions": False, "products": False}
    assert torch.backends.cudnn.conv.fp32_precision != "tf32"  # type: ignore[attr-defined]  # made at run time
    assert torch.backends.cuda.matmul.fp32_precision != "tf32"
    torch.export.export(torch.nn.Conv2d(3, 4, 3), (torch.zeros(1, 3, 8, 8),))


def features_of(image: Path) -> None:
    list(FeatureExtractor(Backbone(SMALL), LimitSettings()).batches([image]))


@pytest.mark.parametrize(
    "start",
    [
        pytest.param(lambda _: TorchEngine(Backbone(SMALL)), id="torch"),
        pytest.param(lambda _: make_engine(DetectorSettings(), lambda: Backbone(SMALL)), id="cuda"),
        pytest.param(features_of, id="training"),
    ],
)
@pytest.mark.usefixtures("gpu")
def test_tf32_is_off_before_a_network_is_moved_to_the_gpu(start: Callable[[Path], object], tmp_path: Path) -> None:
    image = tmp_path / "1.png"
    image.write_bytes(png())
    with contextlib.suppress(RuntimeError, AssertionError):  # there is no GPU to move it to
        start(image)
    assert tf32_allowed() == {"convolutions": False, "products": False}
