"""The projection and cross-entropy in one: value and gradients of the plain formula, whatever the chunks."""

import pytest
import torch
import torch.nn.functional as F

import tnl.model.loss
from tests.closeness import assert_close
from tests.tiny_model import random_ids, tiny_model
from tnl.model.loss import IGNORE_INDEX, linear_cross_entropy

V, D = 37, 16


def inputs(N, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, D, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(V, D, generator=generator).mul(0.5).to(dtype).requires_grad_()
    labels = torch.randint(0, V, (N,), generator=generator)
    labels[::5] = IGNORE_INDEX
    return hidden, weight, labels


def plain_loss_sum(hidden, weight, labels):
    """In fp64, from the same rounded values."""
    hidden, weight = (t.detach().double().requires_grad_() for t in (hidden, weight))
    loss = F.cross_entropy(hidden @ weight.T, labels, ignore_index=IGNORE_INDEX, reduction="sum")
    return loss, *torch.autograd.grad(0.3 * loss, (hidden, weight))


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of 64 rows, the fewest that are made."""
    monkeypatch.setattr(tnl.model.loss, "CHUNK_ELEMENTS", 1)


@pytest.mark.parametrize("N", [1, 63, 64, 65, 128, 131])
@pytest.mark.usefixtures("small_chunks")
def test_loss_and_gradients_equal_the_plain_formula_across_chunks(N):
    hidden, weight, labels = inputs(N)
    labels[0] = 3
    loss, count = linear_cross_entropy(hidden, weight, labels)
    dhidden, dweight = torch.autograd.grad(0.3 * loss, (hidden, weight))
    expected = plain_loss_sum(hidden, weight, labels)
    for name, actual, value in zip(("loss", "dhidden", "dweight"), (loss, dhidden, dweight), expected, strict=True):
        assert_close(name, actual, value)
    assert count == (labels != IGNORE_INDEX).sum()


@pytest.mark.usefixtures("small_chunks")
def test_loss_and_gradients_in_bf16_stay_near_the_plain_formula():
    hidden, weight, labels = inputs(131, torch.bfloat16)
    loss, _ = linear_cross_entropy(hidden, weight, labels)
    dhidden, dweight = torch.autograd.grad(0.3 * loss, (hidden, weight))
    assert (loss.dtype, dhidden.dtype, dweight.dtype) == (torch.float32, torch.bfloat16, torch.bfloat16)
    expected = plain_loss_sum(hidden, weight, labels)
    assert_close("loss", loss, expected[0], 1e-3)
    # The logits are rounded to bf16 before the softmax, and the gradients on their way through it.
    assert_close("dhidden", dhidden, expected[1], 8e-3)
    assert_close("dweight", dweight, expected[2], 8e-3)


def test_the_scale_of_the_loss_is_not_rounded_to_bf16():
    hidden, weight, labels = inputs(20, torch.bfloat16)
    scale = 1 + 2**-9  # 1 in bf16
    loss, _ = linear_cross_entropy(hidden, weight, labels)
    (unscaled,) = torch.autograd.grad(loss, hidden, retain_graph=True)
    (scaled,) = torch.autograd.grad(1.5 * scale * loss, hidden)
    assert (scaled != 1.5 * unscaled).any()


@pytest.mark.parametrize("trained", ["hidden", "weight"])
def test_only_the_asked_gradient_is_made(trained):
    hidden, weight, labels = inputs(20)
    expected = dict(zip(("hidden", "weight"), plain_loss_sum(hidden, weight, labels)[1:], strict=True))
    leaves = {"hidden": hidden, "weight": weight}
    for name, leaf in leaves.items():
        leaf.requires_grad_(name == trained)
    (0.3 * linear_cross_entropy(hidden, weight, labels)[0]).backward()
    assert_close(trained, leaves[trained].grad, expected[trained])
    assert all(leaf.grad is None for name, leaf in leaves.items() if name != trained)


def test_the_value_is_the_same_without_gradients():
    hidden, weight, labels = inputs(20)
    with torch.no_grad():
        loss, _ = linear_cross_entropy(hidden, weight, labels)
    assert loss == linear_cross_entropy(hidden, weight, labels)[0]
    assert not loss.requires_grad


def test_large_logits_do_not_overflow():
    hidden, weight, labels = inputs(20)
    loss, _ = linear_cross_entropy(hidden.detach() * 1e3, weight, labels)
    assert_close("loss", loss, plain_loss_sum(hidden.detach() * 1e3, weight, labels)[0])


def test_a_second_derivative_is_refused():
    hidden, weight, labels = inputs(4)
    loss, _ = linear_cross_entropy(hidden, weight, labels)
    (dhidden,) = torch.autograd.grad(loss.square(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dhidden.sum().backward()


def test_model_loss_equals_cross_entropy_of_its_logits():
    model, ids = tiny_model(), random_ids(2, 9)
    labels = ids.clone()
    labels[0, :4] = IGNORE_INDEX
    output = model(ids, labels=labels, output_logits=True)
    expected = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert_close("loss", output.loss, expected)


def test_loss_is_the_sum_over_the_number_of_labelled_tokens():
    output = tiny_model()(random_ids(2, 9), labels=random_ids(2, 9, seed=1))
    assert output.num_tokens == 16
    assert output.loss == output.loss_sum / 16


def test_labels_are_shifted_inside_and_shift_labels_are_not():
    model, ids = tiny_model(), random_ids(2, 9)
    shifted = torch.cat([ids[:, 1:], torch.full((2, 1), IGNORE_INDEX)], 1)
    assert model(ids, labels=ids).loss == model(ids, shift_labels=shifted).loss


def test_labels_are_left_as_they_were():
    ids = random_ids(2, 9)
    labels = ids.clone()
    tiny_model()(ids, labels=labels)
    assert torch.equal(labels, ids)


def test_both_kinds_of_labels_are_refused():
    ids = random_ids(1, 4)
    with pytest.raises(ValueError, match="not both"):
        tiny_model()(ids, labels=ids, shift_labels=ids)


def test_without_labelled_tokens_the_loss_is_zero_and_so_are_the_gradients():
    model, ids = tiny_model(), random_ids(1, 6)
    output = model(ids, labels=torch.full_like(ids, IGNORE_INDEX))
    output.loss.backward()
    assert (output.loss.item(), output.num_tokens.item()) == (0.0, 0)
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_num_items_in_batch_replaces_the_divisor():
    ids = random_ids(1, 6)
    output = tiny_model()(ids, labels=ids, num_items_in_batch=50)
    assert output.loss == output.loss_sum / 50


def test_logits_are_made_only_when_asked_for_next_to_a_loss():
    ids = random_ids(1, 6)
    assert tiny_model()(ids, labels=ids).logits is None


def test_model_gradients_equal_those_of_the_logits():
    model, ids = tiny_model(), random_ids(2, 9)
    model(ids, labels=ids).loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    F.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    for name, p in model.named_parameters():
        assert_close(name, gradients[name], p.grad)


def test_autocast_trains_near_fp32():
    model, ids = tiny_model(), random_ids(2, 9)
    expected = model(ids, labels=ids).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(ids, labels=ids).loss
    loss.backward()
    assert_close("loss", loss, expected, 2e-2)
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())


def test_no_gradient_is_made_where_none_is_wanted(monkeypatch):
    hidden, weight, labels = inputs(70)
    expected, _ = linear_cross_entropy(hidden, weight, labels)

    def refuse(*arguments, **options):
        raise AssertionError("a gradient was made")

    monkeypatch.setattr(torch, "mm", refuse)
    with pytest.raises(AssertionError, match="a gradient was made"):
        linear_cross_entropy(hidden, weight, labels)
    with torch.no_grad():
        assert linear_cross_entropy(hidden, weight, labels)[0] == expected
    with torch.inference_mode():
        assert linear_cross_entropy(hidden, weight, labels)[0] == expected
