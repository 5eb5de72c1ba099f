"""The rules of the house that a program can check: who imports whom, what no source contains, how files look."""

import ast
import re
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = {"tnl": ROOT / "tnl", "tnl_kernels": ROOT / "kernels" / "tnl_kernels"}
# Each may import itself and what stands left of it; tnl.config stands between what it composes and what reads it.
LAYERS = ["tnl_kernels", "tnl.model", "tnl.data", "tnl.config", "tnl.generation", "tnl.evaluation"]
LAYERS += ["tnl.training", "tnl.tools", "tnl.cli", "tnl.__main__"]
# Everything in tnl may import these; they import each other at most.
LEAVES = {"tnl", "tnl.errors", "tnl.settings", "tnl.plain_yaml", "tnl.files"}
SETTINGS = {"tnl/settings.py", "tnl/model/settings.py", "tnl/data/settings.py", "tnl/training/settings.py"}
SETTINGS |= {"tnl/training/finetune_settings.py", "tnl/evaluation/suite_settings.py"}
# Outside libraries that stay in a few places: files, or folders with a slash at the end.
CONFINED = {
    "deepspeed": {"tnl/training/"},
    "wandb": {"tnl/training/metrics.py"},
    "lm_eval": {"tnl/evaluation/"},
    "peft": {"tnl/model/adapters.py"},
    "torchao": {"tnl/model/four_bit.py"},
    "liger_kernel": {"tnl/model/loss.py"},
    "pydantic": {"tnl/config.py", *SETTINGS},
    "yaml": {"tnl/plain_yaml.py"},
    "typer": {
        "tnl/cli.py",
        "tnl/tools/bench_commands.py",
        "tnl/tools/data_commands.py",
        "tnl/tools/evaluate_commands.py",
        "tnl/tools/probe_commands.py",
    },
    "rich": {
        "tnl/cli.py",
        "tnl/tools/data_inspect.py",
        "tnl/training/metrics.py",
        "tnl/training/pretrain.py",
        "tnl/training/finetune.py",
    },
    "matplotlib": {
        f"tnl/tools/{name}.py"
        for name in ("comparison", "figures", "probe_plots", "report", "report_scores", "score_comparison")
    },
    "datasets": {"tnl/data/records.py", "tnl/evaluation/"},
}


