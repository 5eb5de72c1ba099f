"""When the ranks add up the gradients of a step: after every backward pass, or once.

ZeRO-2 reduces after every pass: a rank then keeps sums of its own share of the gradients only. Reduced once, each rank
keeps fp32 sums of all gradients (4 bytes a parameter more), and a step of G passes moves a G-th of the bytes between
the ranks and through DeepSpeed's buckets.
"""

import contextlib
from collections.abc import Iterator

from tnl.training.gradient_sums import sum_gradients
from tnl.training.settings import TrainSettings


class GradientReduction:
    """The passes of an optimizer step::

        with reduction.step():
            for ...:
                engine.backward(loss, scale_wrt_gas=False)
                reduction.end_pass()
        engine.step()

    Args:
        engine: a DeepSpeed engine, or what has its ``module``, ``step()`` and ``is_gradient_accumulation_boundary()``.
    """

    def __init__(self, engine, train: TrainSettings):
        self._engine = engine
        self._is_once = train.reduce_gradients == "every_step"
        # Autograd itself adds up gradients of fp32 weights in fp32.
        self._sums = sum_gradients(engine.module, fused=not train.compile) if self._is_once else []

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Around all passes of a step; afterwards the engine has the gradients that it updates with."""
        if not self._is_once:
            yield
            return
        with self._engine.coalesce_grad_reduction():
            yield
            for p, total in self._sums:
                p.grad = total.take(p.dtype)

    def end_pass(self) -> None:
        """After each backward pass."""
        if not self._is_once and not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()


def passes_of_engine(train: TrainSettings, passes: int) -> int:
    """How many of a step's ``passes`` the engine knows of."""
    return 1 if train.reduce_gradients == "every_step" else passes
