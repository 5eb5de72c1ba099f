"""TransNormerLLM training framework.

After ``import tnl``, before or after transformers is imported, its Auto classes (`AutoConfig`, `AutoModel`,
`AutoModelForCausalLM`, `AutoTokenizer`) load TransNormerLLM checkpoints with the classes of `tnl.model`, without
remote code. Importing `tnl` alone imports neither torch nor transformers.
"""

import importlib
import importlib.abc
import sys

__version__ = "0.1.0"


class TransformersFinder(importlib.abc.MetaPathFinder):
    """Registers the classes of `tnl.model` as soon as transformers has been imported.

    The registries of transformers take classes, not names, so registering imports torch. Doing that at once would make
    every start of the command line, ``tnl --help`` too, wait for it.
    """

    def find_spec(self, name, path=None, target=None):
        """What the other finders find, with `tnl.model` to be imported after it."""
        if name != "transformers":
            return None
        others = [finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec")]
        spec = next(filter(None, (finder.find_spec(name, path, target) for finder in others)), None)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_register(module):
                run(module)
                sys.meta_path.remove(self)
                importlib.import_module("tnl.model")

            spec.loader.exec_module = run_and_register
        return spec


if "transformers" in sys.modules:
    importlib.import_module("tnl.model")
else:
    sys.meta_path.insert(0, TransformersFinder())


_CLASSES = (
    "TransnormerConfig",
    "TransnormerModel",
    "TransnormerForCausalLM",
    "TransnormerState",
    "TransnormerTokenizer",
)


def __getattr__(name: str):
    """Load the model classes on first use, so that ``tnl --help`` does not pay for importing transformers."""
    if name in _CLASSES:
        import tnl.model

        return getattr(tnl.model, name)
    raise AttributeError(f"module 'tnl' has no attribute {name!r}")
