"""`generate()`: padding, batching, beams and chunks do not change the answer."""

import itertools
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from transformers.generation.streamers import BaseStreamer

from tests.closeness import assert_close
from tests.tiny_model import random_ids, tiny_model
from tnl.model import TransnormerState

ROOT = Path(__file__).parent.parent
PROMPTS = [random_ids(1, n, seed=n)[0] for n in (3, 1, 70, 12)]
LENGTHS = [len(prompt) for prompt in PROMPTS]


def padded(side):
    """The prompts in one batch, and its mask."""
    width = max(LENGTHS)
    ids, mask = torch.zeros(len(PROMPTS), width, dtype=torch.int64), torch.zeros(len(PROMPTS), width)
    for row, prompt in enumerate(PROMPTS):
        place = slice(width - len(prompt), None) if side == "left" else slice(len(prompt))
        ids[row, place], mask[row, place] = prompt, 1
    return ids, mask.long()


def greedy(model, ids, mask=None, **options):
    """New tokens [B, N] and their scores [B, N, vocabulary]."""
    mask = torch.ones_like(ids) if mask is None else mask
    output = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=8,
        do_sample=False,
        return_dict_in_generate=True,
        output_scores=True,
        **options,
    )
    return output.sequences[:, ids.shape[1] :], torch.stack(output.scores, 1)


@pytest.fixture(scope="module")
def model():
    return tiny_model(linear_use_lrpe_list=[1, 1])


@pytest.fixture(scope="module")
def alone(model):
    """`greedy` of each prompt by itself."""
    return [greedy(model, prompt.unsqueeze(0)) for prompt in PROMPTS]


def test_greedy_tokens_are_the_most_likely_of_the_full_forward_pass(model, alone):
    for prompt, (tokens, scores) in zip(PROMPTS, alone, strict=True):
        with torch.no_grad():
            logits = model(torch.cat([prompt, tokens[0]]).unsqueeze(0)).logits[:, len(prompt) - 1 : -1]
        assert_close("scores", scores, logits)
        assert torch.equal(tokens, logits.argmax(-1))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_change_the_logits_of_a_prompt(model, side):
    ids, mask = padded(side)
    with torch.no_grad():
        logits = model(ids, attention_mask=mask).logits[mask.bool()]
        expected = torch.cat([model(prompt.unsqueeze(0)).logits[0] for prompt in PROMPTS])
    assert_close("logits", logits, expected)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_change_the_state_of_a_prompt(model, side):
    ids, mask = padded(side)
    with torch.no_grad():
        state = model(ids, attention_mask=mask).past_key_values
        expected = [model(prompt.unsqueeze(0)).past_key_values for prompt in PROMPTS]
    assert state.positions.tolist() == LENGTHS
    for i, layer in enumerate(state.layers):
        assert_close(f"layer {i}", layer, torch.cat([e.layers[i] for e in expected]))


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_generates_what_each_prompt_generates_alone(model, alone, side):
    tokens, scores = greedy(model, *padded(side))
    assert torch.equal(tokens, torch.cat([a for a, _ in alone]))
    assert_close("scores", scores, torch.cat([s for _, s in alone]))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_change_gradients(model, side):
    ids, mask = padded(side)
    labels = ids.masked_fill(mask == 0, -100)
    model.zero_grad()
    model(ids, attention_mask=mask, labels=labels).loss_sum.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    for prompt in PROMPTS:
        model(prompt.unsqueeze(0), labels=prompt.unsqueeze(0)).loss_sum.backward()
    for name, p in model.named_parameters():
        assert_close(name, gradients[name], p.grad)
    model.zero_grad()


def test_padding_before_the_first_token_gives_zeros(model):
    ids, mask = padded("left")
    with torch.no_grad():
        assert not model(ids, attention_mask=mask).logits[mask == 0].any()


def test_a_batch_of_nothing_but_padding_keeps_the_state_empty(model):
    with torch.no_grad():
        output = model(random_ids(2, 4), attention_mask=torch.zeros(2, 4))
    assert output.past_key_values.positions.tolist() == [0, 0]
    assert not output.logits.any()


def test_a_mask_of_another_length_is_refused(model):
    with pytest.raises(ValueError, match=r"attention_mask: got shape \(1, 3\)"):
        model(random_ids(1, 4), attention_mask=torch.tensor([[0, 1, 1]]))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_a_chunked_prefill_generates_the_same(model, alone, chunk, side):
    tokens, scores = greedy(model, *padded(side), prefill_chunk_size=chunk)
    assert torch.equal(tokens, torch.cat([a for a, _ in alone]))
    assert_close("scores", scores, torch.cat([s for _, s in alone]))


