"""The command line: help with examples that work, one message for each mistake, documented exit codes."""

import json
import runpy
import shlex
import subprocess
import sys
import types
from pathlib import Path

import pytest
import typer

import tnl
from tests.tiny_corpus import tiny_shards, tiny_texts
from tnl import cli, config, errors
from tnl.training.finetune_settings import FinetuneSettings
from tnl.training.settings import PretrainSettings

ROOT = Path(__file__).parent.parent
GROUP = typer.main.get_command(cli.app)


def commands(group=GROUP, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], object]:
    """Every subcommand by its words."""
    found = {}
    for name, command in group.commands.items():
        words = (*path, name)
        found |= commands(command, words) if hasattr(command, "commands") else {words: command}
    return found


COMMANDS = commands()
EXAMPLES = [
    (words, line.strip())
    for words, command in COMMANDS.items()
    for line in (command.callback.__doc__ or "").splitlines()
    if line.strip().startswith(("tnl ", "torchrun "))
]


@pytest.fixture
def prepare_that(monkeypatch):
    """Replace what ``tnl data prepare`` calls by something that raises."""

    def replace(error: BaseException) -> None:
        def prepare(*_, **__):
            raise error

        monkeypatch.setattr("tnl.data.prepare.prepare", prepare)

    return replace


# Help


def test_help_lists_the_commands(tnl_command):
    code, out, err = tnl_command("--help")
    assert (code, err) == (0, "")
    for words in COMMANDS:
        assert words[0] in out
    for number in (0, 2, 65, 69, 70, 73, 75, 76, 77, 78, 130):
        assert f" {number} " in out.partition("Exit codes:")[2]


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_help_of_a_command_shows_its_arguments_and_examples(words, tnl_command):
    code, out, err = tnl_command(*words, "--help")
    assert (code, err) == (0, "")
    examples = [line for at, line in EXAMPLES if at == words]
    assert examples
    for line in examples:
        assert line in out
    for parameter in COMMANDS[words].params:
        if getattr(parameter, "hidden", False):
            continue
        assert (parameter.opts[0] if parameter.param_type_name == "option" else parameter.name) in out.replace(
            "MODEL_OR_RUN", "model"
        )
        assert parameter.name == "help" or parameter.help, f"{words}: {parameter.name} has no help"


@pytest.mark.parametrize(("words", "line"), EXAMPLES)
def test_examples_are_commands(words, line):
    arguments = shlex.split(line.partition("-m tnl ")[2] or line.removeprefix("tnl "))
    assert tuple(arguments[: len(words)]) == words
    context = COMMANDS[words].make_context(words[-1], arguments[len(words) :])
    assert not context.args
    if words == ("pretrain",):
        name = context.params["config"]
        name = "pretrain/quickstart" if name == "my.yaml" else name
        config.load(PretrainSettings, name, list(context.params["overrides"] or []))
    if words == ("finetune",):
        overrides, model = list(context.params["overrides"] or []), {"model": {"preset": "tnl-tiny"}}
        config.load(FinetuneSettings, context.params["config"], overrides, model)


def test_no_arguments_show_the_help(tnl_command):
    for words in ((), ("data",)):
        code, out, err = tnl_command(*words)
        assert code == errors.EXIT_USAGE
        assert "Usage:" in out + err


def test_version(tnl_command):
    assert tnl_command("--version") == (0, f"tnl {tnl.__version__}\n", "")


def test_help_and_configuration_do_not_wait_for_torch():
    program = """
import sys
from tnl import cli
sys.argv = ["tnl", "data", "prepare", "--help"]
try:
    cli.main()
except SystemExit as end:
    assert not end.code
import tnl.config
heavy = {"torch", "transformers", "deepspeed", "numpy", "datasets", "matplotlib", "wandb"} & sys.modules.keys()
sys.exit(f"imported: {heavy}" if heavy else 0)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "Usage:" in done.stdout


@pytest.mark.parametrize(
    ("ending", "is_member"),
    [("sys.exit(0)", False), ("sys.exit(75)", False), ("sys.exit(2)", True), ("1 / 0", True)],
    ids=["done", "to be continued", "refused", "defect"],
)
def test_a_command_that_ends_well_leaves_its_process_group(ending, is_member):
    program = f"""
import atexit, sys
from torch import distributed
from tnl import cli
distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
atexit.register(lambda: print("in a group:", distributed.is_initialized()))

def app():
    {ending}

cli.app = app
cli.main()
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.endswith(f"in a group: {is_member}\n"), done.stderr


def test_python_m_tnl_is_the_same_command(tnl_command, monkeypatch, capsys):
    for arguments in (["--version"], ["pretrain", "nope"], ["nope"]):
        expected = tnl_command(*arguments)
        monkeypatch.setattr(sys, "argv", ["tnl", *arguments])
        with pytest.raises(SystemExit) as end:
            runpy.run_module("tnl", run_name="__main__")
        assert (end.value.code or 0, *capsys.readouterr()) == expected


