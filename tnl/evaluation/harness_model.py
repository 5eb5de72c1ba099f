"""`HarnessModel`: a TNL model for lm-eval, which reads what requests share once and takes texts of any length.

Scores and texts are those of lm-eval's own ``hf`` adapter with a batch size of 1, where a text fits that one's maximum
length; beyond it they are those of one forward pass over all of it. Of logits in bf16 the softmax is taken in fp32, as
that adapter does with ``softmax_dtype=float32``: by default it rounds log-likelihoods to bf16, where many become equal.
"""

import json
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass

import jinja2
import numpy as np
import torch.distributed as dist
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from tnl.errors import ConfigError, DataError, UserError
from tnl.evaluation.batch_generation import GenerationSettings
from tnl.evaluation.prefix_reader import PrefixReader
from tnl.evaluation.prefix_tree import new_tokens, sort_key
from tnl.evaluation.rank_division import RankDivision
from tnl.evaluation.request_scores import Continuation, RequestScores, Score
from tnl.evaluation.request_texts import DEFAULT_NEW_TOKENS, RequestTexts, generation_settings, unshared
from tnl.evaluation.request_tokens import RequestTokens
from tnl.evaluation.result_keys import model_digest, request_digest, result_key
from tnl.evaluation.sample_cache import SampleCache
from tnl.model.modeling import TransnormerForCausalLM

_log = logging.getLogger(__name__)


@dataclass
class HarnessCounts:
    """What happened to the requests, on this rank but where it says otherwise.

    Attributes:
        requests: that lm-eval asked for, those of the other ranks included.
        from_cache: were not computed.
        tokens_read: by the model.
        tokens_reused: not read again, because another request begins with them.
        tokens_generated: end tokens not counted.
        truncations: requests that lost tokens on the left to fit ``max_length``, those of the other ranks included.
        empty_outputs: generations of no text, or of blanks only; those from the cache included.
    """

    requests: int = 0
    from_cache: int = 0
    tokens_read: int = 0
    tokens_reused: int = 0
    tokens_generated: int = 0
    truncations: int = 0
    empty_outputs: int = 0


