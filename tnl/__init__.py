"""TransNormerLLM training framework.

Importing this package registers the model with transformers the first time that ``tnl.model`` is needed:
``AutoConfig`` and
``AutoModelForCausalLM`` then load ``model_type: transnormer`` without remote code.
"""

__version__ = "0.1.0"


def __getattr__(name: str):
    """Load the model classes on first use, so that ``tnl --help`` does not pay for importing transformers."""
    if name in ("TransnormerConfig", "TransnormerModel", "TransnormerForCausalLM", "TransnormerState"):
        import tnl.model

        return getattr(tnl.model, name)
    raise AttributeError(f"module 'tnl' has no attribute {name!r}")
