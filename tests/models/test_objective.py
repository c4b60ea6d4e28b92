"""What the families share of training: draws of noise levels, noise that is not white, errors and their weights."""
import math

import pytest
import torch
from pixstack.models_impl.flux.sampling import RectifiedFlow
from pixstack.models_impl.objective import noise as shaped
from pixstack.models_impl.objective.loss import Objective, cell_weights, debiased_weight, min_snr_weight
from pixstack.models_impl.objective.timesteps import TimestepDraws
from pixstack.models_impl.pixart.sampling import NoiseSchedule, PixArtDiffusion
from pixstack.models_impl.pixelflow.sampling import CascadeFlow
from pixstack.models_impl.pixelflow.stages import Stages
from pixstack.models_impl.ultrapixel.sampling import CosineDiffusion
from torch.nn import functional as F

MANY = 20_000
NEAR = 0.015  # of shares among MANY draws: four standard deviations of a half


def drawn(**settings) -> torch.Tensor:
    return TimestepDraws(**settings).draw(MANY, torch.Generator().manual_seed(0))


def share(values: torch.Tensor) -> float:
    return values.double().mean().item()


# --- Noise levels


@pytest.mark.parametrize("settings, below", [
    ({}, lambda t: t),
    # P(sigmoid(m + s z) < t) = P(z < (logit(t) - m) / s), the cumulative distribution of arXiv 2403.03206's density
    ({"kind": "logit_normal", "mean": 0.5, "deviation": 1.5},
     lambda t: (1 + math.erf((math.log(t / (1 - t)) - 0.5) / 1.5 / math.sqrt(2))) / 2),
    ({"shift": 3.0}, lambda t: t / (3 - 2 * t)),  # of t' = 3 t / (1 + 2 t)
    ({"low": 0.2, "high": 0.7}, lambda t: min(max((t - 0.2) / 0.5, 0), 1)),
], ids=["uniform", "logit_normal", "shifted", "cut off"])
def test_noise_levels_follow_their_distribution(settings, below):
    levels = drawn(**settings)
    for edge in (0.1, 0.3, 0.5, 0.75, 0.9):
        assert share(levels < edge) == pytest.approx(below(edge), abs=NEAR)


def test_a_shift_moves_logit_normal_levels_by_its_logarithm():
    levels = drawn(kind="logit_normal", shift=4.0)
    assert levels.logit().mean().item() == pytest.approx(math.log(4), abs=0.03)
    assert levels.logit().std().item() == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize("kind", ["uniform", "logit_normal"])
def test_quarters_are_drawn_as_often_as_their_weights_say(kind):
    plain, weights = drawn(kind=kind), (1.0, 0.0, 2.0, 0.5)
    levels = drawn(kind=kind, quarters=weights)
    before = [share((4 * plain).long() == q) for q in range(4)]
    total = sum(w * p for w, p in zip(weights, before, strict=True))
    for q in range(4):
        assert share((4 * levels).long() == q) == pytest.approx(weights[q] * before[q] / total, abs=2 * NEAR)
    assert not ((4 * levels).long() == 1).any()


def test_no_level_leaves_the_limits_whatever_else_is_set():
    levels = drawn(kind="logit_normal", deviation=4.0, shift=0.2, low=0.3, high=0.4, quarters=(0, 1, 1, 1))
    assert 0.3 <= levels.min() < 0.301 and 0.399 < levels.max() <= 0.4


def test_levels_that_cannot_be_drawn_are_refused():
    with pytest.raises(ValueError, match="leave nothing to draw from 0.6 to 1.0"):
        drawn(low=0.6, quarters=(1, 1, 0, 0))
    with pytest.raises(ValueError, match="from 0.7 to 0.2 are no range"):
        TimestepDraws(low=0.7, high=0.2)


def test_every_family_draws_from_the_levels_that_it_is_given():
    draws, rng = TimestepDraws(low=0.25, high=0.5), torch.Generator().manual_seed(0)
    timestep = PixArtDiffusion().draw(MANY, rng, draws)
    assert set(timestep.tolist()) == set(range(250, 500)) and timestep.dtype == torch.int64
    for diffusion in (RectifiedFlow(), CosineDiffusion()):
        level = diffusion.draw(MANY, rng, draws)
        assert level.dtype == torch.float32 and 0.25 <= level.min() < 0.251 and 0.499 < level.max() <= 0.5
    stage, t = CascadeFlow(Stages(2)).draw(MANY, rng, TimestepDraws("logit_normal", mean=1.0))
    assert t.mean() < 0.35 and t.max() < 1 and sorted(set(stage.tolist())) == [0, 1]  # t is 1 without noise


