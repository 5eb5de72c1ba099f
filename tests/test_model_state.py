"""`TransnormerState`: continuing from it equals reading everything at once, and nothing is remembered elsewhere."""

import os
import re
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.closeness import assert_close
from tests.tiny_model import random_ids, tiny_model
from tnl.model import TransnormerState
from tnl.model.state import _checksum, state_bytes


def read(model, ids, **inputs):
    """State after ``ids``."""
    with torch.no_grad():
        return model(ids, use_cache=True, **inputs).past_key_values


def read_in_pieces(model, ids, size):
    """Logits of ``ids`` read ``size`` tokens at a time."""
    state = TransnormerState()
    with torch.no_grad():
        return torch.cat([model(piece, past_key_values=state).logits for piece in ids.split(size, 1)], 1)


def assert_equal_states(actual, expected, ratio=None):
    assert torch.equal(actual.positions, expected.positions)
    assert len(actual.layers) == len(expected.layers)
    for i, (a, e) in enumerate(zip(actual.layers, expected.layers, strict=True)):
        assert_close(f"layer {i}", a, e, ratio)


@pytest.mark.parametrize("lrpe", [[1, 0], [0, 1], []], ids=str)
@pytest.mark.parametrize("size", [1, 7, 64])
def test_reading_in_pieces_equals_reading_at_once(size, lrpe):
    model, ids = tiny_model(linear_use_lrpe_list=lrpe), random_ids(2, 130)
    with torch.no_grad():
        expected = model(ids).logits
    assert_close("logits", read_in_pieces(model, ids, size), expected)


def test_token_by_token_after_a_prefill_equals_reading_at_once():
    model, ids = tiny_model(), random_ids(2, 90)
    state = TransnormerState()
    pieces = [ids[:, :75], *ids[:, 75:].split(1, 1)]
    with torch.no_grad():
        logits = torch.cat([model(piece, past_key_values=state).logits for piece in pieces], 1)
        assert_close("logits", logits, model(ids).logits)


def test_steps_with_gradients_equal_steps_without():
    model, ids = tiny_model(), random_ids(1, 12)
    state, logits = TransnormerState(), []
    for token in ids.split(1, 1):
        logits.append(model(token, past_key_values=state).logits)
    assert_close("logits", torch.cat(logits, 1), read_in_pieces(model, ids, 1))


def test_bf16_steps_stay_near_the_bf16_prefill():
    model, ids = tiny_model().bfloat16(), random_ids(2, 130)
    with torch.no_grad():
        expected = model(ids).logits
    # The outputs are summed in another order, and a value rounded to the other side moves what follows (2.9e-3).
    assert_close("logits", read_in_pieces(model, ids, 1), expected, 8e-3)


def test_positions_and_length_count_the_tokens_read():
    model, state = tiny_model(), TransnormerState()
    for size in (5, 1, 3):
        model(random_ids(2, size), past_key_values=state)
    assert state.positions.tolist() == [9, 9]
    assert state.get_seq_length() == state.length == 9


def test_padding_counts_as_length_and_not_as_position():
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    state = read(tiny_model(), random_ids(2, 4), attention_mask=mask)
    assert (state.positions.tolist(), state.length) == ([2, 4], 4)


def test_the_state_is_fp32_in_a_bf16_model():
    assert {s.dtype for s in read(tiny_model().bfloat16(), random_ids(1, 4)).layers} == {torch.float32}


def test_the_size_does_not_grow_with_the_length():
    model = tiny_model()
    short = read(model, random_ids(2, 1)).num_bytes()
    # Layer 0 has LRPE: its keys are twice as wide.
    assert short == read(model, random_ids(2, 150)).num_bytes() == 4 * 2 * 4 * 8 * (16 + 8)
    assert short == state_bytes(model.config, 2)


def test_an_empty_state_has_no_size():
    assert TransnormerState().num_bytes() == 0


def test_the_same_prompt_twice_gives_the_same_logits():
    model, ids = tiny_model(), random_ids(1, 20)
    assert torch.equal(read_in_pieces(model, ids, 3), read_in_pieces(model, ids, 3))


def test_modules_hold_nothing_after_a_forward_pass():
    model = tiny_model()
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    read(model, random_ids(1, 5))
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before
    assert not list(model.buffers())


