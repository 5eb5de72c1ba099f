"""Is attention right on this GPU? Every kind of argument against the definition in fp64, outputs and gradients.

    python kernels/benchmarks/correctness.py [--device cpu] [--part 0/8] [--only TEXT] [--json PATH]

Memory is filled with NaN before each call, so that what is read before it is written shows; inputs are views into
larger buffers of NaN; each case runs twice and must give the same bits. Exit code 1 when a case fails.
"""

import argparse
import sys
import time
from pathlib import Path

import torch
from cases import CASES, Case
from reference import attention_reference, relative_error
from tnl_kernels import lightning_attention, lightning_attention_packed, lightning_attention_state
from tnl_kernels.record import save
from torch import Tensor

# Relative RMS error of o, dq, dk, dv and of the states. bf16: the rounding of the output alone is 1.7e-3.
BOUNDS = {torch.bfloat16: 3e-3, torch.float16: 1e-3, torch.float32: 1e-5}
STATE_BOUNDS = {torch.bfloat16: 2e-3, torch.float16: 1e-3, torch.float32: 1e-5}
# The packed op on bf16: SiLU of q and k is rounded to bf16 for the tensor cores, one rounding more on the way.
PACKED_BOUND, PACKED_STATE_BOUND = 4e-3, 3e-3
# The error at the long end over that at T = 1024.
GROWTH_BOUND = 1.1
POISON_BYTES = 2 * 2**30
STATES = ("state", "dinitial")  # [N, H, K, V], all else [B, T, H, K]


def poison(num_bytes: int, device: str) -> None:
    """Leave freed memory full of NaN (all bits set, in every dtype) to the allocations that follow."""
    if torch.device(device).type != "cuda":
        return
    torch.cuda.empty_cache()
    large = torch.full((min(num_bytes, POISON_BYTES),), 255, dtype=torch.uint8, device=device)
    # Allocations up to 1 MiB come from a pool of their own.
    small = [torch.full((2**19,), 255, dtype=torch.uint8, device=device) for _ in range(64)]
    del large, small


def embedded(x: Tensor) -> Tensor:
    """``x`` [B, T, H, K] as a view into a buffer of NaN, with 64 tokens and 8 features around it."""
    B, T, H, K = x.shape
    buffer = x.new_full((B, T + 128, H, K + 16), float("nan"))
    view = buffer[:, 64 : 64 + T, :, 8 : 8 + K]
    view.copy_(x)
    return view


def make_inputs(case: Case, device: str) -> dict[str, Tensor]:
    """What the op of the case takes, its gradients and cu_seqlens. Packed: qkvu, do, du; otherwise q, k, v, do."""
    generator = torch.Generator(device).manual_seed(case.T)

    def normal(*size: int, dtype: torch.dtype = case.dtype) -> Tensor:
        return torch.randn(*size, device=device, dtype=dtype, generator=generator)

    B, T, H, K, V = case.B, case.T, case.num_heads, case.K, case.V
    if case.op == "packed":
        tensors = {"qkvu": normal(B, T, 4, H * K), "do": normal(B, T, H, K), "du": normal(B, T, H * K)}
    else:
        sizes = {"q": K, "k": K, "v": V, "do": V}
        tensors = {name: normal(B, T, H, dim) for name, dim in sizes.items()}
    if case.embedded:
        tensors = {name: embedded(x) if x.dim() == 4 and name != "qkvu" else x for name, x in tensors.items()}
    if case.op == "packed":
        tensors["qkvu"] = tensors["qkvu"].view(B, T, -1)
    if case.state:
        tensors |= {name: normal(case.num_states, H, K, V, dtype=torch.float32) for name in ("initial_state", "dstate")}
    return tensors


