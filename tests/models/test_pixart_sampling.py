"""PixArt's noise schedule, samplers and training formulas, without a network."""
import math
from functools import partial

import pytest
import torch
from pixstack.models_impl.pixart import sampling
from pixstack.models_impl.pixart.sampling import CLEAN, NoiseSchedule

SCHEDULE = NoiseSchedule()
ZERO_SNR = NoiseSchedule("scaled_linear", beta_start=0.00085, beta_end=0.012, zero_terminal_snr=True)
SCHEDULES = [SCHEDULE, NoiseSchedule("scaled_linear"), ZERO_SNR, NoiseSchedule(steps=50, beta_end=0.2)]
SHAPE = (2, 4, 3, 5)


def normal(seed, shape=SHAPE, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def noises(index, shape):
    return normal(100 + index, shape)


SAMPLE = normal(1)
NOISE = normal(2)


def knows_the_sample(x, timestep, schedule=SCHEDULE):
    return schedule.eps_from_denoised(x, SAMPLE.to(x), timestep)


def with_logits(predict):
    return lambda x, timestep: torch.cat([predict(x, timestep), torch.tanh(x)], dim=1)


def gaussian(x, timestep, spread=0.5):
    """The exact eps for samples of standard deviation `spread`."""
    alpha, std = SCHEDULE.alpha(timestep), SCHEDULE.std(timestep)
    return std * x / ((alpha * spread) ** 2 + std**2)


RUNS = {  # name -> (sampler(predict, x, schedule, timesteps, callback=, after_step=), a list of five steps)
    "dpm1": (partial(sampling.dpm_solver_pp, order=1), sampling.time_uniform(5)),
    "dpm2": (sampling.dpm_solver_pp, sampling.time_uniform(5)),
    "dpm3": (partial(sampling.dpm_solver_pp, order=3), sampling.time_uniform(5)),
    "diffusers": (sampling.dpm_diffusers, sampling.linspace_timesteps(5)),
    "sa": (partial(sampling.sa_solver, noise=noises), sampling.time_uniform(5)),
    "lcm": (partial(sampling.lcm, noise=noises), sampling.lcm_timesteps(5)),
    "iddpm": (
        lambda predict, *args, **named: sampling.iddpm(with_logits(predict), *args, noise=noises, **named),
        sampling.iddpm_timesteps(5),
    ),
}
each_sampler = pytest.mark.parametrize("sampler, timesteps", RUNS.values(), ids=RUNS.keys())


# --- Schedule

@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_timestep_comes_back_from_its_sigma(schedule):
    timesteps = torch.cat([torch.linspace(CLEAN, schedule.steps - 1, 777), torch.arange(schedule.steps)]).double()
    assert torch.allclose(schedule.timestep(schedule.sigma(timesteps)), timesteps, rtol=0, atol=1e-6)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_list_of_timesteps_survives_as_float32_sigmas(schedule):
    timesteps = [schedule.steps - 1.0, 31.4, 20.0, 0.0, CLEAN]
    assert schedule.timesteps(schedule.sigmas(timesteps)) == pytest.approx(timesteps, abs=1e-3)
    assert schedule.timesteps(schedule.sigmas(timesteps))[-3:] == timesteps[-3:]


def test_alpha_at_whole_timesteps_is_the_product_of_the_betas():
    alpha = SCHEDULE.alpha(torch.arange(1000).double())
    assert torch.allclose(alpha**2, (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0))
    assert torch.allclose(alpha**2 + SCHEDULE.std(torch.arange(1000).double()) ** 2, torch.ones(1000).double())


def test_there_is_no_noise_at_the_clean_timestep():
    assert (SCHEDULE.alpha(CLEAN), SCHEDULE.std(CLEAN), SCHEDULE.sigma(CLEAN)) == (1, 0, 0)
    assert torch.equal(SCHEDULE.add_noise(SAMPLE, NOISE, CLEAN), SAMPLE)


def test_more_noise_than_there_is_counts_as_the_last_timestep():
    assert SCHEDULE.timestep(1e9) == SCHEDULE.timestep(math.inf) == 999


def test_zero_terminal_snr_leaves_nothing_of_the_sample():
    assert ZERO_SNR.alphas_cumprod[-1] == 0 and ZERO_SNR.betas[-1] == 1
    assert torch.allclose(ZERO_SNR.alphas_cumprod, (1 - ZERO_SNR.betas).cumprod(0))
    assert ZERO_SNR.alphas_cumprod[0] == pytest.approx(1 - 0.00085)
    assert ZERO_SNR.sigma(999) == pytest.approx(4096, rel=1e-6)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("kind", [float, torch.tensor])
def test_a_prediction_can_be_said_in_three_ways(schedule, kind):
    timestep = kind([0, 7, 30][1]) if kind is float else kind([7, 49])
    x = schedule.add_noise(SAMPLE, NOISE, timestep)
    velocity = schedule.velocity(SAMPLE, NOISE, timestep)
    assert torch.allclose(schedule.denoised(x, NOISE, timestep), SAMPLE)
    assert torch.allclose(schedule.denoised_from_velocity(x, velocity, timestep), SAMPLE)
    assert torch.allclose(schedule.eps(x, velocity, timestep), NOISE)
    assert torch.allclose(schedule.eps_from_denoised(x, SAMPLE, timestep), NOISE)


def test_a_velocity_is_finite_at_zero_snr():
    velocity = ZERO_SNR.velocity(SAMPLE.float(), NOISE.float(), 999)
    x = ZERO_SNR.add_noise(SAMPLE.float(), NOISE.float(), 999)
    assert torch.allclose(ZERO_SNR.denoised_from_velocity(x, velocity, 999), SAMPLE.float(), atol=1e-3)
    eps = ZERO_SNR.eps(x, velocity, 999)
    assert torch.allclose(ZERO_SNR.denoised(x, eps, 999), SAMPLE.float(), atol=5e-3)


def test_an_unknown_schedule_is_refused():
    with pytest.raises(ValueError, match="'cosine'.*linear, scaled_linear"):
        NoiseSchedule("cosine")
    with pytest.raises(ValueError, match="beta_start=0.5 and beta_end=0.1"):
        NoiseSchedule(beta_start=0.5, beta_end=0.1)


# --- Lists of timesteps

@pytest.mark.parametrize("timesteps, expected", [
    (sampling.time_uniform(4), [999, 749.25, 499.5, 249.75, 0]),
    (sampling.time_uniform(1), [999, 0]),
    (sampling.iddpm_timesteps(6), [999, 799, 599, 400, 200, 0, CLEAN]),
    (sampling.iddpm_timesteps(3), [999, 500, 0, CLEAN]),
    (sampling.iddpm_timesteps(1), [999, CLEAN]),
    (sampling.lcm_timesteps(4), [999, 759, 519, 279, CLEAN]),
    (sampling.lcm_timesteps(2, origin=4), [999, 499, CLEAN]),
    (sampling.linspace_timesteps(2), [999, 500, CLEAN]),
    (sampling.trailing_timesteps(4), [999, 749, 499, 249, CLEAN]),
])
def test_a_list_of_timesteps_is_the_published_one(timesteps, expected):
    assert timesteps == pytest.approx(expected)


def test_steps_that_a_table_does_not_have_are_refused():
    with pytest.raises(ValueError, match="steps=60 .* at most 50"):
        sampling.lcm_timesteps(60)
    with pytest.raises(ValueError, match="steps=0"):
        sampling.time_uniform(0)


# --- Samplers

@each_sampler
def test_a_perfect_network_leads_to_its_sample(sampler, timesteps):
    x = sampler(knows_the_sample, NOISE, SCHEDULE, timesteps)
    # time_uniform leaves what belongs to timestep 0
    assert torch.allclose(x, SAMPLE, atol=1e-6 if timesteps[-1] == CLEAN else 0.1)


@each_sampler
def test_a_start_in_the_middle_leads_to_the_sample(sampler, timesteps):
    x = SCHEDULE.add_noise(SAMPLE, NOISE, timesteps[2])
    x = sampler(knows_the_sample, x, SCHEDULE, [*timesteps[2:-1], CLEAN])
    assert torch.allclose(x, SAMPLE, atol=1e-6)


@pytest.mark.parametrize("name", ["dpm1", "dpm2", "dpm3", "diffusers"])
def test_an_ode_solver_keeps_the_noise_of_a_known_sample(name):
    sampler, timesteps = RUNS[name]
    x = sampler(knows_the_sample, SCHEDULE.add_noise(SAMPLE, NOISE, timesteps[0]), SCHEDULE, timesteps[:4])
    assert torch.allclose(x, SCHEDULE.add_noise(SAMPLE, NOISE, timesteps[3]))


@each_sampler
def test_the_callback_hears_each_step_once(sampler, timesteps):
    heard = []
    sampler(gaussian, NOISE, SCHEDULE, timesteps, callback=lambda *said: heard.append(said))
    assert [index for index, _, _ in heard] == [0, 1, 2, 3, 4]
    assert torch.equal(heard[0][1], NOISE) and heard[-1][2].shape == NOISE.shape


@each_sampler
def test_a_callback_that_raises_stops_the_sampler(sampler, timesteps):
    asked = []

    def predict(x, timestep):
        asked.append(timestep)
        return gaussian(x, timestep)

    def interrupt(index, x, denoised):
        if index == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sampler(predict, NOISE, SCHEDULE, timesteps, callback=interrupt)
    assert asked == timesteps[:2]


@each_sampler
def test_the_hand_on_the_state_knows_the_next_timestep(sampler, timesteps):
    seen = []

    def after_step(x, timestep):
        seen.append(timestep)
        return x

    sampler(gaussian, NOISE, SCHEDULE, timesteps, after_step=after_step)
    assert seen[:4] == timesteps[1:5] and seen[-1] is None and None not in seen[:-1]
    seen.clear()
    sampler(gaussian, NOISE, SCHEDULE, timesteps[:3], after_step=after_step)
    assert seen[:2] == timesteps[1:3]


@each_sampler
def test_what_a_hand_makes_of_the_state_is_what_comes_out(sampler, timesteps):
    def keep(x, timestep):
        return SAMPLE if timestep is None else SCHEDULE.add_noise(SAMPLE, NOISE, timestep)

    assert torch.equal(sampler(gaussian, NOISE, SCHEDULE, timesteps, after_step=keep), SAMPLE)


@pytest.mark.parametrize("name", ["dpm1", "lcm", "iddpm"])
def test_a_schedule_in_two_parts_gives_what_it_gives_in_one(name):
    sampler, timesteps = RUNS[name]
    whole = sampler(gaussian, NOISE, SCHEDULE, timesteps)
    x = sampler(gaussian, NOISE, SCHEDULE, timesteps[:3])
    later = {"lcm": sampling.lcm, "iddpm": sampling.iddpm}.get(name)
    if later is None:
        x = sampler(gaussian, x, SCHEDULE, timesteps[2:])
    else:
        predict = with_logits(gaussian) if name == "iddpm" else gaussian
        x = later(predict, x, SCHEDULE, timesteps[2:], lambda index, shape: noises(index + 2, shape))
    assert torch.allclose(x, whole)


@each_sampler
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_outside_the_solver(sampler, timesteps, dtype):
    def predict(x, timestep):
        assert x.dtype == dtype
        return torch.full_like(x, 0.25)

    x = sampler(predict, NOISE.to(dtype), SCHEDULE, timesteps)
    expected = sampler(lambda x, timestep: torch.full_like(x, 0.25), NOISE.to(dtype).float(), SCHEDULE, timesteps)
    assert x.dtype == dtype
    if sampler is not RUNS["iddpm"][0]:  # its logits come from the rounded state
        assert torch.equal(x, expected.to(dtype))


@each_sampler
def test_a_zero_snr_start_stays_finite(sampler, timesteps):
    def predict(x, timestep):
        velocity = ZERO_SNR.velocity(SAMPLE.to(x), (x - ZERO_SNR.alpha(timestep) * SAMPLE.to(x))
                                     / ZERO_SNR.std(timestep), timestep)
        return ZERO_SNR.eps(x, velocity, timestep)

    x = sampler(predict, NOISE.float(), ZERO_SNR, [*timesteps[:-1], CLEAN])
    assert torch.allclose(x, SAMPLE.float(), atol=1e-2)


def exact(spread=0.5):
    def width(timestep):
        return math.sqrt((SCHEDULE.alpha(timestep) * spread) ** 2 + SCHEDULE.std(timestep) ** 2)

    return NOISE * width(0) / width(999)


def test_each_order_of_dpm_solver_is_closer_to_the_exact_flow():
    def error(order):
        x = sampling.dpm_solver_pp(gaussian, NOISE, SCHEDULE, sampling.time_uniform(60), order)
        return (x - exact()).abs().max()

    assert error(1) > 5 * error(2) > 5 * error(3)


@pytest.mark.parametrize("predictor, corrector", [(1, 0), (3, 0), (5, 0), (1, 3), (3, 4), (4, 5)])
@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_a_step_of_sa_solver_is_exact_for_estimates_that_its_order_can_follow(predictor, corrector, eta):
    # For D = Q + Q' / q with a polynomial Q of lambda, x = alpha Q + C std exp(-tau^2 lambda) solves the equation
    # without its noise. Order 2 is left out: it is the reference's, with the weight of appendix D.
    order, q = corrector or predictor, 1 + eta**2
    powers = [0.5 * (-0.3) ** k for k in range(order)]

    def place(timestep):
        return -math.log(SCHEDULE.sigma(timestep))

    def exact(timestep):
        u = place(timestep)
        value = sum(a * u**k for k, a in enumerate(powers))
        return SCHEDULE.alpha(timestep) * value + 2 * SCHEDULE.std(timestep) * math.exp(-(eta**2) * u)

    def predict(x, timestep):
        u = place(timestep)
        denoised = sum(a * (u**k + (k * u ** (k - 1) / q if k else 0)) for k, a in enumerate(powers))
        return SCHEDULE.eps_from_denoised(x, torch.full_like(x, denoised), timestep)

    errors = []

    def back_on_track(x, timestep):
        errors.append((x - exact(timestep)).abs().max().item())
        return torch.full_like(x, exact(timestep))

    timesteps = [790.0 - 40 * i for i in range(13)]
    sampling.sa_solver(
        predict, torch.full(SHAPE, exact(790.0), dtype=torch.float64), SCHEDULE, timesteps,
        lambda index, shape: torch.zeros(shape), predictor, corrector, eta, after_step=back_on_track,
    )
    settled = max(predictor, corrector - 1)
    assert max(errors[settled - 1:12 - order]) < 1e-10
    assert order < 3 or errors[0] > 1e-6  # of a lower order


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0, 1.5])
def test_sa_solver_keeps_the_spread_of_the_samples(eta):
    start = normal(3, (1, 4, 64, 64))
    x = sampling.sa_solver(gaussian, start, SCHEDULE, sampling.time_uniform(80), noises, eta=eta)
    assert x.std().item() == pytest.approx(0.5, rel=0.03)


