"""TNL as one would write it with the kernel of flash-linear-attention and plain PyTorch: what ``tnl-fla`` measures.

Weights, names, initial values, mathematics and rounding are those of `TransnormerForCausalLM`. Around the kernel stand
torch's own operators, the best ones it has for the purpose (``rms_norm`` is a single kernel); the loss is torch's
cross-entropy of all logits, which are made as a whole and widened to fp32, as transformers does it.
"""

import importlib
import importlib.util
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tnl.errors import ConfigError
from tnl.model.configuration import TransnormerConfig
from tnl.model.decay import slopes_tensor
from tnl.model.gated_attention import GatedAttention
from tnl.model.loss import IGNORE_INDEX
from tnl.model.lrpe import Lrpe
from tnl.model.mixers import ChannelMixer
from tnl.model.modeling import TransnormerDecoderLayer, TransnormerForCausalLM
from tnl.model.output import TransnormerCausalLMOutput
from tnl.model.settings import ModelSettings
from tnl.training.settings import PretrainSettings

KIND = "tnl-fla"
# (q, k, v [B, T, H, K], log decay fp32 [H]) -> o [B, T, H, V].
Attention = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
# What `TransnormerConfig` must say, since nothing else is written out here.
WRITTEN = {
    "gate_dim": None,
    "linear_act_fun": ("silu", "swish"),
    "mixer_norm_type": "simplermsnorm",
    "lrpe_phase_dtype": "float32",
}
EPS = 1e-6
# How far apart loss and gradients of both models may be: relative, and relative RMS of the worst matrix. In bf16 each
# rounds its activations at other places, which makes 1 %; decays that are 10 % off make 3.5 %. The gradient of LRPE's
# theta is left out: in a sum over positions nearly all of it cancels, and rounding is what remains in bf16.
LOSS_BOUND = {torch.float32: 1e-5, torch.bfloat16: 1e-3}
GRADIENT_BOUND = {torch.float32: 1e-3, torch.bfloat16: 3e-2}
# One forward and backward pass that compares them: layers and tokens at most.
COMPARED_LAYERS, COMPARED_TOKENS = 2, 16384
SEED = 0


def fla_attention(device: torch.device) -> Attention:
    """fla's chunked kernel for a fixed decay of each head, the fastest of those that it has (kernels/README.md).

    Raises:
        ConfigError: fla is not installed, or there is no GPU.
    """
    if importlib.util.find_spec("fla") is None:
        raise ConfigError(
            "--kinds: tnl-fla: the package fla is not installed; pip install fla-core, or leave tnl-fla out"
        )
    if device.type != "cuda":
        raise ConfigError("--kinds: tnl-fla: the kernels of fla need a GPU; leave tnl-fla out")
    op = importlib.import_module("fla.ops.simple_gla").chunk_simple_gla
    return lambda q, k, v, log_decay: op(q, k, v, g_gamma=log_decay, scale=1.0)[0]


def check_settings(settings: PretrainSettings) -> None:
    """Refuse what this model is not written for.

    Raises:
        ConfigError: naming the keys.
    """
    config, train = settings.model.to_config(), settings.train
    wrong = [f"model: {key}" for key, value in WRITTEN.items() if getattr(config, key) not in _options(value)]
    if train.segment_length is not None or train.sequence_parallel > 1:
        wrong.append("train.segment_length or train.sequence_parallel, which carry states")
    if train.tensor_parallel > 1:
        wrong.append("train.tensor_parallel")
    if train.compile:
        wrong.append("train.compile, which fla's kernels do not allow in one piece")
    if train.activation_checkpointing not in ("none", "full", "every_k"):
        wrong.append("selective train.activation_checkpointing, which knows no operator of fla")
    if wrong:
        raise ConfigError(f"--kinds: tnl-fla: is not written for {'; '.join(wrong)}; leave tnl-fla or these out")


def prepare(
    cases: list[PretrainSettings], attention: Attention | None, device: torch.device, dtype: torch.dtype
) -> tuple[Attention, dict]:
    """The kernel, fla's for None, and what a table says of it: its version, and the `agreement` on the first case.

    Raises:
        ConfigError: as `fla_attention`, `check_settings` and `agreement`.
    """
    for settings in cases:
        check_settings(settings)
    found = {"version": None}
    if attention is None:
        attention = fla_attention(device)
        found["version"] = importlib.import_module("fla").__version__
    return attention, found | agreement(cases[0], attention, device, dtype)


def _options(value: object) -> tuple:
    return value if isinstance(value, tuple) else (value,)


def srms(x: Tensor) -> Tensor:
    """SRMSNorm over the last dim, computed in fp32."""
    return F.rms_norm(x, x.shape[-1:], eps=EPS)


class PlainLrpe(Lrpe):
    """LRPE with phases in fp32."""

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """x [B, T, H, K], positions int64 [T] -> [B, T, H, 2K]."""
        phase = positions.float()[:, None, None] * self.theta[:, 0].float()  # [T, H, K]
        return torch.cat([x * phase.cos().to(x.dtype), x * phase.sin().to(x.dtype)], -1)


