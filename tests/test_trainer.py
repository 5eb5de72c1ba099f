"""The Trainer of transformers on a TNL model: accumulation, evaluation, resume, padding, bf16, checkpointing, LoRA."""

import pytest
import torch
import torch.nn.functional as F
from peft import get_peft_model
from tokenizers import Tokenizer, models
from transformers import (
    AutoModelForCausalLM,
    DataCollatorForLanguageModeling,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

from tests.closeness import assert_close
from tests.tiny_model import VOCAB, random_ids, tiny_model
from tnl.model.adapters import lora_config

# Of several lengths: the batches are padded, and have unequal numbers of tokens.
SEQUENCES = [random_ids(3 + 5 * i % 11, seed=i).tolist() for i in range(8)]
DATA = [{"input_ids": ids} for ids in SEQUENCES]


def tokenizer() -> PreTrainedTokenizerFast:
    """Ids 0 to 60 as words, id 0 the padding."""
    vocab = {"<unk>": 0} | {f"w{i}": i for i in range(1, VOCAB)}
    words = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", pad_token="<unk>")


def trainer(folder, model=None, **arguments) -> Trainer:
    defaults = dict(
        output_dir=str(folder),
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        logging_steps=1,
        save_strategy="no",
        per_device_train_batch_size=4,
        max_steps=2,
        learning_rate=0.01,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=0,
        seed=1,
    )
    return Trainer(
        model=tiny_model() if model is None else model,
        args=TrainingArguments(**(defaults | arguments)),
        train_dataset=DATA,
        eval_dataset=DATA,
        data_collator=DataCollatorForLanguageModeling(tokenizer(), mlm=False),
    )


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def mean_loss(model) -> torch.Tensor:
    """Over all predicted tokens of all sequences, each read alone."""
    with torch.no_grad():
        logits = [model(torch.tensor([ids])).logits[0, :-1] for ids in SEQUENCES]
    return F.cross_entropy(torch.cat(logits), torch.cat([torch.tensor(ids[1:]) for ids in SEQUENCES]))


def assert_equal_weights(actual, expected, ratio=1e-5):
    for (name, weight), other in zip(actual.named_parameters(), expected.parameters(), strict=True):
        assert_close(name, weight, other, ratio)


def test_the_loss_falls(tmp_path):
    run = trainer(tmp_path, optim="adamw_torch", max_steps=12)
    run.train()
    assert losses(run)[-1] < 0.5 * losses(run)[0]


def test_accumulated_gradients_equal_those_of_the_large_batch(tmp_path):
    whole = trainer(tmp_path, per_device_train_batch_size=8)
    parts = trainer(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    for run in (whole, parts):
        run.train()
    assert losses(parts) == pytest.approx(losses(whole), rel=1e-4)
    assert_equal_weights(parts.model, whole.model)


def test_the_first_loss_is_the_mean_over_predicted_tokens(tmp_path):
    run = trainer(tmp_path, per_device_train_batch_size=8, max_steps=1)
    expected = mean_loss(run.model.eval())
    run.train()
    # Padding, of any length, counts for nothing.
    assert losses(run)[0] == pytest.approx(expected.item(), rel=1e-4)


def test_evaluation_gives_the_loss(tmp_path):
    run = trainer(tmp_path, per_device_eval_batch_size=8)
    assert run.evaluate()["eval_loss"] == pytest.approx(mean_loss(run.model.eval()).item(), rel=1e-5)


def test_evaluation_gives_logits_to_a_metric_that_asks_for_them(tmp_path):
    run = trainer(tmp_path, per_device_eval_batch_size=8)
    collate = run.data_collator
    run.data_collator = lambda rows: collate(rows) | {"output_logits": True}
    run.compute_metrics = lambda prediction: {"shape": prediction.predictions.shape}
    longest = max(map(len, SEQUENCES))
    assert run.evaluate()["eval_shape"] == (8, longest, VOCAB)


def test_label_smoothing_shifts_the_labels(tmp_path):
    run = trainer(tmp_path, per_device_train_batch_size=8, max_steps=1, label_smoothing_factor=1e-6)
    expected = mean_loss(run.model.eval())
    run.train()
    assert losses(run)[0] == pytest.approx(expected.item(), rel=1e-3)


def test_a_resumed_run_equals_the_uninterrupted_one(tmp_path):
    whole = trainer(tmp_path / "whole", optim="adamw_torch", max_steps=4)
    whole.train()
    saving = dict(optim="adamw_torch", save_strategy="steps", save_steps=2)
    trainer(tmp_path / "parts", max_steps=2, **saving).train()
    resumed = trainer(tmp_path / "parts", max_steps=4, **saving)
    resumed.train(resume_from_checkpoint=True)
    assert losses(resumed) == losses(whole)
    assert_equal_weights(resumed.model, whole.model, 0)


def test_a_checkpoint_of_the_trainer_is_a_model_folder(tmp_path):
    run = trainer(tmp_path, save_strategy="steps", save_steps=2)
    run.train()
    folder = tmp_path / "checkpoint-2"
    assert {"config.json", "generation_config.json", "model.safetensors"} <= {file.name for file in folder.iterdir()}
    assert_equal_weights(AutoModelForCausalLM.from_pretrained(folder), run.model, 0)


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_bf16_trains(weights, tmp_path):
    run = trainer(tmp_path, tiny_model().to(weights), bf16=weights == torch.float32, optim="adamw_torch", max_steps=12)
    run.train()
    assert losses(run)[-1] < 0.6 * losses(run)[0]
    assert run.model.lm_head.weight.dtype == weights


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_changes_no_update(use_reentrant, tmp_path):
    plain = trainer(tmp_path)
    checkpointed = trainer(
        tmp_path, gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": use_reentrant}
    )
    for run in (plain, checkpointed):
        run.train()
    assert_equal_weights(checkpointed.model, plain.model)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_computes_the_blocks_again_and_keeps_little(use_reentrant):
    def measured(checkpointed) -> tuple[int, int]:
        """Calls of the blocks' linear layers until the gradients are there, and bytes kept for the backward pass."""
        model, ids = tiny_model(decoder_layers=4).train(), random_ids(2, 64)
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        calls, kept = [], {}
        for layer in model.model.layers:
            layer.channel_mixer.l1.register_forward_hook(lambda *_: calls.append(1))
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}

        def keep(tensor):
            if tensor.untyped_storage().data_ptr() not in own:
                kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = model(ids, labels=ids).loss
        bytes_kept = sum(kept.values())
        loss.backward()
        return len(calls), bytes_kept

    plain_calls, plain_bytes = measured(False)
    calls, bytes_kept = measured(True)
    assert (plain_calls, calls) == (4, 8)
    assert bytes_kept < 0.3 * plain_bytes


def test_lora_trains_under_the_trainer(tmp_path):
    model = tiny_model()
    embedding = model.model.embed_tokens.weight.clone()
    model = get_peft_model(model, lora_config(model.config, r=4))
    run = trainer(tmp_path, model, optim="adamw_torch", max_steps=12, gradient_checkpointing=True)
    run.train()
    assert losses(run)[-1] < 0.8 * losses(run)[0]
    assert torch.equal(model.get_base_model().model.embed_tokens.weight, embedding)
    run.save_model(str(tmp_path / "adapter"))
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {f.name for f in (tmp_path / "adapter").iterdir()}
