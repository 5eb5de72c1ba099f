"""The cases of the correctness gate: lengths, head dims, decays, dtypes, documents, the ops, and the timed shapes."""

from dataclasses import dataclass, replace

import torch
from shapes import TIMED, document_offsets, timed_slopes

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
NAMES = {BF16: "bf16", FP16: "fp16", FP32: "fp32"}
# No decay, a slow one, ALiBi with a layer's factor, and one under which a token forgets its predecessor.
SLOPES = (0.0, 1e-4, 0.25 * (1 - 13 / 16), 50.0)
DOCUMENTS = (0, 0, 1, 2, 66, 130, 130, 500, 776, 777)
# Rows of fewer tokens are repeated: the error of a handful of rounded scores scatters around its mean.
MIN_TOKENS = 512


@dataclass(frozen=True)
class Case:
    """One call of one op.

    Every ``head_step``-th head is compared, of the last row of the batch only with ``last_row``; cases of one
    ``family`` share their kernels; a ``huge`` case needs most of the GPU's memory and runs alone, once.
    """

    name: str
    T: int
    K: int = 128
    V: int = 128
    B: int = 1
    dtype: torch.dtype = BF16
    slopes: tuple[float, ...] = SLOPES
    op: str = "plain"
    state: bool = False
    documents: tuple[int, ...] | None = None
    embedded: bool = False
    head_step: int = 1
    last_row: bool = False
    huge: bool = False
    family: str = ""

    @property
    def num_heads(self) -> int:
        """Heads, one for each slope."""
        return len(self.slopes)

    @property
    def heads(self) -> slice:
        """The heads that are compared."""
        return slice(None, None, self.head_step)

    @property
    def num_states(self) -> int:
        """States."""
        return self.B if self.documents is None else len(self.documents) - 1


def short(**changes) -> Case:
    """A short case; its name says what it is."""
    case = Case(name="", **changes)
    if case.documents is None:
        case = replace(case, B=-(-MIN_TOKENS // case.T))
    extras = [name for name in ("state", "embedded") if getattr(case, name)] + ["documents"] * bool(case.documents)
    name = f"{case.op} {NAMES[case.dtype]} K{case.K} V{case.V} T{case.T} {' '.join(extras)}".rstrip()
    family = f"{case.op} {NAMES[case.dtype]} {case.K} {case.V} {case.state} {bool(case.documents)}"
    return replace(case, name=name, family=family)


def timed_cases() -> list[Case]:
    """The timed shapes of T = 16384 and 131072 (and the packed ones) at full size, first and last head compared."""
    cases = []
    for shape in TIMED:
        if not shape.packed and shape.T not in (16384, 131072):
            continue
        offsets = document_offsets(shape.documents, shape.T, "cpu")
        cases.append(
            Case(
                name=f"timed {shape.label}",
                T=shape.T,
                K=shape.K,
                V=shape.V,
                B=shape.B,
                slopes=tuple(timed_slopes(shape.H, "cpu").tolist()),
                op="packed" if shape.packed else "plain",
                documents=None if offsets is None else tuple(offsets.tolist()),
                head_step=shape.H - 1,
                last_row=True,
                family=f"timed {shape.K} {shape.V} {shape.packed} {shape.documents}",
            )
        )
    return cases


def huge_cases() -> list[Case]:
    """2^31 elements: q, k, v of 4 GiB each, and the packed projection of 262144 tokens of a 1B model."""
    common = {"head_step": 15, "last_row": True, "huge": True, "family": "huge"}
    slopes = tuple(timed_slopes(16, "cpu").tolist())
    return [
        Case(name="huge B8 H16 T131072", T=131072, B=8, slopes=slopes, **common),
        Case(name="huge packed B1 H16 T262144", T=262144, slopes=slopes, op="packed", **common),
    ]


CASES = [
    *(short(T=T, state=True, embedded=True) for T in (1, 63, 64, 65, 777)),
    short(T=777),
    *(short(T=777, K=K, V=V, embedded=True) for K, V in ((48, 48), (80, 80), (96, 96), (192, 192))),
    *(short(T=777, K=K, V=V, embedded=True) for K, V in ((64, 64), (64, 128), (256, 128))),
    short(T=777, K=256, V=128, state=True),
    *(short(T=T, dtype=dtype, state=True, embedded=True) for dtype in (FP16, FP32) for T in (65, 777)),
    *(short(T=777, K=K, V=V, dtype=FP32, embedded=True) for K, V in ((96, 96), (64, 128))),
    short(T=777, documents=DOCUMENTS, state=True, embedded=True),
    short(T=777, documents=DOCUMENTS),
    short(T=777, documents=DOCUMENTS, state=True, dtype=FP32),
    *(short(T=T, op="packed", state=state) for T, state in ((65, True), (777, True), (777, False))),
    short(T=777, op="packed", dtype=FP32),
    short(T=777, op="packed", documents=DOCUMENTS, state=True),
    *(short(T=777, op="state", state=True, dtype=dtype, embedded=True) for dtype in (BF16, FP32)),
    short(T=777, op="state", state=True, documents=DOCUMENTS),
    *timed_cases(),
    *(Case(name=f"growth T{T}", T=T, slopes=(1e-4, 0.0625), family="growth") for T in (1024, 131072)),
    *huge_cases(),
]