class PlainTokenMixer(nn.Module):
    """``W_o(u * srms(attention(silu(q), silu(k), v)))`` with the weights of ``mixer``."""

    def __init__(self, mixer: GatedAttention, attention: Attention):
        super().__init__()
        self.attention = attention
        self.num_heads = mixer.num_heads
        # Not a tensor: the model may be cast to bf16.
        self.log_decay = tuple(-slope for slope in mixer.slopes)
        self.qkvu_proj, self.out_proj = mixer.qkvu_proj, mixer.out_proj
        self.lrpe = None
        if mixer.lrpe is not None:
            self.lrpe = PlainLrpe(mixer.num_heads, mixer.head_dim, mixer.lrpe.phase_dtype)
            self.lrpe.theta = mixer.lrpe.theta

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """x [B, T, D], positions int64 [T] -> [B, T, D]."""
        q, k, v, u = self.qkvu_proj(x).chunk(4, dim=-1)
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)) for t in (F.silu(q), F.silu(k), v))  # [B, T, H, K]
        if self.lrpe is not None:
            q, k = self.lrpe(q, positions), self.lrpe(k, positions)  # [B, T, H, 2K]
        o = self.attention(q, k, v, slopes_tensor(self.log_decay, x.device))
        return self.out_proj(u * srms(o.flatten(2)))


class PlainChannelMixer(nn.Module):
    """SGLU with the weights of ``mixer``."""

    def __init__(self, mixer: ChannelMixer):
        super().__init__()
        self.l1, self.l2, self.l3 = mixer.l1, mixer.l2, mixer.l3

    def forward(self, x: Tensor) -> Tensor:
        """x [B, T, D] -> [B, T, D]."""
        return self.l3(self.l1(x) * self.l2(x))


class PlainDecoderLayer(nn.Module):
    """One block with the weights of ``layer``."""

    def __init__(self, layer: TransnormerDecoderLayer, attention: Attention):
        super().__init__()
        self.token_mixer = PlainTokenMixer(layer.token_mixer, attention)
        self.channel_mixer = PlainChannelMixer(layer.channel_mixer)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """x [B, T, D], positions int64 [T] -> [B, T, D]."""
        x = x + self.token_mixer(srms(x), positions)
        return x + self.channel_mixer(srms(x))


class PlainTransnormer(TransnormerForCausalLM):
    """`TransnormerForCausalLM` of the same configuration, initial weights and parameter names, computed plainly.

    Args:
        attention: the kernel, such as `fla_attention` gives.
    """

    def __init__(self, config: TransnormerConfig, attention: Attention):
        super().__init__(config)
        self.model.layers = nn.ModuleList(PlainDecoderLayer(layer, attention) for layer in self.model.layers)

    def forward(self, input_ids: Tensor, labels: Tensor, use_cache: bool = False) -> TransnormerCausalLMOutput:
        """The loss of training windows, input_ids and labels int64 [B, T]."""
        assert not use_cache
        x = self.model.embed_tokens(input_ids) * self.model.embed_scale
        positions = torch.arange(x.shape[1], device=x.device)
        for layer in self.model.layers:
            x = layer(x, positions)
        logits = self.lm_head(srms(x)).float()  # [B, T, vocabulary]
        shifted = F.pad(labels, (0, 1), value=IGNORE_INDEX)[:, 1:].flatten()
        loss_sum = F.cross_entropy(logits.flatten(0, 1), shifted, ignore_index=IGNORE_INDEX, reduction="sum")
        return TransnormerCausalLMOutput(loss_sum=loss_sum, num_tokens=(shifted != IGNORE_INDEX).sum())


def agreement(settings: PretrainSettings, attention: Attention, device: torch.device, dtype: torch.dtype) -> dict:
    """How far loss and gradients are from ours, before anything is timed.

    Of the first `COMPARED_LAYERS` blocks' model, with equal weights, on a micro-batch of ``settings`` cut to
    `COMPARED_TOKENS`. It is here that fla's kernels are compiled and tuned, for the shapes that are timed.

    Returns:
        ``loss_difference``, relative, and ``gradient_difference``, relative RMS, the largest of a matrix.

    Raises:
        ConfigError: one is beyond its bound; a figure of such a model would be worth nothing.
    """
    model = _first_layers(settings.model)
    T = min(settings.train.sequence_length, COMPARED_TOKENS)
    B = max(1, min(settings.train.micro_batch_size, COMPARED_TOKENS // T))
    generator = torch.Generator().manual_seed(SEED)
    ids = torch.randint(3, model.vocab_size, (B, T), generator=generator).to(device)
    losses, gradients = [], []
    for make in (TransnormerForCausalLM, lambda config: PlainTransnormer(config, attention)):
        torch.manual_seed(SEED)
        with torch.device(device):
            built = make(model.to_config()).to(dtype).train()
        output = built(input_ids=ids, labels=ids, use_cache=False)
        loss = output.loss_sum / output.num_tokens
        loss.backward()
        losses.append(loss.item())
        gradients.append({name: p.grad for name, p in built.named_parameters() if p.dim() == 2})
    found = {"loss_difference": abs(losses[1] / losses[0] - 1), "gradient_difference": 0.0}
    for name, ours in gradients[0].items():
        difference = (gradients[1][name].float() - ours.float()).norm() / ours.float().norm()
        found["gradient_difference"] = max(found["gradient_difference"], difference.item())
        # A difference that is no number is beyond the bound, too.
        if not difference <= GRADIENT_BOUND[dtype]:
            raise ConfigError(
                f"--kinds: tnl-fla: the gradient of {name} is {difference:.1%} away from ours; this version of fla "
                "computes something else here, leave tnl-fla out"
            )
    if not found["loss_difference"] <= LOSS_BOUND[dtype]:
        raise ConfigError(
            f"--kinds: tnl-fla: its loss {losses[1]} is not ours, {losses[0]}; this version of fla computes something "
            "else here, leave tnl-fla out"
        )
    return found


def _first_layers(model: ModelSettings) -> ModelSettings:
    count = min(COMPARED_LAYERS, model.num_layers)
    kept = tuple(layer for layer in model.lrpe_layers if layer < count)
    return model.model_copy(update={"num_layers": count, "lrpe_layers": kept})
