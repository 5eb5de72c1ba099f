"""What a model in training writes, on all ranks together."""

import torch

from tnl.model.state import TransnormerState


@torch.no_grad()
def greedy_tokens(engine, prompt: list[int], max_new_tokens: int, device: torch.device) -> list[int]:
    """The most likely continuation of ``prompt``, always of ``max_new_tokens`` tokens: under ZeRO-3 every forward pass
    is a collective, which no rank may leave out.

    Args:
        engine: a DeepSpeed engine around a `TransnormerForCausalLM`, in evaluation mode.
    """
    state, found = TransnormerState(), []
    ids = torch.tensor([prompt], device=device)
    for _ in range(max_new_tokens):
        logits = engine(input_ids=ids, past_key_values=state, logits_to_keep=1).logits
        ids = logits[:, -1:].argmax(-1)
        found.append(ids.item())
    return found


def answers(
    engine, tokenizer, prompts: list[tuple[str, list[int]]], max_new_tokens: int, device: torch.device
) -> list[dict]:
    """``prompt`` and ``text`` for each instruction and its tokens, answered up to the end token."""
    was_training = engine.training
    engine.eval()
    rows = []
    for prompt, ids in prompts:
        found = greedy_tokens(engine, ids, max_new_tokens, device)
        if tokenizer.eos_token_id in found:
            found = found[: found.index(tokenizer.eos_token_id)]
        rows.append({"prompt": prompt, "text": tokenizer.decode(found, skip_special_tokens=True)})
    engine.train(was_training)
    return rows
