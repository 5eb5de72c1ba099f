"""The gate of the channel mixer."""

from torch import Tensor

from tnl_kernels.dispatch import dispatch


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
    if a.shape != b.shape or a.dtype != b.dtype:
        raise ValueError(f"b: got {tuple(b.shape)} {b.dtype}, expected {tuple(a.shape)} {a.dtype}, as a")
    return dispatch(a, torch=torch_sglu)(a, b)
