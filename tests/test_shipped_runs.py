"""Every pretraining run that ships is one that loads, has a plan, fits the GPUs that it names, and builds."""

import re
from pathlib import Path

import pytest
import torch

from tnl import config as configuration
from tnl.model.kinds import model_class, model_config, num_parameters
from tnl.model.settings import ModelSettings
from tnl.tools.plan import figures
from tnl.training.settings import PretrainSettings

CONFIGS = Path(__file__).parent.parent / "configs"
RUNS = sorted(file.stem for file in (CONFIGS / "pretrain").glob("*.yaml"))
MODELS = sorted(file.stem for file in (CONFIGS / "model").glob("*.yaml"))
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
