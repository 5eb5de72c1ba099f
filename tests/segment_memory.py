"""Started as a process by the tests: the memory that training by segments takes, away from that of the test process.

usage: segment_memory.py TOKENS:SEGMENT_LENGTH:GRADIENT ... prints the peak after each, in MiB.
"""

import re
import sys
from pathlib import Path

import torch

from tests.tiny_model import random_ids, tiny_model
from tnl.training.segments import segment_losses
from tnl.training.settings import TrainSettings


class Engine(torch.nn.Module):
    """What the segments use of a DeepSpeed engine."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, **inputs):
        return self.module(**inputs)


def peak_memory_mib(tokens: int, segment_length: int, gradient: str) -> float:
    """Largest resident memory of this process so far, after one window of ``tokens``."""
    torch.set_num_threads(1)
    model, ids = tiny_model(decoder_layers=2).train(), random_ids(1, tokens)
    inputs = {"input_ids": ids, "labels": ids, "cu_seqlens": None}
    settings = TrainSettings(
        steps=1,
        sequence_length=tokens,
        global_batch_size=1,
        micro_batch_size=1,
        segment_length=segment_length,
        segment_gradient=gradient,
    )
    for loss_sum in segment_losses(Engine(model), inputs, settings, torch.device("cpu")):
        loss_sum.backward()
    # And not getrusage: its maximum counts the process that started this one, from before the exec.
    return int(re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024


if __name__ == "__main__":
    for part in sys.argv[1:]:
        tokens, segment_length, gradient = part.split(":")
        print(peak_memory_mib(int(tokens), int(segment_length), gradient))
