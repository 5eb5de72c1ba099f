"""DPO by trl on the model class as it is: the documented example, and the log-probabilities that trl works with."""

import json
import re
import runpy
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.tiny_folder import tiny_folder
from tnl.data.chat_template import REFERENCE_TEMPLATE

trl = pytest.importorskip("trl", reason="needs pip install -e .[preference]")
DOCUMENT = (Path(__file__).parent.parent / "docs/preference-tuning.md").read_text(encoding="utf-8")
PAIRS = [
    {
        "prompt": [{"role": "user", "content": f"count from {i}"}],
        "chosen": [{"role": "assistant", "content": " ".join(map(str, range(i, i + 1 + i % 4)))}],
        "rejected": [{"role": "assistant", "content": "no"}],
    }
    for i in range(16)
]


@pytest.fixture
def base(tmp_path):
    """A model folder as `tnl finetune` and `tnl export` leave it."""
    base = tiny_folder(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(base, split_special_tokens=False)
    tokenizer.chat_template = REFERENCE_TEMPLATE
    tokenizer.save_pretrained(base)
    return base


def log_probability(model, tokenizer, pair: dict, kind: str) -> float:
    """Of an answer and its end token, alone."""
    prompt = tokenizer.apply_chat_template(pair["prompt"], add_generation_prompt=True, return_dict=False)
    ids = tokenizer.apply_chat_template(pair["prompt"] + pair[kind], return_dict=False)
    assert ids[: len(prompt)] == prompt
    labels = [-100] * len(prompt) + ids[len(prompt) :]
    with torch.no_grad():
        return -model(torch.tensor([ids]), labels=torch.tensor([labels])).loss_sum.item()


def test_all_weights_are_tuned_by_the_log_probabilities_of_each_answer_alone(base, tmp_path):
    from datasets import Dataset

    model, reference = (AutoModelForCausalLM.from_pretrained(base) for _ in range(2))
    tokenizer = AutoTokenizer.from_pretrained(base)
    options = trl.DPOConfig(
        output_dir=str(tmp_path / "run"),
        use_cpu=True,
        bf16=False,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        logging_steps=1,
        max_steps=3,
        learning_rate=1e-3,
        per_device_train_batch_size=len(PAIRS),
        beta=0.1,
    )
    trainer = trl.DPOTrainer(
        model, ref_model=reference, args=options, train_dataset=Dataset.from_list(PAIRS), processing_class=tokenizer
    )
    trainer.train()
    found = [row for row in trainer.state.log_history if "loss" in row]
    for kind in ("chosen", "rejected"):
        expected = [log_probability(reference, tokenizer, pair, kind) for pair in PAIRS]
        assert found[0][f"logps/{kind}"] == pytest.approx(sum(expected) / len(expected), rel=1e-4)
    assert found[0]["loss"] == pytest.approx(torch.tensor(2.0).log().item(), rel=1e-4)
    assert found[-1]["loss"] < found[0]["loss"] - 0.01


def test_the_documented_example_prefers_the_chosen_answers(base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base.rename("my-model")
    Path("pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS))
    (shown,) = re.findall(r"```json\n(.*?)\n```", DOCUMENT, re.DOTALL)
    assert json.loads(shown).keys() == PAIRS[0].keys()
    (program,) = re.findall(r"```python\n(.*?)```", DOCUMENT, re.DOTALL)
    Path("program.py").write_text(program)
    runpy.run_path("program.py")
    tokenizer = AutoTokenizer.from_pretrained("preferred-model")
    margins = []
    for name in ("my-model", "preferred-model"):
        model = AutoModelForCausalLM.from_pretrained(name)
        chosen, rejected = (
            sum(log_probability(model, tokenizer, pair, kind) for pair in PAIRS) for kind in ("chosen", "rejected")
        )
        margins.append(chosen - rejected)
    assert margins[1] > margins[0] + 1
