"""What a user asks of a generation, checked before a model is loaded for it."""

import math
from dataclasses import dataclass

from tnl.errors import ConfigError


def check_text(name: str, text: str) -> None:
    """Raise `ConfigError` for what is no text: bytes of a command line that are not UTF-8 arrive as lone surrogates."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ConfigError(f"{name}: is not UTF-8 text at character {error.start}; give it in UTF-8") from None


@dataclass(frozen=True)
class GenerationOptions:
    """How tokens are chosen, and when to stop.

    Attributes:
        temperature: 0 takes the most likely token at each step; None is 0.8, and 0 with beams.
        top_k: sample among so many most likely tokens; 0 for all; None is 50.
        top_p: sample among the most likely tokens that hold this probability together; None is 1.
        num_beams: keep so many continuations and return the most likely; does not sample, and gives no text before
            the end.
        seed: of the sampling.
        stop: end before the first of these texts.

    Raises:
        ConfigError: a value out of range, or values that contradict each other.
    """

    max_new_tokens: int = 128
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    num_beams: int = 1
    seed: int = 0
    stop: tuple[str, ...] = ()

    def __post_init__(self):
        for name, ok, allowed in (
            ("max_new_tokens", self.max_new_tokens >= 1, "1 or more"),
            ("temperature", self.temperature is None or 0 <= self.temperature < math.inf, "a number of at least 0"),
            ("top_k", self.top_k is None or self.top_k >= 0, "0 or more"),
            ("top_p", self.top_p is None or 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("num_beams", self.num_beams >= 1, "1 or more"),
            ("seed", 0 <= self.seed < 2**63, "0 to 2^63 - 1"),
        ):
            if not ok:
                raise ConfigError(f"{name}: must be {allowed}, got {getattr(self, name)}")
        for text in self.stop:
            check_text("stop", text)
            if not text:
                raise ConfigError("stop: is empty; give the text to stop at")
        samples = [name for name in ("temperature", "top_k", "top_p") if getattr(self, name)]
        if self.num_beams > 1 and samples:
            raise ConfigError(f"num_beams: beam search does not sample; leave out {' and '.join(samples)}")
        if self.num_beams > 1 and self.stop:
            raise ConfigError("num_beams: beam search does not stop at a text; leave out stop")

    def arguments(self) -> dict:
        """The arguments of transformers' ``generate``."""
        temperature = (0.8 if self.num_beams == 1 else 0) if self.temperature is None else self.temperature
        sampling = {"do_sample": False}
        if temperature:
            sampling = {
                "do_sample": True,
                "temperature": temperature,
                "top_k": 50 if self.top_k is None else self.top_k,
                "top_p": 1.0 if self.top_p is None else self.top_p,
            }
        return sampling | {"max_new_tokens": self.max_new_tokens, "num_beams": self.num_beams}
