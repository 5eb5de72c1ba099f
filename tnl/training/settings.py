"""The configuration of a training run: one YAML, one complete run."""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from tnl.data.settings import DataSettings
from tnl.model.settings import ModelSettings
from tnl.settings import Settings

# DeepSpeed keys that other sections of the YAML decide; a second value would silently win over the first.
DERIVED_DEEPSPEED_KEYS = {
    "train_batch_size": "train.global_batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.global_batch_size and train.micro_batch_size",
    "gradient_clipping": "train.gradient_clipping",
    "fp16": "train.precision",
    "bf16": "train.precision",
    "data_types": "train.precision",
    "optimizer": "optimizer",
    "scheduler": "schedule",
    "checkpoint": "checkpoint",
    "wandb": "logging.wandb",
    "steps_per_print": "logging",
    "zero_allow_untested_optimizer": "optimizer",
}


class TrainSettings(Settings):
    """How many steps of what size, and in which precision."""

    steps: int = Field(ge=1, description="optimizer steps of the whole run")
    sequence_length: int = Field(ge=2, description="tokens in one training window")
    global_batch_size: int = Field(ge=1, description="windows per optimizer step, over all ranks")
    micro_batch_size: int = Field(ge=1, description="windows per forward pass and rank")
    precision: Literal["fp32", "bf16", "fp16"] = Field(default="fp32", description="dtype of weights in the model")
    zero_stage: Literal[0, 1, 2, 3] = Field(default=0, description="DeepSpeed ZeRO stage")
    gradient_clipping: float = Field(default=1.0, ge=0, description="largest gradient norm; 0 switches clipping off")
    gradient_checkpointing: bool = Field(default=False, description="recompute each block in the backward pass")
    max_skipped_steps: int = Field(default=20, ge=0, description="consecutive non-finite steps before the run ends")

    @model_validator(mode="after")
    def _consistent(self):
        if self.precision == "bf16" and self.zero_stage < 2:
            # Stage 0 accumulates gradients in bf16, stage 1 ends with a bare assertion on a non-finite or zero
            # gradient norm.
            raise ValueError(
                f"zero_stage: DeepSpeed trains bf16 with fp32 accumulation and skipped steps at stage 2 or 3, got "
                f"{self.zero_stage}; set zero_stage: 2, which costs nothing on one GPU"
            )
        if self.precision == "fp16" and self.zero_stage < 1:
            raise ValueError("zero_stage: fp16 needs stage 1, 2 or 3 here, got 0; set zero_stage: 2")
        return self


class OptimizerSettings(Settings):
    """AdamW; no weight decay on 1-d parameters and on LRPE theta."""

    lr: float = Field(gt=0, description="peak learning rate")
    betas: tuple[float, float] = Field(default=(0.9, 0.95), description="decay of the moments")
    eps: float = Field(default=1e-8, gt=0, description="term added to the denominator")
    weight_decay: float = Field(default=0.1, ge=0, description="decoupled weight decay")

    @model_validator(mode="after")
    def _consistent(self):
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas: each must be in [0, 1), got {list(self.betas)}")
        return self


class ScheduleSettings(Settings):
    """Learning rate as a function of the step."""

    name: Literal["cosine", "wsd", "constant", "inverse_sqrt"] = Field(
        default="cosine", description="shape after warm-up"
    )
    warmup_steps: int = Field(default=0, ge=0, description="steps of linear warm-up from 0")
    decay_steps: int | None = Field(
        default=None, ge=1, description="last steps in which wsd decays; default a fifth of the run"
    )
    min_lr_ratio: float = Field(
        default=0.1, ge=0, le=1, description="final learning rate over the peak, for cosine and wsd"
    )


class CheckpointSettings(Settings):
    """When to save and how many to keep."""

    every: int = Field(default=1000, ge=1, description="steps between checkpoints; the last step is always saved")
    keep: int = Field(default=2, ge=2, description="number of newest checkpoints kept")


class EvaluationSettings(Settings):
    """Held-out loss during training."""

    every: int = Field(default=0, ge=0, description="steps between evaluations; 0 evaluates after the last step only")
    max_tokens: int = Field(default=262_144, ge=2, description="held-out tokens at most")


class LoggingSettings(Settings):
    """What is reported where; metrics.jsonl in the run folder is always written."""

    print_every: int = Field(
        default=10, ge=1, description="steps between lines where there is no terminal to draw a bar in"
    )
    wandb: Literal["disabled", "online", "offline"] = Field(default="disabled", description="Weights & Biases mode")
    wandb_project: str = Field(default="tnl", description="Weights & Biases project")
    peak_tflops: float | None = Field(
        default=None, gt=0, description="dense TFLOP/s of one device, for MFU; default by device"
    )


class PretrainSettings(Settings):
    """One pretraining run."""

    output: Path = Field(description="run folder; the same folder resumes")
    seed: int = Field(default=0, ge=0, lt=2**63, description="of weights and data order")
    model: ModelSettings
    data: DataSettings
    train: TrainSettings
    optimizer: OptimizerSettings
    schedule: ScheduleSettings = ScheduleSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    logging: LoggingSettings = LoggingSettings()
    deepspeed: dict[str, Any] = Field(default={}, description="further DeepSpeed keys, passed through")

    @model_validator(mode="after")
    def _consistent(self):
        if self.schedule.warmup_steps >= self.train.steps:
            raise ValueError(
                f"schedule.warmup_steps: {self.schedule.warmup_steps} must be below train.steps {self.train.steps}"
            )
        if self.train.global_batch_size % self.train.micro_batch_size:
            raise ValueError(
                f"train.global_batch_size: {self.train.global_batch_size} is no multiple of train.micro_batch_size "
                f"{self.train.micro_batch_size}"
            )
        for key in self.deepspeed:
            if key in DERIVED_DEEPSPEED_KEYS:
                raise ValueError(f"deepspeed.{key}: derived from {DERIVED_DEEPSPEED_KEYS[key]}, set that instead")
        if "stage" in (self.deepspeed.get("zero_optimization") or {}):
            raise ValueError("deepspeed.zero_optimization.stage: derived from train.zero_stage, set that instead")
        return self
