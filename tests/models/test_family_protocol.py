"""Every family keeps the protocol of models_impl/family.py, which nodes and trainer rely on."""
import inspect
import math
import typing
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from pixstack.models_impl import family
from pixstack.models_impl.flux.sampling import RectifiedFlow
from pixstack.models_impl.pixart.sampling import NoiseSchedule, PixArtDiffusion
from pixstack.models_impl.pixelflow.sampling import CascadeFlow, StageTime, double, shrink
from pixstack.models_impl.pixelflow.schedule import CascadeSchedule
from pixstack.models_impl.pixelflow.stages import Stages
from pixstack.models_impl.ultrapixel.sampling import CosineDiffusion

METHODS = [name for name, value in vars(family.Diffusion).items() if not name.startswith("_") and callable(value)]
SIZE = (3, 4, 8, 8)


def normal(seed: int, size=SIZE) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


CLEAN = double(normal(1, (3, 4, 4, 4)))  # halving and doubling lose nothing
NOISE = normal(2)


def any_noise(index, shape):
    return normal(10 + index, shape)


@dataclass
class Case:
    """A family, and what a test has to know about its times and plans."""

    diffusion: family.Diffusion
    plan: object
    knows: typing.Callable
    """`predict` of a network that knows the clean sample."""

    def one_time(self, rng):
        """Times that the pictures of one tensor may have."""
        return self.diffusion.draw(len(CLEAN), rng)


class Cascade(Case):
    def one_time(self, rng):
        return StageTime(1, self.diffusion.draw(len(CLEAN), rng).t)


def pixart(prediction):
    diffusion = PixArtDiffusion(NoiseSchedule(), prediction)

    def eps(x, timestep):
        return diffusion.schedule.eps_from_denoised(x, CLEAN.to(x), timestep)

    return Case(diffusion, [*diffusion.timesteps(5)[:-1], -1.0], eps)


def flux():
    diffusion = RectifiedFlow()
    return Case(diffusion, diffusion.schedule(5, 16), lambda x, sigma: (x - CLEAN) / sigma.view(-1, 1, 1, 1))


def ultrapixel():
    diffusion = CosineDiffusion()

    def eps(x, timestep):
        logsnr = diffusion.logsnr(timestep)[:1]
        a, b = logsnr.sigmoid().sqrt(), (-logsnr).sigmoid().sqrt()
        return (x - a * CLEAN) / b

    return Case(diffusion, diffusion.steps(5), eps)


def pixelflow():
    stages = Stages(3)
    whole = double(double(CLEAN))

    def velocity(x, timestep, stage, cfg):
        _, t, _ = stages.locate(stages.sigma(timestep))
        return stages.velocity(x, shrink(whole, stage, 3), stage, t)

    return Cascade(CascadeFlow(stages), CascadeSchedule.build(stages, 3), velocity)


CASES = {"pixart": partial(pixart, "eps"), "pixart, velocity": partial(pixart, "v"), "flux": flux,
         "ultrapixel": ultrapixel, "pixelflow": pixelflow}


@pytest.fixture(params=CASES)
def case(request) -> Case:
    return CASES[request.param]()


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_every_member_is_there_and_is_called_alike(case):
    for method in METHODS:
        wanted = list(inspect.signature(getattr(family.Diffusion, method)).parameters.values())[1:]
        own = list(inspect.signature(getattr(case.diffusion, method)).parameters.values())
        assert len(own) >= len(wanted), method
        for theirs, ours in zip(wanted, own, strict=False):
            assert ours.kind == theirs.kind, method
            assert theirs.default is theirs.empty or ours.default is not ours.empty, method
        assert all(p.default is not p.empty for p in own[len(wanted):]), method


def test_the_docstring_names_every_class():
    for make in CASES.values():
        assert type(make().diffusion).__name__ in family.__doc__


def test_times_depend_on_the_generator_only(case):
    first, again, other = (case.diffusion.draw(64, rng(seed)) for seed in (1, 1, 2))
    flat = [torch.stack([*time]) if isinstance(time, tuple) else time for time in (first, again, other)]
    assert torch.equal(flat[0], flat[1]) and not torch.equal(flat[0], flat[2])


def test_there_is_a_timestep_of_the_network_for_each_picture(case):
    timestep = case.diffusion.network_timestep(case.diffusion.draw(64, rng()))
    assert timestep.shape == (64,) and timestep.isfinite().all() and len(set(timestep.tolist())) > 20


def test_the_target_has_no_loss_and_anything_else_has(case):
    time = case.one_time(rng())
    target = case.diffusion.target(CLEAN, NOISE, time)
    loss = case.diffusion.loss(target, CLEAN, NOISE, time)
    assert loss.shape == (len(CLEAN),) and loss.dtype == torch.float32 and loss.max() == 0
    worse = case.diffusion.loss(target + 0.1, CLEAN, NOISE, time)
    torch.testing.assert_close(worse, torch.full_like(worse, 0.01), rtol=1e-3, atol=0)


def test_the_target_says_which_sample_is_in_the_state(case):
    time = case.one_time(rng())
    x = case.diffusion.add_noise(CLEAN, NOISE, time)
    assert not torch.allclose(x, CLEAN, atol=0.1)
    denoised = case.diffusion.denoised(x, case.diffusion.target(CLEAN, NOISE, time), time)
    torch.testing.assert_close(denoised, CLEAN, rtol=0, atol=2e-3)


def test_a_network_that_knows_the_sample_draws_it(case):
    heard = []
    size = CLEAN.shape
    wanted = CLEAN if not isinstance(case, Cascade) else double(double(CLEAN))
    x = case.diffusion.sample(case.knows, normal(3, size), case.plan, any_noise,
                              lambda index, x, denoised: heard.append((index, x, denoised)))
    torch.testing.assert_close(x, wanted, rtol=0, atol=5e-3)
    steps = case.plan.steps if isinstance(case.plan, CascadeSchedule) else len(case.plan) - 1
    assert [index for index, _, _ in heard] == list(range(steps))
    assert torch.equal(heard[0][1], normal(3, size)), "the state that the first estimate was made from"
    assert math.isfinite(heard[-1][2].sum())