def run(case: Case, tensors: dict[str, Tensor], slopes: Tensor, cu_seqlens: Tensor | None) -> dict[str, Tensor]:
    """Outputs and gradients of the op, by the names of `attention_reference`; packed also u and dqkvu."""
    names = {"plain": ["q", "k", "v"], "state": ["k", "v"], "packed": ["qkvu"]}[case.op]
    names += ["initial_state"] * case.state
    leaves = {name: tensors[name].detach().requires_grad_() for name in names}
    options = {"initial_state": leaves.get("initial_state"), "cu_seqlens": cu_seqlens}
    poison(8 * max(x.numel() * x.element_size() for x in tensors.values()), tensors["do"].device)
    if case.op == "state":
        outputs = {"state": lightning_attention_state(leaves["k"], leaves["v"], slopes, **options)}
        doutputs = {"state": tensors["dstate"]}
    elif case.op == "packed":
        o, u, state = lightning_attention_packed(
            leaves["qkvu"], slopes, num_heads=case.num_heads, output_final_state=case.state, **options
        )
        outputs = {"o": o, "u": u, "state": state}
        doutputs = {"o": tensors["do"], "u": tensors["du"], "state": tensors.get("dstate")}
    else:
        o, state = lightning_attention(
            *(leaves[name] for name in "qkv"), slopes, output_final_state=case.state, **options
        )
        outputs, doutputs = {"o": o, "state": state}, {"o": tensors["do"], "state": tensors.get("dstate")}
    outputs = {name: x for name, x in outputs.items() if x is not None}
    gradients = torch.autograd.grad(list(outputs.values()), list(leaves.values()), [doutputs[name] for name in outputs])
    result = {name: x.detach() for name, x in outputs.items()}
    result |= {f"d{name}".replace("dinitial_state", "dinitial"): x for name, x in zip(leaves, gradients, strict=True)}
    return result


def expected(case: Case, tensors: dict[str, Tensor], slopes: Tensor, cu_seqlens: Tensor | None) -> dict[str, Tensor]:
    """The definition in fp64, for the last row of the batch and the checked heads where the case names them."""
    states = {name: x[:, case.heads] for name, x in tensors.items() if name in ("initial_state", "dstate")}
    rows = slice(-1, None) if case.last_row else slice(None)
    do = tensors["do"][rows, :, case.heads]
    options = {"cu_seqlens": cu_seqlens, **states}
    if case.op != "packed":
        q, k, v = (tensors[name][rows, :, case.heads] for name in "qkv")
        if case.op == "state":
            q, do = torch.zeros_like(q), torch.zeros_like(do)
        return attention_reference(q, k, v, slopes[case.heads], do, **options)
    parts = tensors["qkvu"].detach()[rows].unflatten(-1, (4, case.num_heads, -1))[:, :, :, case.heads]
    q, k, v = (x.double() for x in parts.unbind(2)[:3])
    silu = [x.requires_grad_() for x in (q, k)]
    activated = [torch.nn.functional.silu(x) for x in silu]
    result = attention_reference(*(x.detach() for x in activated), v, slopes[case.heads], do, **options)
    dq, dk = torch.autograd.grad(activated, silu, [result["dq"], result["dk"]])
    return result | {"dq": dq, "dk": dk}


def checked_parts(case: Case, actual: dict[str, Tensor]) -> dict[str, Tensor]:
    """What `expected` gives, out of what the op gave."""
    if case.op == "packed":
        parts = actual["dqkvu"].unflatten(-1, (4, case.num_heads, -1)).unbind(2)
        actual = actual | dict(zip(("dq", "dk", "dv"), parts[:3], strict=True))
    rows = slice(-1, None) if case.last_row else slice(None)
    named = {name: x for name, x in actual.items() if name not in ("u", "dqkvu")}
    return {name: x[:, case.heads] if name in STATES else x[rows, :, case.heads] for name, x in named.items()}


