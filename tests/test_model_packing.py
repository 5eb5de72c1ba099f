"""Documents packed into one sequence do not see each other; gradient checkpointing recomputes and changes nothing."""

import pytest
import torch

from tests.closeness import assert_close
from tests.tiny_model import random_ids, tiny_model

LENGTHS = [5, 1, 70, 1, 12]


def packed_ids():
    ids = random_ids(1, sum(LENGTHS))
    return ids, torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0)], dtype=torch.int32)


@pytest.mark.parametrize("lrpe", [[1, 0], []], ids=str)
def test_packed_logits_equal_those_of_each_document_alone(lrpe):
    model, (ids, cu_seqlens) = tiny_model(linear_use_lrpe_list=lrpe), packed_ids()
    alone = torch.cat([model(document).logits for document in ids.split(LENGTHS, 1)], 1)
    assert_close("logits", model(ids, cu_seqlens=cu_seqlens).logits, alone)


def test_packed_loss_and_gradients_equal_the_sum_over_documents():
    model, (ids, cu_seqlens) = tiny_model(), packed_ids()
    model.train()
    labels = ids.clone()
    labels[0, cu_seqlens[:-1].long()] = -100
    packed = model(ids, labels=labels, cu_seqlens=cu_seqlens)
    packed.loss_sum.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    outputs = [model(document, labels=document) for document in ids.split(LENGTHS, 1)]
    alone = sum(output.loss_sum for output in outputs)
    alone.backward()
    assert_close("loss", packed.loss_sum, alone)
    assert packed.num_tokens == sum(output.num_tokens for output in outputs) == sum(LENGTHS) - len(LENGTHS)
    for name, p in model.named_parameters():
        assert_close(name, gradients[name], p.grad)


@pytest.mark.parametrize(
    ("offsets", "message"),
    [([0, 5], "last offset"), ([1, 9], "first offset"), ([0, 6, 4, 9], "never decrease")],
)
def test_wrong_cu_seqlens_are_refused(offsets, message):
    with pytest.raises(ValueError, match=message):
        tiny_model()(random_ids(1, 9), cu_seqlens=torch.tensor(offsets, dtype=torch.int32))


def test_a_padded_packed_batch_is_refused():
    mask = torch.ones(1, 9)
    mask[0, 0] = 0
    with pytest.raises(ValueError, match="packed sequences have no padding"):
        tiny_model()(random_ids(1, 9), attention_mask=mask, cu_seqlens=torch.tensor([0, 9], dtype=torch.int32))


def gradients_and_calls(model, **inputs):
    """Gradients by name, and how often the first block ran forward."""
    calls = []
    handle = model.model.layers[0].channel_mixer.register_forward_pre_hook(lambda *_: calls.append(1))
    model.zero_grad()
    model(**inputs).loss.backward()
    handle.remove()
    return {name: p.grad.clone() for name, p in model.named_parameters()}, len(calls)


@pytest.mark.parametrize("packed", [False, True], ids=["batch", "packed"])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_recomputes_and_changes_no_gradient(packed, use_reentrant):
    model, (ids, cu_seqlens) = tiny_model().train(), packed_ids()
    inputs = dict(input_ids=ids, labels=ids, cu_seqlens=cu_seqlens if packed else None)
    expected, calls = gradients_and_calls(model, **inputs)
    assert calls == 1
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    gradients, calls = gradients_and_calls(model, **inputs)
    assert calls == 2
    for name, gradient in gradients.items():
        assert_close(name, gradient, expected[name])


def test_gradient_checkpointing_keeps_the_state():
    model, ids = tiny_model().train(), random_ids(1, 20)
    expected = model(ids, use_cache=True).past_key_values
    model.gradient_checkpointing_enable({"use_reentrant": False})
    state = model(ids, use_cache=True).past_key_values
    for a, b in zip(state.layers, expected.layers, strict=True):
        assert_close("state", a, b)
