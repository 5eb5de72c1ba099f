"""What `tnl doctor` runs: every op of tnl_kernels against its definition in fp64, outputs and gradients, twice."""

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import tnl_kernels
import torch
from tnl_kernels import naive
from torch import Tensor

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
NAMES = {BF16: "bf16", FP16: "fp16", FP32: "fp32"}
# Relative RMS error. bf16, fp16: twice the rounding of an output alone; what is miscompiled is off by tens of percent.
BOUNDS = {BF16: 4e-3, FP16: 1e-3, FP32: 1e-5}
OUTPUTS = {
    "lightning_attention": ("o", "final_state"),
    "lightning_attention_packed": ("o", "u", "final_state"),
    "lightning_attention_state": ("final_state",),
    "lightning_attention_step": ("o",),
    "fork_srmsnorm": ("y", "same"),
    "add_srmsnorm": ("y", "new_residual"),
    "cross_entropy_": ("losses",),
}
# Ops without gradients, and the argument that they overwrite: a result too.
OVERWRITES = {"lightning_attention_step": "state", "cross_entropy_": "logits"}
# fp32 whatever the dtype of the rest.
WIDE = ("initial_state", "state", "residual")
# No decay, a usual one, and one under which a token forgets its predecessor.
SLOPES = (0.0, 0.05, 50.0)
MESSAGE_CHARACTERS = 200


@dataclass(frozen=True)
class Case:
    """One call of ``tnl_kernels.<op>``: random arguments of the shapes ``random``, others as ``given``."""

    name: str
    op: str
    dtype: torch.dtype
    random: dict[str, tuple[int, ...]]
    given: dict[str, Tensor] = field(default_factory=dict)
    options: dict = field(default_factory=dict)


def attention_case(
    op: str, dtype: torch.dtype, T: int, K: int, V: int, *, state: bool = False, documents: bool = False, name: str = ""
) -> Case:
    """A case of an op over a sequence: ``op`` is "" (of q, k, v), "packed" or "state"."""
    H = len(SLOPES)
    if op == "packed":
        random = {"qkvu": (1, T, 4 * H * K)}
        options = {"num_heads": H, "activation": "silu"}
    else:
        random = {"q": (1, T, H, K), "k": (1, T, H, K), "v": (1, T, H, V)}
        options = {}
    if op == "state":
        del random["q"]
    given = {"slopes": torch.tensor(SLOPES)}
    num_states = 1
    if documents:
        given["cu_seqlens"] = torch.tensor([0, 0, 1, 66, 66, 130, T], dtype=torch.int32)
        num_states = len(given["cu_seqlens"]) - 1
    if state:
        random["initial_state"] = (num_states, H, K, V)
        options |= {} if op == "state" else {"output_final_state": True}
    extras = [", SiLU"] * (op == "packed") + [", states"] * state + [", documents"] * documents
    name = name or f"attention {op}".rstrip() + f" {NAMES[dtype]} {K}x{V}" + "".join(extras)
    return Case(name, f"lightning_attention_{op}".rstrip("_"), dtype, random, given, options)


def as_if_two_held_the_same(part: Tensor) -> None:
    """What a sum over two devices makes of one's part, if both hold the same rows."""
    part.mul_(2)


def other_cases(dtype: torch.dtype, K: int) -> list[Case]:
    """The decoding step, norms, gate, LRPE and loss in one dtype, at odd sizes."""
    B, H, D = 5, len(SLOPES), 1001
    slots = torch.tensor([3, -1, 0, 6, 2], dtype=torch.int32)
    theta = 10000.0 ** (-torch.arange(64) / 64).expand(H, 1, 64)
    labels = torch.arange(13) * 311
    labels[4] = -100
    row = (37, D)
    parts = [
        (
            "attention step, slots",
            "lightning_attention_step",
            {"q": (B, H, K), "k": (B, H, K), "v": (B, H, K), "state": (7, H, K, K)},
            {"slopes": torch.tensor(SLOPES), "slots": slots},
            {"activation": "silu"},
        ),
        ("srmsnorm", "srmsnorm", {"x": row}, {}, {}),
        ("add_srmsnorm", "add_srmsnorm", {"x": row, "residual": row}, {}, {}),
        ("fork_srmsnorm", "fork_srmsnorm", {"x": row}, {}, {}),
        ("gated_srmsnorm", "gated_srmsnorm", {"o": row, "u": row}, {}, {}),
        (
            "split gated_srmsnorm",
            "split_gated_srmsnorm",
            {"o": row, "u": row},
            {},
            {"width": 2 * D, "total": as_if_two_held_the_same},
        ),
        ("sglu", "sglu", {"a": row, "b": row}, {}, {}),
        ("lrpe", "lrpe", {"x": (2, 37, H, 64)}, {"theta": theta, "positions": torch.arange(37) + 100_000}, {}),
        ("loss", "cross_entropy_", {"logits": (13, 5003)}, {"labels": labels}, {}),
    ]
    return [Case(f"{name} {NAMES[dtype]}", op, dtype, *arguments) for name, op, *arguments in parts]