def check(case: Case, device: str) -> dict:
    """Run one case twice: {"case", "errors", "bound", "state_bound", "bitwise", "ok"}."""
    tensors = make_inputs(case, device)
    slopes = torch.tensor(case.slopes, device=device)
    cu_seqlens = None
    if case.documents is not None:
        cu_seqlens = torch.tensor(case.documents, dtype=torch.int32, device=device)
    actual = run(case, tensors, slopes, cu_seqlens)
    wanted = expected(case, tensors, slopes, cu_seqlens)
    parts = checked_parts(case, actual)
    errors = {name: relative_error(x, wanted[name], 1 if name in STATES else 2) for name, x in parts.items()}
    row = {"case": case.name, "errors": errors, "bound": BOUNDS[case.dtype], "state_bound": STATE_BOUNDS[case.dtype]}
    if case.op == "packed" and case.dtype == torch.bfloat16:
        row |= {"bound": PACKED_BOUND, "state_bound": PACKED_STATE_BOUND}
    del wanted, parts
    row["ok"] = all(error <= row["state_bound" if name in STATES else "bound"] for name, error in errors.items())
    if case.op == "packed":
        du = actual["dqkvu"].unflatten(-1, (4, -1))[:, :, 3]
        row["ok"] &= torch.equal(du, tensors["du"])
    if not case.huge:
        again = run(case, tensors, slopes, cu_seqlens)
        row["bitwise"] = all(torch.equal(x, again[name]) for name, x in actual.items())
        row["ok"] &= row["bitwise"]
    return row


def add_growth(rows: list[dict]) -> None:
    """The last of the rows named "growth" may not be less exact than the first."""
    first, *others = (row for row in rows if row["case"].startswith("growth"))
    if not others or "errors" not in first or "errors" not in others[-1]:
        return
    last = others[-1]
    last["growth"] = {name: error / first["errors"][name] for name, error in last["errors"].items()}
    last["ok"] &= max(last["growth"].values()) <= GROWTH_BOUND


def describe(row: dict) -> str:
    """One line."""
    figures = " ".join(f"{name} {error:.1e}" for name, error in row.get("errors", {}).items())
    growth = f" growth {max(row['growth'].values()):.2f}" if "growth" in row else ""
    bits = "" if row.get("bitwise", True) else " NOT REPEATABLE"
    return f"{'ok  ' if row['ok'] else 'FAIL'} {row['case']}: {figures}{growth}{bits} {row.get('reason', '')}".rstrip()


def check_all(cases: list[Case], device: str) -> list[dict]:
    """A row for each case; one that raises fails with its reason and the next one is run."""
    rows = []
    for case in cases:
        start = time.perf_counter()
        try:
            row = check(case, device)
        except Exception as error:
            row = {"case": case.name, "ok": False, "reason": f"{type(error).__name__}: {str(error)[:500]}"}
        rows.append(row | {"seconds": round(time.perf_counter() - start, 1)})
        if case.name.startswith("growth"):
            add_growth(rows)
        print(describe(rows[-1]), flush=True)
    return rows


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", help="cuda or cpu")
    parser.add_argument("--part", metavar="PART/PARTS", help="every PARTS-th group of cases, from PART on")
    parser.add_argument("--only", metavar="TEXT", help="cases whose name has TEXT")
    parser.add_argument("--huge", action="store_true", help="the cases of more than 2^31 elements instead")
    parser.add_argument("--json", type=Path, metavar="PATH", help="save the rows")
    arguments = parser.parse_args(argv)
    cases = [case for case in CASES if case.huge == arguments.huge and (arguments.only or "") in case.name]
    if not cases:
        parser.error(f"--only: no case has {arguments.only!r}")
    if arguments.part:
        part, parts = map(int, arguments.part.split("/"))
        # A family shares its kernels, so one process compiles them once.
        families = sorted({case.family for case in cases})[part::parts]
        cases = [case for case in cases if case.family in families]
    rows = check_all(cases, arguments.device)
    save(rows, arguments.json)
    return 0 if all(row["ok"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
