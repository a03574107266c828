"""The flow: it inverts, its log-determinant is the Jacobian's, its folded form and the reference block agree."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from flawstream.fastflow.flow import Flow, FlowStep, FoldedFlow
from flawstream.fastflow.score import anomaly_grid


def randomise(module: nn.Module, seed: int = 0) -> None:
    """Move all parameters away from where they start, the offsets from 0 above all."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype), alpha=0.3)


def make_flow(channels: int, *, steps: int = 3, ratio: float = 1.0, conv3x3_only: bool = False, seed: int = 0) -> Flow:
    generator = torch.Generator().manual_seed(seed)
    flow = Flow(
        channels, steps=steps, hidden_ratio=ratio, conv3x3_only=conv3x3_only, clamp=2.0, generator=generator
    ).double()
    randomise(flow, seed)
    return flow


def features(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(
    channels=st.integers(2, 9),
    steps=st.integers(1, 5),
    ratio=st.sampled_from([0.1, 0.16, 1.0, 2.5]),
    conv3x3_only=st.booleans(),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(1, 6)),
    seed=st.integers(0, 1000),
)
@settings(max_examples=40)
def test_inverse_of_forward_is_the_input(
    channels: int,
    steps: int,
    ratio: float,
    shape: tuple[int, int, int],
    seed: int,
    *,
    conv3x3_only: bool,
) -> None:
    flow = make_flow(channels, steps=steps, ratio=ratio, conv3x3_only=conv3x3_only, seed=seed)
    x = features(shape[0], channels, *shape[1:], seed=seed)
    latents, log_det = flow(x)
    assert latents.shape == x.shape
    assert log_det.shape == (shape[0],)
    assert not torch.allclose(latents, x)
    torch.testing.assert_close(flow.inverse(latents), x)


@pytest.mark.parametrize("channels", [2, 3, 5])
@pytest.mark.parametrize("conv3x3_only", [False, True])
def test_log_det_is_that_of_the_whole_jacobian(channels: int, *, conv3x3_only: bool) -> None:
    flow = make_flow(channels, conv3x3_only=conv3x3_only)
    x = features(1, channels, 2, 3)
    whole = torch.autograd.functional.jacobian(lambda image: flow(image)[0], x)  # type: ignore[no-untyped-call]
    jacobian = whole.reshape(x.numel(), x.numel())
    _, expected = torch.linalg.slogdet(jacobian)
    torch.testing.assert_close(flow(x)[1][0], expected)


def test_log_det_of_an_image_is_independent_of_its_batch() -> None:
    flow, x = make_flow(4), features(3, 4, 5, 5)
    together = flow(x)[1]
    torch.testing.assert_close(together, torch.cat([flow(image[None])[1] for image in x]))
    assert len(set(together.tolist())) == 3


@pytest.mark.parametrize("channels", [2, 5, 8])
@pytest.mark.parametrize("conv3x3_only", [False, True])
@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("by_index", [False, True])
def test_folded_flow_differs_in_the_order_of_channels_alone(
    channels: int, steps: int, *, conv3x3_only: bool, by_index: bool
) -> None:
    flow = make_flow(channels, steps=steps, conv3x3_only=conv3x3_only)
    x = features(2, channels, 6, 5)
    with torch.no_grad():
        latents, _ = flow(x)
        folded = FoldedFlow(flow, by_index=by_index)(x)
    last = flow.steps[-1]
    assert isinstance(last, FlowStep)
    torch.testing.assert_close(folded[:, last.permutation], latents)
    torch.testing.assert_close(anomaly_grid(folded), anomaly_grid(latents))


def test_folding_leaves_the_flow_trainable_and_apart() -> None:
    flow = make_flow(4)
    x = features(1, 4, 5, 5)
    folded = FoldedFlow(flow).requires_grad_(requires_grad=False)
    before = folded(x)
    assert all(parameter.requires_grad for parameter in flow.parameters())
    randomise(flow, seed=9)
    torch.testing.assert_close(folded(x), before, rtol=0, atol=0)


@pytest.mark.parametrize("channels", [2, 7, 40])
def test_permutation_is_one_and_is_saved(channels: int) -> None:
    flow = make_flow(channels)
    state = flow.state_dict()
    for number in range(3):
        assert sorted(state[f"steps.{number}.permutation"].tolist()) == list(range(channels))


def test_loaded_state_brings_its_permutations() -> None:
    one, other = make_flow(8, seed=1), make_flow(8, seed=2)
    x = features(1, 8, 3, 3)
    assert not torch.allclose(one(x)[0], other(x)[0])
    other.load_state_dict(one.state_dict())
    torch.testing.assert_close(other(x)[0], one(x)[0], rtol=0, atol=0)


def test_subnets_take_turns_unless_all_are_3x3() -> None:
    def kernels(flow: Flow) -> list[int]:
        return [module.kernel_size[0] for module in flow.modules() if isinstance(module, nn.Conv2d)]

    assert kernels(make_flow(4, steps=4)) == [3, 3, 1, 1, 3, 3, 1, 1]
    assert kernels(make_flow(4, steps=2, conv3x3_only=True)) == [3, 3, 3, 3]


def all_in_one_block(step: FlowStep, x: Tensor) -> tuple[Tensor, Tensor]:
    """FrEIA's AllInOneBlock, forward, with global affine SOFTPLUS and a hard permutation, from its formulas."""
    channels = x.shape[1]
    matrix = x.new_zeros(channels, channels, 1, 1)
    for row, column in enumerate(step.permutation.tolist()):
        matrix[row, column] = 1.0
    x1, x2 = x[:, : channels - channels // 2], x[:, channels - channels // 2 :]
    a = 0.1 * step.subnet(x1)
    half = x2.shape[1]
    sub_jacobian = step.clamp * torch.tanh(a[:, :half])
    x2 = x2 * torch.exp(sub_jacobian) + a[:, half:]
    log_det = sub_jacobian.sum(dim=(1, 2, 3))
    scale = 0.1 * functional.softplus(step.raw_scale, beta=0.5)
    y = functional.conv2d(torch.cat([x1, x2], dim=1) * scale + step.offset, matrix)
    return y, log_det + torch.log(scale).sum() * (x.shape[2] * x.shape[3])


@given(
    channels=st.integers(2, 9),
    kernel_size=st.sampled_from([1, 3]),
    clamp=st.floats(0.5, 3.0),
    seed=st.integers(0, 1000),
)
@settings(max_examples=25)
def test_step_is_numerically_the_all_in_one_block(channels: int, kernel_size: int, clamp: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    step = FlowStep(channels, kernel_size=kernel_size, hidden_ratio=1.0, clamp=clamp, generator=generator).double()
    randomise(step, seed)
    x = features(2, channels, 4, 3, seed=seed)
    y, log_det = step(x)
    expected_y, expected_log_det = all_in_one_block(step, x)
    torch.testing.assert_close(y, expected_y)
    torch.testing.assert_close(log_det, expected_log_det)


def test_new_step_scales_by_one() -> None:
    """As FrEIA's `global_affine_init=1.0`."""
    step = FlowStep(6, kernel_size=3, hidden_ratio=1.0, clamp=2.0, generator=torch.Generator())
    torch.testing.assert_close(step.global_scale(), torch.ones(1, 6, 1, 1))
