"""The TNL model as transformers classes; importing this package registers them with the Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tnl.model.configuration import TransnormerConfig
from tnl.model.modeling import TransnormerForCausalLM, TransnormerModel
from tnl.model.state import TransnormerState
from tnl.model.tokenization import BaiChuanTokenizer, NamedTokenizerConfig, TransnormerTokenizer

AutoConfig.register("transnormer", TransnormerConfig)
AutoModel.register(TransnormerConfig, TransnormerModel)
AutoModelForCausalLM.register(TransnormerConfig, TransnormerForCausalLM)
AutoTokenizer.register(
    NamedTokenizerConfig, slow_tokenizer_class=BaiChuanTokenizer, fast_tokenizer_class=TransnormerTokenizer
)
# By this table of names the Trainer tells a language model, whose labels its label smoothing must shift.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["transnormer"] = TransnormerForCausalLM.__name__

__all__ = [
    "TransnormerConfig",
    "TransnormerForCausalLM",
    "TransnormerModel",
    "TransnormerState",
    "TransnormerTokenizer",
]
