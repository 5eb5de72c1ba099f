"""Started by torchrun in the tests: `tnl bench train` three times in one start of the processes.

usage: bench_worker.py FOLDER
"""

import sys
from pathlib import Path

import torch

from tnl.tools.bench_train import bench_train

torch.set_num_threads(1)
SMALL = ["model.vocab_size=100", "model.hidden_size=32", "model.num_heads=2", "model.glu_dim=48"]
SHARED = ["train.sequence_parallel=2"]
for name, engine, more in (("deepspeed", None, []), ("torch", "torch", []), ("sequence-parallel", "torch", SHARED)):
    bench_train(
        "tnl-tiny",
        lengths=[16, 64],
        tokens_per_step=128,
        micro_tokens=32,
        kinds=["tnl"],
        steps=1,
        warmup=1,
        engine=engine,
        overrides=[*SMALL, "optimizer.lr=3e-2", *more],
        json_file=Path(sys.argv[1], f"{name}.json"),
        report=print,
    )
