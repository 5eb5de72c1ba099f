"""Every pretraining run that ships is one that loads, has a plan, fits the GPUs that it names, and builds."""

import math
import re
from pathlib import Path

import pytest
import torch

from tnl import config as configuration
from tnl.model.kinds import model_class, model_config, num_parameters
from tnl.model.settings import ModelSettings
from tnl.tools.plan import figures
from tnl.training.finetune_settings import FinetuneSettings
from tnl.training.methods import check_method
from tnl.training.schedule import learning_rate
from tnl.training.settings import PretrainSettings

CONFIGS = Path(__file__).parent.parent / "configs"
RUNS = sorted(file.stem for file in (CONFIGS / "pretrain").glob("*.yaml"))
MODELS = sorted(file.stem for file in (CONFIGS / "model").glob("*.yaml"))
# The shape of the model that each tuning run begins from.
TUNED = {"alpaca-1b-full": "tnl-1b", "alpaca-1b-lora": "tnl-1b", "alpaca-7b-lora-zero3": "tnl-7b"}
TUNED["quickstart"] = "tnl-tiny"
LADDER = {"tnl-70m": 70e6, "tnl-160m": 160e6, "tnl-410m": 410e6, "tnl-1b": 1e9, "tnl-3b": 3e9, "tnl-7b": 7e9}


def test_the_ladder_and_the_released_sizes_ship():
    assert {*LADDER, "tnl-44m", "tnl-385m", "tnl-15b"} <= {*MODELS}
    assert {"wikitext103-44m", "scaling-law", "tnl-385m", "tnl-1b", "tnl-3b", "tnl-7b", "tnl-15b"} <= {*RUNS}


@pytest.mark.parametrize("name", LADDER)
def test_a_size_is_its_name(name):
    config = configuration.load(ModelSettings, f"model/{name}").to_config()
    assert num_parameters(config) == pytest.approx(LADDER[name], rel=0.07)


@pytest.mark.parametrize("name", MODELS)
def test_a_comment_states_the_parameters(name):
    found = re.search(r"([0-9,]{9,}) parameters", (CONFIGS / f"model/{name}.yaml").read_text())
    count = num_parameters(configuration.load(ModelSettings, f"model/{name}").to_config())
    assert found is None or int(found[1].replace(",", "")) == count


@pytest.mark.parametrize("name", RUNS)
def test_a_run_plans_and_builds(name):
    settings = configuration.load(PretrainSettings, f"pretrain/{name}")
    comments = (CONFIGS / f"pretrain/{name}.yaml").read_text()
    gpus = re.search(r"--gpus ([0-9]+)", comments)
    found = figures(settings, gpus=int(gpus[1]) if gpus else 1, mfu=0.5, tokens=None, gpu_memory=[80.0])
    assert found["memory"]["fits"] == {"80 GiB": True}
    config = model_config(settings.model, settings.train.sequence_length)
    with torch.device("meta"):
        model = model_class(config)(config)
    assert sum(p.numel() for p in model.parameters()) == found["parameters"]


@pytest.mark.parametrize("name", LADDER)
def test_the_scaling_law_recipe_takes_the_whole_ladder(name):
    settings = configuration.load(PretrainSettings, "pretrain/scaling-law", [f"model.preset={name}"])
    found = figures(settings, gpus=64, mfu=0.5, tokens=None, gpu_memory=[80.0])
    assert found["time"]["tokens"] == pytest.approx(300e9, rel=1e-4)
    assert found["layout"]["tokens_per_step"] == 2**22
    assert found["memory"]["fits"] == {"80 GiB": True}


@pytest.mark.parametrize(("name", "preset"), TUNED.items())
def test_a_tuning_run_fits_the_model_that_it_begins_from(name, preset):
    values = {"model": {"preset": preset}}
    settings = configuration.load(FinetuneSettings, f"finetune/{name}", values=values)
    check_method(settings.method, settings.model.to_config())
    resolved = settings.resolved(steps_per_epoch=95.5)
    assert resolved.train.steps == math.ceil(95.5 * settings.train.epochs)
    assert resolved.schedule.warmup_steps == round(resolved.train.steps * 0.1)
    rates = [learning_rate(resolved.schedule, 1.0, step, resolved.train.steps) for step in range(resolved.train.steps)]
    middle = (resolved.schedule.warmup_steps + resolved.train.steps) // 2
    assert rates[middle] == pytest.approx(0.5, abs=0.02)
    assert rates[-1] < 1e-3


def test_the_reference_tunes_with_these_hyperparameters():
    values = {"model": {"preset": "tnl-1b"}}
    found = configuration.load(FinetuneSettings, "finetune/alpaca-1b-full", values=values)
    optimizer, schedule = found.optimizer, found.schedule
    assert (optimizer.lr, optimizer.betas, optimizer.weight_decay) == (1e-4, (0.9, 0.95), 0.1)
    assert (schedule.name, schedule.warmup_ratio) == ("cosine", 0.1)