@pytest.fixture
def widths(model):
    """Number of columns of every forward pass."""
    seen = []

    def note(module, arguments, named):
        ids = arguments[0] if arguments else named["input_ids"]
        seen.append((named["inputs_embeds"] if ids is None else ids).shape[1])

    handle = model.model.register_forward_pre_hook(note, with_kwargs=True)
    yield seen
    handle.remove()


@pytest.mark.parametrize("inputs", ["ids", "embeddings", "beams"])
def test_a_long_prompt_is_read_in_pieces_by_default(model, widths, monkeypatch, inputs):
    monkeypatch.setattr("tnl.model.prefill.PREFILL_TOKENS", 90)
    ids = random_ids(2, 100)
    options = dict(max_new_tokens=3, do_sample=False, num_beams=3 if inputs == "beams" else 1)
    expected = model.generate(ids, prefill_chunk_size=100, **options)[:, 100:]
    del widths[:]
    if inputs == "embeddings":
        actual = model.generate(inputs_embeds=model.get_input_embeddings()(ids), **options)
    else:
        actual = model.generate(ids, **options)[:, 100:]
    assert torch.equal(actual, expected)
    # 90 tokens are 45 columns of 2 sequences, or 15 of 6 beams.
    assert widths == [*([15] * 6 + [10] if inputs == "beams" else [45, 45, 10]), 1, 1]


