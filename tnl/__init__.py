"""TransNormerLLM training framework.

`tnl.model` holds the model; importing it registers the classes with transformers' Auto classes. Importing `tnl` alone
imports neither torch nor transformers.
"""

__version__ = "0.1.0"


def __getattr__(name: str):
    """Load the model classes on first use, so that ``tnl --help`` does not pay for importing transformers."""
    if name in ("TransnormerConfig", "TransnormerModel", "TransnormerForCausalLM", "TransnormerState"):
        import tnl.model

        return getattr(tnl.model, name)
    raise AttributeError(f"module 'tnl' has no attribute {name!r}")
