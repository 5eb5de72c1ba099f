"""Finding a fact again that stands somewhere in a long text: needle in a haystack, and the pass key."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from tnl.errors import ConfigError, NonFiniteError
from tnl.evaluation.haystack import start_ids
from tnl.evaluation.standard_error import standard_error
from tnl.evaluation.state_reader import PIECE_TOKENS, read, score_answers
from tnl.model.state import TransnormerState

CITIES = ("Berlin", "Cairo", "Dublin", "Kyoto", "Lima", "London", "Paris", "Rome", "Sydney", "Tokyo")


@dataclass(frozen=True)
class Retrieval:
    """A fact with a number of its own in every sample, and the question for it.

    Attributes:
        filler: what the haystack consists of, again and again; None where it is a text of the user's.
        digits: of the number.
    """

    name: str
    intro: str
    needle: str
    question: str
    digits: int
    filler: str | None = None


NEEDLE = Retrieval(
    name="needle",
    intro="",
    needle="\nThe special magic number of {city} is {number}.\n",
    question="\nWhat is the special magic number of {city}? The special magic number of {city} is",
    digits=7,
)
# After Mohtashami & Jaggi, Landmark Attention (arXiv 2305.16300), appendix.
PASSKEY = Retrieval(
    name="passkey",
    intro="There is important information hidden inside a lot of irrelevant text. Find it and memorize it. "
    "I will quiz you about it.\n",
    needle="\nThe pass key is {number}. Remember it. {number} is the pass key.\n",
    question="\nWhat is the pass key? The pass key is",
    digits=5,
    filler="The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. ",
)


@dataclass(frozen=True, eq=False)
class Sample:
    """Token ids int64 of one fact: the needle, the question, and the numbers that may follow, the true one first."""

    needle: np.ndarray
    question: np.ndarray
    answers: list[np.ndarray]


@dataclass(frozen=True)
class Found:
    """What came of one sample in one place.

    Attributes:
        exact: whether greedy decoding gives the number.
        rank: of the true number among all by log-likelihood, 1 for the most likely.
        log_likelihood: of the true one, in nats.
    """

    length: int
    depth: float
    exact: bool
    rank: int
    log_likelihood: float


def make_samples(kind: Retrieval, tokenizer, count: int, num_candidates: int, seed: int) -> list[Sample]:
    """``count`` facts with other numbers, and in turn other cities.

    Raises:
        ConfigError: a tokenizer without digits.
    """
    draw = random.Random(seed)
    numbers = range(10 ** (kind.digits - 1), 10**kind.digits)
    samples = []
    for i in range(count):
        values = draw.sample(numbers, num_candidates)
        words = {"city": CITIES[i % len(CITIES)], "number": values[0]}
        question = kind.question.format(**words)
        before = _ids(tokenizer, question)
        answers = [_ids(tokenizer, f"{question} {value}")[len(before) :] for value in values]
        if len({tuple(answer) for answer in answers}) < len(answers):
            raise ConfigError(f"{kind.name}: the model's tokenizer makes one of different numbers; give another model")
        samples.append(Sample(_ids(tokenizer, kind.needle.format(**words)), before, answers))
    return samples


def haystack_of(kind: Retrieval, tokenizer, num_tokens: int) -> np.ndarray:
    """Ids int64 [num_tokens] of ``kind.filler``, repeated."""
    filler = _ids(tokenizer, kind.filler)
    return np.tile(filler, -(-num_tokens // len(filler)))[:num_tokens]


def retrieve(
    model,
    tokenizer,
    kind: Retrieval,
    haystack: np.ndarray,
    samples: Sequence[Sample],
    lengths: Sequence[int],
    depths: Sequence[float],
    *,
    piece_tokens: int = PIECE_TOKENS,
    finished: Callable[[int], None] = lambda tokens: None,
) -> list[Found]:
    """Ask for a fact at every place: one state is in memory beside the one that reads, whatever the length.

    A prompt is the intro, a part of the haystack, the needle, more of the haystack and the question. What stands before
    the needle is read once: a state that has read so far is forked.

    Args:
        haystack: ids int64 [T], at least as many as the longest prompt.
        samples: as many for each place, those of one place side by side, the places by length and then by depth.
        lengths: tokens of the prompts.
        depths: parts of the haystack that stand before the needle, 0 to 1.
        finished: called after each prompt with the tokens that were read for it.

    Raises:
        ConfigError: a length too small for needle and question.
        NonFiniteError: a log-likelihood is not finite.
    """
    intro = np.concatenate([start_ids(tokenizer), _ids(tokenizer, kind.intro)])
    places = [(length, depth) for length in lengths for depth in depths]
    jobs = []
    for i, sample in enumerate(samples):
        length, depth = places[i * len(places) // len(samples)]
        room = length - len(intro) - len(sample.needle) - len(sample.question)
        if room < 1:
            raise ConfigError(
                f"--lengths: {length} tokens do not hold the needle and the question, which take {length - room}; "
                "give longer ones"
            )
        jobs.append((round(depth * room), room, length, depth, sample))
    # Python's sort keeps the order of jobs that stand at the same place.
    order = sorted(range(len(jobs)), key=lambda i: jobs[i][0])
    before, reached = TransnormerState(), 0
    read(model, intro, before, piece_tokens)
    found: dict[int, Found] = {}
    for i in order:
        place, room, length, depth, sample = jobs[i]
        read(model, haystack[reached:place], before, piece_tokens)
        tokens, reached = place - reached, place
        rest = np.concatenate([sample.needle, haystack[place:room], sample.question])
        state = before.fork()
        read(model, rest[:-1], state, piece_tokens)
        scores, greedy = score_answers(model, state, int(rest[-1]), sample.answers)
        if not np.isfinite(scores).all():
            raise NonFiniteError(
                f"{kind.name}, {length} tokens, depth {depth:g}: a log-likelihood is not finite; evaluate another "
                "checkpoint"
            )
        rank = 1 + int((scores > scores[0]).sum())
        found[i] = Found(length, depth, bool(greedy[0]), rank, float(scores[0]))
        finished(tokens + len(rest))
    return [found[i] for i in range(len(jobs))]


def summary(found: Sequence[Found], num_candidates: int) -> dict:
    """The scores of all, and of each place, as JSON values."""
    places: dict[tuple[int, float], list[Found]] = {}
    for one in found:
        places.setdefault((one.length, one.depth), []).append(one)
    rows = [{"length": length, "depth": depth, **_scores(some)} for (length, depth), some in sorted(places.items())]
    return {"chance": 1 / num_candidates, **_scores(found), "rows": rows}


def _scores(found: Sequence[Found]) -> dict:
    exact, first = [float(one.exact) for one in found], [float(one.rank == 1) for one in found]
    return {
        "samples": len(found),
        "exact_match": float(np.mean(exact)),
        "exact_match_stderr": standard_error(exact),
        "most_likely": float(np.mean(first)),
        "most_likely_stderr": standard_error(first),
        "mean_rank": float(np.mean([one.rank for one in found])),
        "log_likelihood": float(np.mean([one.log_likelihood for one in found])),
    }


def _ids(tokenizer, text: str) -> np.ndarray:
    return np.array(tokenizer(text, add_special_tokens=False).input_ids, dtype=np.int64)
