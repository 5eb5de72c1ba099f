"""What the backward pass computes again, what that saves, and that it changes no gradient."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.attention_operators import use_operators
from tests.closeness import assert_close
from tests.tiny_model import random_ids, tiny_model
from tnl.model.activation_memory import block_memory, kept_memory
from tnl.training.blocks import prepare_blocks
from tnl.training.settings import TrainSettings

CPU = torch.device("cpu")
LAYERS, T = 4, 24
MODES = {
    "none": {},
    "full": {"activation_checkpointing": "full"},
    "every_k": {"activation_checkpointing": "every_k", "activation_checkpointing_k": 2},
    "selective": {"activation_checkpointing": "selective"},
    "selective_matmuls": {"activation_checkpointing": "selective_matmuls"},
}


def settings(**values) -> TrainSettings:
    sizes = dict(steps=1, sequence_length=T, global_batch_size=1, micro_batch_size=1)
    return TrainSettings(**sizes, **values)


def prepared(mode: str, **config):
    model = tiny_model(decoder_layers=LAYERS, **config).train()
    prepare_blocks(model, settings(**MODES[mode]), CPU)
    return model


def inputs() -> dict:
    ids = random_ids(1, T)
    return dict(input_ids=ids, labels=ids, cu_seqlens=torch.tensor([0, 7, T], dtype=torch.int32), use_cache=False)


def gradients(model, **more) -> dict[str, torch.Tensor]:
    model(**inputs(), **more).loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("config", [{}, {"gate_dim": 8}], ids=["packed", "gate"])
@pytest.mark.parametrize("mode", list(MODES)[1:])
def test_no_gradient_changes(mode, config, monkeypatch):
    use_operators(monkeypatch)
    expected = gradients(prepared("none", **config))
    for name, gradient in gradients(prepared(mode, **config)).items():
        assert_close(name, gradient, expected[name])


@pytest.mark.parametrize(("mode", "again"), [("none", 0), ("full", LAYERS), ("every_k", LAYERS // 2), ("selective", 0)])
def test_attention_runs_again_only_where_it_is_not_kept(mode, again, monkeypatch):
    calls = use_operators(monkeypatch)
    gradients(prepared(mode))
    assert (calls.count("forward"), calls.count("backward")) == (LAYERS + again, LAYERS)


class MatrixProducts(TorchDispatchMode):
    """Counts those that are computed; what checkpointing kept does not come here."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten.mm.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", ["full", "selective", "selective_matmuls"])
def test_matrix_products_run_again_only_where_they_are_not_kept(mode, monkeypatch):
    use_operators(monkeypatch)
    counts = {}
    for kind in ("none", mode):
        model = prepared(kind)
        with MatrixProducts() as counter:
            gradients(model)
        counts[kind] = counter.count
    # Of a block's five products four: nothing in its backward pass needs the output of the last one.
    assert counts[mode] - counts["none"] == (0 if mode == "selective_matmuls" else 4 * LAYERS)


def kept_bytes(model) -> int:
    """Bytes of the storages that autograd keeps for the backward pass, parameters and ids aside."""
    known = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if tensor.is_floating_point() and storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = model(**inputs())
    output.loss.backward()
    return sum(storage.nbytes() for storage in found.values())


def test_memory_falls_from_mode_to_mode_and_as_planned(monkeypatch):
    use_operators(monkeypatch)
    kept = {mode: kept_bytes(prepared(mode)) for mode in ("none", "every_k", "full")}
    assert kept["none"] > kept["every_k"] > kept["full"]
    config = prepared("none").config
    planned = {m: sum(kept_memory(config, i, T, torch.float32, m) for i in range(LAYERS)) for m in ("none", "full")}
    # On a CPU also a scalar a row of each norm, which shows beside a width of 32.
    assert kept["none"] - kept["full"] == pytest.approx(planned["none"] - planned["full"], rel=0.15)
    order = ["full", "selective", "selective_matmuls", "none"]
    sizes = [kept_memory(config, 1, T, torch.float32, mode) for mode in order]
    assert sizes == sorted(sizes)
    assert sizes[-1] == block_memory(config, 1, T, torch.float32).kept


def test_a_state_passes_through_with_its_gradient(monkeypatch):
    use_operators(monkeypatch)

    def through_states(mode):
        model, ids = prepared(mode), random_ids(1, T)
        first = model(ids[:, :9], use_cache=True)
        second = model(ids[:, 9:], labels=ids[:, 9:], past_key_values=first.past_key_values)
        second.loss.backward()
        return {name: p.grad for name, p in model.named_parameters()}

    expected = through_states("none")
    for mode in ("full", "selective"):
        for name, gradient in through_states(mode).items():
            assert_close(f"{mode} {name}", gradient, expected[name])


def test_nothing_is_computed_again_without_gradients(monkeypatch):
    calls = use_operators(monkeypatch)
    model = prepared("full")
    with torch.no_grad():
        model(**inputs())
    assert calls == ["forward"] * LAYERS


@pytest.mark.parametrize(
    "values", [{"activation_checkpointing": "every_k"}, {"activation_checkpointing_k": 2}], ids=str
)
def test_k_goes_with_every_k(values):
    with pytest.raises(ValueError, match="activation_checkpointing_k"):
        settings(**values)
