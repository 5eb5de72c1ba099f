"""The configuration of a training run: one YAML, one complete run."""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from tnl.data.settings import DataSettings
from tnl.errors import did_you_mean
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
# What may be passed through. DeepSpeed ignores keys that it does not know, and others would change the batch, the
# precision or the schedule behind the back of the run.
PASSED_DEEPSPEED_KEYS = (
    "aio",
    "comms_logger",
    "communication_data_type",
    "csv_monitor",
    "flops_profiler",
    "gradient_predivide_factor",
    "log_level",
    "memory_breakdown",
    "prescale_gradients",
    "sparse_gradients",
    "tensorboard",
    "timers",
    "wall_clock_breakdown",
    "zero_force_ds_cpu_optimizer",
    "zero_optimization",
)


def _raise_all(problems: list[str]) -> None:
    """One error for all problems of a section; `tnl.config` prints a line for each."""
    if problems:
        raise ValueError("\n".join(problems))


class TrainSettings(Settings):
    """How many steps of what size, and in which precision."""

    steps: int = Field(ge=1, description="optimizer steps of the whole run")
    sequence_length: int = Field(ge=2, description="tokens in one training window")
    global_batch_size: int = Field(ge=1, description="windows per optimizer step, over all ranks")
    micro_batch_size: int = Field(ge=1, description="windows per forward pass and rank")
    precision: Literal["fp32", "bf16", "fp16"] = Field(default="fp32", description="dtype of weights in the model")
    zero_stage: int = Field(default=0, ge=0, le=3, description="DeepSpeed ZeRO stage")
    gradient_clipping: float = Field(default=1.0, ge=0, description="largest gradient norm; 0 switches clipping off")
    gradient_checkpointing: bool = Field(default=False, description="recompute each block in the backward pass")
    max_skipped_steps: int = Field(default=20, ge=0, description="consecutive non-finite steps before the run ends")

    @model_validator(mode="after")
    def _consistent(self):
        problems = []
        if self.precision == "bf16" and self.zero_stage < 2:
            # Stage 0 accumulates gradients in bf16, stage 1 ends with a bare assertion on a non-finite or zero
            # gradient norm.
            problems.append(
                f"zero_stage: DeepSpeed trains bf16 with fp32 accumulation and skipped steps at stage 2 or 3, got "
                f"{self.zero_stage}; set zero_stage: 2, which costs nothing on one GPU"
            )
        if self.precision == "fp16" and self.zero_stage < 1:
            problems.append("zero_stage: fp16 needs stage 1, 2 or 3 here, got 0; set zero_stage: 2")
        if self.global_batch_size % self.micro_batch_size:
            problems.append(
                f"global_batch_size: {self.global_batch_size} is no multiple of micro_batch_size "
                f"{self.micro_batch_size}"
            )
        _raise_all(problems)
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
        default=None, ge=1, description="last steps, in which wsd decays; default a fifth of the run"
    )
    min_lr_ratio: float = Field(
        default=0.1, ge=0, le=1, description="final learning rate over the peak, for cosine and wsd"
    )

    @model_validator(mode="after")
    def _consistent(self):
        if self.decay_steps is not None and self.name != "wsd":
            raise ValueError(f"decay_steps: {self.name} has none; remove it, or set name: wsd")
        return self


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

    @field_validator("deepspeed")
    @classmethod
    def _ours_are_ours(cls, keys: dict[str, Any]) -> dict[str, Any]:
        problems = [
            f"{key}: derived from {DERIVED_DEEPSPEED_KEYS[key]}, set that instead"
            if key in DERIVED_DEEPSPEED_KEYS
            else f"{key}: cannot be passed through, {did_you_mean(key, PASSED_DEEPSPEED_KEYS)}"
            for key in keys
            if key not in PASSED_DEEPSPEED_KEYS
        ]
        zero = keys.get("zero_optimization", {})
        if not isinstance(zero, dict):
            problems.append("zero_optimization: must be a mapping")
        elif "stage" in zero:
            problems.append("zero_optimization.stage: derived from train.zero_stage, set that instead")
        _raise_all(problems)
        return keys

    @model_validator(mode="after")
    def _consistent(self):
        steps, warmup, decay = self.train.steps, self.schedule.warmup_steps, self.schedule.decay_steps
        problems = []
        if warmup >= steps:
            problems.append(f"schedule.warmup_steps: {warmup} must be below train.steps {steps}")
        elif decay is not None and decay > steps - warmup:
            problems.append(
                f"schedule.decay_steps: {decay} is more than the {steps - warmup} steps after the warm-up; lower it"
            )
        _raise_all(problems)
        return self
