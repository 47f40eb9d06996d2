"""Sampling parameters, and llama.cpp's sampler chain made of them."""

from __future__ import annotations

import ctypes
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import llama_cpp
import numpy as np
from llama_cpp import llama_cpp as bindings
from llama_cpp._internals import LlamaModel, LlamaSampler
from llama_cpp.llama_grammar import LlamaGrammar

from lminf_edge.engine.sampling import TOKEN_DATA, sample_checked
from lminf_edge.errors import UserError
from lminf_edge.history import Tokens
from lminf_edge.sequence import Logits

LogitsProcessor = Callable[[Tokens, Logits], Logits]

MAX_LAST_N = 1 << 16  # tokens that penalties look back at most, unless the window is larger: each costs memory
MAX_BREAKERS = 64  # each is looked for in the whole vocabulary
MIROSTAT_CANDIDATES = 100  # llama.cpp's m
MIN_TEMPERATURE = 1e-6  # below, logits divided by it might not be numbers any more: taken as 0
MAX_NUMBER = 1e9  # the same for all others

# names in llama_cpp.Llama.generate that are others here
_LLAMA_CPP_NAMES = {"temp": "temperature", "mirostat_mode": "mirostat"}
_COMPLETION_ARGUMENTS = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "typical_p",
    "repeat_penalty",
    "frequency_penalty",
    "presence_penalty",
    "mirostat_mode",
    "mirostat_tau",
    "mirostat_eta",
)
# arguments of llama_cpp.Llama.generate that llama.cpp has no use for any more
_LLAMA_CPP_IGNORED = ("tfs_z", "penalize_nl")


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is drawn. Names, defaults and limits are llama-server's.

    temperature            0 or less: always the likeliest token
    top_k                  0 or less: all tokens; top_p, typical_p 1 or more, min_p 0 or less: off
    repeat_penalty         1: off; also 0 or less, which would divide by it
    repeat_last_n          tokens that the three penalties look back; -1: the attention window, 0: none
    dry_multiplier         0: off; a dry_base below 1 is taken as the default
    dry_penalty_last_n     as repeat_last_n
    xtc_probability        0 or less: off, as a threshold above 0.5
    top_n_sigma            0 or less: off
    dynatemp_range         0 or less: off
    mirostat               1 or 2: in place of all but the penalties and the grammar, as llama_cpp has it
    seed                   32 bits of it; None or -1: another one each time
    logit_bias             token -> what is added to its logit
    grammar                GBNF text, or llama_cpp's
    logits_processor       functions of (tokens so far, logits (n_vocab,)) that return logits; run before all else

    Raises UserError for what llama-server refuses as well, and for numbers that llama.cpp cannot calculate with.
    """

    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    typical_p: float = 1.0
    repeat_penalty: float = 1.0
    repeat_last_n: int = 64
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    dry_multiplier: float = 0.0
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    dry_penalty_last_n: int = -1
    dry_sequence_breakers: Sequence[str] = ("\n", ":", '"', "*")
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    top_n_sigma: float = -1.0
    dynatemp_range: float = 0.0
    dynatemp_exponent: float = 1.0
    mirostat: int = 0
    mirostat_tau: float = 5.0
    mirostat_eta: float = 0.1
    seed: int | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    grammar: str | LlamaGrammar | None = None
    logits_processor: Sequence[LogitsProcessor] | None = None

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if isinstance(value, float) and not abs(value) <= MAX_NUMBER:  # catches nan as well
                raise UserError(f"{each.name} must be a number of at most {MAX_NUMBER:.0e}, not {value}.")
        for name in ("repeat_last_n", "dry_penalty_last_n"):
            if getattr(self, name) < -1:
                raise UserError(f"{name} must be -1 (the attention window) or more, not {getattr(self, name)}.")
        if self.mirostat not in (0, 1, 2):
            raise UserError(f"mirostat must be 0 (off), 1 or 2, not {self.mirostat}.")
        breakers = self.dry_sequence_breakers
        if isinstance(breakers, str) or not all(isinstance(each, str) for each in breakers):
            raise UserError("dry_sequence_breakers must be a list of strings.")
        if len(breakers) > MAX_BREAKERS:
            raise UserError(f"dry_sequence_breakers may have {MAX_BREAKERS} strings at most, not {len(breakers)}.")
        if any(math.isnan(bias) for bias in self.logit_bias.values()):
            raise UserError("logit_bias must not be NaN.")

    def updated(self, keywords: Mapping[str, Any]) -> SamplingParams:
        """With these in place, which have llama_cpp.Llama.generate's names."""
        given = {name: value for name, value in keywords.items() if name not in _LLAMA_CPP_IGNORED}
        return replace(self, **{_LLAMA_CPP_NAMES.get(name, name): value for name, value in given.items()})

    def completion_arguments(self) -> dict[str, Any]:
        """Those that llama_cpp.Llama.create_completion has, in its names, all but the seed, bias and grammar."""
        return {name: getattr(self, _LLAMA_CPP_NAMES.get(name, name)) for name in _COMPLETION_ARGUMENTS}

    def public(self) -> dict[str, Any]:
        """Name and value of all that are plain numbers or strings, as /props tells them."""
        hidden = ("seed", "logit_bias", "grammar", "logits_processor")
        return {each.name: getattr(self, each.name) for each in fields(self) if each.name not in hidden}

    @property
    def may_leave_none(self) -> bool:
        """Whether there may be no token left to draw, for which llama.cpp would end the process."""
        return self.grammar is not None or bool(self.logits_processor) or -math.inf in self.logit_bias.values()


