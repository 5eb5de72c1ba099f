"""`tnl finetune` from instruction data to a tuned model: what it writes, resumes, exports, and that ranks divide it."""

import json
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.released_layout import released_model, write_released
from tests.test_processes import ROOT, torchrun
from tests.tiny_folder import tiny_folder
from tests.tiny_run import rows, trajectory
from tnl.data.chat_template import REFERENCE_TEMPLATE
from tnl.errors import ConfigError, DataError
from tnl.evaluation.answer_loss import answer_loss
from tnl.training.export import export_run
from tnl.training.finetune import finetune, open_data
from tnl.training.finetune_settings import FinetuneSettings
from tnl.training.run_configuration import load_settings

LORA = "method={kind: lora, rank: 4}"
# Runs of two ranks.
STAGE_3 = ["train.zero_stage=3", "train.activation_checkpointing=selective"]
DIVIDED_TUNING = {"stage 3": [LORA, *STAGE_3, "train.micro_batch_size=1", "checkpoint.every=4"]}
DIVIDED_PRETRAINING = {"tensor parallel": ["train.tensor_parallel=2"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base model with a tokenizer, records, and the YAML of a run."""
    folder = tmp_path_factory.mktemp("finetune")
    base = tiny_folder(folder)
    records = [
        {"instruction": f"count from {i}", "input": "", "output": " ".join(map(str, range(i, i + 4)))}
        for i in range(50)
    ]
    (folder / "records.json").write_text(json.dumps(records))
    tree = {
        "output": str(folder / "run"),
        "init_from": str(base),
        "method": {"kind": "full"},
        "data": {"source": {"kind": "json", "path": str(folder / "records.json")}, "heldout_fraction": 0.2},
        "train": {"epochs": 2, "sequence_length": 128, "global_batch_size": 4, "micro_batch_size": 2},
        "optimizer": {"lr": 1e-2},
        "schedule": {"warmup_ratio": 0.1},
        "checkpoint": {"every": 3},
        "evaluation": {"every": 4, "prompts": ["count from 3"], "max_new_tokens": 4},
    }
    (folder / "tune.yaml").write_text(yaml.safe_dump(tree))
    tree = {
        "output": str(folder / "one"),
        "init_from": str(base),
        "data": {"shards": str(folder / "shards")},
        "train": {"steps": 2, "sequence_length": 32, "global_batch_size": 4, "micro_batch_size": 2},
        "optimizer": {"lr": 1e-3},
    }
    (folder / "pretrain.yaml").write_text(yaml.safe_dump(tree))
    return folder


@pytest.fixture(scope="module")
def tuned(folder):
    """The run folder of the YAML as it stands."""
    assert finetune(load_settings(FinetuneSettings, folder / "tune.yaml")) == "finished"
    return folder / "run"


def open_data_of(settings, base):
    """The data of a run of one rank."""
    return open_data(settings, SimpleNamespace(data_rank=0, data_size=1), base)


def test_a_run_learns_the_answers_and_reports_before_and_after(tuned):
    evaluations = rows(tuned, "evaluation")
    assert [row["step"] for row in evaluations] == [0, 4, 6]
    assert evaluations[-1]["loss"] < evaluations[0]["loss"] - 0.5
    assert evaluations[0]["num_predicted"] > 20
    samples = [json.loads(line) for line in (tuned / "samples.jsonl").read_text().splitlines()]
    assert [(row["step"], row["prompt"]) for row in samples] == [(step, "count from 3") for step in (0, 4, 6)]
    effective = yaml.safe_load((tuned / "config.yaml").read_text())
    assert (effective["train"]["steps"], effective["schedule"]["warmup_steps"]) == (6, 1)


def test_a_resumed_run_is_identical(folder, tuned, capsys):
    straight, samples = trajectory(tuned), (tuned / "samples.jsonl").read_text()
    finetune(load_settings(FinetuneSettings, folder / "tune.yaml"), resume="4")
    assert f"{rows(tuned, 'evaluation')[0]['loss']:.4f} nats before training" in capsys.readouterr().out
    assert trajectory(tuned) == straight
    assert (tuned / "samples.jsonl").read_text() == samples


def test_a_run_whose_data_have_grown_does_not_go_on(folder, tuned, tmp_path):
    records = json.loads((folder / "records.json").read_text())
    (tmp_path / "grown.json").write_text(json.dumps(records * 2))
    settings = load_settings(FinetuneSettings, folder / "tune.yaml", [f"data.source.path={tmp_path / 'grown.json'}"])
    with pytest.raises(
        DataError, match=r"(?s)grown\.json: not the data that the run in .*; point .*train\.steps: was 6, now"
    ):
        finetune(settings)
    with pytest.raises(ConfigError, match=r"(?s)another configuration;.*train\.steps: was 6, now"):
        finetune(load_settings(FinetuneSettings, folder / "tune.yaml", ["train.epochs=3"]))


def test_a_tuned_model_generates_with_its_template(tuned, tmp_path):
    export = export_run(tuned, tmp_path / "export", "best")
    model, tokenizer = (kind.from_pretrained(export) for kind in (AutoModelForCausalLM, AutoTokenizer))
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "count from 3"}], add_generation_prompt=True, tokenize=False
    )
    assert text == "Human:\ncount from 3\nAssistant:\n"
    assert tokenizer.chat_template == REFERENCE_TEMPLATE
    assert (export / "tokenizer.model").exists()
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
    turns = [{"role": role, "content": "3"} for role in ("user", "assistant", "user")]
    assert tokenizer.apply_chat_template(turns, return_dict=False).count(tokenizer.eos_token_id) == 1
    found = model.generate(ids, max_new_tokens=4, do_sample=False, suppress_tokens=None)[0, ids.shape[1] :].tolist()
    found = found[: found.index(2)] if 2 in found else found
    last = json.loads((tuned / "samples.jsonl").read_text().splitlines()[-1])
    assert tokenizer.decode(found, skip_special_tokens=True) == last["text"]


def test_the_held_out_loss_is_that_of_the_answers_one_by_one(folder, tuned, tmp_path):
    settings = load_settings(FinetuneSettings, folder / "tune.yaml")
    heldout = open_data_of(settings, folder / "model").instructions.heldout
    model = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    total, count = 0.0, 0
    for ids, trained in (heldout[i] for i in range(len(heldout))):
        ids, trained = torch.tensor(ids).long().unsqueeze(0), torch.tensor(trained).unsqueeze(0)
        output = model(ids, labels=ids.masked_fill(~trained, -100))
        total, count = total + output.loss_sum.item(), count + output.num_tokens.item()
    first = rows(tuned, "evaluation")[0]
    assert first["num_predicted"] == count
    assert first["loss"] == pytest.approx(total / count, rel=1e-5)
    assert answer_loss(model, [], device=torch.device("cpu")).loss == 0.0


def test_ranks_must_hold_out_the_same(folder):
    settings = load_settings(FinetuneSettings, folder / "tune.yaml")
    data = open_data_of(settings, folder / "model")
    other = replace(data, instructions=replace(data.instructions, heldout=data.instructions.train))
    assert other.loader.fingerprint == data.loader.fingerprint
    assert other.fingerprint != data.fingerprint


def test_a_tokenizer_with_more_pieces_than_the_model_is_refused_with_the_cure(folder, tmp_path):
    base = tiny_folder(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(["<|user|>", "<|assistant|>"])
    tokenizer.save_pretrained(base)
    where = [f"init_from={base}", f"output={tmp_path / 'run'}"]
    with pytest.raises(ConfigError, match=r"model\.vocab_size: 340, .* has 342 pieces; set it to at least 342"):
        finetune(load_settings(FinetuneSettings, folder / "tune.yaml", where))
    finetune(load_settings(FinetuneSettings, folder / "tune.yaml", [*where, "model.vocab_size=342", "train.epochs=1"]))
    model = AutoModelForCausalLM.from_pretrained(export_run(tmp_path / "run", tmp_path / "export"))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert len(model.lm_head.weight) == 342


def test_a_released_checkpoint_tunes_and_resumes_and_runs_no_code_of_its_own(folder, tmp_path):
    (tmp_path / "released").mkdir()
    base = write_released(tmp_path / "released", released_model().state_dict(), num_shards=2)
    where = [f"init_from={base}", f"output={tmp_path / 'run'}", LORA, "checkpoint.keep=9"]
    where += ["train.precision=bf16", "train.zero_stage=2"]
    settings = load_settings(FinetuneSettings, folder / "tune.yaml", where)
    finetune(settings)
    straight = trajectory(tmp_path / "run")
    assert straight[-1][0] == settings.resolved(open_data_of(settings, base).loader.steps_per_epoch).train.steps
    finetune(settings, resume="4")
    assert trajectory(tmp_path / "run") == straight
    export = export_run(tmp_path / "run", tmp_path / "export", merge=True)
    assert AutoTokenizer.from_pretrained(export).chat_template == REFERENCE_TEMPLATE
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("batching", ["grouped", "padded"])
def test_padded_batches_train_and_are_judged_alike(folder, tuned, tmp_path, batching):
    overrides = [f"output={tmp_path / 'run'}", f"data.batching={batching}", "train.micro_batch_size=1"]
    finetune(load_settings(FinetuneSettings, folder / "tune.yaml", overrides))
    found, packed = rows(tmp_path / "run", "evaluation"), rows(tuned, "evaluation")
    assert found[0]["loss"] == packed[0]["loss"]
    assert found[-1]["loss"] < found[0]["loss"] - 0.5


def test_the_commands(folder, tnl_command):
    output = folder / "by command"
    code, out, err = tnl_command("finetune", folder / "tune.yaml", f"output={output}", LORA, "train.epochs=1")
    assert code == 0, err
    assert re.search(r"begins from .*model \([0-9a-f]{12}\)", out)
    assert "3,712 parameters train, the others stay as they are" in out
    assert "'count from 3' -> " in out
    first, *_, last = (row["loss"] for row in rows(output, "evaluation"))
    assert f"held-out loss: {first:.4f} nats before training, {last:.4f} after it" in out
    code, out, err = tnl_command("export", output, folder / "merged", "--merge", "--step", "best")
    assert code == 0, err
    assert (folder / "merged/model.safetensors").exists()
    code, _, err = tnl_command("export", folder / "run", folder / "no", "--merge")
    assert (code, "--merge is for runs with method.kind lora" in err) == (2, True)
    code, _, err = tnl_command("export", output, folder / "no", "--step", "newest")
    assert (code, "--step newest: give the step of a checkpoint, or best" in err) == (2, True)
    code, _, err = tnl_command("finetune", folder / "tune.yaml", "method.kind=lora", "method.rnk=4")
    assert (code, "method.rnk: unknown key, did you mean rank?" in err) == (2, True)
    code, _, err = tnl_command("finetune", folder / "tune.yaml", "init_from=./nowhere")
    assert (code, "init_from: ./nowhere: no such folder; give a run folder" in err) == (2, True)


@pytest.fixture(scope="module")
def divided(folder):
    """The runs of `DIVIDED_TUNING` and `DIVIDED_PRETRAINING` on two ranks, from one start of torchrun."""
    arguments = [str(folder), str(folder / "tune.yaml"), str(folder / "pretrain.yaml")]
    done = torchrun(str(ROOT / "tests/tuning_worker.py"), *arguments)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return folder


def test_two_ranks_tune_as_one_and_resume(folder, divided):
    finetune(load_settings(FinetuneSettings, folder / "tune.yaml", [f"output={folder / 'alone'}", LORA]))
    for kind in ("train", "evaluation"):
        found, expected = ([row["loss"] for row in rows(folder / run, kind)] for run in ("stage 3", "alone"))
        assert found == pytest.approx(expected, abs=1e-4)
    exports = (export_run(folder / run, folder / f"{run} export", merge=True) for run in ("stage 3", "alone"))
    two, one = (AutoModelForCausalLM.from_pretrained(export) for export in exports)
    for name, weight in two.named_parameters():
        # Adam divides by the root of tiny moments, which makes the most of rounding.
        assert torch.allclose(weight, one.get_parameter(name), atol=2e-3), name


def test_two_ranks_that_share_the_blocks_begin_from_a_checkpoint(folder, divided):
    from tnl.training.pretrain import pretrain
    from tnl.training.settings import PretrainSettings

    pretrain(load_settings(PretrainSettings, folder / "pretrain.yaml"))
    expected = [row["loss"] for row in rows(folder / "one")]
    for name in DIVIDED_PRETRAINING:
        assert [row["loss"] for row in rows(folder / name)] == pytest.approx(expected, abs=1e-4)


def test_a_prompt_that_becomes_no_token_is_refused(folder, tmp_path):
    given = [f"output={tmp_path / 'run'}", "data.template=verbatim", "evaluation.prompts=['']"]
    settings = load_settings(FinetuneSettings, folder / "tune.yaml", given)
    with pytest.raises(ConfigError, match=r"evaluation\.prompts: number 0 becomes no token by template verbatim"):
        finetune(settings)
    assert not (tmp_path / "run").exists()
