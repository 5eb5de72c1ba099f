"""How a kernel becomes an operator of torch."""

from functools import partial

import torch
from torch import library

# The kernels read through strides: under Inductor the tensors arrive as they are, without a copy.
operator = partial(library.custom_op, mutates_args=(), tags=(torch.Tag.needs_exact_strides,))
# Of kernels whose outputs do not depend on strides: Inductor may lay out the arguments as it likes.
in_place_operator = partial(library.custom_op, tags=(torch.Tag.flexible_layout,))
