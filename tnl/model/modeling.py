"""TransNormerLLM as transformers classes, with the released checkpoints' parameter names."""

import pickle

import torch
from safetensors import SafetensorError
from tnl_kernels import add_srmsnorm, fork_srmsnorm, srmsnorm
from tnl_kernels.checks import check_cu_seqlens
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast

from tnl.model.configuration import TransnormerConfig
from tnl.model.decay import slopes_tensor
from tnl.model.decoding import TransnormerGenerationMixin
from tnl.model.loading import check_index_files, weight_problems
from tnl.model.loss import IGNORE_INDEX, cross_entropy_of_logits, linear_cross_entropy
from tnl.model.lrpe import Lrpe
from tnl.model.mixers import ChannelMixer, token_mixer
from tnl.model.output import TransnormerCausalLMOutput
from tnl.model.state import TransnormerState


class TransnormerDecoderLayer(GradientCheckpointingLayer):
    """One block: ``x += token_mixer(srms(x)); x += channel_mixer(srms(x))``."""

    def __init__(self, config: TransnormerConfig, layer: int):
        super().__init__()
        self.token_mixer = token_mixer(config, layer)
        self.channel_mixer = ChannelMixer(config)

    def forward(self, x, slopes, positions, cu_seqlens, initial_state, output_final_state, is_step, exchange=None):
        """x [B, T, D], slopes fp32 [H] -> (x [B, T, D], final state [N, H, K, V] or None)."""
        y, x = fork_srmsnorm(x)
        mixed, state = self.token_mixer(
            y, slopes, positions, cu_seqlens, initial_state, output_final_state, is_step, exchange
        )
        y, x = add_srmsnorm(mixed, x)
        return x + self.channel_mixer(y), state


class TransnormerPreTrainedModel(PreTrainedModel):
    """Initialisation and capabilities common to the TNL classes."""

    config_class = TransnormerConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["TransnormerDecoderLayer"]  # noqa: RUF012 - transformers' own declaration
    _is_stateful = True
    # What the released classes leave aside, too.
    _keys_to_ignore_on_load_unexpected = [r"decoder\.version$"]  # noqa: RUF012 - transformers' own declaration

    @torch.no_grad()
    def _init_weights(self, module):
        if any(hasattr(p, "ds_id") and p.numel() == 0 for p in module.parameters(recurse=False)):
            raise ValueError(
                "deepspeed.zero.Init has partitioned the weights before they were initialised: hold an "
                "HfDeepSpeedConfig and build the model with AutoModelForCausalLM.from_config or from_pretrained, which "
                "enter zero.Init themselves"
            )
        super()._init_weights(module)
        if isinstance(module, Lrpe) and not getattr(module.theta, "_is_hf_initialized", False):
            num_heads, _, head_dim = module.theta.shape
            index = torch.arange(num_heads * head_dim, dtype=torch.float32, device=module.theta.device)
            theta = 10000.0 ** (-2.0 * index / (num_heads * head_dim))
            module.theta.copy_(theta.view(num_heads, 1, head_dim))

    def tie_weights(self, missing_keys: set[str] | None = None, **options) -> None:
        """As in transformers, also for a checkpoint whose head has another shape."""
        if missing_keys is not None:
            # Such a head is left without values, and transformers would compare it with the embeddings.
            for head, embeddings in self.all_tied_weights_keys.items():
                if self.get_parameter_or_buffer(head).is_meta and not self.get_parameter_or_buffer(embeddings).is_meta:
                    missing_keys.add(head)
        super().tie_weights(missing_keys=missing_keys, **options)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path,
        *args,
        output_loading_info: bool = False,
        ignore_mismatched_sizes: bool = False,
        **kwargs,
    ):
        """As in transformers, but the weights must be exactly those of the model, and finite.

        Raises:
            ValueError: the checkpoint lacks a parameter of the model, or has one that the model has not, or of another
                shape (unless ``ignore_mismatched_sizes``), or a value that is not finite; its index names files outside
                its folder; a pickled file holds more than tensors; a safetensors file is damaged.
        """
        name = pretrained_model_name_or_path
        if name is not None:
            places = {key: kwargs[key] for key in ("subfolder", "cache_dir", "revision", "variant") if key in kwargs}
            check_index_files(str(name), **places)
        try:
            # Other shapes are refused below: transformers would not name them in its error.
            model, info = super().from_pretrained(
                name, *args, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
            )
        except pickle.UnpicklingError as error:
            raise ValueError(
                f"{name}: a pickled file holds more than tensors, which unpickling would run as code, so nothing of it "
                "was loaded; get the checkpoint from its authors, as safetensors if they have it"
            ) from error
        except SafetensorError as error:
            raise ValueError(f"{name}: a file of weights is damaged ({error}); download it again") from error
        problems = weight_problems(model, info, ignore_mismatched_sizes)
        if problems:
            raise ValueError(f"{name}: weights do not fit the configuration; {'; '.join(problems)}")
        return (model, info) if output_loading_info else model


