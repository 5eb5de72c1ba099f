"""The TNL model as transformers classes; importing this package registers them with the Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from tnl.model.configuration import TransnormerConfig
from tnl.model.modeling import TransnormerForCausalLM, TransnormerModel
from tnl.model.state import TransnormerState

AutoConfig.register("transnormer", TransnormerConfig)
AutoModel.register(TransnormerConfig, TransnormerModel)
AutoModelForCausalLM.register(TransnormerConfig, TransnormerForCausalLM)

__all__ = ["TransnormerConfig", "TransnormerForCausalLM", "TransnormerModel", "TransnormerState"]
