"""Compiled blocks: equal ones share one compilation, for all steps, and compute what the eager ones do."""

import pytest
import torch
import torch._dynamo.testing

from tests.attention_operators import use_operators
from tests.closeness import assert_close
from tests.segment_memory import Engine
from tests.tiny_model import random_ids, tiny_model
from tests.tiny_run import tiny_run
from tnl.errors import ConfigError
from tnl.training import blocks
from tnl.training.segments import segment_losses
from tnl.training.settings import TrainSettings

LAYERS = 4
DOCUMENTS = ([0, 20], [0, 3, 20], [0, 1, 8, 8, 20])


def prepared(backend, config=None, **values):
    model = tiny_model(decoder_layers=LAYERS, **(config or {})).train()
    sizes = dict(steps=1, sequence_length=20, global_batch_size=1, micro_batch_size=1)
    blocks.prepare_blocks(model, TrainSettings(**sizes, **values), torch.device("cpu"), backend)
    return model


def gradients(model, documents: list[int]) -> dict[str, torch.Tensor]:
    ids = random_ids(1, documents[-1])
    cu_seqlens = torch.tensor(documents, dtype=torch.int32)
    model.zero_grad()
    model(ids, labels=ids, cu_seqlens=cu_seqlens, use_cache=False).loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.fixture
def backend(monkeypatch):
    """Counts compilations; the graphs run without a C++ compiler, on a CPU that is taken for a GPU."""
    use_operators(monkeypatch)
    monkeypatch.setattr(blocks, "form_of", lambda device: "triton")
    torch._dynamo.reset()
    return torch._dynamo.testing.CompileCounterWithBackend("aot_eager")


def test_equal_blocks_all_steps_and_all_lengths_share_a_compilation(backend):
    eager, compiled = prepared(None), prepared(backend, compile=True)
    for documents in DOCUMENTS:
        expected = gradients(eager, documents)
        for name, gradient in gradients(compiled, documents).items():
            # Sums in another order, through all blocks.
            assert_close(name, gradient, expected[name], ratio=1e-4)
    assert backend.frame_count == 2  # the first block has LRPE, the others are alike
    # Another length compiles once more, for all lengths to come.
    for length in (9, 30, 11):
        gradients(compiled, [0, 2, length])
    assert backend.frame_count == 4


@pytest.mark.parametrize(("mode", "again"), [("full", LAYERS), ("selective", 0), ("selective_matmuls", 0)])
def test_compiled_blocks_are_computed_again_as_eager_ones(mode, again, backend, monkeypatch):
    plain = {"linear_use_lrpe_list": []}
    expected = gradients(prepared(None, plain), DOCUMENTS[1])
    calls = use_operators(monkeypatch)
    compiled = prepared(backend, plain, compile=True, activation_checkpointing=mode)
    for name, gradient in gradients(compiled, DOCUMENTS[1]).items():
        assert_close(name, gradient, expected[name], ratio=1e-4)
    assert (calls.count("forward"), calls.count("backward")) == (LAYERS + again, LAYERS)
    assert backend.frame_count == 1


def test_evaluation_runs_as_it_is(backend):
    model = prepared(backend, compile=True)
    with torch.no_grad():
        model(random_ids(1, 20))
    assert backend.frame_count == 0


def test_a_form_that_cannot_be_compiled_is_refused():
    with pytest.raises(ConfigError, match=r"train\.compile: .* set train\.compile: false"):
        prepared("inductor", compile=True)


def test_blocks_of_another_model_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"train\.compile: the blocks of model\.kind llama are not compiled"):
        tiny_run(tmp_path, tmp_path, "model.kind=llama", "train.compile=true")


@pytest.mark.parametrize("gradient", ["truncated", "exact"])
def test_segments_with_any_number_of_documents_share_two_compilations(gradient, backend):
    """One for a single document, for torch.compile takes a size of 1 for a constant, and one for all numbers above."""
    values = dict(segment_length=10, segment_gradient=gradient, compile=True)
    model = prepared(backend, {"linear_use_lrpe_list": []}, **values)
    settings = TrainSettings(steps=1, sequence_length=20, global_batch_size=1, micro_batch_size=1, **values)
    ids = random_ids(1, 20)
    for documents in ([0, 20], [0, 3, 12, 20], [0, 2, 4, 6, 8, 20], [0, 12, 14, 16, 20], [0, 1, 2, 3, 5, 15, 16, 20]):
        batch = {"input_ids": ids, "labels": ids, "cu_seqlens": torch.tensor(documents, dtype=torch.int32)}
        for loss_sum in segment_losses(Engine(model), batch, settings, torch.device("cpu")):
            loss_sum.backward()
    assert backend.frame_count == 2
