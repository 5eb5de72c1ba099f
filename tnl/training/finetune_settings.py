"""The configuration of a fine-tuning run: what pretraining has, and method, instruction data, prompts to sample."""

import math
from typing import Annotated, Literal

from pydantic import Field, model_validator

from tnl.data.settings import FinetuneDataSettings, UserPath
from tnl.errors import ConfigError
from tnl.settings import Settings
from tnl.training.settings import EvaluationSettings, RunSettings, ScheduleSettings, TrainSettings, raise_all


class Method(Settings):
    """What every method has."""

    neftune_alpha: float | None = Field(
        default=None, gt=0, description="noise on the embeddings in training (NEFTune, arXiv 2310.05914); usual is 5"
    )


class FullMethod(Method):
    """All parameters train, or those that ``train_only`` names."""

    kind: Literal["full"]
    train_only: Annotated[list[str], Field(min_length=1)] | None = Field(
        default=None, description="patterns of parameter names, such as model.layers.1?.*; all others are frozen"
    )


class LoraMethod(Method):
    """Low-rank adapters beside frozen weights (LoRA, arXiv 2106.09685), through peft."""

    kind: Literal["lora"]
    rank: int = Field(default=16, ge=1, description="rank of the adapters")
    alpha: int = Field(default=32, ge=1, description="scale of the adapters times their rank")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="dropout on the input of the adapters")
    targets: Annotated[list[str], Field(min_length=1)] | None = Field(
        default=None, description="names of linear layers; default all of the blocks"
    )
    rslora: bool = Field(default=False, description="divide the scale by the root of the rank (arXiv 2312.03732)")
    dora: bool = Field(default=False, description="train the magnitudes of the weights, too (arXiv 2402.09353)")
    base_bits: Literal[4, 16] = Field(
        default=16, description="4: the adapted weights are kept in NF4 (QLoRA, arXiv 2305.14314); 16: as they are"
    )

    @model_validator(mode="after")
    def _consistent(self):
        if self.dora and self.base_bits == 4:
            raise ValueError("dora: needs the weights themselves; set base_bits: 16, or dora: false")
        return self


class FinetuneTrainSettings(TrainSettings):
    """As in pretraining, with the length of the run in steps or in epochs."""

    steps: int | None = Field(default=None, ge=1, description="optimizer steps of the whole run")
    epochs: float | None = Field(default=None, gt=0, description="passes over the data, instead of steps")

    @model_validator(mode="after")
    def _one_length(self):
        problems = []
        if (self.steps is None) == (self.epochs is None):
            problems.append("steps: give either steps or epochs")
        # Their slices are cut from windows of one stream of text.
        for key in ("sequence_parallel", "segment_length"):
            if getattr(self, key) not in (None, 1):
                problems.append(f"{key}: examples are not cut; remove it")
        raise_all(problems)
        return self


class FinetuneScheduleSettings(ScheduleSettings):
    """As in pretraining; the warm-up also as a part of the run."""

    warmup_ratio: float | None = Field(
        default=None, ge=0, lt=1, description="part of the steps that warm up, instead of warmup_steps"
    )

    @model_validator(mode="after")
    def _one_warmup(self):
        if self.warmup_ratio is not None and self.warmup_steps:
            raise ValueError("warmup_ratio: give either warmup_steps or warmup_ratio")
        return self


class FinetuneEvaluationSettings(EvaluationSettings):
    """Held-out loss over answers, and answers of the model to fixed prompts."""

    max_tokens: int | None = Field(default=None, ge=2, description="held-out tokens at most; default all")
    prompts: tuple[str, ...] = Field(default=(), description="instructions to answer; into samples.jsonl")
    max_new_tokens: int = Field(default=64, ge=1, description="length of an answer")
    at_start: bool = Field(default=True, description="as in pretraining")
    keep_best: bool = Field(default=True, description="as in pretraining")


class FinetuneSettings(RunSettings):
    """One fine-tuning run."""

    init_from: UserPath = Field(description="checkpoint to begin from: hub name, model folder or run folder")
    method: Annotated[FullMethod | LoraMethod, Field(discriminator="kind")]
    data: FinetuneDataSettings
    train: FinetuneTrainSettings
    schedule: FinetuneScheduleSettings = FinetuneScheduleSettings()
    evaluation: FinetuneEvaluationSettings = FinetuneEvaluationSettings()

    @model_validator(mode="after")
    def _method_fits(self):
        problems, train = [], self.train
        if self.method.kind == "lora":
            if train.tensor_parallel > 1:
                problems.append("train.tensor_parallel: does not go with method.kind lora; set zero_stage: 3 instead")
            if train.compile:
                problems.append("train.compile: does not go with method.kind lora; remove it")
            if self.method.dora and train.zero_stage == 3:
                problems.append("method.dora: needs whole weights; set train.zero_stage below 3")
            if self.method.base_bits == 4 and train.zero_stage == 3:
                problems.append(
                    "method.base_bits: weights in 4 bits are whole on every GPU; set train.zero_stage below 3"
                )
        elif self.method.train_only and train.tensor_parallel > 1:
            problems.append("method.train_only: does not go with train.tensor_parallel; remove one of them")
        raise_all(problems)
        return self

    def resolved(self, steps_per_epoch: float) -> "FinetuneSettings":
        """With epochs and the part of the warm-up in steps.

        Raises:
            ConfigError: the warm-up or the decay does not fit them.
        """
        steps = self.train.steps or math.ceil(self.train.epochs * steps_per_epoch)
        schedule = self.schedule
        if schedule.warmup_ratio is not None:
            update = {"warmup_ratio": None, "warmup_steps": min(steps - 1, round(schedule.warmup_ratio * steps))}
            schedule = schedule.model_copy(update=update)
        train = self.train.model_copy(update={"steps": steps, "epochs": None})
        found = self.model_copy(update={"train": train, "schedule": schedule})
        problems = found.length_problems()
        if problems:
            raise ConfigError("\n".join(problems))
        return found
