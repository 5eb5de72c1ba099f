"""The whole model once more, in fp64 and as plainly as the mathematics: quadratic attention under a decay matrix.

Nothing of `tnl` or `tnl_kernels` is used, so that an error there cannot be repeated here.
"""

import torch


def reference_slopes(decay: str, num_heads: int, layer: int, num_layers: int) -> torch.Tensor:
    """Slopes [H] in fp64."""
    if decay == "none":
        return torch.zeros(num_heads, dtype=torch.float64)
    h = torch.arange(num_heads, dtype=torch.float64)
    if decay == "paper":
        return 8 * h / num_heads * (1 - layer / num_layers)
    power = 1
    while 2 * power <= num_heads:
        power *= 2
    exponents = [8 * (i + 1) / power for i in range(power)]
    exponents += [4 * (2 * i + 1) / power for i in range(num_heads - power)]
    factor = 1 - layer / (num_layers - 1) + 1e-5 if num_layers > 1 else 1
    return 2 ** -torch.tensor(exponents, dtype=torch.float64) * factor


def srms(x: torch.Tensor) -> torch.Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-6)


def layernorm(x: torch.Tensor) -> torch.Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / torch.sqrt((centred * centred).mean(-1, keepdim=True) + 1e-5)


def silu(x: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(x)


def reference_logits(
    weights: dict[str, torch.Tensor],
    ids: torch.Tensor,
    *,
    num_heads: int,
    num_layers: int,
    lrpe_layers: tuple[int, ...] = (0,),
    decay: str = "released",
    scale_embedding: bool = True,
    activation: bool = True,
    mixer_norm: str = "simplermsnorm",
) -> torch.Tensor:
    """Logits [B, T, vocabulary] in fp64 of token ids [B, T], from the parameters of a `TransnormerForCausalLM`.

    The names of the parameters tell which token mixer it is. Differentiable in the parameters.
    """
    W = {name: weight.double() for name, weight in weights.items()}
    norm = {"simplermsnorm": srms, "layernorm": layernorm}[mixer_norm]
    E = W["model.embed_tokens.weight"]
    B, T = ids.shape
    x = E[ids] * (E.shape[1] ** 0.5 if scale_embedding else 1)  # [B, T, D]
    p = torch.arange(T, dtype=torch.float64)
    for i in range(num_layers):
        mixer, glu = f"model.layers.{i}.token_mixer.", f"model.layers.{i}.channel_mixer."
        y = srms(x)
        if mixer + "qkvu_proj.weight" in W:
            q, k, v, gate = (y @ W[mixer + "qkvu_proj.weight"].T).chunk(4, -1)
        else:
            q, k, v = (y @ W[mixer + "qkv_proj.weight"].T).chunk(3, -1)
            v = silu(v) if activation else v
            gate = torch.sigmoid(y @ W[mixer + "output_gate.0.weight"].T @ W[mixer + "output_gate.1.weight"].T)
        if activation:
            q, k = silu(q), silu(k)
        q, k, v = (t.reshape(B, T, num_heads, -1).transpose(1, 2) for t in (q, k, v))  # [B, H, T, K]
        if i in lrpe_layers:
            phase = W[mixer + "lrpe.theta"] * p[:, None]  # [H, T, K]
            q, k = (torch.cat([t * phase.cos(), t * phase.sin()], -1) for t in (q, k))  # [B, H, T, 2K]
        slopes = reference_slopes(decay, num_heads, i, num_layers)
        decays = torch.exp(-slopes[:, None, None] * (p[:, None] - p)).tril()  # [H, T, T]
        o = (q @ k.transpose(-1, -2) * decays) @ v  # [B, H, T, K]
        o = norm(o.transpose(1, 2).reshape(B, T, -1))
        x = x + (gate * o) @ W[mixer + "out_proj.weight"].T
        y = srms(x)
        x = x + ((y @ W[glu + "l1.weight"].T) * (y @ W[glu + "l2.weight"].T)) @ W[glu + "l3.weight"].T
    return srms(x) @ W.get("lm_head.weight", E).T


def expected_logits(model, ids: torch.Tensor, weights: dict[str, torch.Tensor] | None = None) -> torch.Tensor:
    """`reference_logits` of a `TransnormerForCausalLM`, its configuration read here; ``weights`` instead of its own."""
    config = model.config
    return reference_logits(
        model.state_dict() if weights is None else weights,
        ids,
        num_heads=config.decoder_attention_heads,
        num_layers=config.decoder_layers,
        lrpe_layers=tuple(i for i, flag in enumerate(config.linear_use_lrpe_list) if flag),
        decay=config.decay,
        scale_embedding=not config.no_scale_embedding,
        activation=config.linear_act_fun != "none",
        mixer_norm=config.mixer_norm_type,
    )
