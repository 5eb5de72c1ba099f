"""The configuration of a training run: one YAML, one complete run."""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from tnl.data.settings import DataSettings, UserPath
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


def raise_all(problems: list[str]) -> None:
    """One error for all problems of a section; `tnl.config` prints a line for each."""
    if problems:
        raise ValueError("\n".join(problems))


class TrainSettings(Settings):
    """How many steps of what size, and in which precision."""

    steps: int = Field(ge=1, description="optimizer steps of the whole run")
    sequence_length: int = Field(ge=2, description="tokens in one training window")
    segment_length: int | None = Field(
        default=None, ge=2, description="tokens of a window that are run at once, the state carried on; default all"
    )
    segment_gradient: Literal["truncated", "exact"] = Field(
        default="truncated", description="stop gradients between segments, or run a pass more and let them through"
    )
    global_batch_size: int = Field(ge=1, description="windows per optimizer step, over all ranks")
    micro_batch_size: int = Field(ge=1, description="windows per forward pass and rank, or group of ranks")
    sequence_parallel: int = Field(default=1, ge=1, description="ranks that share windows, a slice of each window each")
    tensor_parallel: int = Field(
        default=1, ge=1, description="ranks that share the weights of the blocks, some heads and channels each"
    )
    precision: Literal["fp32", "bf16", "fp16"] = Field(default="fp32", description="dtype of weights in the model")
    zero_stage: int = Field(default=0, ge=0, le=3, description="DeepSpeed ZeRO stage")
    reduce_gradients: Literal["every_pass", "every_step"] = Field(
        default="every_pass",
        description="when ranks add up their gradients: after every pass, or once a step, which sends less and keeps "
        "4 bytes a parameter more on each GPU; needs ZeRO stage 2",
    )
    loss_scale_power: int = Field(default=16, ge=0, le=32, description="fp16 begins with a loss scale of 2 to this")
    loss_scale_window: int = Field(default=1000, ge=1, description="steps without overflow that double the loss scale")
    offload_optimizer: Literal["none", "cpu", "nvme"] = Field(
        default="none", description="where masters and moments are kept and updated, instead of on the GPU"
    )
    offload_parameters: Literal["none", "cpu", "nvme"] = Field(
        default="none", description="where weights are kept between their uses; needs ZeRO stage 3"
    )
    offload_path: Path | None = Field(default=None, description="folder on the disk that nvme offloads to")
    gradient_clipping: float = Field(default=1.0, ge=0, description="largest gradient norm; 0 switches clipping off")
    activation_checkpointing: Literal["none", "full", "every_k", "selective", "selective_matmuls"] = Field(
        default="none",
        description="what the backward pass computes again: nothing, each block, every k-th block, each block but its "
        "attention, or each block but its attention and matrix products",
    )
    activation_checkpointing_k: int | None = Field(
        default=None, ge=2, description="k of activation_checkpointing: every_k; blocks 0, k, 2k ... are computed again"
    )
    compile: bool = Field(default=False, description="compile the blocks with torch.compile, once for all equal ones")
    max_skipped_steps: int = Field(default=20, ge=0, description="consecutive non-finite steps before the run ends")

    @property
    def num_segments(self) -> int:
        """Segments of a window: backward passes that a micro-batch takes."""
        return 1 if self.segment_length is None else self.sequence_length // self.segment_length

    @property
    def ranks_per_window(self) -> int:
        """Ranks that work on the same windows."""
        return self.sequence_parallel * self.tensor_parallel

    @property
    def keys_of_sharing(self) -> str:
        """The keys that make ranks work on the same windows."""
        names = [name for name in ("sequence_parallel", "tensor_parallel") if getattr(self, name) > 1]
        return " x ".join(f"train.{name}" for name in names)

    def recomputation(self, layer: int) -> str:
        """What of block ``layer`` the backward pass computes again: none, full, selective or selective_matmuls."""
        if self.activation_checkpointing == "every_k":
            return "none" if layer % self.activation_checkpointing_k else "full"
        return self.activation_checkpointing

    @model_validator(mode="after")
    def _consistent(self):
        problems = []
        if self.segment_length is not None and self.sequence_length % self.segment_length:
            problems.append(
                f"segment_length: {self.segment_length} does not divide sequence_length {self.sequence_length}; set a "
                "divisor of it, or none to run windows whole"
            )
        if self.segment_gradient == "exact" and self.segment_length is None:
            problems.append("segment_gradient: exact needs segment_length; set that, or remove this")
        if self.sequence_length % self.sequence_parallel:
            problems.append(
                f"sequence_length: {self.sequence_length} is no multiple of sequence_parallel {self.sequence_parallel}"
            )
        if self.sequence_parallel > 1 and self.compile:
            problems.append("compile: does not go with sequence_parallel; set only one of them")
        if self.sequence_parallel > 1 and self.segment_length is not None:
            problems.append("segment_length: does not go with sequence_parallel; set only one of them")
        if self.tensor_parallel > 1 and self.compile:
            problems.append("compile: does not go with tensor_parallel; set only one of them")
        if self.tensor_parallel > 1 and self.zero_stage == 3:
            problems.append(
                "tensor_parallel: does not go with zero_stage 3, which divides the weights itself; set zero_stage: 2, "
                "or tensor_parallel: 1"
            )
        if self.precision == "bf16" and self.zero_stage < 2:
            # Stage 0 accumulates gradients in bf16, stage 1 ends with a bare assertion on a non-finite or zero
            # gradient norm.
            problems.append(
                f"zero_stage: DeepSpeed trains bf16 with fp32 accumulation and skipped steps at stage 2 or 3, got "
                f"{self.zero_stage}; set zero_stage: 2, which costs nothing on one GPU"
            )
        if self.precision == "fp16" and self.zero_stage < 1:
            problems.append("zero_stage: fp16 needs stage 1, 2 or 3 here, got 0; set zero_stage: 2")
        if self.offload_optimizer != "none" and self.zero_stage < 2:
            problems.append(f"offload_optimizer: needs zero_stage 2 or 3, got {self.zero_stage}; set zero_stage: 2")
        if self.offload_parameters != "none" and self.zero_stage < 3:
            problems.append(f"offload_parameters: needs zero_stage 3, got {self.zero_stage}; set zero_stage: 3")
        if self.reduce_gradients == "every_step" and self.zero_stage != 2:
            problems.append(
                f"reduce_gradients: every_step is for zero_stage 2, got {self.zero_stage}; set zero_stage: 2, or "
                "reduce_gradients: every_pass"
            )
        if self.reduce_gradients == "every_step" and self.offload_optimizer != "none":
            problems.append(
                "reduce_gradients: every_step keeps all gradients on the GPU, offload_optimizer none; set "
                "only one of them"
            )
        if ("nvme" in (self.offload_optimizer, self.offload_parameters)) != (self.offload_path is not None):
            problems.append("offload_path: goes with nvme and only with it; give the folder, or remove it")
        if (self.activation_checkpointing == "every_k") != (self.activation_checkpointing_k is not None):
            problems.append(
                f"activation_checkpointing_k: goes with activation_checkpointing: every_k and only with it, got "
                f"{self.activation_checkpointing_k} with {self.activation_checkpointing}; give or remove it"
            )
        if self.global_batch_size % self.micro_batch_size:
            problems.append(
                f"global_batch_size: {self.global_batch_size} is no multiple of micro_batch_size "
                f"{self.micro_batch_size}"
            )
        raise_all(problems)
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
    """Held-out loss, and benchmarks, during training."""

    every: int = Field(default=0, ge=0, description="steps between evaluations; 0 evaluates after the last step only")
    max_tokens: int = Field(default=262_144, ge=2, description="held-out tokens at most")
    at_start: bool = Field(default=False, description="evaluate before the first step, too")
    keep_best: bool = Field(
        default=False, description="save where the held-out loss is lowest, and keep that checkpoint whatever its age"
    )
    by_source: bool = Field(
        default=True, description="also the loss of each source of the held-out text, where the shards tell them apart"
    )
    suite: str | None = Field(
        default=None, description="benchmarks to measure, too: quick, or what else tnl evaluate --suite takes"
    )
    tasks: tuple[str, ...] = Field(default=(), description="tasks of lm-eval; with suite, those of its tasks only")
    data_dir: Path | None = Field(default=None, description="folder with the data of the tasks")
    limit: int | None = Field(default=100, ge=1, description="documents of each task at most")


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
    layer_norms_every: int = Field(
        default=0, ge=0, description="steps between norms of each block's gradient and state; 0: none"
    )
    profile_steps: tuple[int, int] | None = Field(
        default=None, description="first and last step of a trace by torch's profiler, written into the run folder"
    )

    @field_validator("profile_steps")
    @classmethod
    def _in_order(cls, steps: tuple[int, int] | None) -> tuple[int, int] | None:
        if steps is not None and not 1 <= steps[0] <= steps[1]:
            raise ValueError(f"must be [first, last] with 1 <= first <= last, got {list(steps)}")
        return steps


