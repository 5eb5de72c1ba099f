"""How `generate()` runs a TNL model: the prompt in pieces, and on a GPU one CUDA graph for every further token."""

import threading

import torch

from tnl.model.output import TransnormerCausalLMOutput
from tnl.model.prefill import PrefillMixin
from tnl.model.state import TransnormerState

# CUDA does not let one thread wait for the device, as a capture does before it begins, while another one captures.
CAPTURE = threading.Lock()


class StepGraph:
    """The forward pass over one token of each sequence, captured as a CUDA graph at its second call and then replayed.

    The state has constant size and is updated in place, so that its tensors are the graph's own buffers: nothing is
    copied but the token ids. One object belongs to one generation and one state; it is called like the model.
    """

    def __init__(self, model):
        self.model = model
        self.state = self.graph = self.ids = self.logits = None
        self.tensors: list[torch.Tensor] = []

    @torch.no_grad()
    def __call__(
        self, input_ids: torch.Tensor, past_key_values: TransnormerState, **options
    ) -> TransnormerCausalLMOutput:
        """Next-token logits [B, 1, vocabulary] after ``input_ids`` int64 [B, 1], none of which is padding.

        The logits lie in the graph's own memory, until the next call.
        """
        if past_key_values is not self.state:
            # The first token runs kernel by kernel: libraries set themselves up and kernels are compiled, neither of
            # which a capture allows.
            self.state, self.graph = past_key_values, None
            return self.model(input_ids, past_key_values=past_key_values, use_cache=True)
        if self.graph is None or not self._holds_state():
            self._capture(input_ids)
        self.ids.copy_(input_ids)
        self.graph.replay()
        self.state.length += 1
        return TransnormerCausalLMOutput(logits=self.logits, past_key_values=self.state)

    def _holds_state(self) -> bool:
        """Whether the state still lies where it lay at the capture."""
        tensors = [*self.state.layers, self.state.positions]
        return all(a is b for a, b in zip(tensors, self.tensors, strict=True))

    def _capture(self, input_ids: torch.Tensor) -> None:
        """Record the forward pass without running it."""
        state = self.state
        self.tensors = [*state.layers, state.positions]
        self.ids = input_ids.clone()
        graph = torch.cuda.CUDAGraph()
        length = state.length
        # Other threads may go on using the GPU meanwhile.
        capture = torch.cuda.graph(graph, capture_error_mode="thread_local")
        with CAPTURE, torch.cuda.device(input_ids.device), capture:
            self.logits = self.model(self.ids, past_key_values=state, use_cache=True).logits
        state.length = length
        assert self._holds_state(), "a step must update the state in place"
        self.graph = graph


class TransnormerGenerationMixin(PrefillMixin):
    """`generate()` of transformers on a `TransnormerState`."""

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        if generation_config.use_cache and model_kwargs.get("past_key_values") is None:
            model_kwargs["past_key_values"] = TransnormerState()

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def _valid_auto_compile_criteria(self, model_kwargs, generation_config) -> bool:
        """Whether the steps of this generation are replayed as a `StepGraph`."""
        quantizer = getattr(self, "hf_quantizer", None)
        return (
            self.device.type == "cuda"
            and isinstance(model_kwargs.get("past_key_values"), TransnormerState)
            and not generation_config.disable_compile
            and not generation_config.output_hidden_states
            # A checkpoint asks for the random state, which a capture does not allow.
            and not (self.training and self.is_gradient_checkpointing)
            # Neither weights that lie on several devices nor those that DeepSpeed gathers for each layer.
            and len(set(getattr(self, "hf_device_map", {}).values())) <= 1
            and not hasattr(next(self.parameters()), "ds_id")
            and (quantizer is None or quantizer.is_compileable)
        )

    def get_compiled_call(self, compile_config) -> StepGraph:
        """What `generate()` calls for each token on a GPU, one object for each generation."""
        return StepGraph(self)
