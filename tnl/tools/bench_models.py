"""Models with random weights for the speed benchmarks, a LLaMA's decoding step among them, and how they are timed."""

import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from tnl_kernels.record import environment
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, StaticCache

from tnl import config as configuration
from tnl.errors import ConfigError
from tnl.model import TransnormerConfig
from tnl.model.settings import ModelSettings

DTYPES = {"cuda": torch.bfloat16, "cpu": torch.float32}


def named_config(name: str) -> TransnormerConfig:
    """Of a file of configs/model, such as ``tnl-7b``, or of a YAML file of model settings. No end-of-text token: a
    benchmark generates as many tokens as it says.

    Raises:
        ConfigError: there is no such file, or it has errors.
    """
    source = name if Path(name).suffix in (".yaml", ".yml") else f"model/{name}"
    return configuration.load(ModelSettings, source).to_config(eos_token_id=None)


def numbers(values: list[int]) -> str:
    """As they are given on the command line."""
    return ",".join(map(str, values))


def check_json(file: Path | None) -> None:
    """Raise `ConfigError` if figures cannot become ``file``, before hours are spent on them."""
    if file is not None and file.is_dir():
        raise ConfigError(f"--json: {file} is a folder; name a file")


def described(command: str, device: torch.device) -> dict:
    """What figures must say of themselves."""
    versions = {"transformers": transformers.__version__, "dtype": str(DTYPES[device.type]).removeprefix("torch.")}
    return environment() | versions | {"command": command}


def random_model(config: PreTrainedConfig, device: torch.device) -> PreTrainedModel:
    """A model with the initial weights of its class, in bf16 on a GPU and in fp32 on a CPU."""
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=DTYPES[device.type]).eval()


def random_prompt(model: PreTrainedModel, batch: int, num_tokens: int) -> torch.Tensor:
    """Token ids int64 [batch, num_tokens]."""
    return torch.randint(3, model.config.vocab_size, (batch, num_tokens), device=model.device)


def weight_bytes(model: PreTrainedModel) -> int:
    """Bytes of the weights, a tied head counted once: what a decoding step reads of them."""
    return sum(weight.numel() * weight.element_size() for weight in model.parameters())


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(function: Callable, device: torch.device, count: int = 1) -> float:
    """Mean time of ``function()`` over ``count`` calls in a row, the device idle before and after."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(count):
        function()
    synchronize(device)
    return (time.perf_counter() - start) / count


def peak_gib(device: torch.device) -> float | None:
    """Most GPU memory that tensors have held since `start_peak`."""
    return torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether a GPU had too little memory. cuBLAS asks for its workspace itself, and says so in its own words."""
    return isinstance(error, torch.OutOfMemoryError) or "CUBLAS_STATUS_ALLOC_FAILED" in str(error)


def start_peak(device: torch.device) -> None:
    """Forget the peak so far, and give unused memory back."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def static_cache_step(model: PreTrainedModel, prompt: torch.Tensor, length: int) -> tuple[Callable, int]:
    """One decoding step of a transformer under transformers' static cache, a CUDA graph on a GPU, after ``prompt``.

    Args:
        prompt: token ids int64 [B, T].
        length: tokens for which the cache has room.

    Returns:
        The step, a function without arguments, and the bytes of the cache, all of which each step reads.
    """
    cache = StaticCache(config=model.config, max_cache_len=length)
    model(prompt, past_key_values=cache, use_cache=True, logits_to_keep=1)
    ids = prompt[:, :1].clone()

    def step() -> None:
        model(ids, past_key_values=cache, use_cache=True)

    num_bytes = sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))
    if ids.device.type == "cpu":
        return step, num_bytes
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay, num_bytes
