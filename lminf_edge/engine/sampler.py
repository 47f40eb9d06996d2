"""llama.cpp's sampler chain, built from sampling parameters."""

from __future__ import annotations

import ctypes
import random
from collections.abc import Callable, Sequence
from typing import Any

import llama_cpp
import numpy as np
from llama_cpp import llama_cpp as bindings
from llama_cpp._internals import LlamaModel, LlamaSampler
from llama_cpp.llama_grammar import LlamaGrammar

from lminf_edge import native
from lminf_edge.cache.sequence import Logits
from lminf_edge.cache.token_log import Tokens
from lminf_edge.engine.params import Grammar, LogitsProcessor, SamplingParams
from lminf_edge.errors import UserError
from lminf_edge.scores import check_numbers

TOO_MUCH = "This grammar takes too much work: give it fewer optional parts, repetitions and alternatives"
GRAMMAR_UNUSABLE = "The grammar cannot be used: it is none in llama.cpp's GBNF, or takes too much work."
NOTHING_LEFT = (
    "No token is left to draw: the grammar allows no token of this model here, or logit_bias or a logits processor "
    "excludes them all."
)
MAX_LAST_N = 1 << 16  # tokens that penalties look back at most, unless the window is larger: each costs memory
MIROSTAT_CANDIDATES = 100  # llama.cpp's m
MIN_TEMPERATURE = 1e-6  # below, logits divided by it might not be numbers any more: taken as 0

_TOKEN_DATA = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])  # struct llama_token_data


