"""From a trained run to its users: export, evaluation, generation, report, and the whole quickstart."""

import json
import pickle
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.released_layout import Payload
from tests.tiny_corpus import tiny_shards, tiny_texts
from tests.tiny_run import rows, tiny_run
from tnl import cli
from tnl.errors import CannotWriteError, CheckpointError, ConfigError, DataError
from tnl.evaluation.command import evaluate_shards
from tnl.files import sha256_of
from tnl.generation.generate import generate_text
from tnl.generation.load import load_model
from tnl.tools.quickstart import _source
from tnl.training.commit import MANIFEST, CheckpointStore
from tnl.training.export import export_run, resolve_model
from tnl.training.pretrain import pretrain


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Shards with a held-out split."""
    return tiny_shards(tmp_path_factory.mktemp("data"), heldout_fraction=0.1)


@pytest.fixture(scope="module")
def run(shards, tmp_path_factory):
    """A finished run."""
    output = tmp_path_factory.mktemp("runs") / "run"
    pretrain(tiny_run(shards, output))
    return output


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    """Its export."""
    return export_run(run, tmp_path_factory.mktemp("export") / "model")


def command(capsys, *arguments: str) -> tuple[int, str]:
    """Exit code and output of the command line, in this process."""
    before, sys.argv = sys.argv, ["tnl", *arguments]
    try:
        cli.main()
        code = 0
    except SystemExit as end:
        code = end.code or 0
    finally:
        sys.argv = before
    captured = capsys.readouterr()
    return code, captured.out + captured.err


def test_export_holds_the_trained_weights_and_loads_with_the_auto_class(run, exported):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    names = {p.name for p in exported.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.model", "tokenizer.json"} <= names
    assert not any(name.endswith((".pt", ".bin", ".py")) for name in names)
    state = torch.load(run / "checkpoints/step_00000012/engine/mp_rank_00_model_states.pt", weights_only=True)["module"]
    weights = load_file(exported / "model.safetensors")
    assert "lm_head.weight" not in weights
    assert all(torch.equal(weight, state[name]) for name, weight in weights.items())
    first, second = (AutoModelForCausalLM.from_pretrained(exported) for _ in range(2))
    ids = AutoTokenizer.from_pretrained(exported)("def value", return_tensors="pt").input_ids
    assert ids[0, 0] == 1  # the shards begin documents with <s>, so prompts do too
    with torch.no_grad():
        assert torch.equal(first(ids).logits, second(ids).logits)
        assert torch.isfinite(first(ids).logits).all()
    assert first.lm_head.weight.data_ptr() == first.model.embed_tokens.weight.data_ptr()


def test_the_export_has_the_loss_of_the_run(run, exported, shards):
    result = evaluate_shards(str(exported), shards, window=32, report=lambda text: None)
    assert result.loss == pytest.approx(rows(run, "evaluation")[-1]["loss"], abs=1e-6)


def test_an_older_step_can_be_exported(run, tmp_path, exported):
    older = load_file(export_run(run, tmp_path / "older", step=10) / "model.safetensors")
    newest = load_file(exported / "model.safetensors")
    assert any(not torch.equal(older[name], newest[name]) for name in newest)
    with pytest.raises(CheckpointError, match="no checkpoint of step 7"):
        export_run(run, tmp_path / "other", step=7)


def test_a_bad_export_leaves_nothing(run, tmp_path, exported):
    with pytest.raises(ConfigError, match="exists already"):
        export_run(run, exported)
    with pytest.raises(ConfigError, match="no run folder"):
        export_run(tmp_path, tmp_path / "out")
    damaged = tmp_path / "damaged"
    shutil.copytree(run, damaged)
    for step in (10, 12):
        next((damaged / f"checkpoints/step_000000{step}/engine").glob("*.pt")).write_bytes(b"")
    with pytest.raises(CheckpointError, match="--fresh"):
        export_run(damaged, tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))


def test_what_is_no_model_is_refused_with_the_cure(tmp_path):
    with pytest.raises(ConfigError, match="give a run folder"):
        resolve_model("missing")
    with pytest.raises(ConfigError, match="neither a run folder nor a model folder"):
        resolve_model(str(tmp_path))
    assert resolve_model("OpenNLPLab/TransNormerLLM-385M") == "OpenNLPLab/TransNormerLLM-385M"
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(ConfigError, match="expected transnormer"):
        load_model(str(tmp_path))


def rewrite(file: Path, **values) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "model.safetensors").write_bytes(b"\xff" * 64), "the weights cannot be loaded"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b""), "the weights cannot be loaded"),
        (lambda folder: (folder / "config.json").write_text("{"), r"config\.json cannot be loaded"),
        (lambda folder: rewrite(folder / "config.json", decoder_attention_heads=0), "decoder_attention_heads: 0 must"),
        (
            lambda folder: rewrite(folder / "config.json", glu_dim=64),
            "the weights cannot be loaded: weights do not fit .* of another shape: model.layers.0.channel_mixer.l1",
        ),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), "the tokenizer cannot be loaded: KeyError"),
        (
            lambda folder: rewrite(folder / "config.json", vocab_size="many"),
            r"config\.json cannot be loaded: .*vocab_size",
        ),
        (
            lambda folder: rewrite(
                folder / "tokenizer_config.json",
                tokenizer_class="Planted",
                auto_map={"AutoTokenizer": ["planted.Planted", None]},
            ),
            "the tokenizer cannot be loaded without running code from that folder, which is never done",
        ),
    ],
)
def test_a_damaged_model_is_refused_with_its_name_and_runs_nothing(exported, tmp_path, monkeypatch, damage, message):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked the user"))
    folder = tmp_path / "model"
    shutil.copytree(exported, folder)
    (folder / "planted.py").write_text("raise SystemExit('remote code was run')")
    damage(folder)
    with pytest.raises(ConfigError, match=f"^{folder}: .*{message}"):
        load_model(str(folder))


def test_a_name_that_is_neither_a_folder_nor_on_the_hub_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match=r"^runs/mine: no such folder here, and config\.json of a hub model"):
        load_model("runs/mine")


def test_evaluation_refuses_what_it_cannot_do_before_it_begins(exported, shards, tmp_path, monkeypatch):
    monkeypatch.setattr("tnl.evaluation.command.load_model", lambda *_, **__: pytest.fail("began"))
    with pytest.raises(ConfigError, match="no split 'foo', give one of train, heldout"):
        evaluate_shards(str(exported), shards, "foo")
    for file in (tmp_path, tmp_path / "none" / "x.json", tmp_path / ("x" * 300)):
        with pytest.raises(CannotWriteError, match="choose another file"):
            evaluate_shards(str(exported), shards, json_file=file)
    kept = tmp_path / "kept.json"
    kept.write_text("old")
    other = tiny_shards(tmp_path, texts=tiny_texts(seed=1), heldout_fraction=0.1)
    monkeypatch.undo()
    for file in (kept, tmp_path / "new.json"):
        with pytest.raises(DataError, match="tokenizer"):
            evaluate_shards(str(exported), other, json_file=file)
    assert kept.read_text() == "old"
    assert not (tmp_path / "new.json").exists()


def test_evaluation_refuses_shards_of_another_tokenizer(exported, tmp_path):
    other = tiny_shards(tmp_path, texts=tiny_texts(seed=1), heldout_fraction=0.1)
    with pytest.raises(DataError, match="tokenizer"):
        evaluate_shards(str(exported), other)


@pytest.mark.parametrize("stage", [0, 2])
def test_no_code_runs_from_a_checkpoint_whose_manifest_was_forged_too(shards, tmp_path, stage):
    settings = tiny_run(shards, tmp_path / "run", "train.steps=4", "checkpoint.every=2", f"train.zero_stage={stage}")
    pretrain(settings)
    store = CheckpointStore(tmp_path / "run/checkpoints")
    canary = tmp_path / "canary"
    for step in store.steps():
        folder = store.path(step)
        for file in (folder / "engine").glob("*.pt"):
            content = torch.load(file, weights_only=False)
            content["extra"] = Payload(canary)
            torch.save(content, file)
            assert b"canary" in file.read_bytes()
        manifest = json.loads((folder / MANIFEST).read_text())
        (folder / MANIFEST).unlink()
        del manifest["manifest_sha256"]
        files = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
        manifest["files"] = {name: {"bytes": p.stat().st_size, "sha256": sha256_of(p)} for name, p in files.items()}
        from tnl.training.commit import _manifest_hash

        manifest["manifest_sha256"] = _manifest_hash(manifest)
        (folder / MANIFEST).write_text(json.dumps(manifest))
        store.verify(step)
    with pytest.raises(pickle.UnpicklingError):
        pretrain(settings, resume="2")
    with pytest.raises(pickle.UnpicklingError):
        export_run(tmp_path / "run", tmp_path / "out")
    assert not canary.exists()


def test_generation_is_reproducible_and_streams(exported):
    model, tokenizer = load_model(str(exported))
    pieces = []
    first = generate_text(model, tokenizer, "def value", max_new_tokens=20, seed=1, on_text=pieces.append)
    torch.manual_seed(99)
    before = torch.get_rng_state()
    assert generate_text(model, tokenizer, "def value", max_new_tokens=20, seed=1) == first
    assert torch.equal(torch.get_rng_state(), before)
    assert generate_text(model, tokenizer, "def value", max_new_tokens=20, seed=2) != first
    assert "".join(pieces).strip() == first.strip()
    greedy = [generate_text(model, tokenizer, "def", max_new_tokens=10, temperature=0, seed=s) for s in (1, 2)]
    assert greedy[0] == greedy[1]


@pytest.mark.parametrize(
    ("option", "value"), [("max_new_tokens", 0), ("temperature", -1.0), ("top_k", -1), ("top_p", 0.0), ("top_p", 1.5)]
)
def test_generation_options_out_of_range_are_refused(exported, option, value):
    model, tokenizer = load_model(str(exported))
    with pytest.raises(ConfigError, match=option):
        generate_text(model, tokenizer, "def", **{option: value})


def test_commands_on_a_run_folder(run, shards, tmp_path, capsys):
    code, text = command(capsys, "evaluate", str(run), "--data", str(shards), "--json", str(tmp_path / "figures.json"))
    assert code == 0
    assert "bits/byte" in text
    assert json.loads((tmp_path / "figures.json").read_text())["bits_per_byte"] > 0
    code, text = command(capsys, "generate", str(run), "--prompt", "def value", "--max-new-tokens", "8")
    assert code == 0
    assert text.startswith("def value")
    code, text = command(capsys, "report", str(run))
    assert code == 0
    assert (run / "report/loss.png").stat().st_size > 5000
    assert len(list(run.glob("exports/step_00000012*/model.safetensors"))) == 1
    code, text = command(capsys, "export", str(run), str(tmp_path / "model"))
    assert code == 0
    assert (tmp_path / "model/config.json").exists()


def test_quickstart_runs_from_text_to_summary_and_reuses_what_is_there(tmp_path, capsys):
    texts = tmp_path / "texts"
    texts.mkdir()
    for i, text in enumerate(tiny_texts(100)):
        (texts / f"{i:03d}.txt").write_text(text)
    small = [
        "model.vocab_size=300", "model.hidden_size=32", "model.num_layers=2", "model.num_heads=2", "model.glu_dim=48",
        "train.steps=15", "train.sequence_length=32", "schedule.warmup_steps=2", "checkpoint.every=10",
    ]  # fmt: skip
    (texts / "latin.txt").write_bytes(b"caf\xe9")
    # What YAML would take for a comment or a mapping.
    folder = tmp_path / "a #b: c"
    arguments = ["quickstart", "--text", str(texts), "--folder", str(folder), "--on-bad", "skip", *small]
    code, text = command(capsys, *arguments)
    assert code == 0, text
    assert "1 bad" in text
    (run,) = folder.glob("runs/quickstart-texts-????????")
    for part in (
        "held-out loss, TNL",
        "interpolated trigram",
        "interpolated bigram",
        "tokens/s",
        "loss.png",
        "tnl export",
    ):
        assert part in text
    assert text.count("--- prompt:") == 3
    figures = json.loads((run / "summary.json").read_text())
    assert set(figures["ngrams"]) == {"2", "3"}
    assert "held-out loss, TNL" in (run / "summary.txt").read_text()
    code, again = command(capsys, *arguments)
    assert code == 0
    assert "used as it is" in again
    assert "nothing to train" in again
    assert json.loads((run / "summary.json").read_text())["tnl"] == figures["tnl"]
    (texts / "more.txt").write_text(tiny_texts(101)[100])
    code, changed = command(capsys, *arguments, "--fresh", "train.steps=3")
    assert code == 0, changed
    assert "101 kept" in changed
    assert "nothing to train" not in changed


def test_quickstart_keeps_texts_of_the_same_folder_name_apart(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    names = [_source(Path(text), None, None)[0] for text in (tmp_path / "a/texts", tmp_path / "b/texts", "~/a/texts")]
    assert names[0] == names[2] != names[1]
    assert all(name.startswith("quickstart-texts-") for name in names)
    with pytest.raises(ConfigError, match="--text or --dataset"):
        _source(None, None, "skip")


@pytest.mark.parametrize(("make", "part"), [(None, "none"), ("empty", "empty"), ("binary", "UTF-8")])
def test_quickstart_on_bad_text_ends_with_65_and_leaves_nothing(tmp_path, capsys, make, part):
    texts = tmp_path / "texts"
    if make:
        texts.mkdir()
    if make == "binary":
        (texts / "a.txt").write_bytes(b"abc \xff\xfe def")
    code, text = command(capsys, "quickstart", "--text", str(texts), "--folder", str(tmp_path / "out"))
    assert code == 65, text
    assert str(texts) in text
    assert not (tmp_path / "out/runs").exists()
    assert not list((tmp_path / "out").rglob("*.bin")) if (tmp_path / "out").exists() else True


def test_quickstart_on_a_single_document_ends_before_training(tmp_path, capsys):
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "a.txt").write_text("\n".join(tiny_texts(100)))
    arguments = ["--text", str(texts), "--folder", str(tmp_path / "out"), "model.vocab_size=330"]
    code, text = command(capsys, "quickstart", *arguments)
    assert code == 65
    assert "split the text into 30 files or more" in text
    assert not (tmp_path / "out/runs").exists()
