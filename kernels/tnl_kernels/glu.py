"""The gate of the channel mixer."""

import torch
from torch import Tensor

from tnl_kernels.checks import check_devices, check_dtype
from tnl_kernels.dispatch import HAS_TRITON, dispatch
from tnl_kernels.dtypes import FLOATS

if HAS_TRITON:
    from tnl_kernels.glu_triton import triton_sglu
else:
    triton_sglu = None


def torch_sglu(a: Tensor, b: Tensor) -> Tensor:
    """The torch form of `tnl_kernels.sglu`: torch's product keeps a and b for the backward pass and nothing else."""
    return a * b


def sglu(a: Tensor, b: Tensor) -> Tensor:
    """a * b, the gate without an activation.

    Args:
        a, b: equal shapes and dtypes.

    Returns:
        The product, of the same shape and dtype.

    Raises:
        ValueError: shapes or dtypes differ.

    Source: TransNormerLLM (arXiv 2307.14995), SGLU.
    """
    check_dtype("a", a, FLOATS)
    check_devices(a.device, b=b)
    if a.shape != b.shape or a.dtype != b.dtype:
        raise ValueError(f"b: got {tuple(b.shape)} {b.dtype}, expected {tuple(a.shape)} {a.dtype}, as a")
    # Inductor fuses the torch form with its neighbours; kernels/benchmarks/elementwise.py measures both.
    on_cuda = torch_sglu if torch.compiler.is_compiling() else triton_sglu
    return dispatch(a, torch=torch_sglu, triton=on_cuda)(a, b)
