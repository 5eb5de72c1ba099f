"""An evaluation that was killed continues where it stood; a wrong number is an error and is never kept."""

import json
import os
import signal
import time

import pytest
import torch

from tests.harness_requests import assert_same_scores, multiple_choice, requests
from tests.tiny_model import tiny_model
from tests.tiny_tokenizers import released_tokenizer
from tests.tiny_tokenizers import tiny_model as tiny_sentencepiece
from tests.warm_process import CONTEXT
from tnl.errors import CannotWriteError, NonFiniteError
from tnl.evaluation.harness_model import HarnessModel
from tnl.evaluation.sample_cache import SampleCache
from tnl.model.fingerprint import contents_digest, weights_digest


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    return AutoTokenizer.from_pretrained(released_tokenizer(folder / "t", tiny_sentencepiece()))


@pytest.fixture
def model():
    return tiny_model(vocab_size=400)


def scores(model, tokenizer, folder, asked=None, **options):
    """Scores, and the adapter that made them."""
    ours = HarnessModel(model, tokenizer, batch_tokens=60, cache=SampleCache(folder), **options)
    return ours.loglikelihood(ASKED if asked is None else asked, disable_tqdm=True), ours


ASKED = multiple_choice(2, 12, 0, 20, (" self", " value of", " return"))


def test_results_are_read_back_and_nothing_is_computed(model, tokenizer, tmp_path):
    expected, first = scores(model, tokenizer, tmp_path)
    again, second = scores(model, tokenizer, tmp_path)
    assert again == expected
    assert (first.counts.from_cache, second.counts.from_cache) == (0, len(ASKED))
    assert second.counts.tokens_read == 0
    generated = requests("generate_until", [("the state", {"max_gen_toks": 5}), ("self", {"max_gen_toks": 4})])
    texts = first.generate_until(generated, disable_tqdm=True)
    third = HarnessModel(model, tokenizer, cache=SampleCache(tmp_path))
    assert third.generate_until(generated, disable_tqdm=True) == texts
    assert third.counts.from_cache == 2
    rolled = requests("loglikelihood_rolling", [("the state of self",)])
    assert third.loglikelihood_rolling(rolled, disable_tqdm=True) == first.loglikelihood_rolling(rolled, True)


def test_repeated_samples_are_kept_apart(model, tokenizer, tmp_path):
    asked = requests("generate_until", [("the", {"max_gen_toks": 9, "do_sample": True, "temperature": 1.0})] * 3)
    first = HarnessModel(model, tokenizer, cache=SampleCache(tmp_path)).generate_until(asked, disable_tqdm=True)
    assert len(set(first)) > 1
    cached = HarnessModel(model, tokenizer, cache=SampleCache(tmp_path))
    assert cached.generate_until(asked, disable_tqdm=True) == first
    assert cached.counts.from_cache == 3
    assert HarnessModel(model, tokenizer).generate_until(asked, disable_tqdm=True) == first


@pytest.mark.parametrize("change", ["weight", "dtype", "until"])
def test_another_question_is_not_answered_from_the_cache(model, tokenizer, tmp_path, change):
    def run(until):
        ours = HarnessModel(model, tokenizer, cache=SampleCache(tmp_path))
        ours.generate_until(requests("generate_until", [("the", {"max_gen_toks": 3, "until": until})]), True)
        return ours.counts.from_cache

    assert (run("x"), run("x")) == (0, 1)
    sampled = weights_digest(model)
    if change == "weight":
        with torch.no_grad():
            model.model.layers[1].token_mixer.out_proj.weight[3, 5] *= 1.0001
        assert weights_digest(model) == sampled  # which is why it is not what keys are made of
    elif change == "dtype":
        model.bfloat16()
    assert run("y" if change == "until" else "x") == 0


def test_contents_tell_apart_what_differs_in_one_place():
    model = tiny_model()
    digests = {contents_digest(model), contents_digest(tiny_model())}
    assert len(digests) == 1
    weight = model.lm_head.weight.data
    for change in (lambda: weight[:2].copy_(weight[:2].flip(0)), lambda: weight[60, 31].mul_(-1), model.bfloat16):
        change()
        digests.add(contents_digest(model))
    assert len(digests) == 4


def evaluate_slowly(folder, tokenizer):
    torch.set_num_threads(1)
    model = tiny_model(vocab_size=400)
    model.model.register_forward_pre_hook(lambda *_: time.sleep(0.05))
    scores(model, tokenizer, folder)