# --- Noise


def test_offset_noise_gives_the_means_of_channels_its_variance():
    rng = torch.Generator().manual_seed(0)
    noise, offset = torch.randn(400, 8, 16, 16, generator=rng), torch.randn(400, 8, 1, 1, generator=rng)
    means = shaped.with_offset(noise, offset, 0.5).mean((2, 3))
    assert means.var().item() == pytest.approx(0.5**2 + 1 / 256, rel=0.1)  # 3200 of them: 2.5 % a deviation


def test_pyramid_noise_has_unit_variance_and_more_of_it_in_large_areas():
    rng = torch.Generator().manual_seed(0)
    found = {}
    for discount in (0.0, 0.3, 0.8):
        pictures = [shaped.pyramid(torch.randn(4, 32, 32, generator=rng), discount, [0.1 * i for i in range(6)],
                                   lambda size: torch.randn(size, generator=rng)) for _ in range(50)]
        noise = torch.stack(pictures)
        torch.testing.assert_close(noise.flatten(1).std(1), torch.ones(50))
        found[discount] = F.avg_pool2d(noise, 8).var().item()
    assert found[0.0] == pytest.approx(1 / 64, rel=0.15) and 1.1 * found[0.0] < found[0.3] < found[0.8] / 2


# --- The weight of a noise level


@pytest.mark.parametrize("prediction, snr, expected", [
    # arXiv 2303.09556: min(SNR, 5) / SNR for eps, min(SNR, 5) / (SNR + 1) for v
    ("eps", 4.0, 1.0), ("eps", 5.0, 1.0), ("eps", 20.0, 0.25), ("eps", 0.01, 1.0),
    ("v", 4.0, 0.8), ("v", 19.0, 0.25), ("v", 0.25, 0.2),
    # sigma = 1 / (1 + sqrt(SNR)), and sigma^2 min(SNR, 5)
    ("flow", 1.0, 0.25), ("flow", 4.0, 4 / 9), ("flow", 9.0, 5 / 16), ("flow", float("inf"), 0.0),
])
def test_min_snr_is_the_papers(prediction, snr, expected):
    assert min_snr_weight(torch.tensor([snr]), 5.0, prediction).item() == pytest.approx(expected)


@pytest.mark.parametrize("prediction, snr, expected", [
    ("eps", 4.0, 0.5), ("eps", 0.25, 2.0),  # arXiv 2310.08442: 1 / sqrt(SNR)
    ("v", 4.0, 2 / 5), ("flow", 4.0, 2 / 9),
])
def test_debiased_estimation_is_the_papers(prediction, snr, expected):
    assert debiased_weight(torch.tensor([snr]), prediction).item() == pytest.approx(expected)


@pytest.mark.parametrize("objective", [Objective(snr_gamma=5.0), Objective(debiased=True)], ids=["min-SNR", "debias"])
def test_a_weight_is_the_same_of_one_estimate_of_the_sample_whatever_is_predicted(objective):
    """An eps and a v predictor that mean the same sample get the same loss."""
    rng = torch.Generator().manual_seed(0)
    sample, noise, guess = (torch.randn(3, 4, 4, 4, generator=rng, dtype=torch.float64) for _ in range(3))
    timestep, schedule = torch.tensor([50, 400, 900]), NoiseSchedule()
    noisy = schedule.add_noise(sample, noise, timestep)
    eps = schedule.eps_from_denoised(noisy, guess, timestep)
    velocity = schedule.velocity(guess, eps, timestep)
    by_eps, by_v = (PixArtDiffusion(schedule, kind).losses(said, sample, noise, timestep, 0.0, objective=objective).mse
                    for kind, said in (("eps", eps), ("v", velocity)))
    torch.testing.assert_close(by_eps, by_v, rtol=1e-3, atol=1e-5)
    assert (by_eps - PixArtDiffusion().losses(eps, sample, noise, timestep, 0.0).mse).abs().max() > 1


@pytest.mark.parametrize("diffusion, time, snr", [
    (RectifiedFlow(), torch.tensor([0.5, 0.2]), [1.0, 16.0]),
    (CosineDiffusion(), torch.tensor([0.3, 0.8]), None),
    (PixArtDiffusion(), torch.tensor([100, 800]), None),
], ids=["flux", "cascade", "pixart"])
def test_the_ratio_of_signal_and_noise_is_that_of_the_states(diffusion, time, snr):
    one, none = torch.ones(2, 1, 1, 1), torch.zeros(2, 1, 1, 1)
    of_signal, of_noise = (diffusion.add_noise(*pair, time).flatten() for pair in ((one, none), (none, one)))
    expected = (of_signal / of_noise).square()
    if snr is not None:
        torch.testing.assert_close(expected, torch.tensor(snr))
    weighted = diffusion.loss(one, none if isinstance(diffusion, RectifiedFlow) else one, none, time,
                              objective=Objective(snr_gamma=5.0))
    prediction = "flow" if isinstance(diffusion, RectifiedFlow) else "eps"
    torch.testing.assert_close(weighted, min_snr_weight(expected, 5.0, prediction), rtol=1e-3, atol=1e-6)


