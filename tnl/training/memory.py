"""How much GPU memory a run takes, from its configuration alone: what `tnl plan` prints and a run out of memory says.

Without DeepSpeed. What DeepSpeed 0.19 holds at each ZeRO stage was read off its tensors on the CPU accelerator, which
`tests/test_plan.py` repeats.
"""

from dataclasses import dataclass, replace

import torch

from tnl.model.activation_memory import (
    BlockMemory,
    HeadMemory,
    block_memory,
    head_memory,
    kept_memory,
    segment_state_memory,
)
from tnl.model.baseline_memory import llama_block_memory, llama_head_memory, llama_kept_memory
from tnl.model.configuration import TransnormerConfig
from tnl.model.kinds import model_config, num_parameters
from tnl.model.state import state_bytes
from tnl.model.tensor_parallel import sliced_config
from tnl.training.batch_split import passes_per_step
from tnl.training.settings import RunSettings, TrainSettings

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FP32_BYTES = 4
MOMENT_BYTES = 2 * FP32_BYTES
# DeepSpeed's defaults, in elements; `tnl.training.engine` writes them out.
REDUCE_BUCKET, PREFETCH_BUCKET = 500_000_000, 50_000_000
# What no tensor shows: the CUDA context with its kernels, cuBLAS, and with several GPUs the buffers of NCCL; an
# allowance and not a measurement. Fragments of the allocator come on top.
CONTEXT_BYTES, NCCL_BYTES = 2**30, 2**30


def overlaps(world_size: int) -> bool:
    """Whether DeepSpeed reduces gradients while others are still computed."""
    return world_size > 1


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on one GPU.

    Attributes:
        moments: what is held when the loss is made, in the backward pass of some block, in the reduction of the
            gradients where that is done once, in the optimizer step: bytes of each part, by the name of the moment.
        allowance: for what is no tensor.
        ram, disk: bytes of each part that offloading keeps there instead, for this GPU's process.
    """

    moments: dict[str, dict[str, int]]
    allowance: int
    ram: dict[str, int]
    disk: dict[str, int]

    @property
    def fullest(self) -> str:
        """The moment of the peak."""
        return max(self.moments, key=lambda name: sum(self.moments[name].values()))

    @property
    def parts(self) -> dict[str, int]:
        """Bytes of each part at the peak."""
        return self.moments[self.fullest]

    @property
    def peak(self) -> int:
        """Bytes of all tensors at the peak."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class _States:
    """Bytes a parameter, on one rank, of what an optimizer step reads and writes."""

    weights: float
    optimizer: float  # moments, and fp32 masters
    accumulated: float  # gradients between two backward passes
    fresh: float  # gradients of one backward pass, before they are added
    step: float  # what the optimizer step makes


def _states(stage: int, dtype: torch.dtype, world_size: int) -> _States:
    size, part = dtype.itemsize, 1 / world_size
    # A stage of 1 or more keeps masters even of fp32 weights.
    optimizer = MOMENT_BYTES if stage == 0 else (MOMENT_BYTES + FP32_BYTES) * part
    narrow = 0 if dtype == torch.float32 else size
    if stage == 0:
        return _States(size, optimizer, FP32_BYTES, narrow, 0)
    if stage == 1:
        return _States(size, optimizer, FP32_BYTES, narrow, FP32_BYTES * part)
    copied = FP32_BYTES * part
    if stage == 2:
        return _States(size, optimizer, copied, size * part, 0 if narrow else copied)
    return _States(size * part, optimizer, copied, 0, copied)