class TransnormerModel(TransnormerPreTrainedModel):
    """Embedding, blocks and the final SRMSNorm."""

    # The output head in the checkpoint of a `TransnormerForCausalLM`.
    _keys_to_ignore_on_load_unexpected = [r"^lm_head\.weight$", r"decoder\.version$"]  # noqa: RUF012 - see above

    def __init__(self, config: TransnormerConfig):
        super().__init__(config)
        # No padding_idx: id 0 is <unk>, a token like any other, and the tied head trains its row.
        self.embed_tokens = nn.Embedding(config.vocab_size, config.decoder_embed_dim)
        self.embed_scale = 1.0 if config.no_scale_embedding else config.decoder_embed_dim**0.5
        self.layers = nn.ModuleList(TransnormerDecoderLayer(config, i) for i in range(config.decoder_layers))
        self.post_init()

    def get_input_embeddings(self):
        """The embedding layer, as transformers asks for it."""
        return self.embed_tokens

    def set_input_embeddings(self, value):
        """Replace the embedding layer."""
        self.embed_tokens = value

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: TransnormerState | None = None,
        inputs_embeds: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """Hidden states after the final norm.

        Args:
            input_ids: int64 [B, T]; or give ``inputs_embeds`` [B, T, D], unscaled.
            attention_mask: [B, T] or [B, past + T], 0 marks padding on any side. A padded position returns what the
                last token before it returns, zeros before the first token.
            past_key_values: state to continue from, updated in place, or left as it is where ``use_cache`` is False.
                After an error on the way it is a mixture of before and after: go on from a `TransnormerState.fork`
                made before.
            cu_seqlens: int32 [N + 1] with B = 1: N packed sequences, each starting from its own state; [0, ..., T].
            use_cache: whether to make and return a state; default the config's, and False in training.
            sequence_shard: a `tnl.model.sequence_parallel.SequenceShard`: the input is one rank's slice of windows that
                several ranks share; without padding and without a state.
            output_hidden_states: also return the embeddings and the output of each block [B, T, D]; the last one after
                the final norm.

        Raises:
            ValueError: ids and embeddings both or neither given, a mask of another shape or together with
                ``cu_seqlens``, ``past_key_values`` of another model or batch, or a ``sequence_shard`` of another batch
                or together with a mask or a state.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        shard = kwargs.get("sequence_shard")
        if shard is not None and (attention_mask is not None or past_key_values is not None or use_cache):
            raise ValueError("sequence_shard: goes with neither attention_mask nor past_key_values nor use_cache")
        if use_cache is None:
            stateful = self.config.use_cache and not self.training and shard is None
            use_cache = past_key_values is not None or stateful
        state = past_key_values if past_key_values is not None else TransnormerState() if use_cache else None
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        x = x * self.embed_scale  # [B, T, D]
        B, T, D = x.shape

        unpack = None
        if attention_mask is not None:
            mask = attention_mask[:, -T:].bool()
            if mask.shape != (B, T):
                raise ValueError(f"attention_mask: got shape {tuple(attention_mask.shape)}, expected [B, T] = {(B, T)}")
            if not mask.all():
                if cu_seqlens is not None:
                    raise ValueError("attention_mask and cu_seqlens both given: packed sequences have no padding")
                # The real tokens are packed side by side, so that padding on any side neither decays nor enters a
                # state.
                kept = mask.flatten().nonzero().squeeze(1)
                cu_seqlens = torch.cat([mask.new_zeros(1, dtype=torch.int32), mask.sum(1).cumsum(0).int()])
                x = x.flatten(0, 1).index_select(0, kept).unsqueeze(0)  # [1, tokens, D]
                # On the way back a padded position repeats the token before it: then the last column is right for
                # prompts padded on the right, too.
                seen = mask.cumsum(1)
                source = torch.where(seen > 0, seen + cu_seqlens[:-1].unsqueeze(1), 0).flatten()

                def unpack(x):
                    # The blocks may lie on several devices.
                    return torch.cat([x.new_zeros(1, D), x[0]]).index_select(0, source.to(x.device)).view(B, T, D)

        num_sequences = check_cu_seqlens(cu_seqlens, *x.shape[:2])
        start = None if state is None else state.positions
        if start is not None and len(state.layers) != len(self.layers):
            raise ValueError(f"past_key_values holds {len(state.layers)} layers, the model has {len(self.layers)}")
        if start is not None and len(start) != num_sequences:
            raise ValueError(f"past_key_values holds {len(start)} sequences, the input has {num_sequences}")
        exchange = None if shard is None else shard.exchange(*x.shape[:2], cu_seqlens)
        positions = self._positions(x, cu_seqlens, start if exchange is None else exchange.starts)
        # Asked before the blocks: gradient checkpointing may run them without gradients first, and then once more.
        is_step = x.shape[1] == 1 and cu_seqlens is None and start is not None and not torch.is_grad_enabled()
        is_step = is_step and use_cache  # a step updates the state in place
        finals, hidden_states = [], []
        for i, layer in enumerate(self.layers):
            if output_hidden_states:
                hidden_states.append(x)
            # An argument, not an attribute read inside: so one compilation of a layer serves all layers.
            slopes = slopes_tensor(layer.token_mixer.slopes, x.device)
            initial = None if state is None else state.layer(i)
            x, final = layer(x, slopes, positions, cu_seqlens, initial, use_cache, is_step, exchange)
            if start is not None and use_cache:
                state.layers[i] = final  # at once: otherwise the states of all layers would be there twice
            finals.append(final)
        x = srmsnorm(x)
        if use_cache:
            read = x.shape[1] if cu_seqlens is None else cu_seqlens.diff().long()
            start = positions.new_zeros(num_sequences) if start is None else start
            state.update(finals, start + read, T)
        if unpack is not None:
            x, hidden_states = unpack(x), [unpack(h) for h in hidden_states]
        output = BaseModelOutputWithPast(
            last_hidden_state=x,
            past_key_values=state if use_cache else None,
            hidden_states=(*hidden_states, x) if output_hidden_states else None,
        )
        return output if return_dict is None or return_dict else output.to_tuple()

    @staticmethod
    def _positions(x, cu_seqlens, start):
        """Position of every token in its sequence: int64 [T], or [B, T] where sequences start differently."""
        T = x.shape[1]
        index = torch.arange(T, device=x.device)
        if cu_seqlens is None:
            return index if start is None else start.unsqueeze(1) + index
        begins = cu_seqlens[:-1].long() if start is None else cu_seqlens[:-1].long() - start
        return index - begins.repeat_interleave(cu_seqlens.diff().long(), output_size=T)


class LanguageModelHead(nn.Linear):
    """The output projection; with labels it returns the loss and never the logits.

    The loss is made inside this module's own forward because ZeRO-3 gathers a parameter only for the module that
    owns it.
    """

    def forward(self, hidden: torch.Tensor, labels: torch.Tensor | None = None):
        """hidden [..., D] -> logits [..., vocabulary]; with labels int64 [...] -> (loss sum, number of labelled
        tokens)."""
        if labels is None:
            return super().forward(hidden)
        if is_traceable_wrapper_subclass(self.weight):
            # A quantised weight knows its matmul and no other operation.
            return cross_entropy_of_logits(super().forward(hidden), labels)
        return linear_cross_entropy(hidden.flatten(0, -2), self.weight, labels.flatten())


class TransnormerForCausalLM(TransnormerGenerationMixin, TransnormerPreTrainedModel):
    """The language model: `TransnormerModel` and a head tied to the embeddings."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012 - transformers' own declaration

    def __init__(self, config: TransnormerConfig):
        super().__init__(config)
        self.model = TransnormerModel(config)
        self.lm_head = LanguageModelHead(config.decoder_embed_dim, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self):
        """The head, as transformers asks for it."""
        return self.lm_head

    def set_output_embeddings(self, new_embeddings):
        """Give the head another weight."""
        self.lm_head.weight = new_embeddings.weight
        self.lm_head.out_features = len(new_embeddings.weight)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: TransnormerState | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        num_items_in_batch: int | torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        output_logits: bool = False,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs,
    ) -> TransnormerCausalLMOutput:
        """Logits, or the loss when labels are given; arguments as in `TransnormerModel.forward`, and:

        Args:
            labels: int64 [B, T], -100 ignored; shifted inside: position t is asked for ``labels[t + 1]``. With
                ``cu_seqlens``, mark the first token of every sequence -100, or its predecessor is asked to predict
                across the boundary.
            shift_labels: int64 [B, T], already shifted: position t is asked for ``shift_labels[t]``; instead of
                ``labels``.
            num_items_in_batch: divide the loss by this instead of its own number of labelled tokens; what the Trainer
                of transformers gives when it accumulates gradients.
            logits_to_keep: compute logits for the last so many positions only (0 = all), or for these indices.
            output_logits: return logits next to the loss.

        Raises:
            ValueError: both kinds of labels given.
        """
        # Not a parameter by name: the Trainer wants a batch to hold every parameter with "label" in its name, or it
        # evaluates without a loss.
        shift_labels = kwargs.get("shift_labels")
        if labels is not None and shift_labels is not None:
            raise ValueError("give labels or shift_labels, not both")
        output = self.model(
            input_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            cu_seqlens=cu_seqlens,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            sequence_shard=kwargs.get("sequence_shard"),
        )
        hidden = output.last_hidden_state
        loss = loss_sum = num_tokens = logits = None
        if labels is not None:
            shift_labels = torch.full_like(labels, IGNORE_INDEX)
            shift_labels[:, :-1] = labels[:, 1:]
        if shift_labels is not None:
            if isinstance(self.lm_head, LanguageModelHead):
                loss_sum, num_tokens = self.lm_head(hidden, shift_labels)
            else:
                # An adapter or a quantised layer stands in its place, which makes logits and no loss.
                loss_sum, num_tokens = cross_entropy_of_logits(self.lm_head(hidden), shift_labels)
            loss = loss_sum / (num_tokens.clamp(min=1) if num_items_in_batch is None else num_items_in_batch)
        if shift_labels is None or output_logits:
            keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(hidden[:, keep])
        result = TransnormerCausalLMOutput(
            loss=loss,
            loss_sum=loss_sum,
            num_tokens=num_tokens,
            logits=logits,
            past_key_values=output.past_key_values,
            hidden_states=output.hidden_states,
        )
        return result if return_dict is None or return_dict else result.to_tuple()