def test_after_kill_9_the_rest_is_computed_and_the_scores_are_the_same(model, tokenizer, tmp_path):
    expected, whole = scores(model, tokenizer, tmp_path / "whole")
    folder, lost = tmp_path / "killed", []
    for wanted in (1, 4):
        process = CONTEXT.Process(target=evaluate_slowly, args=(folder, tokenizer))
        process.start()
        deadline = time.monotonic() + 60
        known = len(SampleCache(folder))
        while len(SampleCache(folder)) < known + wanted:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        lost.append(len(ASKED) - len(SampleCache(folder)))
    assert len(ASKED) > lost[0] > lost[1] > 0
    again, resumed = scores(model, tokenizer, folder)
    assert_same_scores(again, expected)
    assert resumed.counts.from_cache == len(ASKED) - lost[1]
    assert 0 < resumed.counts.tokens_read < whole.counts.tokens_read
    assert scores(model, tokenizer, folder)[1].counts.tokens_read == 0


@pytest.mark.parametrize("damage", ["cut", "changed", "zeros"])
def test_a_damaged_line_is_computed_again(model, tokenizer, tmp_path, damage):
    expected, _ = scores(model, tokenizer, tmp_path)
    (file,) = tmp_path.glob("*.jsonl")
    data = file.read_bytes()
    lines = data.splitlines(keepends=True)
    if damage == "cut":
        file.write_bytes(data[:-7])
    elif damage == "changed":
        file.write_bytes(lines[0].replace(b"-", b"-1", 1) + b"".join(lines[1:]))
    else:
        file.write_bytes(lines[0] + bytes(100) + b"".join(lines[1:]))
    cache = SampleCache(tmp_path)
    assert cache.num_damaged == 1
    assert len(cache) == len(ASKED) - 1
    assert_same_scores(scores(model, tokenizer, tmp_path)[0], expected)


def test_a_score_that_is_not_finite_is_an_error_that_names_the_request(model, tokenizer, tmp_path):
    scores(model, tokenizer, tmp_path, ASKED[:6])
    with torch.no_grad():
        model.lm_head.weight[:] = float("nan")
    with pytest.raises(NonFiniteError, match=r"tiny, document 0, request 0: its log-likelihood is nan; .*float32"):
        scores(model, tokenizer, tmp_path / "new", ASKED[:1])
    assert len(SampleCache(tmp_path / "new")) == 0


@pytest.mark.parametrize("sampling", [{}, {"do_sample": True, "temperature": 1.0}], ids=["greedy", "sampled"])
def test_a_text_of_logits_that_are_not_finite_is_an_error_that_names_the_request(model, tokenizer, tmp_path, sampling):
    model.generation_config.suppress_tokens = [5, 6]  # whose logits are not finite in any case
    asked = requests("generate_until", [("the", {"max_gen_toks": 3, **sampling})])
    HarnessModel(model, tokenizer).generate_until(asked, disable_tqdm=True)
    with torch.no_grad():
        model.lm_head.weight[7] = float("nan")
    ours = HarnessModel(model, tokenizer, cache=SampleCache(tmp_path))
    with pytest.raises(NonFiniteError, match=r"tiny, document 0, request 0: its logits are not finite; .*float32"):
        ours.generate_until(asked, disable_tqdm=True)
    assert len(SampleCache(tmp_path)) == 0


def test_empty_texts_are_counted_when_they_are_read_back(model, tokenizer, tmp_path):
    model.generation_config.eos_token_id = list(range(400))
    asked = requests("generate_until", [("the", {"max_gen_toks": 3}), ("self", {"max_gen_toks": 3})])
    for from_cache in (0, 2):
        ours = HarnessModel(model, tokenizer, cache=SampleCache(tmp_path))
        assert ours.generate_until(asked, disable_tqdm=True) == ["", ""]
        assert (ours.counts.from_cache, ours.counts.empty_outputs) == (from_cache, 2)


def test_what_cannot_be_written_is_said_before_anything_is_computed(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CannotWriteError, match="choose another folder"):
        SampleCache(tmp_path / "file" / "cache")


def test_a_line_holds_a_checksum_a_key_and_a_result(tmp_path):
    cache = SampleCache(tmp_path)
    cache.put({"key": [-1.5, True]})
    cache.close()
    (file,) = tmp_path.iterdir()
    checksum, text = file.read_text().rstrip("\n").split(" ", 1)
    assert json.loads(text) == ["key", [-1.5, True]]
    assert len(checksum) == 8
    with pytest.raises(ValueError, match="not JSON compliant"):
        cache.put({"key": [float("nan"), True]})