def relative(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


SOURCES = {relative(file): package for package, folder in PACKAGES.items() for file in sorted(folder.rglob("*.py"))}
SCRIPTS = [relative(file) for folder in ("kernels", "scripts", "tests") for file in (ROOT / folder).rglob("*.py")]
ALL_PYTHON = sorted({*SOURCES, *SCRIPTS, "setup.py"})


@cache
def tree_of(file: str) -> ast.Module:
    return ast.parse((ROOT / file).read_text(encoding="utf-8"), file)


def module_of(file: str) -> str:
    package = SOURCES[file]
    parts = (ROOT / file).relative_to(PACKAGES[package]).with_suffix("").parts
    return ".".join([package, *(part for part in parts if part != "__init__")])


def is_module(name: str) -> bool:
    return any(module_of(file) == name for file in SOURCES)


@cache
def imports_of(file: str) -> frozenset[str]:
    """Modules that a file imports anywhere, also inside functions; ``from tnl import config`` is ``tnl.config``."""
    found = set()
    for node in ast.walk(tree_of(file)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: a relative import"
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name for name in inner if is_module(name)} or {node.module}
    return frozenset(found)


def layer_of(module: str) -> str:
    return next((layer for layer in LAYERS if module == layer or module.startswith(f"{layer}.")), module)


def own_imports(file: str) -> set[str]:
    return {name for name in imports_of(file) if name.split(".")[0] in PACKAGES}


def calls(file: str) -> list[ast.Call]:
    return [node for node in ast.walk(tree_of(file)) if isinstance(node, ast.Call)]


# Who imports whom


def test_every_module_stands_in_a_layer():
    assert {layer_of(module_of(file)) for file in SOURCES} <= {*LAYERS, *LEAVES}


@pytest.mark.parametrize("file", SOURCES)
def test_arrows_never_run_back(file):
    module = module_of(file)
    if module == "tnl":
        allowed = {"tnl.model"}  # its classes, on first use
    elif module in LEAVES:
        allowed = LEAVES
    else:
        position = LAYERS.index(layer_of(module))
        allowed = {*LAYERS[: position + 1], *(LEAVES if module.startswith("tnl.") else ())}
        if layer_of(module) == "tnl.config":
            allowed = LEAVES
    wrong = {name for name in own_imports(file) if layer_of(name) not in allowed}
    assert not wrong, f"{file} imports {wrong}"


def test_tools_are_imported_by_the_command_line_only():
    users = {
        layer_of(module_of(file)) for file in SOURCES for name in imports_of(file) if layer_of(name) == "tnl.tools"
    }
    assert users <= {"tnl.tools", "tnl.cli"}


def test_yaml_is_read_through_the_configuration():
    users = {module_of(file) for file in SOURCES if "tnl.plain_yaml" in imports_of(file)}
    assert users == {"tnl.config"}


def test_kernels_import_torch_and_triton_only():
    outside = {name.split(".")[0] for file in SOURCES if SOURCES[file] == "tnl_kernels" for name in imports_of(file)}
    assert outside - sys.stdlib_module_names <= {"tnl_kernels", "torch", "triton"}


@pytest.mark.parametrize("library", CONFINED)
def test_an_outside_library_stays_in_its_place(library):
    users = {file for file in SOURCES for name in imports_of(file) if name.split(".")[0] == library}
    wrong = {file for file in users if not any(file == place or file.startswith(place) for place in CONFINED[library])}
    assert not wrong, f"{library} is imported by {wrong}"


def test_the_rules_see_imports_inside_functions():
    assert "datasets" in imports_of("tnl/data/records.py")
    assert "tnl.training.export" in imports_of("tnl/cli.py")


# What no source contains


@pytest.mark.parametrize("file", [*SOURCES, *(file for file in SCRIPTS if not file.startswith("tests/"))])
def test_nothing_runs_text_as_code(file):
    for call in calls(file):
        name, at = ast.unparse(call.func), f"{file}:{call.lineno}"
        assert name not in ("eval", "exec", "compile", "__import__"), at
        assert name not in ("os.system", "os.popen", "yaml.unsafe_load", "yaml.full_load"), at
        assert name not in ("pickle.load", "pickle.loads", "dill.load", "marshal.loads"), at
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        assert given.get("shell") != "True", at
        assert given.get("trust_remote_code") != "True", at
        assert given.get("allow_pickle") != "True", at
        if name == "torch.load":
            assert given.get("weights_only", "True") == "True", at
        if name == "yaml.load":
            assert given.get("Loader") == "_Loader", at


@pytest.mark.parametrize("file", SOURCES)
def test_environment_switches_are_in_one_file(file):
    names = [
        node.value
        for node in ast.walk(tree_of(file))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and re.fullmatch("TNL_[A-Z0-9_]+", node.value)
    ]
    assert not names or file == "tnl/training/faults.py"


@pytest.mark.parametrize("file", SOURCES)
def test_no_bare_except(file):
    handlers = [node for node in ast.walk(tree_of(file)) if isinstance(node, ast.ExceptHandler)]
    assert all(handler.type is not None for handler in handlers)
    caught = [ast.unparse(handler.type) for handler in handlers]
    assert "BaseException" not in caught or any(isinstance(n, ast.Raise) for h in handlers for n in ast.walk(h))


# How files look


def test_kernels_is_no_package():
    # An importable name "kernels" would hide the package that transformers imports by that name.
    assert not list((ROOT / "kernels").glob("__init__.py"))
    assert not (ROOT / "tests" / "kernels").exists()


@pytest.mark.parametrize("file", ALL_PYTHON)
def test_a_file_says_what_it_holds(file):
    assert Path(file).stem not in ("utils", "util", "helpers", "helper", "misc", "common", "tools")
    assert len((ROOT / file).read_text(encoding="utf-8").splitlines()) <= 500
    assert ast.get_docstring(tree_of(file))


@pytest.mark.parametrize(
    "file",
    sorted(
        relative(file)
        for pattern in (
            "tnl/**/*.py",
            "kernels/**/*.py",
            "tests/*.py",
            "scripts/*",
            "configs/**/*.yaml",
            "*.py",
            "*.t*",
        )
        for file in ROOT.glob(pattern)
        if file.is_file() and "__pycache__" not in file.parts
    ),
)
def test_sources_are_ascii(file):
    data = (ROOT / file).read_bytes()
    assert data.isascii()
    assert b"\r" not in data
    assert data.endswith(b"\n") or not data


def public(body: list[ast.stmt], prefix: str = "") -> list[tuple[str, ast.AST]]:
    """Public functions, classes and methods; not those inside functions or private classes, nor the autograd rules
    of an op, which the op itself describes."""
    found = []
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            if isinstance(node, ast.ClassDef) and "torch.autograd.Function" in map(ast.unparse, node.bases):
                continue
            found.append((prefix + node.name, node))
            if isinstance(node, ast.ClassDef):
                found += public(node.body, f"{prefix}{node.name}.")
    return found


@pytest.mark.parametrize("file", SOURCES)
def test_what_is_public_has_a_docstring(file):
    missing = [name for name, node in public(tree_of(file).body) if not ast.get_docstring(node)]
    assert not missing
