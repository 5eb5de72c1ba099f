"""Operators of TransNormerLLM: linear attention with a fixed decay per head, its norms, gates and positions.

Every op has a definition ``naive_*`` and forms by name (``torch_*``); the public op checks its arguments and picks the
form for the tensor's device.
"""

from tnl_kernels.attention import lightning_attention, lightning_attention_packed, lightning_attention_state
from tnl_kernels.cross_entropy import cross_entropy_
from tnl_kernels.glu import sglu
from tnl_kernels.lrpe import lrpe
from tnl_kernels.norm import add_srmsnorm, fork_srmsnorm, gated_srmsnorm, srmsnorm
from tnl_kernels.split_norm import split_gated_srmsnorm
from tnl_kernels.step import lightning_attention_step

__all__ = [
    "add_srmsnorm",
    "cross_entropy_",
    "fork_srmsnorm",
    "gated_srmsnorm",
    "lightning_attention",
    "lightning_attention_packed",
    "lightning_attention_state",
    "lightning_attention_step",
    "lrpe",
    "sglu",
    "split_gated_srmsnorm",
    "srmsnorm",
]
