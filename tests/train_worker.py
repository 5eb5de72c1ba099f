"""Started by torchrun in the tests: several runs of the training loop in one start of the processes.

usage: train_worker.py CONFIG.yaml OUTPUT_FOLDER NAME [key=value ...] [-- NAME [key=value ...]] ...
"""

import sys

import torch

from tnl import config
from tnl.training.pretrain import pretrain
from tnl.training.settings import PretrainSettings

torch.set_num_threads(1)
path, folder, *rest = sys.argv[1:]
for part in " ".join(rest).split(" -- "):
    name, *overrides = part.split()
    pretrain(config.load(PretrainSettings, path, [f"output={folder}/{name}", *overrides]))