# --- The kind of error

ERRORS = torch.linspace(-2, 2, 41).view(1, 1, 1, 41)


@pytest.mark.parametrize("delta", [0.1, 0.75])
def test_huber_is_twice_torchs_gradients_included(delta):
    ours, theirs = (ERRORS.clone().requires_grad_() for _ in range(2))
    found = Objective("huber", delta).errors(ours)
    expected = 2 * F.huber_loss(theirs, torch.zeros_like(theirs), reduction="none", delta=delta)
    torch.testing.assert_close(found, expected)
    found.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_the_other_kinds_are_their_formulas():
    zero = torch.zeros_like(ERRORS)
    assert torch.equal(Objective().errors(ERRORS), F.mse_loss(ERRORS, zero, reduction="none"))
    assert torch.equal(Objective("mae").errors(ERRORS), F.l1_loss(ERRORS, zero, reduction="none"))
    smooth = Objective("pseudo_huber", 0.5).errors(ERRORS)
    torch.testing.assert_close(smooth, (ERRORS.square() + 0.25).sqrt() - 0.5)
    small = 1e-2 * ERRORS
    torch.testing.assert_close(Objective("pseudo_huber", 0.5).errors(small), small.square(), rtol=1e-2, atol=1e-6)


def test_a_scheduled_delta_falls_from_one_to_its_value_with_the_noise():
    error, level, snr = torch.full((3, 1), 100.0), torch.tensor([0.0, 0.5, 1.0]), torch.tensor([1e12, 1.0, 1e-12])
    for schedule, middle in (("exponential", 0.1), ("snr", 0.99 / 4 + 0.01)):
        found = Objective("huber", 0.01, schedule).errors(error, level, snr).flatten()
        expected = [2 * 100 * delta - delta**2 for delta in (1, middle, 0.01)]
        torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-3, atol=1e-3)


# --- Masks


def test_cells_count_the_share_of_the_mask_in_them_and_at_least_what_is_outside():
    mask = torch.zeros(2, 1, 8, 8)
    mask[0, :, :4] = 1
    mask[0, :, 4:6] = 0.5
    assert cell_weights(mask, (4, 4), 0.0, False)[0, 0, :, 0].tolist() == [1, 1, 0.5, 0]
    assert cell_weights(mask, (4, 4), 0.25, False)[:, 0, :, 0].tolist() == [[1, 1, 0.5, 0.25], [0.25] * 4]
    even = cell_weights(mask, (2, 2), 0.0, True)
    assert even.mean((1, 2, 3)).tolist() == [1, 0]  # of an empty mask nothing counts
    assert cell_weights(mask, (3, 5), 0.0, False).shape == (2, 1, 3, 5)


@pytest.mark.parametrize("diffusion, time, channels", [
    (RectifiedFlow(), torch.tensor([0.5, 0.2]), 16),
    (CosineDiffusion(), torch.tensor([0.3, 0.8]), 16),
    (PixArtDiffusion(), torch.tensor([0, 800]), 8),  # with the logits of its variance
    (PixArtDiffusion(prediction="v"), torch.tensor([0, 800]), 8),
], ids=["flux", "cascade", "pixart eps", "pixart v"])
def test_outside_of_a_mask_the_prediction_gets_no_gradient_at_all(diffusion, time, channels):
    rng = torch.Generator().manual_seed(0)
    sample, noise = (torch.randn(2, min(channels, 16) if channels == 16 else 4, 6, 6, generator=rng) for _ in range(2))
    prediction = torch.randn(2, channels, 6, 6, generator=rng, requires_grad=True)
    mask = torch.zeros(2, 1, 48, 48)
    mask[..., :24, 8:40] = 1
    cells = cell_weights(mask, (6, 6), 0.0, False)
    diffusion.loss(prediction, sample, noise, time, Objective("huber", snr_gamma=5.0), cells).sum().backward()
    inside = cells.bool().expand_as(prediction)
    assert not prediction.grad[~inside].any() and prediction.grad[inside].count_nonzero() == inside.sum()
