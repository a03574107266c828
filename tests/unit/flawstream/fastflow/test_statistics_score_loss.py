"""Feature statistics before the flow, scores after it, and the loss."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.covariance import ledoit_wolf
from torch import Tensor

from flawstream.fastflow.flow import Flow
from flawstream.fastflow.loss import negative_log_likelihood
from flawstream.fastflow.score import (
    HIGHEST_SCORE,
    anomaly_grid,
    finite_scores,
    half_grid,
    image_scores,
    likelihood_score,
    ranked_scores,
    top_positions,
)
from flawstream.fastflow.statistics import FeatureStatistics
from flawstream.imaging.maps import published_grid
from schemas.errors import ShapeError


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def statistics_of(features: np.ndarray) -> FeatureStatistics:
    statistics = FeatureStatistics(features.shape[1], features.shape[2])
    statistics.set_from(lambda: (torch.from_numpy(features[:, :, row]) for row in range(features.shape[2])))
    return statistics


@pytest.mark.parametrize("level", [0.0, 3.0, 1e4])
def test_whitening_is_the_root_of_scikit_learns_ledoit_wolf_estimate(level: float) -> None:
    """At a level of 10,000 the squares hold 8 digits more than the variance: float64 bears it."""
    random = np.random.default_rng(0)
    mixing = random.normal(0, 1, (4, 4, 6, 6))
    features = np.einsum("nchw,hwcd->ndhw", random.normal(0, 0.5, (40, 6, 4, 4)), mixing) + level
    statistics = statistics_of(features)
    residuals = features - features.mean(axis=0)
    deviation = np.sqrt((residuals**2).mean(axis=(0, 2, 3)))
    widened = deviation + 1e-3 * deviation.mean()
    np.testing.assert_allclose(statistics.mean.numpy(), features.mean(axis=0), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(statistics.deviation[:, 0, 0].numpy(), widened, rtol=1e-5)
    for row, column in ((0, 0), (1, 3), (3, 2)):
        estimate, _ = ledoit_wolf(residuals[:, :, row, column] / widened, assume_centered=True)
        whitening = statistics.whitening[row * 4 + column].double().numpy()
        np.testing.assert_allclose(whitening, whitening.T)
        product = whitening @ (estimate + 0.01 * np.eye(6)) @ whitening
        np.testing.assert_allclose(product, np.eye(6), atol=5e-3)  # rounded to half precision


def test_white_features_of_many_images_are_uncorrelated_and_of_unit_variance() -> None:
    random = np.random.default_rng(0)
    turned = np.array([[2.0, 1.0], [0.0, 1.0]])
    features = np.einsum("nchw,cd->ndhw", random.normal(0, 1, (4000, 2, 2, 2)), turned) + 5
    white = statistics_of(features)(torch.from_numpy(features).float())
    assert white.mean(dim=0).abs().max() < 1e-4
    for row, column in ((0, 0), (1, 0)):
        covariance = torch.cov(white[:, :, row, column].T)
        torch.testing.assert_close(covariance, torch.eye(2), atol=0.1, rtol=0)


def test_position_that_never_varies_is_scaled_by_its_channel() -> None:
    features = np.random.default_rng(0).normal(0, 1, (20, 2, 3, 3))
    features[:, :, 1, 1] = 7.0
    statistics = statistics_of(features)
    white = statistics(torch.from_numpy(features).float())
    assert white[:, :, 1, 1].abs().max() < 1e-5
    features[0, :, 1, 1] += statistics.deviation[:, 0, 0].double().numpy()
    assert statistics(torch.from_numpy(features).float())[0, :, 1, 1].tolist() == pytest.approx([10.0, 10.0], rel=1e-3)


def test_features_that_never_vary_at_all_stay_finite() -> None:
    features = np.full((5, 2, 2, 2), 3.25)
    assert torch.equal(statistics_of(features)(torch.full((1, 2, 2, 2), 3.25)), torch.zeros(1, 2, 2, 2))


@pytest.mark.parametrize(("channels", "side", "groups"), [(112, 16, 1), (320, 8, 2), (64, 64, 4), (3, 4096, 3)])
def test_whitening_of_a_large_scale_is_cut_into_groups_of_channels(channels: int, side: int, groups: int) -> None:
    with torch.device("meta"):
        statistics = FeatureStatistics(channels, side)
    assert statistics.groups == groups
    assert tuple(statistics.whitening.shape) == (side * side * groups, channels // groups, channels // groups)


def test_groups_of_channels_are_made_white_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    features = np.random.default_rng(0).normal(0, 1, (30, 4, 2, 2)).cumsum(axis=1)
    monkeypatch.setattr("flawstream.fastflow.statistics._MOST_VALUES", 4 * 2 * 4)
    whole = statistics_of(features)
    assert whole.groups == 2
    monkeypatch.undo()
    part = statistics_of(features[:, 2:])
    # the deviations' floor hangs on the scale's mean, which the other channels share in
    torch.testing.assert_close(
        whole.whitening.reshape(-1, 2, *whole.whitening.shape[1:])[:, 1], part.whitening, atol=2e-3, rtol=2e-3
    )


def test_new_statistics_change_nothing() -> None:
    x = normal(2, 3, 4, 4)
    assert torch.equal(FeatureStatistics(3, 4)(x), x)


def test_anomaly_grid_is_half_the_mean_square_over_channels() -> None:
    latents = torch.tensor([[[[1.0, 0.0]], [[3.0, 2.0]]]])
    assert anomaly_grid(latents).tolist() == [[[2.5, 1.0]]]


def test_image_score_of_a_small_case_by_hand() -> None:
    """The fine scale is pooled to the coarse one's single position, 3.5, and both are averaged."""
    fine = torch.tensor([[[1.0, 2.0], [3.0, 8.0]]])
    coarse = torch.tensor([[[4.0]]])
    assert image_scores([coarse, fine], 0.5).tolist() == [(3.5 + 4.0) / 2]
    assert image_scores([fine], 0.25).tolist() == [8.0]
    assert image_scores([fine], 0.5).tolist() == [5.5]