def test_a_prompt_of_100k_tokens_takes_no_more_memory_than_one_of_10k():
    program = """
import resource, torch
from tests.tiny_model import random_ids, tiny_model
from tnl.model import prefill
torch.set_num_threads(1)
prefill.PREFILL_TOKENS = 2048
model = tiny_model(glu_dim=256)
def peak(length):
    model.generate(random_ids(1, length), max_new_tokens=2, do_sample=False)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(peak(10_000), peak(100_000))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True, timeout=120
    )
    short, long = map(int, done.stdout.split())
    # KiB. The ids and what is made of them take 4,000; read at once, the prompt takes 440,000.
    assert long - short < 12_000


def test_generating_without_a_cache_gives_the_same(model, alone):
    tokens, scores = greedy(model, *padded("left"), use_cache=False)
    assert torch.equal(tokens, torch.cat([a for a, _ in alone]))
    assert_close("scores", scores, torch.cat([s for _, s in alone]))


def test_generating_from_embeddings_gives_the_same(model, alone):
    prompt = PROMPTS[3].unsqueeze(0)
    embeds = model.get_input_embeddings()(prompt)
    tokens = model.generate(inputs_embeds=embeds, max_new_tokens=8, do_sample=False)
    assert torch.equal(tokens, alone[3][0])


def test_a_second_turn_continues_from_the_state_of_the_first(model):
    options = dict(max_new_tokens=5, do_sample=False)
    state = TransnormerState()
    first = model.generate(PROMPTS[3].unsqueeze(0), past_key_values=state, **options)
    prompt = torch.cat([first, random_ids(1, 6, seed=9)], 1)
    expected = model.generate(prompt, **options)
    assert state.length == first.shape[1] - 1
    assert torch.equal(model.generate(prompt, past_key_values=state, **options), expected)
    assert state.positions.tolist() == [expected.shape[1] - 1]


def test_a_turn_continues_with_the_new_tokens_alone_under_the_mask_of_all(model, widths):
    ids = random_ids(2, 60)
    mask = torch.ones_like(ids)
    mask[0, :10] = 0
    options = dict(max_new_tokens=5, do_sample=False)
    expected = model.generate(ids, attention_mask=mask, **options)[:, 60:]
    with torch.no_grad():
        state = model(ids[:, :40], attention_mask=mask[:, :40], use_cache=True).past_key_values
    for new in (ids, ids[:, 40:]):
        del widths[:]
        tokens = model.generate(new, attention_mask=mask, past_key_values=state.fork(), prefill_chunk_size=7, **options)
        assert torch.equal(tokens[:, -5:], expected)
        assert widths == [7, 7, 6, 1, 1, 1, 1]


def test_a_prompt_that_the_state_has_read_is_refused(model):
    with torch.no_grad():
        state = model(random_ids(1, 9), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="past_key_values has read 9 columns, the prompt has 4: give the whole text"):
        model.generate(random_ids(1, 4), past_key_values=state, max_new_tokens=1)


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"do_sample": True, "num_return_sequences": 3}], ids=str)
def test_a_state_is_repeated_for_beams_and_samples(model, options):
    ids = random_ids(2, 30)

    def generate(**state):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return model.generate(ids, max_new_tokens=5, **options, **state)

    with torch.no_grad():
        state = model(ids[:, :20], use_cache=True).past_key_values
    with pytest.raises(ValueError, match="past_key_values holds 2 sequences, the input has 6"):
        generate(past_key_values=state)
    state.batch_repeat_interleave(3)
    assert torch.equal(generate(past_key_values=state), generate())


def test_assisted_generation_is_refused(model):
    with pytest.raises(ValueError, match="not supported with stateful models"):
        model.generate(random_ids(1, 4), assistant_model=tiny_model(), max_new_tokens=2)


def test_the_state_is_as_large_after_1000_tokens_as_after_10(model):
    state, ids, sizes = TransnormerState(), random_ids(1, 1), []
    for count in (10, 990):
        ids = model.generate(ids, past_key_values=state, max_new_tokens=count, do_sample=False)
        sizes.append(state.num_bytes())
    assert state.positions.tolist() == [1000]
    assert sizes[0] == sizes[1]


def test_generations_in_turn_do_not_touch_each_other(model):
    prompts, barrier = [PROMPTS[2], PROMPTS[3]], threading.Barrier(2, timeout=60)

    class Turns(BaseStreamer):
        """Lets both generations take one step, and only then the next."""

        def put(self, value):
            barrier.wait()

        def end(self):
            pass

    def generate(prompt):
        return model.generate(prompt.unsqueeze(0), max_new_tokens=20, do_sample=False, streamer=Turns())

    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(generate, prompts))
    for prompt, tokens in zip(prompts, together, strict=True):
        assert torch.equal(tokens, model.generate(prompt.unsqueeze(0), max_new_tokens=20, do_sample=False))


def test_a_model_in_training_generates_the_same(alone):
    model = tiny_model(linear_use_lrpe_list=[1, 1]).train()
    assert torch.equal(greedy(model, PROMPTS[3].unsqueeze(0))[0], alone[3][0])
    assert model.training


def test_the_same_prompt_generates_the_same_twice(model):
    ids = PROMPTS[3].unsqueeze(0)
    assert torch.equal(greedy(model, ids)[1], greedy(model, ids)[1])


def test_sampling_is_reproduced_by_its_seed(model):
    def sample(seed):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return model.generate(PROMPTS[3].unsqueeze(0), max_new_tokens=20, do_sample=True, top_k=0)

    assert torch.equal(sample(1), sample(1))
    assert not torch.equal(sample(1), sample(2))


def test_several_samples_of_one_prompt_differ(model):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        samples = model.generate(
            PROMPTS[3].unsqueeze(0), max_new_tokens=20, do_sample=True, top_k=0, num_return_sequences=3
        )
    assert len({tuple(row) for row in samples.tolist()}) == 3


def test_an_end_of_text_stops_its_row_and_no_other(model, alone):
    ids, mask = padded("left")
    end = alone[0][0][0, 2].item()
    tokens, _ = greedy(model, ids, mask, eos_token_id=end, pad_token_id=0)
    for row, (expected, _) in zip(tokens, alone, strict=True):
        stop = (expected[0] == end).nonzero()
        kept = stop[0].item() + 1 if len(stop) else 8
        assert torch.equal(row[:kept], expected[0, :kept])
        assert not row[kept:].any()


def test_beam_search_over_all_sequences_finds_the_most_likely():
    vocab, steps = 5, 3
    model, prompt = tiny_model(vocab_size=vocab, seed=15), torch.tensor([[3, 4, 3]])
    found = model.generate(prompt, num_beams=vocab**steps, max_new_tokens=steps, do_sample=False)[0, 3:]
    endings = torch.tensor(list(itertools.product(range(vocab), repeat=steps)))
    with torch.no_grad():
        logits = model(torch.cat([prompt.expand(len(endings), -1), endings], 1)).logits[:, 2:-1]
    scores = logits.log_softmax(-1).gather(2, endings.unsqueeze(2)).sum((1, 2))
    greedy_ending = model.generate(prompt, max_new_tokens=steps, do_sample=False)[0, 3:]
    assert not torch.equal(found, greedy_ending)  # otherwise the beams would not have been reordered
    assert torch.equal(found, endings[scores.argmax()])


def test_beams_of_a_padded_batch_equal_those_of_each_prompt_alone(model):
    options = dict(num_beams=3, max_new_tokens=4, do_sample=False)
    ids, mask = padded("left")
    batch = model.generate(ids, attention_mask=mask, **options)[:, ids.shape[1] :]
    for row, prompt in zip(batch, PROMPTS, strict=True):
        assert torch.equal(row, model.generate(prompt.unsqueeze(0), **options)[0, len(prompt) :])


def test_beams_with_the_state_equal_beams_without(model):
    options = dict(num_beams=4, max_new_tokens=6, do_sample=False)
    ids = PROMPTS[3].unsqueeze(0)
    assert torch.equal(model.generate(ids, **options), model.generate(ids, use_cache=False, **options))