def test_sa_solver_without_noise_draws_none():
    def refuse(index, shape):
        raise AssertionError("noise was drawn")

    sampling.sa_solver(gaussian, NOISE, SCHEDULE, sampling.time_uniform(6), refuse, eta=0)


def test_iddpm_keeps_the_spread_of_the_samples():
    start = normal(3, (1, 4, 64, 64))
    least = sampling.iddpm(lambda x, t: torch.cat([gaussian(x, t), -torch.ones_like(x)], 1), start, SCHEDULE,
                           sampling.iddpm_timesteps(100), noises)
    greatest = sampling.iddpm(lambda x, t: torch.cat([gaussian(x, t), torch.ones_like(x)], 1), start, SCHEDULE,
                              sampling.iddpm_timesteps(100), noises)
    assert least.std() < greatest.std()
    assert least.std().item() == pytest.approx(0.5, rel=0.1) and greatest.std().item() == pytest.approx(0.5, rel=0.1)


def test_one_step_of_a_student_divides_by_alpha():
    eps = normal(5)
    x = sampling.dmd(lambda x, timestep: eps if timestep == 400 else None, NOISE, SCHEDULE, sampling.one_step())
    alpha = SCHEDULE.alphas_cumprod[400].sqrt()
    assert torch.allclose(x, (NOISE - (1 - alpha**2).sqrt() * eps) / alpha)