def test_top_fraction_0_is_the_maximum_and_1_the_mean() -> None:
    grid = normal(3, 8, 8).square()
    torch.testing.assert_close(image_scores([grid], 0), grid.amax(dim=(1, 2)))
    torch.testing.assert_close(image_scores([grid], 1), grid.mean(dim=(1, 2)))


@given(
    top_fraction=st.floats(0, 1),
    scale=st.integers(0, 1),
    position=st.integers(0, 15),
    rise=st.floats(0.01, 100),
    seed=st.integers(0, 100),
)
def test_image_score_never_falls_when_a_position_rises(
    top_fraction: float, scale: int, position: int, rise: float, seed: int
) -> None:
    grids = [normal(1, 8, 8, seed=seed).square(), normal(1, 4, 4, seed=seed + 1).square()]
    before = image_scores(grids, top_fraction)
    grids[scale].view(-1)[position] += rise
    assert image_scores(grids, top_fraction) >= before - 1e-6


def test_image_scores_are_independent_of_batch_mates() -> None:
    grids = [normal(4, 8, 8).square(), normal(4, 4, 4, seed=1).square()]
    alone = [image_scores([grid[row : row + 1] for grid in grids], 0.03) for row in range(4)]
    torch.testing.assert_close(image_scores(grids, 0.03), torch.cat(alone))


@pytest.mark.parametrize("grids", [[], [torch.zeros(2, 4, 4), torch.zeros(3, 2, 2)]])
def test_grids_that_are_not_of_one_batch_are_refused(grids: list[Tensor]) -> None:
    with pytest.raises(ShapeError, match="grids of one batch"):
        image_scores(grids, 0.5)


@given(st.lists(st.floats(0, 80, width=32), min_size=1, max_size=20))
def test_likelihood_score_lies_in_minus_1_to_0_and_keeps_the_order(values: list[float]) -> None:
    grid = torch.tensor(sorted(values))
    scores = likelihood_score(grid)
    assert scores.shape == grid.shape
    assert ((scores >= -1) & (scores < 0)).all()
    assert (scores.diff() >= 0).all()


def test_loss_of_an_identity_flow_is_the_gaussian_likelihood_without_its_constant() -> None:
    scales = [normal(3, 4, 5, 5), normal(3, 2, 3, 3, seed=1)]
    expected = 0.0
    for z in scales:
        log_likelihood = torch.distributions.Normal(0.0, 1.0).log_prob(z).mean().item()  # type: ignore[no-untyped-call]
        expected += -log_likelihood - 0.5 * math.log(2 * math.pi)
    assert negative_log_likelihood(scales, [torch.zeros(3)] * 2).item() == pytest.approx(expected, rel=1e-5)


def test_log_det_counts_for_its_share_of_the_values() -> None:
    z = torch.zeros(2, 3, 2, 2)
    assert negative_log_likelihood([z], [torch.tensor([12.0, 24.0])]).item() == pytest.approx(-1.5)


def test_loss_falls_within_a_few_steps() -> None:
    generator = torch.Generator().manual_seed(0)
    flow = Flow(4, steps=2, hidden_ratio=1.0, conv3x3_only=False, clamp=2.0, generator=generator)
    x = 2 + 3 * normal(16, 4, 4, 4)
    optimiser = torch.optim.Adam(flow.parameters(), 0.05)
    losses = []
    for _ in range(10):
        latents, log_det = flow(x)
        loss = negative_log_likelihood([latents], [log_det])
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 1


@pytest.mark.parametrize("fraction", [0.0, 0.03, 0.5, 1.0])
def test_images_with_numbers_of_positions_of_their_own_are_scored_as_alone(fraction: float) -> None:
    generator = torch.Generator().manual_seed(0)
    grids = [torch.rand((3, side, side), generator=generator) for side in (8, 4)]
    counts = torch.tensor([top_positions(16, fraction), 1, 16])
    scores = ranked_scores(grids, counts)
    for row, alone in enumerate((fraction, 0.0, 1.0)):
        torch.testing.assert_close(scores[row], image_scores(grids, alone)[row])


def test_value_that_is_no_number_is_never_a_low_score() -> None:
    grids = [torch.tensor([[[0.0, float("nan")], [1.0, 2.0]], [[0.0, float("inf")], [1.0, 2.0]]])]
    scores = ranked_scores(grids, torch.tensor([1, 1]))
    assert (finite_scores(scores.numpy()) == HIGHEST_SCORE).all()


def test_half_grid_is_the_published_grid() -> None:
    values = torch.tensor([[[0.1, 70_000.0], [float("nan"), float("inf")]]])
    np.testing.assert_array_equal(half_grid(values).numpy(), published_grid(values.numpy()))