class Sampler(LlamaSampler):
    """llama.cpp's sampler chain. It counts the tokens that it draws as said; `close` frees it."""

    def __init__(self, params: SamplingParams, model: LlamaModel, n_window: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.params = params
        self._n_vocab = int(model.n_vocab())
        self._failures: list[BaseException] = []  # of logits processors, as C code cannot pass them on
        self._n_window = n_window
        self._model = model

    def sample(self, ctx: Any, idx: int = -1) -> int:
        """Draws from the logits of a llama_cpp context at batch index `idx`.

        Raises UserError if no token can be drawn, and what a logits processor raises.
        """
        if self.params.may_leave_none:
            logits = bindings.llama_get_logits_ith(ctx.ctx, idx)
            return self.draw(np.ctypeslib.as_array(logits, shape=(self._n_vocab,)))
        return int(super().sample(ctx, idx))

    def draw(self, logits: Logits) -> int:
        """Draws from `logits` (n_vocab,), which stay as they are; raises as `sample` does."""
        try:
            token = sample_checked(self, logits)
        except UserError:
            self._raise_failure()  # what the processor did is the reason
            raise
        self._raise_failure()
        return token

    def _raise_failure(self) -> None:
        if self._failures:
            raise self._failures.pop()

    # --- the parts of the chain ---------------------------------------------------------------------------------------

    def add_processors(self, processors: Sequence[LogitsProcessor], seen: Callable[[], Tokens]) -> None:
        """`seen` gives the tokens so far."""

        def apply(candidates: Any) -> None:
            array = candidates.contents
            buffer = (llama_cpp.llama_token_data * array.size).from_address(ctypes.addressof(array.data.contents))
            data = np.frombuffer(buffer, dtype=TOKEN_DATA)
            try:
                scores = data["logit"].copy()
                for processor in processors:
                    scores = processor(seen(), scores)
                data["logit"] = scores
            except BaseException as error:
                self._failures.append(error)

        self.add_custom(apply)

    def add_grammar_text(self, grammar: str | LlamaGrammar) -> None:
        """Raises UserError for what llama.cpp cannot parse."""
        text, root = (grammar, "root") if isinstance(grammar, str) else (grammar._grammar, grammar._root)
        sampler = bindings.llama_sampler_init_grammar(self._model.vocab, text.encode("utf-8"), root.encode("utf-8"))
        if not sampler:
            raise UserError("The grammar cannot be parsed: it must be GBNF with a rule named root.")
        bindings.llama_sampler_chain_add(self.sampler, sampler)

    def add_penalties_and_dry(self, previous: Sequence[int]) -> None:
        p = self.params
        if p.repeat_last_n and (p.repeat_penalty, p.frequency_penalty, p.presence_penalty) != (1.0, 0.0, 0.0):
            repeat = p.repeat_penalty if p.repeat_penalty > 0 else 1.0
            n = self._last_n(p.repeat_last_n)
            self.add_penalties(self._n_vocab, n, repeat, p.frequency_penalty, p.presence_penalty)
            self._tell_last(previous[-n:])
        if p.grammar is not None:
            self.add_grammar_text(p.grammar)
        if p.dry_multiplier and p.dry_penalty_last_n:
            base = p.dry_base if p.dry_base >= 1 else SamplingParams.dry_base
            breakers = [text.replace("\0", "").encode("utf-8", "replace").decode() for text in p.dry_sequence_breakers]
            n = self._last_n(p.dry_penalty_last_n)
            allowed = min(max(p.dry_allowed_length, 0), n)
            self.add_dry(self._model, p.dry_multiplier, base, allowed, n, [each for each in breakers if each])
            self._tell_last(previous[-n:])

    def _last_n(self, n: int) -> int:
        return self._n_window if n == -1 else min(n, max(MAX_LAST_N, self._n_window))

    def _tell_last(self, tokens: Sequence[int]) -> None:
        """Lets the part added last, alone, count these as said."""
        part = bindings.llama_sampler_chain_get(self.sampler, bindings.llama_sampler_chain_n(self.sampler) - 1)
        for token in tokens:
            bindings.llama_sampler_accept(part, int(token))


def make_sampler(
    params: SamplingParams,
    model: LlamaModel,
    n_window: int,
    seen: Callable[[], Tokens] = lambda: np.empty(0, dtype=np.int32),
    previous: Sequence[int] = (),
) -> Sampler:
    """llama-server's chain: bias, penalties, DRY, top-n-sigma, top-k, typical, top-p, min-p, XTC, temperature.

    n_window   tokens of the attention window, for last_n of -1
    seen       the tokens so far, for the logits processors
    previous   tokens before the answer that penalties and DRY count as said, as llama-server does with the prompt's;
               llama_cpp.Llama counts none

    With parameters that llama_cpp.Llama has as well, and none before, what is drawn is what its chain draws with the
    same seed. Raises UserError for a grammar or a bias the model cannot have.
    """
    p = params
    sampler = Sampler(p, model, n_window)
    n_vocab = int(model.n_vocab())
    if any(not 0 <= token < n_vocab for token in p.logit_bias):
        raise UserError(f"logit_bias: this model's tokens are 0 to {n_vocab - 1}.")
    if p.logits_processor:
        sampler.add_processors(p.logits_processor, seen)
    if p.logit_bias:
        sampler.add_logit_bias(n_vocab, dict(p.logit_bias))
    sampler.add_penalties_and_dry(previous)

    seed = random.getrandbits(32) if p.seed is None or p.seed == -1 else p.seed & 0xFFFFFFFF
    temperature = p.temperature if p.temperature >= MIN_TEMPERATURE else 0.0
    is_greedy = temperature == 0 and p.dynatemp_range <= 0
    if p.mirostat and not is_greedy:
        if p.mirostat == 1:
            sampler.add_mirostat(n_vocab, seed, p.mirostat_tau, p.mirostat_eta, MIROSTAT_CANDIDATES)
        else:
            sampler.add_mirostat_v2(seed, p.mirostat_tau, p.mirostat_eta)
        return sampler
    if not is_greedy or p.xtc_probability > 0:  # of the others, none takes the likeliest token away
        if p.top_n_sigma > 0:
            sampler.add_top_n_sigma(p.top_n_sigma)
        sampler.add_top_k(min(max(p.top_k, 0), n_vocab))
        sampler.add_typical(p.typical_p)
        sampler.add_top_p(p.top_p)
        sampler.add_min_p(p.min_p)
        if p.xtc_probability > 0:
            sampler.add_xtc(p.xtc_probability, p.xtc_threshold, 1, seed)
    if is_greedy:
        sampler.add_greedy()  # type: ignore[no-untyped-call]
    else:
        sampler.add_temp_ext(temperature, max(p.dynatemp_range, 0.0), p.dynatemp_exponent)
        sampler.add_dist(seed)
    return sampler


@dataclass(frozen=True)
class Defaults:
    """What a request leaves out.

    max_tokens    for requests without a limit of their own; None: no limit
    detect_loops  whether requests without any limit end once they loop
    """

    sampling: SamplingParams = SamplingParams()
    max_tokens: int | None = None
    detect_loops: bool = True
