"""The one place where DeepSpeed is imported: set up so that it neither warns, nor looks for MPI tools, nor compiles."""

import logging
import os

import torch

# DeepSpeed looks for an accelerator while it is imported, and warns where it finds none.
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed

# The shared-memory collective would be compiled for 40 seconds at every first start, and serves inference only.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
logging.getLogger("DeepSpeed").setLevel(logging.WARNING)

__all__ = ["deepspeed"]