class HarnessModel(TemplateLM):
    """A `TransnormerForCausalLM` and its tokenizer as a model of lm-eval.

    On several ranks every rank is given all requests, computes its part of them and returns the results of all: lm-eval
    sees one process everywhere, and every rank arrives at the same scores.

    Attributes:
        counts: what happened so far.
    """

    backend = "causal"

    def __init__(
        self,
        model,
        tokenizer,
        *,
        batch_tokens: int = 2**14,
        max_state_bytes: int = 2**32,
        max_length: int | None = None,
        add_bos_token: bool | None = None,
        split_special_tokens: bool | None = None,
        cache: SampleCache | None = None,
        ranks: dist.ProcessGroup | None = None,
    ):
        """
        Args:
            model: `TransnormerForCausalLM` in evaluation mode; its weights must not change while this object is used.
            tokenizer: of transformers.
            batch_tokens: that a forward pass reads at most; a longer text is read in pieces.
            max_state_bytes: of the states that are held for what continues from them.
            max_length: cut contexts on the left to so many tokens, and texts into windows, as lm-eval's ``hf`` adapter
                does; None reads everything.
            add_bos_token, split_special_tokens: see `RequestTokens`.
            cache: results that are there already are not computed again; others are added batch by batch.
            ranks: that share the work; default all of them.

        Raises:
            ConfigError: not a TNL model or one whose weights are partitioned, a tokenizer of another vocabulary, or a
                size below 1.
        """
        super().__init__()
        if not isinstance(model, TransnormerForCausalLM):
            raise ConfigError(
                f"{type(model).__name__}: expected a TransnormerForCausalLM; merge an adapter into it first, and give "
                "other models to lm-eval's own hf adapter"
            )
        if hasattr(next(model.parameters()), "ds_id"):
            raise ConfigError(
                "the weights are partitioned by ZeRO-3, under which every forward pass is made by all ranks together; "
                "evaluate a saved checkpoint, or train with ZeRO 2"
            )
        for name, value in (("batch_tokens", batch_tokens), ("max_length", max_length)):
            if value is not None and value < 1:
                raise ConfigError(f"{name}: must be 1 or more, got {value}")
        check_vocabulary_fits(model, tokenizer)
        self.model, self.tokenizer = model, tokenizer
        self.counts = HarnessCounts()
        self._device = model.device
        self._max_length = max_length
        self._tokens = RequestTokens(tokenizer, add_bos_token, split_special_tokens)
        self._reader = PrefixReader(model, batch_tokens, max_state_bytes)
        self._division = RankDivision(ranks)
        self._cache = cache
        self._model_digest = "" if cache is None else model_digest(model, tokenizer)

    # What lm-eval asks of a model beside its results.

    @property
    def config(self):
        """The model's configuration."""
        return self.model.config

    @property
    def eot_token_id(self) -> int | None:
        """The tokenizer's end token."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that nothing stands before."""
        return self._tokens.prefix_id

    @property
    def max_length(self) -> int | None:
        """Tokens of a context, None without a limit."""
        return self._max_length

    @property
    def max_gen_toks(self) -> int:
        """Tokens of a generation where the task does not say."""
        return DEFAULT_NEW_TOKENS

    @property
    def tokenizer_name(self) -> str:
        """For lm-eval's own cache of requests."""
        return self.tokenizer.name_or_path.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs) -> list[int]:
        """Ids of a text."""
        return self._tokens.encode([string], add_special_tokens)[string].tolist()

    def tok_decode(self, tokens: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Text of ids."""
        return self.tokenizer.decode(tokens, skip_special_tokens=skip_special_tokens)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A dialogue as the tokenizer's template writes it; without the system's words where it refuses those."""

        def render(messages: list[dict[str, str]]) -> str:
            return self.tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )

        try:
            return render(chat_history)
        except jinja2.exceptions.TemplateError:
            _log.warning("the chat template refuses the dialogue; it is rendered without the system message")
            return render([message for message in chat_history if message["role"] != "system"])

    def get_model_info(self) -> dict:
        """What lm-eval writes beside the scores."""
        return {
            "model_num_parameters": self.model.num_parameters(),
            "model_dtype": str(self.model.dtype),
            "counts": asdict(self.counts),
        }

    # Results.

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[Score]:
        """Log-likelihood of each continuation in nats, and whether greedy decoding gives it.

        Raises:
            DataError: a continuation without tokens, or longer than ``max_length``.
            NonFiniteError: a log-likelihood is not finite.
        """
        names = [request_name(request) for request in requests]
        pairs = self._tokens.encode_pairs([request.args for request in requests], names)
        self.counts.requests += len(requests)
        return self._scores(pairs, names, disable_tqdm)

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, **kwargs) -> list[Score]:
        """The same of ids: a list of ((context, continuation), ids of the context, ids of the continuation)."""
        pairs = [(np.array(context), np.array(continuation)) for _, context, continuation in requests]
        self.counts.requests += len(requests)
        return self._scores(pairs, [f"request {i}" for i in range(len(pairs))], disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of each text in nats, every token behind all before it, or as far as ``max_length`` reaches.

        Raises:
            NonFiniteError: a log-likelihood is not finite.
        """
        texts = [request.args[0] for request in requests]
        ids = self._tokens.encode(texts)
        pairs, names, owners = [], [], []
        for i, text in enumerate(texts):
            for pair in self._windows(ids[text]):
                pairs.append(pair)
                names.append(request_name(requests[i]))
                owners.append(i)
        self.counts.requests += len(requests)
        sums = [0.0] * len(requests)
        for owner, (score, _) in zip(owners, self._scores(pairs, names, disable_tqdm), strict=True):
            sums[owner] += score
        return sums

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Text that continues each context, up to one of its ``until`` texts or an end token.

        A sampled text depends on the request and on how often it was asked before in this call, and not on the batch.

        Raises:
            DataError: arguments that do not fit together, or nothing to read or to generate.
            NonFiniteError: logits are not finite.
        """
        names = [request_name(request) for request in requests]
        contexts = self._tokens.encode_prompts(request.args[0] for request in requests)
        eos = None if self.eot_token_id is None else self.tok_decode([self.eot_token_id], skip_special_tokens=False)
        groups: dict[str, tuple[GenerationSettings, dict[int, np.ndarray]]] = {}
        digests: list[str] = []
        times_asked: dict[str, int] = {}
        for i, request in enumerate(requests):
            settings = generation_settings(request, eos, names[i])
            prompt = self._fitting_prompt(contexts[request.args[0]], settings, names[i])
            text = json.dumps(asdict(settings), sort_keys=True)
            groups.setdefault(text, (settings, {}))[1][i] = prompt
            digest = request_digest("generate_until", text, prompt)
            if settings.sampling is not None:
                times_asked[digest] = times_asked.get(digest, 0) + 1
                digest = request_digest("sample", f"{digest} {times_asked[digest]}")
            digests.append(digest)
        self.counts.requests += len(requests)
        texts: dict[int, str] = {}
        for settings, prompts in groups.values():
            texts |= self._texts(prompts, settings, digests, names, disable_tqdm)
        return [texts[i] for i in range(len(requests))]

    # How they are made.

    def _scores(
        self, pairs: Sequence[tuple[np.ndarray, np.ndarray]], names: Sequence[str], disable_tqdm: bool
    ) -> list[Score]:
        """Scores of (context, continuation) ids, in their order, on every rank."""
        places: dict[bytes, int] = {}
        sequences: list[np.ndarray] = []
        continuations, digests = [], []
        for (context, ids), name in zip(pairs, names, strict=True):
            read = self._fitting(np.concatenate([context, ids[:-1]]), len(ids), name)
            digests.append("" if self._cache is None else request_digest("loglikelihood", "", read, ids))
            place = places.setdefault(sort_key(read), len(sequences))
            if place == len(sequences):
                sequences.append(read)
            continuations.append(Continuation(ids, place, name))
        order = [place for _, place in sorted(places.items())]
        mine = order[self._division.share(lambda: new_tokens([sequences[place] for place in order]))]
        asked: dict[int, list[int]] = {place: [] for place in mine}
        found: dict[int, Score] = {}
        for i, continuation in enumerate(continuations):
            if continuation.sequence in asked:
                known = self._known(digests[i])
                if known is None:
                    asked[continuation.sequence].append(i)
                else:
                    found[i] = (known[0], known[1])
        self.counts.from_cache += len(found)
        mine = [place for place in mine if asked[place]]
        missing = {i: continuations[i] for place in mine for i in asked[place]}
        with self._progress("loglikelihood", len(missing), disable_tqdm) as bar:

            def finished(scores: dict[int, Score]) -> None:
                found.update(scores)
                self._keep({digests[i]: list(score) for i, score in scores.items()})
                bar.update(len(scores))

            def compute() -> None:
                scores = RequestScores(self.model, missing, finished)
                scores.compute(self._reader, [sequences[place] for place in mine], [asked[place] for place in mine])

            tokens = sum(len(sequences[place]) * len(asked[place]) for place in mine)
            merged = self._division.gather(found, self._computed(compute, tokens))
        return [merged[i] for i in range(len(pairs))]

    def _texts(
        self,
        prompts: dict[int, np.ndarray],
        settings: GenerationSettings,
        digests: Sequence[str],
        names: Sequence[str],
        disable_tqdm: bool,
    ) -> dict[int, str]:
        """Continuations of prompts of equal settings by index, on every rank."""
        ends = {i: unshared(ids, i) for i, ids in prompts.items()}
        order = sorted(prompts, key=lambda i: sort_key(ends[i]))
        mine = order[self._division.share(lambda: new_tokens([ends[i] for i in order]) + settings.max_new_tokens)]
        found = {i: known for i in mine if (known := self._known(digests[i])) is not None}
        self.counts.from_cache += len(found)
        missing = {i: prompts[i] for i in mine if i not in found}
        with self._progress("generate_until", len(missing), disable_tqdm) as bar:

            def finished(texts: dict[int, str], num_tokens: dict[int, int]) -> None:
                found.update(texts)
                self._keep({digests[i]: text for i, text in texts.items()})
                self.counts.tokens_generated += sum(num_tokens.values())
                bar.update(len(texts))

            def compute() -> None:
                texts = RequestTexts(self.model, self.tokenizer, settings, digests, names, finished)
                texts.compute(self._reader, missing)

            failure = self._computed(compute, sum(map(len, missing.values())))
            self.counts.empty_outputs += sum(not text.strip() for text in found.values())
            return self._division.gather(found, failure)

    def _computed(self, compute: Callable[[], None], num_tokens: int) -> UserError | None:
        """Compute, and count what was read of ``num_tokens``; the user's mistake that ended it, if one did, of which
        all ranks must hear before they end."""
        before = self._reader.tokens_read
        try:
            compute()
        except UserError as error:
            return error
        read = self._reader.tokens_read - before
        self.counts.tokens_read += read
        self.counts.tokens_reused += num_tokens - read
        return None

    def _known(self, digest: str) -> list | str | None:
        """The result of a request, if it is in the cache."""
        return None if self._cache is None else self._cache.get(result_key(self._model_digest, digest))

    def _keep(self, results: dict[str, list | str]) -> None:
        """Put the results of a batch, by the requests' digests, into the cache."""
        if self._cache is not None:
            self._cache.put({result_key(self._model_digest, digest): value for digest, value in results.items()})

    def _progress(self, name: str, total: int, disable: bool) -> tqdm:
        return tqdm(total=total, desc=name, disable=disable or self._division.rank > 0)

    def _windows(self, ids: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
        """(context, tokens to score) that cover a text; one without a limit, none for no text."""
        if self._max_length is None:
            return [(np.array([self.prefix_token_id]), ids)] if len(ids) else []
        windows = get_rolling_token_windows(ids.tolist(), self.prefix_token_id, self._max_length, context_len=1)
        return [tuple(np.array(part) for part in make_disjoint_window(window)) for window in windows]

    def _fitting(self, read: np.ndarray, num_scored: int, name: str) -> np.ndarray:
        """``read`` cut on the left to ``max_length``."""
        if self._max_length is None or len(read) <= self._max_length:
            return read
        if num_scored > self._max_length:
            raise DataError(
                f"{name}: its continuation has {num_scored} tokens, max_length is {self._max_length}; raise that or "
                "leave it out, a TNL model has no limit"
            )
        self.counts.truncations += 1
        return read[-self._max_length :]

    def _fitting_prompt(self, ids: np.ndarray, settings: GenerationSettings, name: str) -> np.ndarray:
        """``ids`` of a context, cut on the left to leave room for new tokens below ``max_length``."""
        if not len(ids):
            raise DataError(f"{name}: its context has no tokens, so that there is nothing to continue")
        if self._max_length is None:
            return ids
        room = self._max_length - settings.max_new_tokens
        if room < 1:
            raise DataError(
                f"{name}: asks for {settings.max_new_tokens} new tokens, max_length is {self._max_length}; raise that "
                "or leave it out, a TNL model has no limit"
            )
        self.counts.truncations += len(ids) > room
        return ids[-room:]


def check_vocabulary_fits(model, tokenizer) -> None:
    """Raise `ConfigError` where the tokenizer has ids that the model has no embeddings for."""
    highest = max(tokenizer.get_vocab().values())
    if highest >= model.config.vocab_size:
        raise ConfigError(
            f"{tokenizer.name_or_path or 'the tokenizer'}: its ids go up to {highest}, the model's vocab_size is "
            f"{model.config.vocab_size}; give the model's own tokenizer"
        )


def request_name(request: Instance) -> str:
    """How errors call a request."""
    return f"{request.task_name or request.request_type}, document {request.doc_id}, request {request.idx}"