@pytest.mark.parametrize("timesteps, message", [
    ([999.0], "at least two"), ([1.0, 5.0], "fall from step to step"), ([5.0, 5.0, 1.0], "fall from step to step"),
    ([1000.0, 0.0], "between 999 and 0"), ([5.0, CLEAN, -2.0], "between 999 and 0"), ([5.0, -0.5], "-0.5.*clean"),
])
def test_a_list_that_no_sampler_can_walk_is_refused(timesteps, message):
    with pytest.raises(ValueError, match=message):
        sampling.dpm_solver_pp(gaussian, NOISE, SCHEDULE, timesteps)


def test_an_order_that_a_solver_does_not_have_is_refused():
    with pytest.raises(ValueError, match="not 4"):
        sampling.dpm_solver_pp(gaussian, NOISE, SCHEDULE, [999.0, 0.0], order=4)
    with pytest.raises(ValueError, match="predictor_order=0"):
        sampling.sa_solver(gaussian, NOISE, SCHEDULE, [999.0, 0.0], noises, predictor_order=0)


@pytest.mark.parametrize("name", sampling.ALGORITHMS)
def test_an_algorithm_of_the_table_walks_its_own_list_to_the_sample(name):
    algorithm = sampling.ALGORITHMS[name]
    timesteps = algorithm.timesteps(5, SCHEDULE.steps)
    assert len(timesteps) == (2 if algorithm.one_step else 6)
    predict = with_logits(knows_the_sample) if algorithm.learned_variance else knows_the_sample
    x = algorithm.sample(predict, NOISE, SCHEDULE, timesteps, noises)
    assert torch.allclose(x, SAMPLE, atol=1e-6 if timesteps[-1] == CLEAN else 0.1)


