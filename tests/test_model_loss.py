"""The projection and cross-entropy in one: value and gradients of the plain formula, whatever the chunks."""

import pytest
import tnl_kernels.dispatch
import torch
import torch.nn.functional as F
from torch import library

import tnl.model.loss
from tests.closeness import assert_close
from tests.tiny_model import random_ids, tiny_model
from tnl.model.loss import IGNORE_INDEX, chunk_rows, linear_cross_entropy, linear_cross_entropy_op
from tnl.model.modeling import LanguageModelHead

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


@pytest.mark.parametrize("of_loss", [lambda loss: loss, torch.square])
def test_a_second_derivative_is_refused(of_loss):
    hidden, weight, labels = inputs(4)
    loss, _ = linear_cross_entropy(hidden, weight, labels)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(of_loss(loss), hidden, create_graph=True)


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


def test_no_memory_is_taken_for_a_gradient_that_is_not_wanted():
    hidden, weight, labels = inputs(20)
    for need_dhidden in (True, False):
        for need_dweight in (True, False):
            with torch.no_grad():
                _, *made = linear_cross_entropy_op(hidden, weight, labels, torch.float32, need_dhidden, need_dweight)
            assert [x.numel() for x in made] == [need_dhidden * hidden.numel(), need_dweight * weight.numel()]


@pytest.mark.parametrize(("trains_hidden", "trains_weight"), [(True, True), (True, False), (False, True)])
def test_opcheck(trains_hidden, trains_weight):
    hidden, weight, labels = inputs(9)
    hidden.requires_grad_(trains_hidden)
    weight.requires_grad_(trains_weight)
    arguments = (hidden, weight, labels, torch.float32, trains_hidden, trains_weight)
    library.opcheck(linear_cross_entropy_op, arguments)