class Sampler(LlamaSampler):
    """llama.cpp's sampler chain. It counts the tokens that it draws as said; `close` frees it."""

    def __init__(self, params: SamplingParams, model: LlamaModel, n_window: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.params = params
        self._n_vocab = int(model.n_vocab())
        self.is_greedy = False  # it draws the likeliest token
        self._failures: list[BaseException] = []  # of logits processors, as C code cannot pass them on
        self.raised: BaseException | None = None  # by a logits processor: no bug of ours
        self._n_window = n_window
        self._model = model

    def close(self) -> None:
        super().close()  # type: ignore[no-untyped-call]

    def sample(self, ctx: Any, idx: int = -1) -> int:
        """Draws from the logits of a llama_cpp context at batch index `idx`.

        Raises UserError if no token can be drawn, ModelError for logits that are no numbers, and what a logits
        processor raises.
        """
        logits = np.ctypeslib.as_array(bindings.llama_get_logits_ith(ctx.ctx, idx), shape=(self._n_vocab,))
        if self.params.may_leave_none:
            return self.draw(logits)
        check_numbers(logits)
        return int(super().sample(ctx, idx))

    def draw(self, logits: Logits) -> int:
        """Draws from `logits` (n_vocab,), which stay as they are; raises as `sample` does."""
        return self.draw_of(logits)[0]

    def draw_of(self, logits: Logits) -> tuple[int, Logits]:
        """Draws as `draw` does; returns the token and the logits (n_vocab,) it was drawn by, -inf for what had gone."""
        check_numbers(logits)
        try:
            token, left = _drawn(self, logits)
            after = np.full(self._n_vocab, -np.inf, dtype=np.float32)
            if self.is_greedy:
                after[token] = 0.0
            else:
                after[left["id"]] = left["logit"]
            return token, after
        finally:
            if self._failures:  # what a logits processor did is the reason
                self.raised = self._failures.pop()
                raise self.raised

    # --- the parts of the chain ---------------------------------------------------------------------------------------

    def add_processors(self, processors: Sequence[LogitsProcessor], seen: Callable[[], Tokens]) -> None:
        """`seen` gives the tokens so far."""

        def apply(candidates: Any) -> None:
            array = candidates.contents
            buffer = (llama_cpp.llama_token_data * array.size).from_address(ctypes.addressof(array.data.contents))
            data = np.frombuffer(buffer, dtype=_TOKEN_DATA)
            try:
                scores = data["logit"].copy()
                for processor in processors:
                    scores = processor(seen(), scores)
                data["logit"] = scores
            except BaseException as error:
                self._failures.append(error)

        self.add_custom(apply)

    def add_any_grammar(self, grammar: Grammar) -> None:
        """Raises UserError for what llama.cpp cannot parse, or what takes too much work."""
        if not isinstance(grammar, (str, LlamaGrammar)):
            bindings.llama_sampler_chain_add(self.sampler, grammar.sampler(self._model.vocab))
            return
        text, root = (grammar, "root") if isinstance(grammar, str) else (grammar._grammar, grammar._root)
        with native.captured_errors():
            sampler = bindings.llama_sampler_init_grammar(self._model.vocab, text.encode("utf-8"), root.encode("utf-8"))
        if not sampler:
            raise UserError(GRAMMAR_UNUSABLE)
        bindings.llama_sampler_chain_add(self.sampler, sampler)

    def add_named(self, name: str, temperature: float, seed: int, previous: Sequence[int] | Tokens) -> None:
        """Adds one of SAMPLERS. `previous` are the tokens before the answer."""
        p, keep = self.params, max(self.params.min_keep, 1)
        if name == "penalties":
            self._add_penalties(previous)
        elif name == "dry":
            self._add_dry(previous)
        elif name == "top_n_sigma" and p.top_n_sigma > 0:
            self.add_top_n_sigma(p.top_n_sigma)
        elif name == "top_k":
            self.add_top_k(min(max(p.top_k, 0), self._n_vocab))
        elif name == "typ_p":
            self.add_typical(p.typical_p, keep)
        elif name == "top_p":
            self.add_top_p(p.top_p, keep)
        elif name == "min_p":
            self.add_min_p(p.min_p, keep)
        elif name == "xtc" and p.xtc_probability > 0:
            self.add_xtc(p.xtc_probability, p.xtc_threshold, keep, seed)
        elif name == "temperature":
            self.add_temp_ext(temperature, max(p.dynatemp_range, 0.0), p.dynatemp_exponent)

    def _add_penalties(self, previous: Sequence[int] | Tokens) -> None:
        p = self.params
        if p.repeat_last_n and (p.repeat_penalty, p.frequency_penalty, p.presence_penalty) != (1.0, 0.0, 0.0):
            repeat = p.repeat_penalty if p.repeat_penalty > 0 else 1.0
            n = self._last_n(p.repeat_last_n)
            self.add_penalties(self._n_vocab, n, repeat, p.frequency_penalty, p.presence_penalty)
            self._tell_last(previous[-n:])

    def _add_dry(self, previous: Sequence[int] | Tokens) -> None:
        p = self.params
        if p.dry_multiplier and p.dry_penalty_last_n:
            base = p.dry_base if p.dry_base >= 1 else SamplingParams.dry_base
            breakers = [text.replace("\0", "").encode("utf-8", "replace").decode() for text in p.dry_sequence_breakers]
            n = self._last_n(p.dry_penalty_last_n)
            allowed = min(max(p.dry_allowed_length, 0), n)
            self.add_dry(self._model, p.dry_multiplier, base, allowed, n, [each for each in breakers if each])
            self._tell_last(previous[-n:])

    def _last_n(self, n: int) -> int:
        return self._n_window if n == -1 else min(n, max(MAX_LAST_N, self._n_window))

    def _tell_last(self, tokens: Sequence[int] | Tokens) -> None:
        """Lets the part added last, alone, count these as said."""
        part = bindings.llama_sampler_chain_get(self.sampler, bindings.llama_sampler_chain_n(self.sampler) - 1)
        for token in tokens:
            bindings.llama_sampler_accept(part, int(token))


def sample_checked(sampler: LlamaSampler, logits: Logits) -> int:
    """What llama_sampler_sample draws from `logits` (n_vocab,), which stay as they are; raises as `_drawn` does."""
    return _drawn(sampler, logits)[0]


def _drawn(sampler: LlamaSampler, logits: Logits) -> tuple[int, Any]:
    """What llama_sampler_sample draws, and the candidates that were left to draw from, as an array of _TOKEN_DATA.

    Raises UserError if a grammar could not be parsed, if nothing is left to draw from, or if a grammar takes too much
    work: llama.cpp would go on without it, end the process, or go on for ever.
    """
    chain = sampler.sampler
    if not all(bindings.llama_sampler_chain_get(chain, i) for i in range(bindings.llama_sampler_chain_n(chain))):
        raise UserError(GRAMMAR_UNUSABLE)
    candidates = np.zeros(len(logits), dtype=_TOKEN_DATA)
    candidates["id"], candidates["logit"] = np.arange(len(logits)), logits
    data = candidates.ctypes.data_as(llama_cpp.llama_token_data_p)
    array = llama_cpp.llama_token_data_array(data=data, size=len(candidates), selected=-1, sorted=False)
    library = native.load()
    library.grammar_overran()  # forgets what an earlier chain's did
    with native.captured_errors():
        bindings.llama_sampler_apply(chain, array)
        if not 0 <= array.selected < array.size:
            raise UserError("No token could be drawn.")
        chosen = array.data[array.selected]
        if not np.isfinite(chosen.logit):
            raise UserError(f"{TOO_MUCH}." if library.grammar_overran() else NOTHING_LEFT)
        bindings.llama_sampler_accept(chain, chosen.id)
        if library.grammar_overran():
            raise UserError(f"{TOO_MUCH}.")
    return int(chosen.id), candidates[: array.size]


def make_sampler(
    params: SamplingParams,
    model: LlamaModel,
    n_window: int,
    seen: Callable[[], Tokens] = lambda: np.empty(0, dtype=np.int32),
    previous: Sequence[int] | Tokens = (),
) -> Sampler:
    """llama-server's chain: bias, grammar, then what `params.samplers` names.

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
    if p.grammar is not None:
        sampler.add_any_grammar(p.grammar)

    seed = random.getrandbits(32) if p.seed is None or p.seed == -1 else p.seed & 0xFFFFFFFF
    temperature = p.temperature if p.temperature >= MIN_TEMPERATURE else 0.0
    sampler.is_greedy = temperature == 0 and p.dynatemp_range <= 0 and "temperature" in p.samplers
    if p.mirostat and not sampler.is_greedy:
        for name in ("penalties", "dry"):
            sampler.add_named(name, temperature, seed, previous)
        if p.mirostat == 1:
            sampler.add_mirostat(n_vocab, seed, p.mirostat_tau, p.mirostat_eta, MIROSTAT_CANDIDATES)
        else:
            sampler.add_mirostat_v2(seed, p.mirostat_tau, p.mirostat_eta)
        return sampler
    names = list(dict.fromkeys(p.samplers))
    if sampler.is_greedy:
        names.remove("temperature")
        if p.xtc_probability <= 0 or "xtc" not in names:  # of the others, none takes the likeliest token away
            names = [name for name in names if name in ("penalties", "dry")]
    for name in names:
        sampler.add_named(name, temperature, seed, previous)
    if sampler.is_greedy:
        sampler.add_greedy()  # type: ignore[no-untyped-call]
    else:
        sampler.add_dist(seed)
    return sampler