# Exit code 2: usage and configuration


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nope"], "No such command 'nope'"),
        (["pretrain"], "Missing argument"),
        (["pretrain", "pretrain/quickstart", "--nope"], "No such option"),
        (["evaluate", "run"], "give --data for held-out loss, or --suite or --tasks for benchmarks"),
        (["evaluate", "run", "--data", "d", "--max-tokens", "many"], "Invalid value for '--max-tokens'"),
        (["evaluate", "run", "--data", "d", "--window", "0"], "Invalid value for '--window'"),
        (["pretrain", "nope.yaml"], "nope.yaml: no such file; give a path, or one of the shipped names: "),
        (["data", "prepare", "nope"], "nope: no such file; give a path, or one of the shipped names: "),
        (["pretrain", "pretrain/quickstart", "steps"], "'steps': an override is section.key=value"),
        (["pretrain", "pretrain/quickstart", "train.step=3"], "train.step: unknown key, did you mean steps?"),
        (["pretrain", "pretrain/quickstart", "train.steps=x"], "train.steps: input should be a valid integer"),
        (["pretrain", "pretrain/quickstart", "train.steps=[x"], "train.steps: not a valid YAML text: line 1: "),
        (["data", "prepare", "data/stdlib", "seeed=3"], "seeed: unknown key, did you mean seed?"),
        (["data", "prepare", "pretrain/quickstart"], "source: missing, this key must be given"),
    ],
)
def test_usage_and_configuration(arguments, message, tnl_command):
    code, out, err = tnl_command(*arguments)
    assert code == errors.EXIT_USAGE
    assert message in err
    assert out == ""
    assert "Traceback" not in err


def test_a_bad_file_names_every_problem(tnl_command, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text((ROOT / "tests/example_run.yaml").read_text().replace("steps: 600", "step: 600"))
    code, _, err = tnl_command("pretrain", file)
    assert code == errors.EXIT_USAGE
    assert err == (
        f"error: {file}: 2 problems\n"
        "  train.steps: missing, this key must be given\n"
        "  train.step: unknown key, did you mean steps?\n"
    )


# Exit code 65: data


def prepare_yaml(folder: Path, kind: str, path: Path) -> Path:
    file = folder / "prepare.yaml"
    source = f"{{kind: {kind}, path: {path}}}"
    file.write_text(f"source: {source}\ntokenizer: {{vocab_size: 340}}\noutput: {folder / 'shards'}\n")
    return file


def records(*texts: str) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


BAD_DATA = {
    "missing folder": ("text", None, "no such file or folder; correct source.path"),
    "empty folder": ("text", {}, "no file with suffix .txt, .md"),
    "other files only": ("text", {"a.pdf": b"x"}, "no file with suffix .txt, .md"),
    "empty files": ("text", {"a.txt": b"", "b.md": b" \n"}, "no document with text (2 empty, 0 bad)"),
    "not UTF-8": ("text", {"a.txt": b"caf\xe9 au lait"}, "a.txt: not UTF-8 at byte 3"),
    "malformed JSON": ("jsonl", {"a.jsonl": records("x") + b'{"text": \n'}, "a.jsonl:2: "),
    "not an object": ("jsonl", {"a.jsonl": records("x", "y") + b"[1]\n"}, "a.jsonl:3: "),
    "no text field": ("jsonl", {"a.jsonl": b'{"body": "x"}\n'}, "a.jsonl:1: "),
    "not UTF-8 in JSON": ("jsonl", {"a.jsonl": b'{"text": "\xff"}\n'}, "a.jsonl:1: not UTF-8 at byte 10"),
}


@pytest.mark.parametrize("name", BAD_DATA)
def test_bad_data(name, tnl_command, tmp_path):
    kind, files, message = BAD_DATA[name]
    corpus = tmp_path / "corpus"
    for file, data in (files or {}).items():
        corpus.mkdir(exist_ok=True)
        (corpus / file).write_bytes(data)
    if files == {}:
        corpus.mkdir()
    code, _, err = tnl_command("data", "prepare", prepare_yaml(tmp_path, kind, corpus))
    assert code == errors.EXIT_DATA
    assert err.startswith(f"error: {corpus}")
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "shards").exists()


def test_a_command_that_succeeds(tnl_command, tmp_path):
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_bytes(records(*tiny_texts()))
    file = prepare_yaml(tmp_path, "jsonl", corpus)
    code, out, err = tnl_command("data", "prepare", file, f"output={tmp_path / 'other'}", "tokenizer.vocab_size=341")
    assert (code, err) == (0, "")
    assert "tokenizer: 341 pieces" in out
    assert (tmp_path / "other").is_dir()
    assert not (tmp_path / "shards").exists()


