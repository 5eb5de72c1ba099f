"""lm-eval's own adapter around a model that is loaded already, to compare ours with."""

import torch
from lm_eval.models.huggingface import HFLM
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast


def reference_adapter(
    model, tokenizer, *, batch_size: int, max_length: int, softmax_dtype: torch.dtype | None = None
) -> HFLM:
    """lm-eval's ``hf`` adapter.

    Args:
        batch_size: sequences of a forward pass.
        max_length: tokens of a sequence; longer ones are cut.
        softmax_dtype: of log-probabilities and of their sums; default the model's. In bf16 a sum of -345 is a multiple
            of 2.
    """
    return HFLM(
        pretrained=model,
        tokenizer=tokenizer,
        batch_size=batch_size,
        max_length=max_length,
        device=str(model.device),
        softmax_dtype=softmax_dtype,
    )


def nominal_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """A tokenizer of so many words, for requests that are token ids already: adapters do not go without one."""
    specials = ["<unk>", "<s>", "</s>"]
    words = specials + [f"w{i}" for i in range(len(specials), vocab_size)]
    model = WordLevel({word: i for i, word in enumerate(words)}, unk_token=specials[0])
    names = dict(zip(("unk_token", "bos_token", "eos_token"), specials, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model), pad_token=specials[0], **names)


class ReadTokens:
    """Counts the positions that a model reads, padding included, while it is open.

    Args:
        model: `TransnormerForCausalLM`.
    """

    def __init__(self, model: torch.nn.Module):
        self._model, self.count = model.model, 0

    def __enter__(self) -> "ReadTokens":
        self._hook = self._model.register_forward_pre_hook(self._see)
        return self

    def __exit__(self, *error) -> None:
        self._hook.remove()

    def _see(self, module, arguments) -> None:
        self.count += arguments[0].numel()
