"""`resize_token_embeddings`: the head follows, tied or not, and the rest of the model stays what it was."""

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from tests.closeness import assert_close
from tests.tiny_model import VOCAB, random_ids, tiny_model
from tnl.model.flops import num_parameters

SIZES = {"up": (dict(new_num_tokens=70), 70), "down": (dict(new_num_tokens=50), 50)}
SIZES["padded"] = (dict(pad_to_multiple_of=32), 64)
SIZES["up and padded"] = (dict(new_num_tokens=65, pad_to_multiple_of=32), 96)
IDS = random_ids(2, 9, vocab=50)


@pytest.fixture(params=[(size, tied) for size in SIZES for tied in (True, False)], ids=str)
def resized(request):
    """A model before and after, and the size asked for."""
    (options, size), tied = SIZES[request.param[0]], request.param[1]
    model = tiny_model(tie_word_embeddings=tied)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model.resize_token_embeddings(**options)
    return tiny_model(tie_word_embeddings=tied), model, size


def test_the_head_follows_and_known_tokens_keep_their_logits(resized):
    before, after, size = resized
    logits = after(IDS).logits
    assert logits.shape[-1] == size
    assert torch.equal(logits[..., :50], before(IDS).logits[..., :50])
    is_tied = before.config.tie_word_embeddings
    assert (after.lm_head.weight is after.model.embed_tokens.weight) == is_tied


def test_the_configuration_follows(resized):
    _, after, size = resized
    assert (after.config.vocab_size, after.lm_head.out_features, after.model.embed_tokens.num_embeddings) == (size,) * 3
    assert num_parameters(after.config) == after.num_parameters()


def test_the_loss_is_that_of_the_logits_and_reaches_new_rows(resized):
    _, after, size = resized
    labels = IDS.clone()
    labels[:, 5] = size - 1
    output = after(IDS, labels=labels, output_logits=True)
    assert_close("loss", output.loss, F.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()))
    output.loss.backward()
    assert after.lm_head.weight.grad[size - 1].any()


def test_a_saved_model_keeps_its_new_size(resized, tmp_path):
    _, after, size = resized
    after.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.vocab_size == size
    assert torch.equal(loaded(IDS).logits, after(IDS).logits)


def test_generation_goes_on():
    model = tiny_model()
    expected = model.generate(IDS, max_new_tokens=5, do_sample=False)
    model.resize_token_embeddings(VOCAB + 3)
    # Their logits are 0, below the largest at every position.
    with torch.no_grad():
        model.model.embed_tokens.weight[VOCAB:] = 0
    assert torch.equal(model.generate(IDS, max_new_tokens=5, do_sample=False), expected)
