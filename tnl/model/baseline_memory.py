"""What training the LLaMA baseline holds in memory beside its weights, in the terms of `tnl.model.activation_memory`.

For transformers' eager blocks with PyTorch's FlashAttention. Their norms keep what they read in fp32, in every dtype,
and the block's input itself lives on only where that is the same tensor or the block is recomputed.
"""

import torch
from transformers import LlamaConfig

from tnl.model.activation_memory import FP32_BYTES, BlockMemory, HeadMemory, loss_memory


def llama_block_memory(config: LlamaConfig, tokens: int, dtype: torch.dtype) -> BlockMemory:
    """Bytes that a block holds for ``tokens`` tokens (batch times length) in ``dtype``."""
    D, F, size = config.hidden_size, config.intermediate_size, dtype.itemsize
    # The input in fp32, its normed form, and that times the norm's weight.
    norm = D * (FP32_BYTES + 2 * size)
    stream = D * size
    # q and k after their rotation, v, the output.
    attention = _heads_width(config) * size + config.num_attention_heads * FP32_BYTES
    return BlockMemory(
        stream=tokens * stream,
        mixer=tokens * (norm + attention - stream),
        # The gate before and after its activation, what it is multiplied with, the product.
        channels=tokens * (norm + 4 * F * size),
        backward=tokens * (2 * F + 2 * D) * size,
    )


def _heads_width(config: LlamaConfig) -> int:
    """Elements a token of q, k, v and the output."""
    return config.head_dim * 2 * (config.num_attention_heads + config.num_key_value_heads)


def llama_kept_memory(config: LlamaConfig, tokens: int, dtype: torch.dtype, recomputation: str) -> int:
    """Bytes that a block keeps between the passes; ``recomputation`` as for a TNL's `kept_memory`."""
    block = llama_block_memory(config, tokens, dtype)
    if recomputation == "none":
        return block.kept
    D, F, size = config.hidden_size, config.intermediate_size, dtype.itemsize
    width = config.head_dim * config.num_attention_heads
    attention = 0 if recomputation == "full" else width * size + config.num_attention_heads * FP32_BYTES
    projected = _heads_width(config) - width
    matmuls = (projected + 2 * F + 2 * D) * size if recomputation == "selective_matmuls" else 0
    return block.stream + tokens * (attention + matmuls)


def llama_head_memory(config: LlamaConfig, tokens: int, dtype: torch.dtype) -> HeadMemory:
    """Bytes that the final norm and the loss of ``tokens`` tokens hold, on a GPU."""
    stream = tokens * config.hidden_size * (FP32_BYTES + 2 * dtype.itemsize)
    return HeadMemory(stream, *loss_memory(config.hidden_size, config.vocab_size, tokens, dtype))
