"""Sampling parameters and their defaults."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from lminf_edge.errors import UserError

if TYPE_CHECKING:
    from llama_cpp.llama_grammar import LlamaGrammar

LogitsProcessor = Callable[[Any, Any], Any]  # (int32 (n_tokens,), float32 (n_vocab,)) -> float32 (n_vocab,)


class SamplerMaker(Protocol):
    """A grammar that is a part of the sampler chain of its own kind."""

    def sampler(self, vocab: Any) -> Any:
        """A llama_sampler for a llama_vocab, for a chain to own. Raises UserError."""


Grammar: TypeAlias = "str | LlamaGrammar | SamplerMaker"  # GBNF text, llama_cpp's, or a chat template's

MAX_BREAKERS = 64  # each is searched for in the whole vocabulary
MAX_NUMBER = 1e9  # llama.cpp calculates in f32

# the parts of llama.cpp's chain whose order can be chosen, in llama-server's order
SAMPLERS = ("penalties", "dry", "top_n_sigma", "top_k", "typ_p", "top_p", "min_p", "xtc", "temperature")
MAX_SAMPLERS = 32
_SAMPLER_ALIASES = {"nucleus": "top_p", "temp": "temperature", "typ": "typ_p", "typical_p": "typ_p"}

# names in llama_cpp.Llama.generate that differ here
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
    "seed",
)
# arguments of llama_cpp.Llama.generate that llama.cpp no longer uses
_LLAMA_CPP_IGNORED = ("tfs_z", "penalize_nl")


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is sampled. Names, defaults and limits are llama-server's.

    temperature            0 or less: greedy
    top_k                  sample from so many of the likeliest tokens; 0 or less: all
    top_p                  sample from the likeliest tokens that have this probability in all; 1 or more: off
    min_p                  drop tokens less likely than this share of the likeliest; 0 or less: off
    typical_p              as top_p, of the tokens nearest to the expected surprise; 1 or more: off
    repeat_penalty         divisor of the logits of repeated tokens; 1: off; also 0 or less, which cannot be a divisor
    repeat_last_n          tokens that the three penalties look back; -1: the attention window, 0: none
    frequency_penalty      subtracted for each repetition of a token; 0: off
    presence_penalty       subtracted once for a repeated token; 0: off
    dry_multiplier         penalty for a token that continues a repetition; 0: off
    dry_base               factor of that for each token of the repetition; below 1: the default
    dry_allowed_length     repetitions of so many tokens are free
    dry_penalty_last_n     as repeat_last_n
    dry_sequence_breakers  texts that no repetition extends across, at most 64
    xtc_probability        how often all likely tokens but the last are dropped; 0 or less: off
    xtc_threshold          probability from which a token is likely; above 0.5: off
    top_n_sigma            drop logits so many standard deviations below the largest; 0 or less: off
    dynatemp_range         the temperature varies by so much with the entropy; 0 or less: off
    dynatemp_exponent      of that entropy
    mirostat               1 or 2: replaces all but the penalties and the grammar, as in llama_cpp
    mirostat_tau, mirostat_eta  its target surprise in bits, and its learning rate
    samplers               which of SAMPLERS take part, in this order; of those that do not, nothing is used
    min_keep               tokens that top_p, min_p, typical_p and XTC leave at least
    seed                   32 bits of it; None or -1: a new one each time
    logit_bias             token -> what is added to its logit
    grammar                GBNF text, a LlamaGrammar, or a chat template's
    logits_processor       functions of (tokens so far, logits (n_vocab,)) that return logits; they run first

    Raises UserError for what llama-server refuses too, and for numbers out of llama.cpp's range.
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
    samplers: Sequence[str] = SAMPLERS
    min_keep: int = 0
    seed: int | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    grammar: Grammar | None = None
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
        if isinstance(self.samplers, str) or not set(self.samplers) <= set(SAMPLERS):
            raise UserError(f"samplers must be a list of these: {', '.join(SAMPLERS)}.")
        if len(self.samplers) > MAX_SAMPLERS:
            raise UserError(f"samplers may be {MAX_SAMPLERS} at most, not {len(self.samplers)}.")
        if not 0 <= self.min_keep <= 1 << 30:
            raise UserError(f"min_keep must be 0 or more, not {self.min_keep}.")
        breakers = self.dry_sequence_breakers
        if isinstance(breakers, str) or not all(isinstance(each, str) for each in breakers):
            raise UserError("dry_sequence_breakers must be a list of strings.")
        if len(breakers) > MAX_BREAKERS:
            raise UserError(f"dry_sequence_breakers may have {MAX_BREAKERS} strings at most, not {len(breakers)}.")
        if any(math.isnan(bias) for bias in self.logit_bias.values()):
            raise UserError("logit_bias must not be NaN.")

    def updated(self, keywords: Mapping[str, Any]) -> SamplingParams:
        """A copy with these values, which have llama_cpp.Llama.generate's names."""
        given = {name: value for name, value in keywords.items() if name not in _LLAMA_CPP_IGNORED}
        return replace(self, **{_LLAMA_CPP_NAMES.get(name, name): value for name, value in given.items()})

    def completion_arguments(self) -> dict[str, Any]:
        """Those that llama_cpp.Llama.create_completion has, in its names, all but bias, grammar and processors."""
        return {name: getattr(self, _LLAMA_CPP_NAMES.get(name, name)) for name in _COMPLETION_ARGUMENTS}

    def public(self) -> dict[str, Any]:
        """All plain numbers and strings by name, as /props reports them."""
        hidden = ("seed", "logit_bias", "grammar", "logits_processor")
        return {each.name: getattr(self, each.name) for each in fields(self) if each.name not in hidden}

    @property
    def may_leave_none(self) -> bool:
        """Whether no token may be left to sample: llama.cpp would abort the process."""
        return self.grammar is not None or bool(self.logits_processor) or -math.inf in self.logit_bias.values()


def sampler_name(name: str) -> str:
    """The name in SAMPLERS for one that llama-server takes, such as "top-k" or "temp"; others stay as they are."""
    plain = name.lower().replace("-", "_")
    without = {each.replace("_", ""): each for each in SAMPLERS}
    return _SAMPLER_ALIASES.get(plain) or without.get(plain.replace("_", "")) or name


def as_processors(processors: Any) -> list[LogitsProcessor] | None:
    """Logits processors from None, one or several. Raises UserError for anything else."""
    if processors is None:
        return None
    found = list(processors) if hasattr(processors, "__iter__") else [processors]
    for processor in found:
        if not callable(processor):
            raise UserError(f"A logits processor must be a function of tokens and scores, not {processor!r}.")
    return found


@dataclass(frozen=True)
class Defaults:
    """Defaults for what a request omits.

    max_tokens    for requests without a limit; None: no limit
    detect_loops  whether requests without any limit end when the model loops
    drafts        whether NgramDrafts propose tokens
    """

    sampling: SamplingParams = SamplingParams()
    max_tokens: int | None = None
    detect_loops: bool = True
    drafts: bool = False