@pytest.mark.parametrize("name", sampling.ALGORITHMS)
def test_an_algorithm_reads_what_it_says_that_it_takes(name):
    algorithm = sampling.ALGORITHMS[name]
    timesteps = algorithm.timesteps(5, SCHEDULE.steps)
    usual = {"noise": noises, "order": 2, "eta": 1.0}
    others = {"noise": lambda index, shape: noises(index + 9, shape), "order": 1, "eta": 0.5}

    def drawn(**changed):
        return algorithm.sample(with_logits(gaussian), NOISE, SCHEDULE, timesteps, **{**usual, **changed})

    assert {name for name, value in others.items() if not torch.equal(drawn(**{name: value}), drawn())} \
        == algorithm.takes


def test_a_sampler_other_than_iddpm_leaves_the_variance_alone():
    plain, with_variance = (sampling.dpm_solver_pp(predict, NOISE, SCHEDULE, sampling.time_uniform(5))
                            for predict in (gaussian, with_logits(gaussian)))
    assert torch.equal(plain, with_variance)


def test_iddpm_refuses_a_network_without_a_variance():
    with pytest.raises(ValueError, match="IDDPM needs the variance"):
        sampling.iddpm(gaussian, NOISE, SCHEDULE, sampling.iddpm_timesteps(5), noises)


