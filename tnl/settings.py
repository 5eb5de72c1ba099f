"""The base class of every configuration section."""

from pydantic import BaseModel, ConfigDict


class Settings(BaseModel):
    """One section of a configuration: unknown keys are errors, values are fixed once validated, no type is guessed.

    Strict typing means that ``"3"`` is not an integer and ``1`` is not a boolean; an integer is accepted where a
    float is asked.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)
