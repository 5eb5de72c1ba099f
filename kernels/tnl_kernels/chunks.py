"""How documents are cut into chunks, and what decays inside, into and out of a chunk.

Chunks are ordered by their place in the document (step), the longest documents first. The chunks of one step are then a
slice, and those that go on into the next step are the head of that slice: the loop that carries the state has as many
iterations as the longest document has chunks, each over all documents at once and without a gather.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

# Measured on CPU for head dims 32 to 128, forward and backward: 64 is the best or near it.
CHUNK_SIZE = 64


@dataclass(frozen=True)
class Chunks:
    """Where the tokens of ``num_documents`` documents lie in chunks of ``size`` rows.

    steps: slice of the chunks that are the j-th of their document, for each j.
    tokens: [NC * size] int64, the token of a row (any token for a padded row).
    padding: [P] int64, the padded rows, all behind the last token of a document.
    rows: [B * T] int64, the row of a token.
    lengths: [NC] int64, tokens in a chunk.
    documents: [M] int64, the documents that have tokens, and last_chunks: [M] int64, the last chunk of each.
    """

    size: int
    num_documents: int
    steps: list[slice]
    tokens: Tensor
    padding: Tensor
    rows: Tensor
    lengths: Tensor
    documents: Tensor
    last_chunks: Tensor

    def gather(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Tokens to chunks: [B, T, K], any strides -> [NC, size, K] contiguous, ``dtype``, padded rows zero."""
        blocks = x.flatten(0, 1).index_select(0, self.tokens).to(dtype)
        if len(self.padding):
            blocks.index_fill_(0, self.padding, 0)
        return blocks.view(-1, self.size, x.shape[-1])

    def scatter(self, blocks: Tensor, out: Tensor) -> None:
        """Chunks to tokens: [NC, size, K] -> ``out`` [B, T, K], any strides and dtype."""
        out.copy_(blocks.flatten(0, 1).index_select(0, self.rows).view(out.shape))


def document_offsets(B: int, T: int, cu_seqlens: Tensor | None) -> list[int]:
    """Offsets [N + 1] of the documents in the flattened [B * T] tokens; without ``cu_seqlens`` a row is a document."""
    return [b * T for b in range(B + 1)] if cu_seqlens is None else cu_seqlens.tolist()


def cut(offsets: list[int], device: torch.device, size: int = CHUNK_SIZE) -> Chunks:
    """Cut the documents ``[offsets[n], offsets[n + 1])`` into chunks."""
    num_tokens = offsets[-1]
    spans = sorted(
        ((end - start, start, n) for n, (start, end) in enumerate(pairwise(offsets)) if end > start),
        key=lambda span: -(-span[0] // size),
        reverse=True,
    )
    steps, starts, lengths, last_chunks = [], [], [], [0] * len(spans)
    active = len(spans)
    for first_row in range(0, max((length for length, _, _ in spans), default=0), size):
        while spans[active - 1][0] <= first_row:
            active -= 1
        steps.append(slice(len(starts), len(starts) + active))
        last_chunks[:active] = range(len(starts), len(starts) + active)
        starts += [start + first_row for _, start, _ in spans[:active]]
        lengths += [min(size, length - first_row) for length, _, _ in spans[:active]]

    def integers(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=device)

    chunk_lengths = integers(lengths)
    row = torch.arange(size, device=device)
    tokens = (integers(starts)[:, None] + row).flatten()  # [NC * size]
    if len(tokens) == num_tokens:
        padding = integers([])
    else:
        padded = (row >= chunk_lengths[:, None]).flatten()
        padding = padded.nonzero().flatten()
        # One entry past the last token takes what padded rows write into the inverse.
        tokens = tokens.masked_fill_(padded, num_tokens)
    rows = tokens.new_empty(num_tokens + 1).index_copy_(0, tokens, torch.arange(len(tokens), device=device))[:-1]
    return Chunks(
        size=size,
        num_documents=len(offsets) - 1,
        steps=steps,
        tokens=tokens.clamp_(max=max(num_tokens - 1, 0)),
        padding=padding,
        rows=rows,
        lengths=chunk_lengths,
        documents=integers([n for _, _, n in spans]),
        last_chunks=integers(last_chunks),
    )


@dataclass(frozen=True)
class Decay:
    """The decays of one head; every exponent is <= 0, so that no slope overflows.

    within: [size, size], from row s to row r >= s, exp(-slope (r - s)), zero for r < s.
    into: [size, 1], from the state before the chunk to row r, exp(-slope (r + 1)).
    out_of: [NC, size, 1], from row r to the chunk's last token, exp(-slope max(n - 1 - r, 0)).
    across: [NC, 1, 1], over the whole chunk of n tokens, exp(-slope n).
    """

    within: Tensor
    into: Tensor
    out_of: Tensor
    across: Tensor


def decays(slopes: Tensor, chunks: Chunks, dtype: torch.dtype) -> list[Decay]:
    """The decays of every head, in ``dtype``."""
    rate = -slopes.detach().to(dtype)  # [H]
    row = torch.arange(chunks.size, device=slopes.device)
    distance = (row[:, None] - row).clamp_(min=0)  # [size, size]
    to_end = (chunks.lengths[:, None] - 1 - row).clamp_(min=0)  # [NC, size]
    within = torch.exp(rate[:, None, None] * distance).tril_()
    into = torch.exp(rate[:, None] * (row + 1))[..., None]
    out_of = torch.exp(rate[:, None, None] * to_end)[..., None]
    across = torch.exp(rate[:, None] * chunks.lengths)[..., None, None]
    return [Decay(*tables) for tables in zip(within, into, out_of, across, strict=True)]