def test_dmd_refuses_a_list_of_several_steps():
    with pytest.raises(ValueError, match="one step, and this list of timesteps has 4"):
        sampling.dmd(gaussian, NOISE, SCHEDULE, sampling.time_uniform(4))


def test_guidance_of_some_channels_leaves_the_others_to_the_prompt():
    cond, uncond = normal(11), normal(12)
    some, whole = (sampling.guided(cond, uncond, 4.5, channels) for channels in (3, None))
    assert torch.equal(some[:, :3], whole[:, :3])
    assert torch.equal(some[:, 3:], cond[:, 3:])


# --- Training

TIMESTEP = torch.tensor([0, 700])


def test_the_variance_term_moves_only_the_variance():
    eps, logits = normal(6).requires_grad_(), normal(7).requires_grad_()
    loss = sampling.iddpm_loss(eps, logits, SAMPLE, NOISE, TIMESTEP, SCHEDULE)
    assert loss.total.shape == (2,)
    in_eps, in_logits = torch.autograd.grad(loss.vb.sum(), (eps, logits), allow_unused=True)
    assert in_eps is None and in_logits.abs().min() >= 0 and in_logits.any()
    assert torch.autograd.grad(loss.mse.sum(), logits, allow_unused=True)[0] is None


def test_the_variance_term_is_zero_for_the_true_step():
    timestep = torch.tensor([1, 999])
    loss = sampling.iddpm_loss(NOISE, -torch.ones(SHAPE), SAMPLE, NOISE, timestep, SCHEDULE)
    assert loss.vb.abs().max() < 1e-5 and loss.mse.max() == 0