def cases_of(device_type: str) -> list[Case]:
    """All cases of a type of device ("cuda" or "cpu"): the dtypes and head dims that matter there."""
    on_gpu = device_type == "cuda"
    T = 333 if on_gpu else 150
    dims = [(128, 128), (64, 64), (256, 128)] if on_gpu else [(64, 64), (48, 32)]
    K, V = dims[0]
    cases = []
    for dtype in (BF16, FP32) if on_gpu else (FP32,):
        cases += [attention_case("", dtype, T, *dim) for dim in dims]
        cases += [attention_case("", dtype, T, K, V, state=True, documents=documents) for documents in (False, True)]
        cases += [attention_case("packed", dtype, T, K, V, documents=documents) for documents in (False, True)]
        cases += [attention_case("state", dtype, T, K, V, state=True)]
        cases += other_cases(dtype, K)
    if on_gpu:
        cases.append(attention_case("", FP16, T, K, V, state=True))
        # Triton has compiled tl.dot(tl.trans(x)), x the result of a dot, to code that gives wrong gradients.
        name = "gradients, bf16, T = 1000: no miscompiled tl.dot(tl.trans(dot))"
        cases.append(attention_case("", BF16, 1000, K, V, name=name))
    return cases


def make_inputs(case: Case, device: torch.device) -> dict[str, Tensor]:
    """The tensors of a case, the same numbers on every device."""
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randn(shape, generator=generator).to(device, FP32 if name in WIDE else case.dtype)
        for name, shape in case.random.items()
    }
    return tensors | {name: x.to(device) for name, x in case.given.items()}


def run(case: Case, function: Callable, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Outputs and gradients by name, of the op or of its definition."""
    arguments = {name: x.clone() for name, x in tensors.items()}
    overwritten = OVERWRITES.get(case.op)
    leaves = {}
    if overwritten is None:
        leaves = {name: x for name, x in arguments.items() if x.is_floating_point() and name != "slopes"}
        for leaf in leaves.values():
            leaf.requires_grad_()
    results = function(**arguments, **case.options)
    results = results if isinstance(results, tuple) else (results,)
    outputs = dict(zip(OUTPUTS.get(case.op, ("y",)), results, strict=True))
    outputs = {name: x for name, x in outputs.items() if x is not None}
    if overwritten is not None:
        return outputs | {f"new_{overwritten}": arguments[overwritten]}
    generator = torch.Generator().manual_seed(1)
    # Rounded to the dtype of the case, so that the definition gets the same numbers in fp64.
    doutputs = [torch.randn(x.shape, generator=generator).to(case.dtype).to(x) for x in outputs.values()]
    gradients = torch.autograd.grad(list(outputs.values()), list(leaves.values()), doutputs)
    return outputs | {f"d{name}": x for name, x in zip(leaves, gradients, strict=True)}


def relative_error(name: str, actual: Tensor, expected: Tensor) -> float | None:
    """rms(actual - expected) / rms(expected); None when a value is not finite.

    Raises:
        ValueError: the shapes differ.
    """
    if actual.shape != expected.shape:
        raise ValueError(f"{name}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}")
    if not torch.isfinite(actual).all():
        return None
    error = torch.linalg.vector_norm(actual.double() - expected)
    return (error / torch.linalg.vector_norm(expected).clamp(min=1e-30)).item()


def check(case: Case, device: torch.device) -> dict:
    """Run one case: {"check", "ok", "errors", "worst", "error", "bound", "repeatable", "seconds"}.

    ``errors`` are by name of output or gradient, None when not finite; ``worst`` names the largest. An op that raises
    gives ``message`` instead: the other cases still run.
    """
    start = time.perf_counter()
    row = {"check": case.name, "ok": False, "bound": BOUNDS[case.dtype]}
    try:
        tensors = make_inputs(case, device)
        op = getattr(tnl_kernels, case.op)
        actual, again = run(case, op, tensors), run(case, op, tensors)
        wide = {name: x.double() if x.is_floating_point() else x for name, x in tensors.items()}
        expected = run(case, getattr(naive, f"naive_{case.op}"), wide)
        errors = {name: relative_error(name, x, expected[name]) for name, x in actual.items()}
        worst = max(errors, key=lambda name: float("inf") if errors[name] is None else errors[name])
        row |= {"errors": errors, "worst": worst, "error": errors[worst]}
        row["ok"] = errors[worst] is not None and errors[worst] <= row["bound"]
        row["repeatable"] = all(torch.equal(x.nan_to_num(), again[name].nan_to_num()) for name, x in actual.items())
    # Compilers and drivers raise dozens of types; each is a finding.
    except Exception as error:
        row["message"] = message_of(error)
    return row | {"seconds": round(time.perf_counter() - start, 2)}


def message_of(error: Exception) -> str:
    """Type and first line of an error; of a Triton compilation error, which begins with source code, the last too."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    if len(lines) > 1 and re.match(r"at \d+:\d+:$", lines[0]):
        lines[0] += f" {lines[-1]}"
    text = f"{type(error).__name__}: {lines[0]}".rstrip(": ")
    return text.encode("ascii", "replace").decode()[:MESSAGE_CHARACTERS]


def repeatability(rows: list[dict]) -> dict:
    """The row that says whether the two runs of every case gave the same bits."""
    ran = [row for row in rows if "repeatable" in row]
    differ = [row["check"] for row in ran if not row["repeatable"]]
    note = f"these differ: {'; '.join(differ)}" if differ else f"{len(ran)} of {len(rows)} cases ran"
    return {"check": "two runs of each give the same bits", "ok": bool(ran) and not differ, "message": note}