def test_verify_reads_every_byte(tnl_command, tmp_path):
    folder = tiny_shards(tmp_path)
    size = sum(file.stat().st_size for file in folder.glob("*.bin"))
    assert tnl_command("data", "verify", folder) == (0, f"{folder}: {size:,} bytes verified\n", "")
    shard = folder / "train-00000.bin"
    data = bytearray(shard.read_bytes())
    data[130] ^= 1
    shard.write_bytes(data)
    code, _, err = tnl_command("data", "verify", folder)
    assert code == errors.EXIT_DATA
    assert err.startswith(f"error: {shard}: ")


def test_a_name_that_no_disk_takes(tnl_command, tmp_path):
    file = prepare_yaml(tmp_path, "text", tmp_path)
    assert tnl_command("data", "prepare", file, f"output={'x' * 300}")[0] == errors.EXIT_CANNOT_WRITE
    assert tnl_command("data", "prepare", file, f"source.path={'x' * 300}")[0] == errors.EXIT_DATA
    assert tnl_command("quickstart", "--text", "x" * 300, "--folder", tmp_path)[0] == errors.EXIT_DATA
    assert tnl_command("quickstart", "--text", tmp_path, "--folder", "x" * 300)[0] == errors.EXIT_CANNOT_WRITE
    assert tnl_command("data", "verify", "x" * 300)[0] == errors.EXIT_DATA


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompt", "\udcff\udcfe"], "error: prompt: is not UTF-8 text at character 0"),
        (["--prompt", "def", "--top-p", "2"], "error: top_p: must be above 0"),
    ],
)
def test_a_bad_request_is_refused_before_its_prompt_is_printed(options, message, tnl_command, monkeypatch):
    monkeypatch.setattr("tnl.generation.command.load_model", lambda name, **options: (None, None))
    monkeypatch.setitem(sys.modules, "tnl.training.export", types.SimpleNamespace(resolve_model=str))
    code, out, err = tnl_command("generate", "run", *options)
    assert (code, out) == (errors.EXIT_USAGE, "")
    assert err.startswith(message)


# The other exit codes


@pytest.mark.parametrize("kind", errors.UserError.__subclasses__())
def test_every_error_has_its_exit_code(kind, tnl_command, prepare_that):
    prepare_that(kind("corpus.txt: wrong, correct it"))
    code, out, err = tnl_command("data", "prepare", "data/stdlib")
    assert (code, out, err) == (kind.exit_code, "", "error: corpus.txt: wrong, correct it\n")


def test_exit_codes_differ_and_none_is_that_of_python():
    # Without those that other modules derive for an outcome, such as a stopped quickstart.
    kinds = [kind for kind in errors.UserError.__subclasses__() if kind.__module__ == errors.__name__]
    codes = [kind.exit_code for kind in kinds]
    assert len(set(codes)) == len(codes)
    assert not {0, 1, errors.EXIT_INTERNAL, errors.EXIT_PREEMPTED} & set(codes)


@pytest.mark.parametrize("error", [RuntimeError("odd"), AssertionError("odd"), ValueError("odd"), OSError(5, "odd")])
def test_a_defect_says_where_and_ends_with_70(error, tnl_command, prepare_that):
    prepare_that(error)
    code, _, err = tnl_command("data", "prepare", "data/stdlib")
    assert code == errors.EXIT_INTERNAL == 70
    assert "Traceback" in err
    assert "odd" in err
    assert err.endswith("internal error: please report the lines above\n")


def test_the_interrupt_key_ends_with_130(tnl_command, prepare_that):
    prepare_that(KeyboardInterrupt())
    code, _, err = tnl_command("data", "prepare", "data/stdlib")
    assert code == 130
    assert "Traceback" not in err


@pytest.mark.parametrize(("outcome", "code"), [("finished", 0), ("preempted", errors.EXIT_PREEMPTED)])
def test_the_outcome_of_training_is_the_exit_code(outcome, code, tnl_command, monkeypatch):
    calls = []

    def run(settings, *, resume, fresh, start):
        assert start is None
        calls.append((settings.train.steps, resume, fresh))
        return outcome

    # In place of the module: importing DeepSpeed takes seconds.
    monkeypatch.setitem(sys.modules, "tnl.training.pretrain", types.SimpleNamespace(pretrain=run))
    assert tnl_command("pretrain", "pretrain/quickstart", "train.steps=777", "--resume", "40", "--fresh")[0] == code
    assert calls == [(777, "40", True)]


def test_a_secret_is_not_shown(tnl_command, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("logging: {wandb_api_key: CANARY}\ntrain: {steps: [CANARY}\n")
    for arguments in (
        ["pretrain", file],
        ["pretrain", "pretrain/quickstart", "logging.wandb_api_key=CANARY"],
        ["pretrain", "pretrain/quickstart", "hf_token='CANARY"],
    ):
        code, out, err = tnl_command(*arguments)
        assert code == errors.EXIT_USAGE
        assert "CANARY" not in out + err
