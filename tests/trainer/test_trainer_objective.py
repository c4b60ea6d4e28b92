"""[noise] and [loss]: how noise levels and noise are drawn and how errors count, in every family."""
import json
import re
from dataclasses import replace

import pytest
import tiny_recipes
import tiny_run
import torch
from pixstack.models_impl.objective import loss, timesteps
from pixstack.trainer.config import check, load
from pixstack.trainer.config import objective as rules
from pixstack.trainer.config.schema import Noise
from pixstack.trainer.data import loader
from pixstack.trainer.training import build, checkpoints
from pixstack.trainer.training.noise import VALIDATION, batch_noise, state_noise, training_noise

NOISE = {"timesteps": "logit_normal", "mean": 0.3, "shift": 2.0, "min_timestep": 100.0, "max_timestep": 600.0,
         "quarters": [1.0, 2.0, 1.0, 0.5], "offset": 0.1, "pyramid": 0.3, "perturbation": 0.1}
LOSS = {"kind": "huber", "huber_delta": 0.2, "huber_schedule": "snr", "snr_gamma": 5.0}
TUNED = {  # a tiny run of each family -> what it is trained with
    "pixart": {"noise": NOISE, "loss": LOSS},
    "ultrapixel_lora": {"noise": NOISE, "loss": LOSS, "recipe": {"weight": "none"}},
    "flux": {"noise": NOISE, "loss": {"debiased": True}},
    "pixelponder": {"noise": NOISE, "loss": LOSS},
    "pixelflow": {"noise": {"timesteps": "logit_normal", "mean": 0.5}, "loss": {"kind": "pseudo_huber"}},
}
AS_TIMESTEP = {"pixart": 1, "ultrapixel": 1000, "flux": 1000, "pixelponder": 1000}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return tiny_recipes.every(folder / "files", folder / "out")


def changed(config, out, **sections):
    """A run like another one, but for some settings."""
    raw = {**load.as_dict(config), "out": str(out)}
    for section, values in sections.items():
        raw[section] = {**raw[section], **values}
    return check.parse(raw)


def trained(config) -> tuple[list, dict]:
    """(the log, the weights) of a finished run."""
    lines = [json.loads(line) for line in (config.folder / "log.jsonl").read_text().splitlines()]
    weights = checkpoints.read_tensors(config.folder / "checkpoints/00000003/model.safetensors")
    return [(one["step"], one["loss"]) for one in lines if "loss" in one], {k: v.clone() for k, v in weights.items()}


@pytest.mark.parametrize("name", TUNED)
def test_a_resumed_run_with_other_noise_and_loss_repeats_the_unbroken_one(runs, name, tmp_path):
    def interrupt(run, step):
        run.stop = step == 1

    whole, broken = (changed(runs[name], tmp_path / out, **TUNED[name]) for out in ("whole", "broken"))
    recipe, _ = tiny_run.train(whole)
    tiny_run.train(broken, interrupt)
    tiny_run.train(broken)
    (log, weights), (again, resumed) = trained(whole), trained(broken)
    assert log == again and [step for step, _ in log] == [1, 2, 3] and all(loss > 0 for _, loss in log)
    assert all(torch.equal(value, resumed[key]) for key, value in weights.items())
    for scale in [factor for family, factor in AS_TIMESTEP.items() if name.startswith(family)]:
        found = [scale * float(re.search(r"(?:timestep|t|sigma) ([\d.]+)", line)[1])
                 for step in range(20) for line in recipe.described(step)]
        assert 99 <= min(found) < 250 and 450 < max(found) <= 601


def test_without_settings_the_noise_is_what_it_was():
    drawn = (3, 7, range(2, 5), (4, 8, 8), "cpu", 2)
    noise = training_noise(Noise(), *drawn)
    assert torch.equal(noise, batch_noise(*drawn))
    assert state_noise(Noise(), noise, 3, 7, range(2, 5)) is noise


@pytest.mark.parametrize("settings", [{"offset": 0.5}, {"pyramid": 0.5}, {"offset": 0.5, "pyramid": 0.5}], ids=str)
def test_shaped_noise_depends_on_seed_step_and_place_only(settings):
    def noise(step=7, positions=range(2, 5), seed=3, kind=0):
        return training_noise(Noise(**settings), seed, step, positions, (4, 8, 8), "cpu", kind)

    whole = noise()
    assert torch.equal(whole, torch.cat([noise(positions=range(p, p + 1)) for p in range(2, 5)]))
    for other in (noise(step=8), noise(seed=4), noise(kind=2), batch_noise(3, 7, range(2, 5), (4, 8, 8), "cpu")):
        assert not torch.isclose(whole, other).any(0).all()
    assert torch.equal(noise(seed=VALIDATION), batch_noise(VALIDATION, 7, range(2, 5), (4, 8, 8), "cpu"))


def test_perturbed_is_what_the_network_sees_and_not_what_it_predicts():
    settings, drawn = Noise(perturbation=0.1), (3, 7, range(400))
    noise = training_noise(settings, *drawn, (4, 4, 4), "cpu")
    assert torch.equal(noise, batch_noise(*drawn, (4, 4, 4), "cpu"))
    other = (state_noise(settings, noise, *drawn) - noise) / 0.1
    assert other.std().item() == pytest.approx(1, abs=0.03)
    assert torch.corrcoef(torch.stack([noise.flatten(), other.flatten()]))[0, 1].abs() < 0.03


