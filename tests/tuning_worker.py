"""Started by torchrun in the tests: runs that begin from a checkpoint, on ranks that divide it.

usage: tuning_worker.py FOLDER FINETUNE.yaml PRETRAIN.yaml
"""

import sys
from pathlib import Path

import torch

from tests.test_finetune import DIVIDED_PRETRAINING, DIVIDED_TUNING
from tnl.training.finetune import finetune
from tnl.training.finetune_settings import FinetuneSettings
from tnl.training.pretrain import pretrain
from tnl.training.run_configuration import load_settings
from tnl.training.settings import PretrainSettings

if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, tuning, pretraining = map(Path, sys.argv[1:])
    for name, overrides in DIVIDED_TUNING.items():
        settings = load_settings(FinetuneSettings, tuning, [f"output={folder / name}", *overrides])
        finetune(settings)
        finetune(settings, resume="4")
    for name, overrides in DIVIDED_PRETRAINING.items():
        pretrain(load_settings(PretrainSettings, pretraining, [f"output={folder / name}", *overrides]))
