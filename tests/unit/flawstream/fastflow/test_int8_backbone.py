"""A backbone in int8: one function of the weights, close to float32, and a backbone of its own."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from flawstream.engines.choose import make_engine
from flawstream.fastflow.backbone import Backbone, load_trained_backbone
from flawstream.fastflow.int8_backbone import noise_images, round_up
from flawstream.fastflow.quantise import QuantisedConv
from schemas.errors import ConfigError
from schemas.settings import DetectorSettings, ModelSettings

EXACT = ModelSettings(input_size=64)
INT8 = EXACT.model_copy(update={"arithmetic": "int8"})


@pytest.fixture(scope="module")
def quantised() -> Backbone:
    return Backbone(INT8)


@torch.inference_mode()
def features(backbone: Backbone) -> list[torch.Tensor]:
    scales: list[torch.Tensor] = backbone(torch.from_numpy(noise_images(12, 64)[8:]))  # not those that set the ranges
    return scales


def test_features_are_those_of_float32_but_for_the_steps_of_int8(quantised: Backbone) -> None:
    for found, exact in zip(features(quantised), features(Backbone(EXACT)), strict=True):
        error = float((found - exact).pow(2).mean().sqrt() / exact.std())
        assert 0.01 < error < 0.3


def test_it_is_the_same_whenever_it_is_made(quantised: Backbone) -> None:
    for one, other in zip(features(quantised), features(Backbone(INT8)), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_first_and_depthwise_convolutions_stay_in_float(quantised: Backbone) -> None:
    plain = set(quantised.network.modules())
    inside = {child for module in plain if isinstance(module, QuantisedConv) for child in module.children()}
    convolutions = [module for module in plain - inside if isinstance(module, nn.Conv2d)]
    assert inside
    assert {one.in_channels for one in convolutions if one.groups == 1} == {3}
    assert not [one for one in inside if isinstance(one, nn.Conv2d) and one.groups > 1]


def test_sum_of_two_products_fits_sixteen_bits(quantised: Backbone) -> None:
    """As CPUs without VNNI add them: 255 times the largest weight, twice."""
    weights = [one for one in quantised.network.modules() if isinstance(one, QuantisedConv)]
    for one in weights:
        (convolution,) = one.children()
        assert isinstance(convolution, nn.Conv2d)
        steps = convolution.weight.abs().amax(dim=(1, 2, 3)) / one.weight_scale
        assert float(steps.max()) * 255 * 2 < 2**15


def test_it_is_a_backbone_of_its_own(quantised: Backbone) -> None:
    exact = Backbone(EXACT)
    assert quantised.spec.weights_sha256 == exact.spec.weights_sha256
    assert quantised.spec.identity != exact.spec.identity
    assert quantised.spec.summary == f"{exact.spec.summary} in int8"


def test_version_is_served_by_the_arithmetic_that_it_was_trained_on(quantised: Backbone) -> None:
    assert load_trained_backbone(quantised.spec, EXACT).spec == quantised.spec
    assert load_trained_backbone(Backbone(EXACT).spec, INT8).spec.arithmetic == "float32"


def test_gpu_refuses_it_with_what_would_serve_it(quantised: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ConfigError, match=r"in int8 is for CPUs: set detector.device=cpu, or train with model.arith"):
        make_engine(DetectorSettings(engine="cuda"), lambda: quantised)


@given(st.floats(-1e6, 1e6, allow_nan=False))
def test_range_is_rounded_outwards_by_less_than_a_thirtieth(value: float) -> None:
    rounded = round_up(value)
    assert abs(value) <= abs(rounded) <= abs(value) * (1 + 1 / 30)
    assert rounded == 0 or math.copysign(1, rounded) == math.copysign(1, value)


def test_noise_spans_all_grey_levels() -> None:
    images = noise_images(2, 64)
    assert images.dtype == np.uint8
    assert (images.min(), images.max()) == (0, 255)
    assert 100 < images.mean() < 156