class RunSettings(Settings):
    """What every training run has, whatever it trains on.

    With ``init_from`` the model section is that of the checkpoint: see `tnl.training.run_configuration.load_settings`.
    """

    output: Path = Field(description="run folder; the same folder resumes")
    seed: int = Field(default=0, ge=0, lt=2**63, description="of weights and data order")
    init_from: UserPath | None = Field(
        default=None, description="checkpoint to begin from: hub name, model folder or run folder; default none"
    )
    model: ModelSettings
    data: Settings
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
        else:
            ours = {
                "stage": "zero_stage",
                "offload_optimizer": "offload_optimizer",
                "offload_param": "offload_parameters",
            }
            problems += [
                f"zero_optimization.{key}: derived from train.{name}, set that instead"
                for key, name in ours.items()
                if key in zero
            ]
        raise_all(problems)
        return keys

    def length_problems(self) -> list[str]:
        """What does not fit the number of steps."""
        steps, warmup, decay = self.train.steps, self.schedule.warmup_steps, self.schedule.decay_steps
        problems = []
        traced = self.logging.profile_steps
        if traced is not None and traced[1] > steps:
            problems.append(f"logging.profile_steps: {list(traced)} goes beyond train.steps {steps}; lower it")
        if warmup >= steps:
            problems.append(f"schedule.warmup_steps: {warmup} must be below train.steps {steps}")
        elif decay is not None and decay > steps - warmup:
            problems.append(
                f"schedule.decay_steps: {decay} is more than the {steps - warmup} steps after the warm-up; lower it"
            )
        return problems

    @model_validator(mode="after")
    def _consistent(self):
        problems = [] if self.train.steps is None else self.length_problems()
        if self.train.segment_length is not None and self.model.kind != "tnl":
            problems.append(
                f"train.segment_length: model.kind {self.model.kind} has no state to carry from segment to segment; "
                "remove it"
            )
        if self.train.compile and self.model.kind != "tnl":
            problems.append(f"train.compile: the blocks of model.kind {self.model.kind} are not compiled; remove it")
        if self.train.sequence_parallel > 1 and self.model.kind != "tnl":
            problems.append(
                f"train.sequence_parallel: model.kind {self.model.kind} has no state to pass between ranks; remove it"
            )
        if self.train.tensor_parallel > 1 and self.model.kind != "tnl":
            problems.append(
                f"train.tensor_parallel: the blocks of model.kind {self.model.kind} are not divided; remove it, or set "
                "model.kind: tnl"
            )
        elif self.train.tensor_parallel > 1:
            from tnl.model.tensor_parallel import slicing_problems

            model = self.model
            found = slicing_problems(model.num_heads, model.glu_dim, model.mixer_norm, self.train.tensor_parallel)
            problems += [f"train.tensor_parallel: {problem}" for problem in found]
        if self.evaluation.suite is not None or self.evaluation.tasks:
            # Every rank asks the model for other documents.
            for key, is_wrong in (
                ("model.kind: llama", self.model.kind != "tnl"),
                ("train.zero_stage: 3", self.train.zero_stage == 3),
                ("train.tensor_parallel", self.train.tensor_parallel > 1),
            ):
                if is_wrong:
                    problems.append(
                        f"evaluation.suite: needs a TNL model that is whole on every rank, which {key} does not give; "
                        "remove evaluation.suite and evaluation.tasks"
                    )
        if self.init_from is not None and self.model.kind != "tnl":
            problems.append(f"model.kind: {self.model.kind} cannot begin from a checkpoint; remove init_from")
        raise_all(problems)
        return self


class PretrainSettings(RunSettings):
    """One pretraining run."""

    data: DataSettings
