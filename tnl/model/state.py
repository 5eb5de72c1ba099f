"""`TransnormerState`: all that the model remembers of the tokens it has read."""

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

FORMAT = "transnormer_state_v1"


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
    """

    # What transformers' ``generate`` asks a cache.
    is_compileable = False
    is_croppable = False

    def __init__(self):
        self.layers: list[torch.Tensor] | None = None
        self.positions: torch.Tensor | None = None
        self.length = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Number of columns read so far, the name that transformers' ``generate`` asks for."""
        return self.length

    def layer(self, index: int) -> torch.Tensor | None:
        """State [N, H, K, V] of one layer, None before the first token."""
        return None if self.layers is None else self.layers[index]

    def update(self, layers: list[torch.Tensor], positions: torch.Tensor, num_columns: int) -> None:
        """Replace the states after a forward pass over ``num_columns`` more columns."""
        self.layers, self.positions = layers, positions
        self.length += num_columns

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Keep the sequences ``beam_idx`` [N'] in this order: what beam search asks for."""
        if self.layers is not None:
            index = beam_idx.to(self.positions.device)
            self.layers = [state.index_select(0, index) for state in self.layers]
            self.positions = self.positions.index_select(0, index)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence ``repeats`` times, side by side."""
        if self.layers is not None:
            self.reorder_cache(torch.arange(len(self.positions)).repeat_interleave(repeats))

    def fork(self) -> "TransnormerState":
        """An independent copy."""
        copy = TransnormerState()
        copy.length = self.length
        if self.layers is not None:
            copy.layers = [state.clone() for state in self.layers]
            copy.positions = self.positions.clone()
        return copy

    def detach(self) -> "TransnormerState":
        """The same values without their graph, sharing memory: for truncated back-propagation through time."""
        copy = TransnormerState()
        copy.length = self.length
        if self.layers is not None:
            copy.layers = [state.detach() for state in self.layers]
            copy.positions = self.positions
        return copy

    def num_bytes(self) -> int:
        """Memory of the states in bytes."""
        return 0 if self.layers is None else sum(state.numel() * state.element_size() for state in self.layers)

    def save(self, path: str | Path) -> None:
        """Write to a safetensors file.

        Raises:
            ValueError: the state is empty.
        """
        if self.layers is None:
            raise ValueError("an empty TransnormerState cannot be saved: run the model on some tokens first")
        tensors = {f"layers.{i}": state.detach().contiguous() for i, state in enumerate(self.layers)}
        tensors["positions"] = self.positions
        save_file(tensors, str(path), metadata={"format": FORMAT, "length": str(self.length)})

    @classmethod
    def load(cls, path: str | Path, device: str | torch.device = "cpu") -> "TransnormerState":
        """Read what `save` wrote.

        Raises:
            ValueError: the file is not a saved state.
        """
        state = cls()
        try:
            with safe_open(str(path), framework="pt", device=str(device)) as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FORMAT:
                    raise ValueError(f"{path}: not a saved TransnormerState (format {metadata.get('format')!r})")
                state.layers = [file.get_tensor(f"layers.{i}") for i in range(len(file.keys()) - 1)]
                state.positions = file.get_tensor("positions")
                state.length = int(metadata["length"])
        except SafetensorError as error:
            raise ValueError(f"{path}: not a saved TransnormerState ({error})") from None
        return state