@pytest.mark.parametrize("name", ["pixart_controlnet", "ultrapixel_lora", "flux", "pixelponder choices"])
def test_masks_divide_the_loss_of_a_picture_in_every_family(runs, name, tmp_path):
    more = {"recipe": {"weight": "none"}} if name.startswith("ultrapixel") else {"recipe": {"variance": 0.0}} \
        if name.startswith("pixart") else {}
    config = changed(runs[name], tmp_path, **more)
    items = build.collection(config)
    recipe = build.recipe(config, items)
    batch = loader.Batches(items.train, config.data, 0, 4)(0, range(4))
    left = torch.zeros(4, 1, *batch.size, dtype=torch.uint8)
    left[..., : batch.size[1] // 2] = 255
    with torch.no_grad():
        whole, *halves = (recipe(replace(batch, mask=mask)) for mask in (None, left, 255 - left))
    torch.testing.assert_close(sum(halves), whole, rtol=1e-4, atol=1e-5)
    assert min(h.min() for h in halves) > 0.05 * whole.max()


def test_the_validation_does_not_depend_on_the_noise_of_training(runs, tmp_path):
    found = []
    for noise in ({}, NOISE):
        config = changed(runs["flux"], tmp_path, noise=noise)
        items = build.collection(config)
        recipe = build.recipe(config, items)
        found.append(recipe.validate(loader.fixed(items.held_out, config.data)))
    assert found[0] == found[1] and found[0]["loss"] > 0


@pytest.mark.parametrize("name, sections, sentence", [
    ("pixart", {"noise": {"timesteps": "logitnormal"}}, "'logitnormal' is none of released, uniform, logit_normal;"),
    ("pixart", {"noise": {"min_timestep": 900.0, "max_timestep": 100.0}},
     "noise.min_timestep=900 and noise.max_timestep=100 must rise inside 0 to 1000."),
    ("pixart", {"noise": {"max_timestep": 1001.0}}, "noise.max_timestep=1001 must rise inside 0 to 1000."),
    ("pixart", {"noise": {"quarters": [1.0, 2.0]}}, "noise.quarters=[1.0, 2.0] must be 4 numbers"),
    ("pixart", {"noise": {"quarters": [1.0, 0.0, 0.0, 0.0], "min_timestep": 250.0}},
     "leaves nothing to draw from noise.min_timestep=250 to noise.max_timestep=1000."),
    ("pixart", {"noise": {"mean": 0.5}}, "noise.mean=0.5 is read only with noise.timesteps=\"logit_normal\"."),
    ("pixart", {"noise": {"shift": 0.0}}, "noise.shift=0.0 must be more than 0."),
    ("pixart", {"noise": {"pyramid": 1.0}}, "noise.pyramid=1.0 is outside [0, 1)."),
    ("pixart", {"loss": {"kind": "hubert"}}, "loss.kind='hubert' is none of mse, mae, huber, pseudo_huber; did"),
    ("pixart", {"loss": {"huber_delta": 0.5}}, "loss.huber_delta=0.5 is read only with loss.kind=\"huber\""),
    ("pixart", {"loss": {"kind": "huber", "huber_delta": 2.0, "huber_schedule": "snr"}},
     "loss.huber_delta=2 must be below 1 with loss.huber_schedule='snr'"),
    ("flux", {"loss": {"snr_gamma": 5.0, "debiased": True}},
     "loss.snr_gamma=5 and loss.debiased=true are two weights of the noise level: leave one of them out."),
    ("ultrapixel_guide", {"loss": {"snr_gamma": 5.0}},
     "recipe.weight='adaptive' and loss.snr_gamma both weigh the loss by its noise level: set recipe.weight=\"none\""),
    ("pixelflow", {"noise": {"shift": 2.0}},
     "noise.shift=2.0 is not read by recipe.name='pixelflow': its stages divide the noise levels, and "
     "recipe.stage_weights says how often each is drawn. Take it out."),
    ("pixelflow", {"noise": {"offset": 0.1}}, "the jumps between its stages presume white noise. Take it out."),
    ("pixelflow", {"loss": {"snr_gamma": 5.0}}, "a signal-to-noise ratio is not defined. Take it out."),
    ("pixart_lcm", {"noise": {"offset": 0.1}},
     "noise.offset=0.1 is not read by recipe.name='pixart_lcm': its loss and what is drawn for it are its own."),
    ("pixart_dmd", {"loss": {"kind": "mae"}}, "loss.kind='mae' is not read by recipe.name='pixart_dmd'"),
    ("autoencoder", {"loss": {"kind": "mae"}}, "loss.kind='mae' is not read by recipe.name='autoencoder'"),
])
def test_what_cannot_work_is_refused_in_a_sentence(runs, name, sections, sentence, tmp_path):
    with pytest.raises(ValueError) as caught:
        changed(runs[name], tmp_path, **sections)
    assert sentence in str(caught.value)


def test_the_names_in_settings_are_those_of_the_formulas():
    assert rules.KINDS == loss.KINDS and rules.SCHEDULES == loss.SCHEDULES
    assert rules.DISTRIBUTIONS == ("released", *timesteps.KINDS)
