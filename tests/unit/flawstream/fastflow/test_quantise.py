"""Convolutions in int8: close to what they were, and nothing else is touched."""

import pytest
import torch
from torch import nn

from flawstream.fastflow.quantise import QuantisedConv, quantise


def make(*modules: nn.Module, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    network = nn.Sequential(*modules).eval().requires_grad_(requires_grad=False)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            for tensor in [*module.parameters(), *module.buffers()]:
                if tensor.is_floating_point():
                    tensor.copy_(torch.rand_like(tensor) + 0.1)
    return network


def values(*shape: int, low: float = -1.0) -> torch.Tensor:
    return low + (1 - low) * torch.rand(shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("low", [-1.0, 0.0])
def test_convolution_is_as_exact_as_eight_bits_are(low: float) -> None:
    convolution = nn.Conv2d(6, 4, 3, padding="same")
    x = values(2, 6, 9, 9, low=low)
    exact = convolution(x)
    found = QuantisedConv(convolution, float(x.min()), float(x.max()))(x)
    error = (found - exact).pow(2).mean().sqrt() / exact.std()
    assert 1e-5 < error < 0.02


def test_each_channel_has_a_scale_of_its_own() -> None:
    """A channel of small weights loses no more than one of large weights."""
    convolution = nn.Conv2d(3, 2, 1, bias=False)
    convolution.weight.data[0] *= 1e-4
    x = values(1, 3, 8, 8)
    exact, found = convolution(x), QuantisedConv(convolution, -1, 1)(x)
    error = (found - exact).abs().amax(dim=(0, 2, 3)) / exact.abs().amax(dim=(0, 2, 3))
    assert (error < 0.03).all()


def test_inputs_past_the_range_are_cut_off() -> None:
    convolution = nn.Conv2d(1, 1, 1, bias=False)
    quantised = QuantisedConv(convolution, 0.0, 2.0)
    found = quantised(torch.tensor([2.0, 50.0]).view(1, 1, 1, 2)).flatten()
    assert found[0] == found[1] != 0


def test_convolutions_alone_are_replaced() -> None:
    network = make(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 1))
    x = values(1, 3, 12, 12)
    exact = network(x)
    assert quantise(network, lambda: network(x)) == 2
    assert [type(module) for module in network] == [QuantisedConv, nn.ReLU, QuantisedConv]
    assert not torch.equal(network(x), exact)
    torch.testing.assert_close(network(x), exact, rtol=0.02, atol=0.02 * float(exact.abs().max()))
