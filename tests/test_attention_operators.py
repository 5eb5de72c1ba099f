"""The Triton forms of attention as operators of torch: opcheck, the compiler, checkpointing, and what they refuse."""

import functools

import pytest
import tnl_kernels.attention_triton
import tnl_kernels.packed_triton
import torch
import torch._dynamo.testing
import torch.utils.checkpoint
from tnl_kernels import lightning_attention, lightning_attention_packed, lightning_attention_state
from tnl_kernels.dispatch import FORM_OF_DEVICE
from torch import library
from torch._functorch.aot_autograd import aot_module_simplified

from tests.attention_inputs import ALIBI, int32, random_inputs, random_packed

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OPS = torch.ops.tnl_kernels
PACKED_FWD = OPS.lightning_attention_packed_fwd.default
PACKED_BWD = OPS.lightning_attention_packed_bwd.default
T = 5


@pytest.fixture(autouse=True)
def _triton_form(monkeypatch):
    """The public ops take the Triton forms, also on CPU tensors."""
    monkeypatch.setitem(FORM_OF_DEVICE, "cpu", "triton")
    torch._dynamo.reset()


def slopes():
    return torch.tensor(ALIBI, device=DEVICE)


def problem(T=T, K=16, V=16, N=1):
    """q, k, v, state, do, dfinal."""
    return random_inputs(T, K, V, N=N, device=DEVICE)


# opcheck


def op_cases():
    """(op, options) -> arguments, with what an op may be called without."""
    cases = {}
    for cu_seqlens in (None, int32(0, 0, 2, T, device=DEVICE)):
        q, k, v, state, do, dfinal = problem(N=1 if cu_seqlens is None else 3)
        k = k.transpose(1, 2).contiguous().transpose(1, 2)
        qkvu, du = random_packed(T, 16, device=DEVICE)
        what = "documents" if cu_seqlens is not None else "rows"
        wide = state[..., :1].expand_as(state)
        for given in (True, False) if cu_seqlens is None else (True,):
            name = f"{what}, {'everything' if given else 'nothing'} given"
            optional = [x if given else None for x in (do, du, state, dfinal)]
            some_do, some_du, some_state, some_dfinal = optional
            cases |= {
                ("fwd", name): (q, k, v, slopes(), some_state, cu_seqlens, given),
                ("bwd", name): (q, k, v, some_do, slopes(), some_state, some_dfinal, cu_seqlens, given),
                ("state_fwd", name): (k, v, slopes(), some_state, cu_seqlens),
                ("state_bwd", name): (k, v, dfinal if given else wide, slopes(), cu_seqlens),
                ("packed_fwd", name): (qkvu, slopes(), 2, given, some_state, cu_seqlens, given),
                ("packed_bwd", name): (
                    qkvu, some_do, some_du, slopes(), 2, given, some_state, some_dfinal, cu_seqlens, given
                ),
            }  # fmt: skip
    return cases


@pytest.mark.parametrize(("op", "name"), op_cases())
def test_is_an_operator_of_torch(op, name):
    arguments = op_cases()[op, name]
    if op in ("fwd", "state_fwd"):  # the packed op has its gradient around it
        arguments = tuple(
            x.detach().requires_grad_() if isinstance(x, torch.Tensor) and x.dim() == 4 else x for x in arguments
        )
    library.opcheck(getattr(OPS, f"lightning_attention_{op}").default, arguments)


# The compiler


def plain(x, weight, state, cu_seqlens):
    q, k, v, u = (x @ weight).unflatten(-1, (4, 2, 16)).unbind(2)
    o, final = lightning_attention(
        q, k, v, slopes(), initial_state=state, output_final_state=True, cu_seqlens=cu_seqlens
    )
    return o * u, final


def state_only(x, weight, state, cu_seqlens):
    _, k, v, _ = (x @ weight).unflatten(-1, (4, 2, 16)).unbind(2)
    return (lightning_attention_state(k, v, slopes(), initial_state=state, cu_seqlens=cu_seqlens),)


def packed(x, weight, state, cu_seqlens):
    o, u, final = lightning_attention_packed(
        x @ weight, slopes(), num_heads=2, initial_state=state, output_final_state=True, cu_seqlens=cu_seqlens
    )
    return o.flatten(2) * u, final


def packed_alone(x, weight, state, cu_seqlens):
    o, u, _ = lightning_attention_packed(x @ weight, slopes(), num_heads=2, cu_seqlens=cu_seqlens)
    return o, u