def test_two_interleaved_generations_do_not_touch_each_other():
    model = tiny_model()
    streams = [random_ids(1, 30, seed=seed) for seed in (0, 1)]
    states, logits = [TransnormerState(), TransnormerState()], [[], []]
    with torch.no_grad():
        for t in range(30):
            for ids, state, collected in zip(streams, states, logits, strict=True):
                collected.append(model(ids[:, t : t + 1], past_key_values=state).logits)
    for ids, collected in zip(streams, logits, strict=True):
        assert torch.equal(torch.cat(collected, 1), read_in_pieces(model, ids, 1))


@pytest.mark.parametrize("T", [1, 5])
def test_a_fork_continues_independently(T):
    model, ids = tiny_model(), random_ids(2, 9)
    state = read(model, ids)
    before = [layer.clone() for layer in state.layers]
    fork = state.fork()
    with torch.no_grad():
        model(random_ids(2, T, seed=1), past_key_values=fork)
    assert all(torch.equal(a, b) for a, b in zip(state.layers, before, strict=True))
    assert (fork.positions.tolist(), fork.length) == ([9 + T] * 2, 9 + T)
    assert (state.positions.tolist(), state.length) == ([9, 9], 9)


def test_reordering_picks_sequences():
    model, ids = tiny_model(), random_ids(3, 9)
    state = read(model, ids, attention_mask=torch.tensor([[1] * 9, [0] * 4 + [1] * 5, [1] * 9]))
    before = state.fork()
    state.reorder_cache(torch.tensor([2, 1, 1, 0]))
    assert state.positions.tolist() == [9, 5, 5, 9]
    for a, b in zip(state.layers, before.layers, strict=True):
        assert torch.equal(a, b[[2, 1, 1, 0]])


def storage(state):
    return [tensor.data_ptr() for tensor in (*state.layers, state.positions)]


def test_steps_and_reordering_keep_the_storage():
    # A captured CUDA graph holds the addresses.
    model = tiny_model()
    state = read(model, random_ids(3, 9))
    before, rows = storage(state), state.fork()
    state.reorder_cache(torch.tensor([2, 0, 0]))
    for a, b in zip(state.layers, rows.layers, strict=True):
        assert torch.equal(a, b[[2, 0, 0]])
    with torch.no_grad():
        model(random_ids(3, 1), past_key_values=state)
    assert state.positions.tolist() == [10] * 3
    assert storage(state) == before


def test_repeating_puts_copies_side_by_side():
    state = read(tiny_model(), random_ids(2, 9))
    before = state.fork()
    state.batch_repeat_interleave(2)
    for a, b in zip(state.layers, before.layers, strict=True):
        assert torch.equal(a, b[[0, 0, 1, 1]])


def test_reordering_an_empty_state_leaves_it_empty():
    state = TransnormerState()
    state.reorder_cache(torch.tensor([0, 0]))
    assert state.layers is None


def test_past_of_packed_documents_continues_each():
    model, lengths = tiny_model(), [6, 1, 70]
    first = [random_ids(1, n, seed=n) for n in lengths]
    second = [random_ids(1, n, seed=n + 100) for n in (3, 40, 1)]
    state = TransnormerState()
    with torch.no_grad():
        for part in (first, second):
            offsets = torch.tensor([0, *(p.shape[1] for p in part)]).cumsum(0).int()
            logits = model(torch.cat(part, 1), cu_seqlens=offsets, past_key_values=state).logits
        alone = [model(torch.cat(pair, 1)).logits[:, pair[0].shape[1] :] for pair in zip(first, second, strict=True)]
    assert state.positions.tolist() == [9, 41, 71]
    assert_close("logits", logits, torch.cat(alone, 1))


def test_an_empty_packed_document_keeps_its_state():
    model = tiny_model()
    state = read(model, random_ids(2, 5))
    before = state.fork()
    with torch.no_grad():
        model(random_ids(1, 4), cu_seqlens=torch.tensor([0, 0, 4], dtype=torch.int32), past_key_values=state)
    assert torch.equal(state.layers[1][0], before.layers[1][0])
    assert state.positions.tolist() == [5, 9]