def test_a_network_without_variance_has_no_variance_term():
    loss = sampling.iddpm_loss(normal(6), None, SAMPLE, NOISE, TIMESTEP, SCHEDULE)
    assert torch.equal(loss.total, loss.mse)


def test_snr_loss_learns_the_sample_where_there_is_little_noise():
    eps, timestep = normal(6), torch.tensor([249, 250])
    loss = sampling.iddpm_loss(eps, None, SAMPLE, NOISE, timestep, SCHEDULE, snr=True)
    plain = sampling.iddpm_loss(eps, None, SAMPLE, NOISE, timestep, SCHEDULE)
    assert loss.mse[1] == plain.mse[1]
    assert loss.mse[0].item() == pytest.approx(plain.mse[0].item() * SCHEDULE.sigma(249) ** 2, rel=1e-4)


def test_the_loss_is_finite_at_zero_snr():
    loss = sampling.iddpm_loss(normal(6), normal(7), SAMPLE, NOISE, torch.tensor([0, 999]), ZERO_SNR)
    assert loss.total.isfinite().all()


def distil(student, teacher=None, target=None, **settings):
    def known(x, timestep):
        return SCHEDULE.eps_from_denoised(x, SAMPLE.float(), timestep)

    return sampling.lcm_distillation(
        student or known, teacher or known, known, target or known, SAMPLE.float(), NOISE.float(),
        torch.tensor([3, 49]), sampling.LcmGrid(SCHEDULE), **settings,
    )


@pytest.mark.parametrize("loss_type", ["huber", "l2"])
def test_a_consistent_student_has_nothing_to_learn(loss_type):
    assert distil(None, loss_type=loss_type).loss < 1e-4


def test_only_the_student_of_a_distillation_is_trained():
    scale = torch.ones(3, requires_grad=True)
    step = distil(*(lambda x, t, s=s: s * torch.ones_like(x) for s in scale))
    step.loss.backward()
    assert scale.grad[0] != 0 and not scale.grad[1:].any()
    assert step.loss.shape == ()


def test_the_teacher_of_a_distillation_is_guided_by_one_more_than_asked():
    step = distil(None, teacher=lambda x, t: SCHEDULE.eps_from_denoised(x, SAMPLE.float() + 1, t), guidance=2.0)
    assert torch.allclose(step.teacher_denoised, SAMPLE.float() + 3, atol=2e-2)


def test_an_unknown_distillation_loss_is_refused():
    with pytest.raises(ValueError, match="'l1' is not one of huber, l2"):
        distil(None, loss_type="l1")


def test_a_distillation_pair_ends_one_stride_lower():
    start, end = sampling.LcmGrid(SCHEDULE, 20).pair(torch.tensor([0, 1, 19]))
    assert start.tolist() == [49, 99, 999] and end.tolist() == [0, 49, 949]


def test_distribution_matching_moves_the_student_towards_the_teacher():
    generated = normal(8, dtype=torch.float32).requires_grad_()
    timestep = torch.tensor([50, 600])
    noisy = SCHEDULE.add_noise(generated, NOISE.float(), timestep)
    fake, real = normal(9, dtype=torch.float32).requires_grad_(), normal(10, dtype=torch.float32)
    step = sampling.dmd_loss(generated, noisy, real, fake, timestep, SCHEDULE)
    step.loss.backward()
    assert torch.allclose(generated.grad, 2 * step.weight * step.direction / generated.numel(), atol=1e-6)
    assert fake.grad is None
    # where the teacher sees more of noise in the state than the student's follower, the state holds too much
    assert torch.equal(step.direction > 0, real > fake)
