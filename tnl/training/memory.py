"""How much GPU memory a run takes, from its configuration alone: what `tnl plan` prints and a run out of memory says.

Without DeepSpeed. What DeepSpeed 0.19 holds at each ZeRO stage was read off its tensors on the CPU accelerator, which
`tests/test_plan.py` repeats.
"""

from dataclasses import dataclass, replace

import torch

from tnl.errors import ConfigError
from tnl.model.activation_memory import block_memory, head_memory, kept_memory, segment_state_memory
from tnl.model.flops import num_parameters
from tnl.model.state import state_bytes
from tnl.training.settings import PretrainSettings

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
        moments: what is held when the loss is made, in the backward pass of some block, in the optimizer step:
            bytes of each part, by the name of the moment.
        allowance: for what is no tensor.
    """

    moments: dict[str, dict[str, int]]
    allowance: int

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


def passes_per_step(settings: PretrainSettings, world_size: int) -> int:
    """Backward passes that a rank takes in one optimizer step.

    Raises:
        ConfigError: the ranks do not divide into groups, or the global batch is no multiple of what all take in one
            micro-batch.
    """
    train = settings.train
    if world_size % train.sequence_parallel:
        raise ConfigError(
            f"train.sequence_parallel: {world_size} GPU(s) do not divide into groups of {train.sequence_parallel}; "
            "change one of them"
        )
    groups = world_size // train.sequence_parallel
    per_pass = train.micro_batch_size * groups
    if train.global_batch_size % per_pass:
        raise ConfigError(
            f"train.global_batch_size: {train.global_batch_size} is no multiple of train.micro_batch_size "
            f"{train.micro_batch_size} x {groups} {'GPUs' if groups == world_size else 'groups of GPUs'} = {per_pass}; "
            "change one of them"
        )
    return train.global_batch_size // per_pass * train.num_segments


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


def memory_plan(settings: PretrainSettings, world_size: int) -> MemoryPlan:
    """What one of ``world_size`` GPUs holds, moment by moment.

    Raises:
        ConfigError: the batch does not divide, or the model is no TNL.
    """
    if settings.model.kind != "tnl":
        raise ConfigError(f"model.kind: {settings.model.kind}: memory is planned for a tnl only; set kind: tnl")
    train, config = settings.train, settings.model.to_config()
    accumulates = passes_per_step(settings, world_size) > 1
    dtype, stage, N = DTYPES[train.precision], train.zero_stage, num_parameters(config)
    length = train.segment_length or train.sequence_length // train.sequence_parallel
    tokens, layers = train.micro_batch_size * length, config.decoder_layers
    states = _states(stage, dtype, world_size)
    if train.offload_optimizer != "none":
        # The sums of the gradients go with the masters, and the step is made there.
        states = replace(states, optimizer=0, accumulated=0, step=0)
    if train.offload_parameters != "none":
        states = replace(states, weights=0)
    blocks = [block_memory(config, i, tokens, dtype) for i in range(layers)]
    kept = [kept_memory(config, i, tokens, dtype, train.recomputation(i)) for i in range(layers)]
    head = head_memory(config, tokens, dtype)
    carried = 0
    if train.segment_length is not None:
        # Truncated: before and after a segment. Exact: before each, and the gradients of one.
        copies = 2 if train.segment_gradient == "truncated" else train.num_segments + 2
        carried = copies * state_bytes(config, train.micro_batch_size)
    if train.sequence_parallel > 1:
        # Each layer keeps the state that its slice begins with, and one at a time those of all slices.
        carried = (1 + train.sequence_parallel / layers) * state_bytes(config, train.micro_batch_size)
    scanned = segment_state_memory(config, train.micro_batch_size, length)

    embedding = config.vocab_size * config.decoder_embed_dim
    per_block = (N - embedding * (1 if config.tie_word_embeddings else 2)) / layers
    zero = settings.deepspeed.get("zero_optimization", {})
    bucket = int(zero.get("reduce_bucket_size", REDUCE_BUCKET)) * dtype.itemsize
    gathered = 0
    if stage == 3:
        prefetched = int(zero.get("stage3_prefetch_bucket_size", PREFETCH_BUCKET))
        gathered = min(N, max(embedding, per_block) + prefetched) * dtype.itemsize
    # Stages 1 and 2 make the bucket in the backward pass, stage 3 at the start.
    buckets = (bucket if stage else 0) * (2 if zero.get("overlap_comm", overlaps(world_size)) and stage < 3 else 1)
    between = N * states.accumulated if accumulates or stage == 3 else 0

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
            "ZeRO buffers": buckets + passing,
        }
    full = N * states.accumulated
    moments["optimizer step"] = fixed | {
        "gradients": full + N * states.step,
        "activations": 0,
        "recurrent states": 0,
        "loss": 0,
        "ZeRO buffers": bucket if stage == 3 else 0,
    }
    whole = {name: {part: round(value) for part, value in parts.items()} for name, parts in moments.items()}
    return MemoryPlan(whole, CONTEXT_BYTES + (NCCL_BYTES if world_size > 1 else 0))