def test_a_state_of_another_batch_is_refused():
    model = tiny_model()
    with pytest.raises(ValueError, match="past_key_values holds 2 sequences, the input has 3"):
        model(random_ids(3, 1), past_key_values=read(model, random_ids(2, 5)))


def test_a_state_of_a_deeper_model_is_refused():
    state = read(tiny_model(decoder_layers=3), random_ids(1, 5))
    with pytest.raises(ValueError, match="past_key_values holds 3 layers, the model has 2"):
        tiny_model()(random_ids(1, 1), past_key_values=state)


def test_a_saved_state_continues_as_the_original(tmp_path):
    model, ids = tiny_model(), random_ids(2, 9)
    state = read(model, ids)
    state.notes["text"] = "\u4e2d"
    state.save(tmp_path / "state.safetensors", model)
    loaded = TransnormerState.load(tmp_path / "state.safetensors", model)
    assert_equal_states(loaded, state, 0.0)
    assert (loaded.length, loaded.notes) == (9, state.notes)
    following = random_ids(2, 1, seed=1)
    with torch.no_grad():
        logits = [model(following, past_key_values=s).logits for s in (state, loaded)]
    assert torch.equal(*logits)


def test_an_empty_state_cannot_be_saved(tmp_path):
    with pytest.raises(ValueError, match="run the model on some tokens first"):
        TransnormerState().save(tmp_path / "state.safetensors", tiny_model())


