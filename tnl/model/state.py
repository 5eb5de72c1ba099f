"""`TransnormerState`: all that the model remembers of the tokens it has read."""

import hashlib
import json
import math
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from tnl.files import write_atomically
from tnl.model.configuration import TransnormerConfig
from tnl.model.fingerprint import architecture, weights_digest

FORMAT = "transnormer_state_v2"


def state_shapes(config: TransnormerConfig) -> list[tuple[int, int, int]]:
    """(H, K, V) of each layer's state; K is doubled where the layer uses LRPE."""
    width = config.head_dim
    return [
        (config.decoder_attention_heads, 2 * width if config.uses_lrpe(layer) else width, width)
        for layer in range(config.decoder_layers)
    ]


def state_bytes(config: TransnormerConfig, num_sequences: int = 1) -> int:
    """Memory of a state in bytes, before there is one."""
    return num_sequences * 4 * sum(math.prod(shape) for shape in state_shapes(config))


class TransnormerState:
    """The recurrent state of a batch of N sequences; its size does not depend on how many tokens were read.

    Passed to the model as ``past_key_values``, updated in place by it (like every transformers cache) and returned.
    A new object is empty and takes its shape from the first forward pass. To continue one prefix in two ways, `fork`
    it first.

    Attributes:
        layers: one fp32 tensor [N, H, K, V] per layer (K doubled where the layer uses LRPE); None before the first
            token.
        positions: int64 [N], the number of tokens that each sequence has read, padding not counted.
        length: number of columns read, padding included.
        notes: texts of the caller's own that are saved with the state.
    """

    # What transformers' ``generate`` asks a cache.
    is_compileable = False
    is_croppable = False

    def __init__(self):
        self.layers: list[torch.Tensor] | None = None
        self.positions: torch.Tensor | None = None
        self.length = 0
        self.notes: dict[str, str] = {}

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Number of columns read so far, the name that transformers' ``generate`` asks for."""
        return self.length

    def layer(self, index: int) -> torch.Tensor | None:
        """State [N, H, K, V] of one layer, None before the first token."""
        return None if self.layers is None else self.layers[index]

    def update(self, layers: list[torch.Tensor], positions: torch.Tensor, num_columns: int) -> None:
        """Take over the states after a forward pass over ``num_columns`` more columns.

        The positions stay in their memory: a step allocates nothing that outlives it.
        """
        if self.layers is not None and len(positions) == len(self.positions):
            self.layers = layers
            self.positions.copy_(positions)
        else:
            self.layers, self.positions = layers, positions
        self.length += num_columns

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Keep the sequences ``beam_idx`` [N'] in this order: what beam search asks for. In place where N' = N."""
        if self.layers is None:
            return
        tensors = [*self.layers, self.positions]
        picked = (tensor.index_select(0, beam_idx.to(tensor.device)) for tensor in tensors)
        if len(beam_idx) == len(self.positions):
            for tensor, rows in zip(tensors, picked, strict=True):
                tensor.copy_(rows)
        else:
            *self.layers, self.positions = picked

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence ``repeats`` times, side by side."""
        if self.layers is not None:
            self.reorder_cache(torch.arange(len(self.positions)).repeat_interleave(repeats))

    def fork(self) -> "TransnormerState":
        """An independent copy."""
        copy = TransnormerState()
        copy.length, copy.notes = self.length, dict(self.notes)
        if self.layers is not None:
            copy.layers = [state.clone() for state in self.layers]
            copy.positions = self.positions.clone()
        return copy

    def continued(self, sources: torch.Tensor) -> "TransnormerState":
        """A state of other sequences, with gradients to this one.

        Args:
            sources: int64 [N'], in host memory, so that nothing waits for the device: sequence n goes on from sequence
                ``sources[n]`` of this state, or starts from zero where that is -1.
        """
        copy = TransnormerState()
        copy.length, copy.notes = self.length, dict(self.notes)
        if self.layers is not None:
            rows = (sources >= 0).nonzero().squeeze(1)
            taken = sources[rows].to(self.positions.device, non_blocking=True)
            rows = rows.to(self.positions.device, non_blocking=True)
            *copy.layers, copy.positions = (
                tensor.new_zeros(len(sources), *tensor.shape[1:]).index_copy(0, rows, tensor.index_select(0, taken))
                for tensor in (*self.layers, self.positions)
            )
        return copy

    def detach(self) -> "TransnormerState":
        """The same values without their graph, in the same memory: for truncated back-propagation through time."""
        copy = TransnormerState()
        copy.length, copy.notes = self.length, dict(self.notes)
        if self.layers is not None:
            copy.layers = [state.detach() for state in self.layers]
            copy.positions = self.positions.clone()
        return copy

    def num_bytes(self) -> int:
        """Memory of the states in bytes."""
        return 0 if self.layers is None else sum(state.numel() * state.element_size() for state in self.layers)

    def save(self, path: str | Path, model: torch.nn.Module) -> None:
        """Write to a safetensors file, which then holds the whole state or what it held before.

        Args:
            model: the one that made the state; no other can load it.

        Raises:
            ValueError: the state is empty.
            OSError: the disk refused.
        """
        if self.layers is None:
            raise ValueError("an empty TransnormerState cannot be saved: run the model on some tokens first")
        tensors = {f"layers.{i}": state.detach().cpu().contiguous() for i, state in enumerate(self.layers)}
        tensors["positions"] = self.positions.cpu().contiguous()
        metadata = {
            "format": FORMAT,
            "length": str(self.length),
            "architecture": json.dumps(architecture(model.config)),
            "weights": weights_digest(model),
            "notes": json.dumps(self.notes),
        }
        write_atomically(Path(path), save(tensors, metadata | {"checksum": _checksum(tensors, metadata)}))

    @classmethod
    def load(cls, path: str | Path, model: torch.nn.Module) -> "TransnormerState":
        """Read what `save` wrote, onto the device of ``model``.

        Raises:
            ValueError: the file is no saved state, is damaged, or was made by another model.
            OSError: it cannot be read.
        """
        try:
            with safe_open(str(path), framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FORMAT:
                    raise ValueError(
                        f"{path}: not a saved TransnormerState (format {metadata.get('format')!r}, not {FORMAT!r})"
                    )
                names = file.keys()
                tensors = {name: file.get_tensor(name) for name in names}
        except SafetensorError as error:
            raise ValueError(f"{path}: not a saved TransnormerState, or damaged ({error}); save it again") from None
        if metadata.pop("checksum", None) != _checksum(tensors, metadata):
            raise ValueError(f"{path}: damaged, its content does not have its checksum; save it again")
        _check_model(path, metadata, model)
        state = cls()
        positions = tensors.get("positions", torch.empty(0))
        expected = {f"layers.{i}": (*positions.shape, *shape) for i, shape in enumerate(state_shapes(model.config))}
        found = {name: tuple(tensor.shape) for name, tensor in tensors.items() if tensor.dtype == torch.float32}
        if positions.ndim != 1 or positions.dtype != torch.int64 or found != expected:
            raise ValueError(f"{path}: damaged, its tensors are not those of a state of this model; save it again")
        state.layers = [tensors[name].to(model.device) for name in expected]
        state.positions = positions.to(model.device)
        state.length, state.notes = int(metadata["length"]), json.loads(metadata["notes"])
        return state


def _checksum(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> str:
    """SHA-256 of all that a file says: safetensors itself does not notice a changed byte."""
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}".encode())
        digest.update(tensors[name].flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _check_model(path: str | Path, metadata: dict[str, str], model: torch.nn.Module) -> None:
    """Raise ValueError unless ``model`` made the state that ``metadata`` describes."""
    saved, here = json.loads(metadata["architecture"]), json.loads(json.dumps(architecture(model.config)))
    differences = [
        f"{key} {saved.get(key)!r} there, {here.get(key)!r} here"
        for key in sorted(saved.keys() | here.keys())
        if saved.get(key) != here.get(key)
    ]
    if differences:
        raise ValueError(
            f"{path}: the state of another model ({'; '.join(differences)}); load it into the model that saved it"
        )
    if metadata["weights"] != weights_digest(model):
        raise ValueError(
            f"{path}: the state of a model with other weights; load it into the model that saved it, or read the text "
            "again"
        )
