"""Whether lm-eval is there, which only evaluation on benchmarks needs."""

from importlib.util import find_spec

from tnl.errors import ConfigError


def check_harness() -> None:
    """Raise `ConfigError` where lm-eval is not installed."""
    if find_spec("lm_eval") is None:
        raise ConfigError("this needs lm-eval; install it: pip install 'transnormer-llm[eval]'")
