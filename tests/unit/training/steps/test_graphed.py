"""The optimiser and the schedule of steps on a GPU are torch's."""

import copy

import torch

from training.steps.graphed import DeviceAdamW, one_cycle


def test_adamw_is_torch_s_with_changing_rates_and_momenta() -> None:
    generator = torch.Generator().manual_seed(0)
    ours, gradients = torch.randn((1, 118), generator=generator), torch.zeros((1, 118))
    theirs = torch.nn.Parameter(copy.deepcopy(ours))
    optimiser = DeviceAdamW(ours, gradients, weight_decay=0.01)
    reference = torch.optim.AdamW([theirs], 1.0, weight_decay=0.01)
    for number in range(12):
        rate, momentum = 0.001 * (1 + number), 0.95 - 0.01 * number
        optimiser.rate.fill_(rate)
        optimiser.momentum.fill_(momentum)
        reference.param_groups[0] |= {"lr": rate, "betas": (momentum, 0.999)}
        theirs.grad = gradients.copy_(torch.randn(ours.shape, generator=generator)).clone()
        optimiser.step()
        reference.step()
        torch.testing.assert_close(ours, theirs.detach(), rtol=1e-5, atol=1e-7)


def test_rates_and_momenta_are_those_of_torch_s_schedule() -> None:
    optimiser = torch.optim.AdamW([torch.zeros(1, requires_grad=True)], 0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 0.01, total_steps=9, pct_start=0.3)
    rates, momenta = one_cycle(0.01, 9, 0.3)
    assert len(rates) == len(momenta) == 9
    for number, (rate, momentum) in enumerate(zip(rates, momenta, strict=True)):
        assert rate == optimiser.param_groups[0]["lr"]
        assert momentum == optimiser.param_groups[0]["betas"][0]
        optimiser.step()
        if number < 8:
            schedule.step()
