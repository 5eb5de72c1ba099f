"""What training a TNL holds in memory beside its weights, counted from what each operator keeps for its backward pass.

For the eager model on a GPU. A tensor that two neighbours keep is counted once: the normed stream of both projections
that read it, the packed projection of the attention and of the gate that is a view into it. torch.compile may keep
less, never more than a few scalars a row beyond this.
"""

from dataclasses import dataclass

import torch
from tnl_kernels.segments import COUNTS, FREE_BYTES, MEMORY_SHARE, MIN_ROWS

from tnl.model.configuration import TransnormerConfig
from tnl.model.loss import chunk_rows

FP32_BYTES = 4


@dataclass(frozen=True)
class BlockMemory:
    """Bytes of one block for one forward and backward pass.

    Attributes:
        stream: the block's input, all that is kept when the block is recomputed.
        mixer: what else its token mixer keeps, the normed input included.
        channels: what its channel mixer keeps, the residual stream before it included.
        backward: what its backward pass holds beyond these at most.
    """

    stream: int
    mixer: int
    channels: int
    backward: int

    @property
    def kept(self) -> int:
        """Bytes between the forward and the backward pass, without recomputation."""
        return self.stream + self.mixer + self.channels


@dataclass(frozen=True)
class HeadMemory:
    """Bytes of the final norm, the output head and the loss.

    Attributes:
        stream: the final norm's input, and its output while the loss is made.
        gradients: those of the hidden states and of the head's weight, fp32, which are made with the loss.
        logits: of one chunk of the loss.
    """

    stream: int
    gradients: int
    logits: int


def block_memory(config: TransnormerConfig, layer: int, tokens: int, dtype: torch.dtype) -> BlockMemory:
    """Bytes that block ``layer`` holds for ``tokens`` tokens (batch times length) in ``dtype``."""
    D, E, F = config.decoder_embed_dim, config.hidden_dim, config.glu_dim
    is_activated = config.linear_act_fun != "none"
    # [elements a token in dtype]; the input of out_proj is the last E.
    lrpe = 4 * E if config.uses_lrpe(layer) else 0  # q and k, each twice as wide
    if config.gate_dim is None:
        # The activation comes before LRPE, outside of the attention, which then keeps what it is given.
        mixer = D + 4 * E + (lrpe + 2 * E * is_activated if lrpe else 0) + E
    else:
        mixer = D + 3 * E + 3 * E * is_activated + lrpe + config.gate_dim + E + E
    wide = 0
    if config.mixer_norm_type == "simplermsnorm":
        mixer += E  # o
    elif dtype == torch.float32:
        mixer += 2 * E  # o and its norm
    else:
        wide = 2 * E * FP32_BYTES
    size = dtype.itemsize
    return BlockMemory(
        stream=tokens * D * size,
        mixer=tokens * (mixer * size + wide),
        channels=tokens * (2 * D + 3 * F) * size,
        # The gradients of both factors of the gate, and of the stream on both sides of a projection.
        backward=tokens * (2 * F + 2 * D) * size,
    )


def kept_memory(config: TransnormerConfig, layer: int, tokens: int, dtype: torch.dtype, recomputation: str) -> int:
    """Bytes that block ``layer`` keeps between the passes.

    Args:
        recomputation: of the block: ``none``, ``full``, ``selective`` (the attention's output is kept) or
            ``selective_matmuls`` (the outputs of all matrix products, too).
    """
    block = block_memory(config, layer, tokens, dtype)
    if recomputation == "none":
        return block.kept
    D, E, F = config.decoder_embed_dim, config.hidden_dim, config.glu_dim
    attention = 0 if recomputation == "full" else E
    gate = E if config.gate_dim is None else config.gate_dim + E
    matmuls = 3 * E + gate + 2 * F + 2 * D if recomputation == "selective_matmuls" else 0
    return block.stream + tokens * (attention + matmuls) * dtype.itemsize


def head_memory(config: TransnormerConfig, tokens: int, dtype: torch.dtype) -> HeadMemory:
    """Bytes that the loss of ``tokens`` tokens holds, on a GPU."""
    D, V = config.decoder_embed_dim, config.vocab_size
    return HeadMemory(2 * tokens * D * dtype.itemsize, *loss_memory(D, V, tokens, dtype))


def loss_memory(D: int, V: int, tokens: int, dtype: torch.dtype) -> tuple[int, int]:
    """Bytes of the gradients that are made with the loss, and of the logits of one of its chunks, on a GPU."""
    rows = min(tokens, chunk_rows(tokens, V, torch.device("cuda")))
    return tokens * D * dtype.itemsize + V * D * FP32_BYTES, rows * V * dtype.itemsize


def segment_state_memory(config: TransnormerConfig, sequences: int, length: int) -> int:
    """At most so many bytes hold the states between the segments into which the kernels cut a sequence, one layer."""
    K = 2 * config.head_dim if any(map(config.uses_lrpe, range(config.decoder_layers))) else config.head_dim
    V, walks, kinds = config.head_dim, sequences * config.decoder_attention_heads, 2
    state = walks * K * V * FP32_BYTES * kinds
    room = max(FREE_BYTES, MEMORY_SHARE * 16 * length * walks * (K + V)) // state
    count = max(count for count in COUNTS if count <= max(1, min(length // MIN_ROWS, int(room))))
    return state * count if count > 1 else 0
