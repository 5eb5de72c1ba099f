"""Reading the prompt of `generate()` in pieces, so that its length does not change the memory it takes."""

import torch
from transformers import GenerationMixin

# Tokens of a batch that are read at once: enough to fill a GPU, few enough that activations stay far below the weights.
PREFILL_TOKENS = 2**15


class PrefillMixin(GenerationMixin):
    """The prefill of transformers' ``generate``, in pieces by default.

    Its own chunks, on ``prefill_chunk_size``, start from an empty cache in older versions, do not split embeddings, and
    lose the logits of a prompt that is padded on the right and ends before the last piece.
    """

    def _prefill(self, input_ids, generation_config, model_kwargs, is_first_iteration=True):
        """Output of the model with the logits [B, 1, vocabulary] after each row's last token.

        Raises:
            ValueError: the prompt has nothing that ``past_key_values`` has not read.
        """
        state = model_kwargs.get("past_key_values")
        if state is None:
            return super()._prefill(input_ids, generation_config, model_kwargs, is_first_iteration=is_first_iteration)
        embeds = model_kwargs.get("inputs_embeds") if is_first_iteration else None
        prompt = input_ids if embeds is None else embeds
        mask = model_kwargs.get("attention_mask")
        mask_length = getattr(generation_config, "_mask_length", -1) if mask is None else mask.shape[1]
        # As in transformers: a prompt as long as its mask repeats what the state has read; a shorter one does not.
        repeats = embeds is not None or mask_length == prompt.shape[1]
        unread = prompt.shape[1] - (state.length if repeats else 0)
        if unread < 1:
            raise ValueError(
                f"past_key_values has read {state.length} columns, the prompt has {prompt.shape[1]}: give the whole "
                "text so far and more, or the new tokens and an attention_mask [B, past + new]"
            )
        columns = generation_config.prefill_chunk_size or max(1, PREFILL_TOKENS // len(prompt))
        if generation_config.output_hidden_states:
            columns = unread  # what was asked for grows with the prompt anyway
        pieces = prompt[:, -unread:].split(columns, 1)
        masks = [None] * len(pieces) if mask is None else mask[:, -unread:].split(columns, 1)
        logits = None
        for piece, piece_mask in zip(pieces, masks, strict=True):
            inputs = dict(model_kwargs, attention_mask=piece_mask)
            if embeds is not None:
                inputs["inputs_embeds"] = piece
            ids = piece if embeds is None else input_ids
            output = self(
                **self.prepare_inputs_for_generation(ids, is_first_iteration=is_first_iteration, **inputs),
                return_dict=True,
            )
            if logits is not None and piece_mask is not None:
                # A row that has ended keeps what follows its last token.
                output.logits = torch.where(piece_mask.any(1)[:, None, None], output.logits[:, -1:], logits)
            logits = output.logits[:, -1:]
        return output