def leaves_of(T=T, N=1):
    """x, the projection's weight and a state."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((1, T, 8), (8, 128), (N, 2, 16, 16))
    return [torch.randn(*shape, generator=generator).to(DEVICE).requires_grad_() for shape in shapes]


def gradients_of(outputs, leaves):
    return torch.autograd.grad(sum(x.square().sum() for x in outputs), leaves, materialize_grads=True)


DOCUMENTS = (0, 3, 3, T)


@pytest.mark.parametrize(
    ("function", "documents"),
    [(plain, None), (plain, DOCUMENTS), (state_only, DOCUMENTS), (packed, DOCUMENTS), (packed_alone, None)],
)
def test_compiles_to_one_graph(function, documents):
    leaves = leaves_of(N=len(documents) - 1 if documents else 1)
    cu_seqlens = int32(*documents, device=DEVICE) if documents else None
    expected = function(*leaves, cu_seqlens)
    actual = torch.compile(function, fullgraph=True, backend="aot_eager")(*leaves, cu_seqlens)
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a, e)
    for a, e in zip(gradients_of(actual, leaves), gradients_of(expected, leaves), strict=True):
        assert torch.equal(a, e)


@pytest.mark.parametrize("function", [plain, packed])
def test_compiles_once_for_all_lengths(function):
    count = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, backend=count)
    for length in (5, 20, 9):
        leaves = leaves_of(length)
        torch._dynamo.mark_dynamic(leaves[0], 1)
        actual, expected = compiled(*leaves, None), function(*leaves, None)
        for a, e in zip(gradients_of(actual, leaves), gradients_of(expected, leaves), strict=True):
            assert torch.equal(a, e)
    assert count.frame_count == 1


def test_the_compiled_packed_op_has_one_packed_gradient():
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def backend(graph, inputs):
        return aot_module_simplified(graph, inputs, fw_compiler=keep, bw_compiler=keep)

    leaves = leaves_of()
    gradients_of(torch.compile(packed, fullgraph=True, backend=backend)(*leaves, None), leaves)
    forward, backward = ([node.target for node in graph.graph.nodes] for graph in graphs)
    assert forward.count(PACKED_FWD) == 1
    assert backward.count(PACKED_BWD) == 1
    assert PACKED_FWD not in backward
    # The gradient of u goes into the op: no sum and no concatenation of tensors as large as qkvu.
    names = " ".join(map(str, backward))
    assert not any(name in names for name in ("aten.add", "aten.cat", "slice_backward", "slice_scatter"))


# Checkpointing


@pytest.mark.parametrize("keep", [True, False])
def test_checkpointing_can_keep_the_packed_op(keep, monkeypatch):
    calls = []
    launch = tnl_kernels.packed_triton.forward
    monkeypatch.setattr(tnl_kernels.packed_triton, "forward", lambda *args: (calls.append(1), launch(*args)))
    policies = torch.utils.checkpoint.CheckpointPolicy

    def policy(ctx, op, *args, **kwargs):
        return policies.MUST_SAVE if keep and op == PACKED_FWD else policies.PREFER_RECOMPUTE

    leaves = leaves_of()
    expected = gradients_of(packed(*leaves, None), leaves)
    calls.clear()
    outputs = torch.utils.checkpoint.checkpoint(
        packed,
        *leaves,
        None,
        use_reentrant=False,
        context_fn=functools.partial(torch.utils.checkpoint.create_selective_checkpoint_contexts, policy),
    )
    gradients = gradients_of(outputs, leaves)
    assert len(calls) == (1 if keep else 2)
    assert all(torch.equal(a, e) for a, e in zip(gradients, expected, strict=True))


def test_what_is_kept_for_the_backward_pass():
    q, k, v, state, _, _ = (x.requires_grad_() for x in problem())
    qkvu = random_packed(T, 16, device=DEVICE)[0].requires_grad_()
    for given, run in (
        ((q, k, v, state), lambda: lightning_attention(q, k, v, slopes(), initial_state=state)),
        ((k, v), lambda: lightning_attention_state(k, v, slopes(), initial_state=state)),
        ((qkvu, state), lambda: lightning_attention_packed(qkvu, slopes(), num_heads=2, initial_state=state)),
    ):
        kept = set()

        def keep(x, kept=kept):
            kept.add(x.data_ptr() if x.dim() > 1 else None)  # slopes aside
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            run()
        assert kept == {None, *(x.data_ptr() for x in given)}


# What is refused. Values are looked at in host memory only, so these are CPU tensors on every machine.


def good(**wrong):
    """Arguments of all three ops, by op."""
    x = torch.zeros(1, 8, 2, 16)
    common = {"slopes": torch.tensor(ALIBI)}
    arguments = {
        lightning_attention: {"q": x, "k": x, "v": x, **common},
        lightning_attention_state: {"k": x, "v": x, **common},
        lightning_attention_packed: {"qkvu": torch.zeros(1, 8, 128), "num_heads": 2, **common},
    }
    optional = {"initial_state", "cu_seqlens"}
    return {
        op: given | wrong for op, given in arguments.items() if all(name in given or name in optional for name in wrong)
    }


def on_meta(*shape, dtype=torch.float32):
    return torch.empty(*shape, dtype=dtype, device="meta")


STATE_SHAPE = r"initial_state: got shape \(.*\), expected \[N, H, K, [KV]\] = \(1, 2, 16, 16\)"
DEVICES = "got a tensor on meta, expected cpu like the other arguments"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"k": torch.zeros(8, 2, 16)}, r"k: got shape \(8, 2, 16\), expected \[B, T, H, K\]"),
        ({"k": torch.zeros(1, 2, 8, 16)}, r"(v|q): got shape \(1, 8, 2, 16\), expected \[B, T, H, [KV]\]"),
        ({"q": torch.zeros(1, 8, 2, 32)}, r"q: got shape \(1, 8, 2, 32\), .* the shape of k = \(1, 8, 2, 16\)"),
        ({"v": torch.zeros(1, 8, 3, 16)}, r"v: got shape \(1, 8, 3, 16\), expected \[B, T, H, V\] = \(1, 8, 2, 16\)"),
        ({"v": torch.zeros(1, 8, 2, 16).half()}, "v: got dtype float16, expected float32"),
        ({"qkvu": torch.zeros(8, 128)}, r"qkvu: got shape \(8, 128\), expected \[B, T, 4 \* H \* K\]"),
        ({"slopes": torch.tensor([[0.1, 0.2]])}, r"slopes: got shape \(1, 2\), expected \[H\] = \(2,\)"),
        ({"slopes": torch.tensor([0.5, -0.5])}, r"slopes: got \[0.5, -0.5\], expected finite values >= 0"),
        ({"slopes": torch.tensor([0.5, float("nan")])}, "slopes: got .*nan.*, expected finite values >= 0"),
        ({"cu_seqlens": int32(0, 7)}, "cu_seqlens: got 7 as the last offset, expected T = 8"),
        ({"cu_seqlens": int32(0, 9, 8)}, r"cu_seqlens: got decreasing offsets \[0, 9, 8\]"),
        ({"cu_seqlens": torch.tensor([0, 8])}, "cu_seqlens: got dtype int64, expected int32"),
        ({"initial_state": torch.zeros(2, 2, 16, 16)}, STATE_SHAPE),
        ({"initial_state": torch.zeros(1, 2, 16, 17)}, STATE_SHAPE),
        ({"initial_state": torch.zeros(1, 2, 16, 16).half()}, "initial_state: got dtype float16, expected float32"),
        ({"initial_state": torch.zeros(1, 2, 16, 16).double()}, "initial_state: got dtype float64, expected float32"),
        ({"q": on_meta(1, 8, 2, 16)}, f"q: {DEVICES}"),
        ({"v": on_meta(1, 8, 2, 16)}, f"v: {DEVICES}"),
        ({"slopes": on_meta(2)}, f"slopes: {DEVICES}"),
        ({"initial_state": on_meta(1, 2, 16, 16)}, f"initial_state: {DEVICES}"),
        ({"cu_seqlens": on_meta(2, dtype=torch.int32)}, f"cu_seqlens: {DEVICES}"),
    ],
)
def test_wrong_arguments_are_named(wrong, message):
    cases = good(**wrong)
    assert cases
    for op, arguments in cases.items():
        with pytest.raises(ValueError, match=message):
            op(**arguments)


@pytest.mark.parametrize(("K", "V", "name"), [(257, 16, "k"), (16, 257, "v"), (512, 512, "k")])
def test_head_dims_that_do_not_fit_on_chip_are_refused(K, V, name):
    k, v = torch.zeros(1, 3, 2, K), torch.zeros(1, 3, 2, V)
    message = f"{name}: got head dim {max(K, V)}, expected 1 to 256"
    with pytest.raises(ValueError, match=message):
        lightning_attention(k, k, v, torch.tensor(ALIBI))
    with pytest.raises(ValueError, match=message):
        lightning_attention_state(k, v, torch.tensor(ALIBI))
    if K == V:
        with pytest.raises(ValueError, match=message):
            lightning_attention_packed(torch.zeros(1, 3, 8 * K), torch.tensor(ALIBI), num_heads=2)