@pytest.mark.parametrize("trains_weight", [True, False])
def test_the_head_compiles_to_one_graph(trains_weight):
    hidden, weight, labels = inputs(12)
    head = LanguageModelHead(D, V, bias=False)
    head.weight = torch.nn.Parameter(weight.detach(), requires_grad=trains_weight)
    leaves = [hidden, head.weight] if trains_weight else [hidden]
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(hidden, labels):
        loss_sum, num_tokens = head(torch.tanh(hidden).view(3, 4, D), labels.view(3, 4))
        return loss_sum / num_tokens

    loss_sum, num_tokens = head(torch.tanh(hidden), labels)
    expected = loss_sum / num_tokens
    loss = compiled(hidden, labels)
    assert_close("loss", loss, expected)
    gradients = zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, leaves), strict=True)
    for name, (actual, value) in zip(("dhidden", "dweight"), gradients, strict=False):
        assert_close(name, actual, value)
    with torch.no_grad():
        assert_close("loss", compiled(hidden, labels), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_close("loss", compiled(hidden, labels), expected, 2e-2)


@pytest.mark.usefixtures("small_chunks")
def test_autocast_rounds_the_factors_and_not_the_gradients():
    hidden, weight, labels = inputs(131)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _ = linear_cross_entropy(hidden, weight, labels)
    dhidden, dweight = torch.autograd.grad(0.3 * loss, (hidden, weight))
    assert (loss.dtype, dhidden.dtype, dweight.dtype) == (torch.float32,) * 3
    expected = plain_loss_sum(hidden.bfloat16(), weight.bfloat16(), labels)
    for name, actual, value in zip(("loss", "dhidden", "dweight"), (loss, dhidden, dweight), expected, strict=True):
        # As in bf16: the logits are rounded before the softmax, and the gradients on their way through it.
        assert_close(name, actual, value, 8e-3)


@pytest.mark.skipif(
    torch.cuda.is_available() or not tnl_kernels.dispatch.HAS_TRITON, reason="needs Triton's interpreter"
)
@pytest.mark.usefixtures("small_chunks")
def test_the_triton_form_inside(monkeypatch):
    monkeypatch.setitem(tnl_kernels.dispatch.FORM_OF_DEVICE, "cpu", "triton")
    hidden, weight, labels = inputs(70)
    loss, _ = linear_cross_entropy(hidden, weight, labels)
    actual = loss, *torch.autograd.grad(0.3 * loss, (hidden, weight))
    for name, a, e in zip(("loss", "dhidden", "dweight"), actual, plain_loss_sum(hidden, weight, labels), strict=True):
        assert_close(name, a, e)


def test_no_rows():
    hidden, weight, labels = inputs(0)
    loss, count = linear_cross_entropy(hidden, weight, labels)
    dhidden, dweight = torch.autograd.grad(loss, (hidden, weight))
    assert (loss.item(), count.item(), dhidden.shape) == (0.0, 0, (0, D))
    assert not dweight.any()


def test_shapes_are_found_without_data():
    hidden, weight, labels = (x.to("meta") for x in inputs(20))
    loss, count = linear_cross_entropy(hidden, weight, labels)
    assert (loss.shape, loss.dtype, count.shape, loss.requires_grad) == ((), torch.float32, (), True)


def test_a_nan_is_seen_in_the_loss():
    hidden, weight, labels = inputs(20)
    with torch.no_grad():
        weight[5, 5] = float("nan")
    assert linear_cross_entropy(hidden, weight, labels)[0].isnan()


def test_two_runs_are_bitwise_equal():
    results = []
    for _ in range(2):
        hidden, weight, labels = inputs(131, torch.bfloat16)
        loss, _ = linear_cross_entropy(hidden, weight, labels)
        results.append((loss, *torch.autograd.grad(loss, (hidden, weight))))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_chunks_on_a_gpu_are_equal_and_fit_the_budget():
    gpu = torch.device("cuda")
    assert [chunk_rows(N, 64000, gpu) for N in (0, 1, 8192, 16384, 17000, 131072)] == [128, 128, 4096, 4096, 3456, 4096]


@pytest.mark.gpu
@pytest.mark.parametrize("vocab_size", [1000, 1003])
@pytest.mark.parametrize("trained", [("hidden", "weight"), ("hidden",), ("weight",)])
def test_chunks_on_a_gpu_equal_the_plain_formula(monkeypatch, vocab_size, trained):
    monkeypatch.setattr(tnl.model.loss, "GPU_CHUNK_ELEMENTS", 256 * vocab_size)
    generator = torch.Generator().manual_seed(0)
    leaves = {
        "hidden": torch.randn(1000, 64, generator=generator).bfloat16().cuda(),
        "weight": torch.randn(vocab_size, 64, generator=generator).mul(0.3).bfloat16().cuda(),
    }
    labels = torch.randint(0, vocab_size, (1000,), generator=generator).cuda()
    labels[::7] = IGNORE_INDEX
    expected = dict(zip(("loss", "hidden", "weight"), plain_loss_sum(**leaves, labels=labels), strict=True))
    for name in trained:
        leaves[name].requires_grad_()
    loss, _ = linear_cross_entropy(**leaves, labels=labels)
    assert_close("loss", loss, expected["loss"], 1e-3)
    gradients = torch.autograd.grad(0.3 * loss, [leaves[name] for name in trained])
    for name, gradient in zip(trained, gradients, strict=True):
        assert gradient.dtype == torch.bfloat16
        # The logits are rounded to bf16 before the softmax, and the gradients on their way through it.
        assert_close(name, gradient, expected[name], 8e-3)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"hidden": torch.zeros(2, 3, 4)}, r"hidden: got shape \(2, 3, 4\), expected \[N, D\]"),
        ({"weight": torch.zeros(9, 5)}, r"weight: got shape \(9, 5\), expected \[vocabulary, D\] = \(9, 4\)"),
        ({"labels": torch.zeros(7, dtype=torch.int64)}, r"labels: got shape \(7,\), expected \[N\] = \(6,\)"),
        ({"labels": torch.zeros(6)}, "labels: got dtype float32, expected int64"),
        ({"hidden": torch.zeros(6, 4).bfloat16()}, "hidden: got dtype bfloat16, expected float32"),
        ({"weight": torch.zeros(9, 4, device="meta")}, "weight: got a tensor on meta, expected cpu"),
    ],
)
def test_what_does_not_fit_is_refused(wrong, message):
    given = {"hidden": torch.zeros(6, 4), "weight": torch.zeros(9, 4), "labels": torch.zeros(6, dtype=torch.int64)}
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**given | wrong)
