"""Cross-entropy that leaves its gradient in place of the logits: both forms against the definition in fp64."""

import pytest
import torch
import torch.nn.functional as F
from tnl_kernels import cross_entropy_
from tnl_kernels.cross_entropy import torch_cross_entropy_
from tnl_kernels.naive import naive_cross_entropy_
from torch import library

from tests.closeness import assert_close

pytest.importorskip("triton")

from tnl_kernels.cross_entropy_triton import cross_entropy_op, triton_cross_entropy_

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IGNORE_INDEX = -100
both_forms = pytest.mark.parametrize("form", [torch_cross_entropy_, triton_cross_entropy_])
half = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])


def random_logits(N, V, dtype=torch.float32):
    """Logits [N, V] and labels [N], every third row without one."""
    generator = torch.Generator().manual_seed(N + V)
    logits = torch.randn(N, V, generator=generator).mul(3).to(DEVICE, dtype)
    labels = torch.randint(0, V, (N,), generator=generator)
    labels[::3] = IGNORE_INDEX
    return logits, labels.to(DEVICE)


def check_against_definition(form, logits, labels):
    """Losses and gradient near the definition in fp64."""
    expected_gradient = logits.double()
    expected = naive_cross_entropy_(expected_gradient, labels)
    losses = form(logits, labels)
    assert losses.dtype == torch.float32
    assert_close("losses", losses, expected)
    assert_close("gradient", logits, expected_gradient)


def test_the_definition_is_cross_entropy():
    logits, labels = random_logits(20, 37, torch.float64)
    leaf = logits.clone().requires_grad_()
    expected = F.cross_entropy(leaf, labels, ignore_index=IGNORE_INDEX, reduction="none")
    assert_close("losses", naive_cross_entropy_(logits, labels), expected.detach())
    assert_close("gradient", logits, *torch.autograd.grad(expected.sum(), leaf))


# Around a tile of 16,384 logits, and the vocabulary of TNL.
@both_forms
@pytest.mark.parametrize("V", [1, 2, 37, 1000, 16383, 16384, 16385, 64000])
def test_equals_the_definition_at_every_vocabulary(form, V):
    check_against_definition(form, *random_logits(4, V))


@pytest.mark.gpu
@half
@pytest.mark.parametrize("V", [37, 1000, 16385, 64000])
def test_half_precision_is_rounded_once(V, dtype):
    check_against_definition(triton_cross_entropy_, *random_logits(300, V, dtype))


@both_forms
@pytest.mark.parametrize("label", [0, 16383, 16384, 19999])
def test_a_label_on_either_side_of_a_tile(form, label):
    logits, _ = random_logits(1, 20000)
    check_against_definition(form, logits, torch.full((1,), label, device=DEVICE))


@both_forms
def test_rows_without_a_label_have_no_loss_and_no_gradient(form):
    logits, labels = random_logits(5, 37)
    assert not form(logits, labels.fill_(IGNORE_INDEX)).any()
    assert not logits.any()


def test_logits_of_rows_without_a_label_are_not_read():
    logits, labels = random_logits(4, 37)
    logits[labels == IGNORE_INDEX] = float("nan")
    losses = triton_cross_entropy_(logits, labels)
    assert torch.isfinite(losses).all()
    assert torch.isfinite(logits).all()


@both_forms
def test_without_gradient_the_logits_stay(form):
    logits, labels = random_logits(5, 1000)
    before = logits.clone()
    losses = form(logits, labels, gradient=False)
    assert torch.equal(logits, before)
    assert torch.equal(losses, form(logits, labels))


@both_forms
def test_large_logits_do_not_overflow(form):
    logits, labels = random_logits(6, 20000)
    check_against_definition(form, logits * 1e4, labels)


@both_forms
def test_logits_of_minus_infinity_are_classes_that_cannot_be(form):
    logits, labels = random_logits(2, 40000)
    logits[:, :20000] = float("-inf")  # the whole first tile
    check_against_definition(form, logits, labels.fill_(30000))


@both_forms
def test_a_nan_is_seen_in_the_loss(form):
    logits, labels = random_logits(3, 20000)
    logits[1, 7] = float("nan")
    losses = form(logits, labels.fill_(5))
    assert losses.isnan().tolist() == [False, True, False]


def test_another_label_to_ignore():
    logits, labels = random_logits(4, 37)
    losses = triton_cross_entropy_(logits, labels.fill_(3), ignore_index=3)
    assert not losses.any()
    assert not logits.any()


def test_a_wrong_label_is_seen_in_the_loss():
    logits, _ = random_logits(3, 37)
    losses = triton_cross_entropy_(logits, torch.tensor([36, 37, -1], device=DEVICE))
    assert losses.isnan().tolist() == [False, True, True]


def test_any_strides():
    logits, labels = random_logits(4, 50)
    check_against_definition(triton_cross_entropy_, logits.t().contiguous().t(), labels.repeat_interleave(2)[::2])


def test_two_runs_are_bitwise_equal():
    results = []
    for _ in range(2):
        logits, labels = random_logits(5, 20000)
        results.append((triton_cross_entropy_(logits, labels), logits))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@both_forms
def test_no_rows(form):
    logits, labels = random_logits(0, 37)
    assert form(logits, labels).shape == (0,)


@pytest.mark.parametrize("gradient", [True, False])
def test_opcheck(gradient):
    library.opcheck(cross_entropy_op, (*random_logits(4, 37), IGNORE_INDEX, gradient))


@pytest.mark.gpu
def test_the_public_op_takes_the_triton_form_on_a_gpu():
    logits, labels = random_logits(4, 1000, torch.bfloat16)
    expected = logits.clone()
    assert torch.equal(cross_entropy_(logits, labels), triton_cross_entropy_(expected, labels))
    assert torch.equal(logits, expected)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(logits=torch.zeros(3)), r"logits: got shape \(3,\), expected \[N, vocabulary\]"),
        (dict(logits=torch.zeros(3, 4, dtype=torch.int64)), "logits: got dtype int64, expected float32, bfloat16"),
        (dict(labels=torch.zeros(4, dtype=torch.int64)), r"labels: got shape \(4,\), expected \[N\] = \(3,\)"),
        (dict(labels=torch.zeros(3, dtype=torch.int32)), "labels: got dtype int32, expected int64"),
    ],
)
def test_wrong_arguments_are_named(wrong, message):
    good = dict(logits=torch.zeros(3, 4), labels=torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match=message):
        cross_entropy_(**{**good, **wrong})