def _offloaded(
    train: TrainSettings, dtype: torch.dtype, numbers: float, accumulates: bool
) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes in RAM and on disk for ``numbers`` parameters of a rank's share; those on disk from DeepSpeed's source."""
    places: dict[str, dict[str, float]] = {"cpu": {}, "nvme": {}}
    if train.offload_optimizer != "none":
        place = places[train.offload_optimizer]
        place["optimizer"] = numbers * (MOMENT_BYTES + FP32_BYTES)
        place["gradients"] = numbers * FP32_BYTES
        # What they are summed up in, before the optimizer's own copy.
        if train.zero_stage == 3 or (accumulates and dtype == torch.float32):
            ram = places["cpu"]
            ram["gradients"] = ram.get("gradients", 0) + numbers * FP32_BYTES
        if train.zero_stage == 2:
            places["cpu"]["weights"] = numbers * dtype.itemsize  # on their way back
    if train.offload_parameters != "none":
        places[train.offload_parameters]["weights"] = numbers * dtype.itemsize
    ram, disk = ({part: round(size) for part, size in parts.items()} for parts in places.values())
    return ram, disk


def _activations(
    settings: RunSettings, config: TransnormerConfig, tokens: int, dtype: torch.dtype
) -> tuple[list[BlockMemory], list[int], HeadMemory]:
    """What each block holds, what it keeps between the passes as it is configured, and the head.

    ``config``: of the TNL that one rank holds.
    """
    modes = map(settings.train.recomputation, range(settings.model.num_layers))
    if settings.model.kind == "llama":
        llama = model_config(settings.model, settings.train.sequence_length)
        blocks = [llama_block_memory(llama, tokens, dtype)] * settings.model.num_layers
        kept = [llama_kept_memory(llama, tokens, dtype, mode) for mode in modes]
        return blocks, kept, llama_head_memory(llama, tokens, dtype)
    blocks = [block_memory(config, i, tokens, dtype) for i in range(settings.model.num_layers)]
    kept = [kept_memory(config, i, tokens, dtype, mode) for i, mode in enumerate(modes)]
    if settings.train.tensor_parallel > 1 and settings.train.activation_checkpointing == "selective_matmuls":
        # What is summed over ranks is made and summed again.
        kept = [size - 2 * tokens * config.decoder_embed_dim * dtype.itemsize for size in kept]
    return blocks, kept, head_memory(config, tokens, dtype)


def memory_plan(settings: RunSettings, world_size: int) -> MemoryPlan:
    """What one of ``world_size`` GPUs holds, moment by moment.

    Raises:
        ConfigError: the batch does not divide.
    """
    train, is_tnl = settings.train, settings.model.kind == "tnl"
    config = sliced_config(settings.model.to_config(), train.tensor_parallel)
    num_divided = world_size // train.tensor_parallel  # ranks that ZeRO divides its states over
    accumulates = passes_per_step(settings.train, world_size) > 1
    dtype, stage = DTYPES[train.precision], train.zero_stage
    N = num_parameters(config if is_tnl else model_config(settings.model, train.sequence_length))
    length = train.segment_length or train.sequence_length // train.sequence_parallel
    tokens, layers = train.micro_batch_size * length, config.decoder_layers
    states = _states(stage, dtype, num_divided)
    if train.offload_optimizer != "none":
        # The sums of the gradients go with the masters, and the step is made there.
        states = replace(states, optimizer=0, accumulated=0, step=0)
    if train.offload_parameters != "none":
        states = replace(states, weights=0)
    once = train.reduce_gradients == "every_step"
    if once:
        # Whole sums on each rank. Almost all gradients are added to them as they are made.
        share, states = states.accumulated, replace(states, accumulated=FP32_BYTES, fresh=0)
    blocks, kept, head = _activations(settings, config, tokens, dtype)
    ram, disk = _offloaded(train, dtype, N / num_divided, accumulates)
    carried = 0
    if train.segment_length is not None:
        # Truncated: before and after a segment. Exact: before each, and the gradients of one.
        copies = 2 if train.segment_gradient == "truncated" else train.num_segments + 2
        carried = copies * state_bytes(config, train.micro_batch_size)
    if train.sequence_parallel > 1:
        # Each layer keeps the state that its slice begins with, and one at a time those of all slices.
        carried = (1 + train.sequence_parallel / layers) * state_bytes(config, train.micro_batch_size)
    scanned = segment_state_memory(config, train.micro_batch_size, length) if is_tnl else 0

    embedding = config.vocab_size * config.decoder_embed_dim
    per_block = (N - embedding * (1 if config.tie_word_embeddings else 2)) / layers
    zero = settings.deepspeed.get("zero_optimization", {})
    bucket = int(zero.get("reduce_bucket_size", REDUCE_BUCKET)) * dtype.itemsize
    gathered = 0
    if stage == 3:
        prefetched = int(zero.get("stage3_prefetch_bucket_size", PREFETCH_BUCKET))
        gathered = min(N, max(embedding, per_block) + prefetched) * dtype.itemsize
    # Stages 1 and 2 make the bucket in the backward pass, stage 3 at the start.
    buckets = (bucket if stage else 0) * (2 if zero.get("overlap_comm", overlaps(num_divided)) and stage < 3 else 1)
    between = N * states.accumulated if accumulates or stage == 3 or once else 0

    fixed = {"weights": N * states.weights, "optimizer": N * states.optimizer}
    made = fixed | {
        "gradients": between,
        "activations": sum(kept) + head.stream,
        "recurrent states": carried,
        "loss": head.gradients + head.logits,
        "ZeRO buffers": gathered + (buckets if stage == 3 or (stage == 1 and accumulates) else 0),
    }
    moments = {"loss": made}
    for i in reversed(range(layers)):
        done = embedding + (layers - i) * per_block  # parameters whose gradient is there when the block ends
        if stage == 3:
            # Gradients wait beside gathered weights until the bucket is full; then each is copied.
            waiting = min(bucket, done * dtype.itemsize)
            gradients, passing = between, waiting + max(gathered, waiting)
        else:
            # Gradients that nothing accumulates are made as the pass goes, narrow ones beside their fp32 sum.
            summed = between or (done if stage < 2 else N * (dtype != torch.float32)) * states.accumulated
            gradients, passing = summed + done * states.fresh, 0
        moments[f"backward pass of block {i}"] = fixed | {
            "gradients": gradients,
            "activations": sum(kept[:i]) + blocks[i].kept + blocks[i].backward,
            "recurrent states": carried + scanned,
            "loss": 0,
            "ZeRO buffers": passing + (0 if once else buckets),
        }
    full = N * states.accumulated
    if once:
        full += N * share
        moments["reduction"] = fixed | {
            "gradients": full + (0 if dtype == torch.float32 else N * dtype.itemsize),
            "activations": 0,
            "recurrent states": 0,
            "loss": 0,
            "ZeRO buffers": buckets,
        }
    moments["optimizer step"] = fixed | {
        "gradients": full + N * states.step,
        "activations": 0,
        "recurrent states": 0,
        "loss": 0,
        "ZeRO buffers": bucket if stage == 3 else 0,
    }
    whole = {name: {part: round(value) for part, value in parts.items()} for name, parts in moments.items()}
    return MemoryPlan(whole, CONTEXT_BYTES + (NCCL_BYTES if world_size > 1 else 0), ram, disk)