def test_a_state_loads_into_a_copy_of_its_model_in_another_dtype(saved):
    _, file = saved
    assert TransnormerState.load(file, tiny_model().bfloat16()).layers[0].dtype == torch.float32


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A model and a file of its state."""
    model, file = tiny_model(), tmp_path_factory.mktemp("state") / "state.safetensors"
    read(model, random_ids(1, 5)).save(file, model)
    return model, file


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"seed": 1}, "the state of a model with other weights"),
        ({"decoder_layers": 3}, "the state of another model (decoder_layers 2 there, 3 here)"),
        ({"decay": "paper"}, "the state of another model (decay 'released' there, 'paper' here)"),
        ({"no_scale_embedding": False}, "the state of another model (no_scale_embedding True there, False here)"),
    ],
    ids=str,
)
def test_the_state_of_another_model_is_refused(saved, other, message):
    with pytest.raises(ValueError, match=re.escape(f"{saved[1]}: {message}")):
        TransnormerState.load(saved[1], tiny_model(**other))


def test_the_state_of_a_model_trained_further_is_refused(saved):
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[1].channel_mixer.l3.weight.mul_(1.1)
    with pytest.raises(ValueError, match="other weights"):
        TransnormerState.load(saved[1], model)


def truncated(file):
    file.write_bytes(file.read_bytes()[:-10])


def one_bit_off(file):
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)


def rewritten(**tensors):
    """Replace tensors; None removes."""

    def damage(file):
        with safe_open(file, "pt") as old:
            metadata = old.metadata()
        kept = {name: t for name, t in (load_file(file) | tensors).items() if t is not None}
        metadata["checksum"] = _checksum(kept, {k: v for k, v in metadata.items() if k != "checksum"})
        save_file(kept, file, metadata)

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda file: file.write_text("nothing of the kind"), "not a saved TransnormerState"),
        (lambda file: file.write_bytes(b""), "not a saved TransnormerState"),
        (lambda file: save_file({"layers.0": torch.zeros(1)}, file), "not a saved TransnormerState (format None"),
        (lambda file: save_file({}, file, {"format": "transnormer_state_v1"}), "(format 'transnormer_state_v1'"),
        (truncated, "not a saved TransnormerState, or damaged"),
        (one_bit_off, "damaged, its content does not have its checksum"),
        (rewritten(positions=None), "its tensors are not those of a state of this model"),
        (rewritten(positions=torch.zeros(1)), "its tensors are not those of a state of this model"),
        (rewritten(**{"layers.1": None}), "its tensors are not those of a state of this model"),
        (rewritten(**{"layers.1": torch.zeros(1, 4, 8, 9)}), "its tensors are not those of a state of this model"),
        (rewritten(**{"layers.1": torch.zeros(1, 4, 8, 8).bfloat16()}), "its tensors are not those of a state"),
        (rewritten(**{"layers.2": torch.zeros(1, 4, 8, 8)}), "its tensors are not those of a state of this model"),
    ],
)
def test_a_damaged_file_is_refused(saved, tmp_path, damage, message):
    file = tmp_path / "state.safetensors"
    shutil.copyfile(saved[1], file)
    damage(file)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        TransnormerState.load(file, saved[0])
    assert str(error.value).startswith(f"{file}: ")


def test_a_state_that_cannot_be_written_leaves_the_old_file(saved, tmp_path):
    model, file = saved
    before = file.read_bytes()
    (file.parent / f"state.safetensors.{os.getpid()}.tmp").mkdir()
    with pytest.raises(OSError, match="directory"):
        read(model, random_ids(1, 6)).save(file, model)
    assert file.read_bytes() == before


def gradient_of_first_piece(model, ids, detach):
    """Gradient that a loss on the second half sends to the embeddings of the first half."""
    first = model.get_input_embeddings()(ids[:, :6]).detach().requires_grad_()
    state = model(inputs_embeds=first, use_cache=True).past_key_values
    model(ids[:, 6:], labels=ids[:, 6:], past_key_values=state.detach() if detach else state).loss_sum.backward()
    return first.grad


def test_gradients_flow_through_the_state():
    model, ids = tiny_model().train(), random_ids(1, 12)
    whole = model.get_input_embeddings()(ids).detach().requires_grad_()
    labels = ids.clone()
    labels[:, :7] = -100
    model(inputs_embeds=whole, labels=labels).loss_sum.backward()
    assert_close("gradient", gradient_of_first_piece(model, ids, detach=False), whole.grad[:, :6])


def test_a_detached_state_stops_gradients_and_keeps_values():
    model, ids = tiny_model().train(), random_ids(1, 12)
    state = model(ids, use_cache=True).past_key_values
    assert_equal_states(state.detach(), state, 0.0)
    assert gradient_of_first_piece(model, ids, detach=True) is None


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_of_a_single_token_behind_a_state_changes_no_gradient(use_reentrant):
    def gradients(checkpointed):
        model = tiny_model().train()
        state = read(model, random_ids(2, 9))
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        model(random_ids(2, 1, seed=1), past_key_values=state).logits.square().sum().backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    expected, actual = gradients(False), gradients(True)
    assert expected.keys() == actual.keys()
    for name, gradient in expected.items():
        assert_close(name, actual[name], gradient)


def test_positions_lie_with_the_tokens_wherever_the_last_block_is():
    class Elsewhere(torch.nn.Module):
        """A block on another device, as under a device map."""

        def __init__(self, layer):
            super().__init__()
            self.token_mixer = layer.token_mixer

        def forward(self, x, *_):
            return x.to("meta"), torch.empty(2, 4, 8, 8, device="meta")

    model, state, mask = tiny_model().model, TransnormerState(), torch.ones(2, 9)
    model.layers[1], mask[0, :4] = Elsewhere(model.layers[1]), 0
    for T, positions in ((9, [5, 9]), (1, [6, 10]), (5, [11, 15])):
        with torch.no_grad():
            output = model(random_ids(2, T), attention_mask=mask if T == 9 else None, past_key_values=state)
        assert output.last_hidden_state.device.type == "meta"
        assert output.last_hidden_state.shape == (2, T, 32)
        assert state.positions.tolist() == positions


def test_training_makes_no_state_unless_asked():
    model = tiny_model().train()
    assert model(random_ids(1, 4)).past_key_values is None
    assert model(random_ids(1, 4), use_cache=True).past_key_values.length == 4


@pytest.mark.parametrize("num_tokens", [1, 9])
def test_without_use_cache_a_state_is_read_and_left_as_it_is(num_tokens):
    model, ids = tiny_model(), random_ids(2, 20 + num_tokens)
    state = read(model, ids[:, :20])
    before = state.fork()
    with torch.no_grad():
        output = model(ids[:, 20:], past_key_values=state, use_cache=False)
        assert_close("logits", output.logits, model(ids).logits[:, 20:])
    assert output.past_key_values is None
    assert state.length == 20
    assert_equal_states(state, before, ratio=0)
