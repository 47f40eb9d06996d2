"""Text completion over an endless stream: llama_cpp.Llama.create_completion at a constant cost per token.

The formats, the finish reasons and, for text that fits the window, the text itself are llama_cpp's. Three things are
not: max_tokens is never exceeded (llama_cpp goes on to complete a character), the earliest of several stop strings
ends the text (not the first in the list), and logprobs do not need logits_all.
"""

from __future__ import annotations

import codecs
import contextlib
import logging
import random
import sys
import time
import uuid
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import llama_cpp
import numpy as np

from lminf_edge.checkpoint import Checkpoint, CheckpointError
from lminf_edge.history import Tokens, as_tokens
from lminf_edge.loops import LoopDetector

if TYPE_CHECKING:
    from llama_cpp.llama_cache import BaseLlamaCache

    from lminf_edge.llama import Llama
    from lminf_edge.sequence import Logits

log = logging.getLogger("lminf_edge.completion")

# tokens before a piece of text that a tokenizer may look at to place its spaces
_CONTEXT = 16


# --- tokens to text ---------------------------------------------------------------------------------------------------


class Detokenizer:
    """The text of a token stream, token by token."""

    def __init__(self, llm: Llama, before: Tokens | Sequence[int], opening: Sequence[int]) -> None:
        """`before` are tokens that precede the text, `opening` tokens without text it begins with."""
        self._llm = llm
        self._before = deque(as_tokens(before[-_CONTEXT:]).tolist(), maxlen=_CONTEXT)
        self._opening = list(opening)

    def piece(self, token: int) -> bytes:
        """The bytes this token adds, which may end inside a character."""
        piece: bytes = self._llm.detokenize([*self._opening, token], prev_tokens=list(self._before))
        self._before.extend([*self._opening, token])
        self._opening = []
        return piece


@dataclass(frozen=True)
class TokenLogprobs:
    """One token's entry in the four lists of a completion's logprobs."""

    text: str
    offset: int  # characters before the token
    logprob: float | None
    top: dict[str, float] | None


@dataclass(frozen=True)
class _Piece:
    text: bytes
    logprobs: TokenLogprobs | None


@dataclass(frozen=True)
class Part:
    """A stretch of text that is final: whole characters, and no part of a stop string."""

    text: str
    logprobs: list[TokenLogprobs]


class StopScanner:
    """Lets text through up to the first stop string.

    It holds back as few tokens as possible: those that may turn out to begin a stop string or that end inside a
    character. So it holds, and looks at, no more than the longest stop string and one token.
    """

    def __init__(self, stops: Sequence[bytes]) -> None:
        self._stops = stops
        self._held: list[_Piece] = []
        self.stopped = False

    def push(self, text: bytes, logprobs: TokenLogprobs | None) -> Iterator[Part]:
        """Takes one token's text and yields what this makes final."""
        self._held.append(_Piece(text, logprobs))
        held = b"".join(piece.text for piece in self._held)
        # what was let through was no beginning of a stop string, so one can only be in what is held
        found = [held.index(stop) for stop in self._stops if stop in held]
        if found:
            self.stopped = True
            yield from self._release(min(found), cut=True)
        else:
            yield from self._release(len(held) - max(partial_character(held), partial_stop(held, self._stops)))

    def flush(self) -> Iterator[Part]:
        """Yields all that is held: no more text will come."""
        if not self.stopped:
            yield from self._release(sum(len(piece.text) for piece in self._held), cut=True)

    def _release(self, n_bytes: int, cut: bool = False) -> Iterator[Part]:
        """Yields tokens within the first n_bytes, grouped so that no group ends inside a character.

        With `cut`, the rest is dropped and the group it begins in is cut short.
        """
        text, logprobs, n_grouped, end = b"", [], 0, 0
        for i, piece in enumerate(self._held):
            end += len(piece.text)
            if end > n_bytes and not cut:
                break
            text += piece.text[: len(piece.text) - max(end - n_bytes, 0)]
            logprobs += [piece.logprobs] if piece.logprobs else []
            if cut and end >= n_bytes:
                if text:
                    yield Part(text.decode("utf-8", errors="ignore"), logprobs)
                n_grouped = len(self._held)
                break
            if partial_character(text) == 0:
                yield Part(text.decode("utf-8", errors="ignore"), logprobs)
                text, logprobs, n_grouped = b"", [], i + 1
        del self._held[:n_grouped]


def partial_character(text: bytes) -> int:
    """Bytes at the end of `text` (0 to 3) that begin a UTF-8 character without completing it."""
    for n_bytes in range(1, min(3, len(text)) + 1):
        byte = text[-n_bytes]
        if byte & 0xC0 == 0x80:  # not the first byte of a character
            continue
        n_needed = 4 if byte & 0xF8 == 0xF0 else 3 if byte & 0xF0 == 0xE0 else 2 if byte & 0xE0 == 0xC0 else 1
        return n_bytes if n_bytes < n_needed else 0
    return 0


def partial_stop(text: bytes, stops: Sequence[bytes]) -> int:
    """Bytes at the end of `text` that may be the beginning of a stop string, at most."""
    longest = max(map(len, stops), default=1) - 1
    for n_bytes in range(min(longest, len(text)), 0, -1):
        tail = text[-n_bytes:]
        if any(stop.startswith(tail) for stop in stops):
            return n_bytes
    return 0


# --- logprobs ---------------------------------------------------------------------------------------------------------


class LogprobReporter:
    """Makes the logprobs entries of consecutive tokens."""

    def __init__(self, llm: Llama, n_top: int, offset: int) -> None:
        """`offset` is the number of characters before the first token."""
        self._llm, self._n_top, self._offset = llm, n_top, offset
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="ignore")
        self._bos = llm.token_bos()

    def entry(self, token: int, piece: bytes, logits: Logits | None) -> TokenLogprobs | None:
        """The entry of a token sampled from `logits` (n_vocab,); None for a beginning-of-text token, which has none."""
        offset = self._offset
        self._offset += len(self._decoder.decode(piece))
        if token == self._bos:
            return None
        text = piece.decode("utf-8", errors="ignore")
        if logits is None:
            return TokenLogprobs(text, offset, None, None)
        logprobs = self._llm.logits_to_logprobs(logits)
        top = {
            self._llm.detokenize([int(other)]).decode("utf-8", errors="ignore"): float(logprobs[other])
            for other in top_tokens(logprobs, self._n_top)
        }
        top[text] = float(logprobs[token])
        return TokenLogprobs(text, offset, float(logprobs[token]), top)


def top_tokens(logprobs: Logits, n: int) -> Tokens:
    """The n most likely tokens of `logprobs` (n_vocab,), best first, the larger of two equals first."""
    n = min(n, len(logprobs))
    if n <= 0:
        return np.empty(0, dtype=np.int32)
    least = np.partition(logprobs, -n)[-n]
    candidates = np.flatnonzero(logprobs >= least)
    order = np.lexsort((candidates, logprobs[candidates]))[::-1]
    return candidates[order][:n].astype(np.int32)


def _as_lists(entries: Sequence[TokenLogprobs]) -> dict[str, list[Any]]:
    return {
        "tokens": [entry.text for entry in entries],
        "text_offset": [entry.offset for entry in entries],
        "token_logprobs": [entry.logprob for entry in entries],
        "top_logprobs": [entry.top for entry in entries],
    }


# --- the prompt -------------------------------------------------------------------------------------------------------


def prompt_to_tokens(llm: Llama, prompt: str | Sequence[int] | Tokens, suffix: str | None) -> Tokens:
    """The tokens (n_tokens,) of a prompt, or of the text around a gap; tokens without suffix stay as they are."""
    if not isinstance(prompt, str) and suffix is None:
        return as_tokens(prompt)
    model = llm._model
    bos = model.token_cls() if model.token_cls() != -1 else llm.token_bos()
    sep = model.token_sep()
    begin = [bos] if model.add_bos_token() and bos != -1 else []
    end = [sep if sep != -1 else llm.token_eos()] if model.add_eos_token() or sep != -1 else []
    text: Sequence[int] | Tokens = prompt if not isinstance(prompt, str) else []
    if isinstance(prompt, str) and prompt:
        text = llm.tokenize(prompt.encode("utf-8"), add_bos=False, special=suffix is None)
    if suffix is None:
        return _joined(begin, text, end)

    # a model without fill-in-the-middle tokens gets token 0 for them, as llama_cpp does for every model
    before, after, middle = (
        max(token, 0) for token in (model.token_prefix(), model.token_suffix(), model.token_middle())
    )
    rest: list[int] = []
    if suffix:
        # a tokenizer that puts a space before its text puts it before the smiley here, and both are cut off again
        spaced = llm.metadata.get("tokenizer.ggml.add_space_prefix", "true") == "true"
        rest = llm.tokenize(("☺" + suffix if spaced else suffix).encode("utf-8"), add_bos=False, special=False)
        rest = rest[2:] if spaced else rest
    halves = [_joined([before], text), _joined([after], rest)]
    if llm.spm_infill:
        halves.reverse()
    return _joined(begin, *halves, [middle], end)


def _joined(*parts: Sequence[int] | Tokens) -> Tokens:
    return np.concatenate([as_tokens(part) for part in parts])


def _prompt_logprobs(llm: Llama, tokens: Tokens, reporter: LogprobReporter) -> list[TokenLogprobs]:
    """Processes a prompt (n_tokens,) from an empty stream and reports on its tokens, as `echo` with `logprobs` asks.

    A leading beginning-of-text token is left out; the first token reported has no probability.
    """
    detokenizer = Detokenizer(llm, [], [])
    entries: list[TokenLogprobs] = []
    before: Logits | None = None  # logits of the token before this one
    for block, rows in llm.prompt_logits(tokens):
        for i, token in enumerate(block.tolist()):
            entry = reporter.entry(token, detokenizer.piece(token), before if entries else None)
            entries += [entry] if entry else []
            before = rows[i]
        before = rows[-1].copy()
    return entries


# --- the completion ---------------------------------------------------------------------------------------------------


def complete(
    llm: Llama,
    prompt: str | Sequence[int] | Tokens,
    suffix: str | None = None,
    max_tokens: int | None = 16,
    temperature: float = 0.8,
    logprobs: int | None = None,
    echo: bool = False,
    stop: str | Sequence[str] | None = None,
    stream: bool = False,
    seed: int | None = None,
    model: str | None = None,
    logits_processor: Any = None,
    logit_bias: dict[int, float] | None = None,
    **sampling: Any,
) -> Iterator[Any]:
    """Yields the chunks of a streamed completion, or the one response of another; see create_completion.

    max_tokens None, 0 or less: until a stop string, a stopping criterion or the end-of-text token or, with
    llm.detect_loops, until the model says the same over and over: then the finish reason is "length", too.
    """
    tokens = prompt_to_tokens(llm, prompt, suffix)
    _warn_of_two_bos(llm, tokens)
    head = {"id": f"cmpl-{uuid.uuid4()}", "object": "text_completion", "created": int(time.time())}
    head["model"] = llm.model_path if model is None else model
    if llm.verbose:
        llm._ctx.reset_timings()
    if llm.cache:
        _load_from_cache(llm, llm.cache, tokens)
    # as llama_cpp does: without a seed of its own each call still depends on the one given to Llama
    llm.set_seed(random.Random(llm._seed).randint(0, 2**32) if seed is None else seed)

    # the text of an empty prompt begins with its BOS, which takes a leading space with it and counts as completion
    opening = [llm.token_bos()] if len(prompt) == 0 else []
    n_completion = len(opening)
    echo = echo and not stream  # llama_cpp's chunks never echo
    reporter = None if logprobs is None else LogprobReporter(llm, logprobs, 0 if echo else len(prompt))
    entries = _prompt_logprobs(llm, tokens, reporter) if echo and reporter else []
    detokenizer = Detokenizer(llm, tokens, opening)
    scanner = StopScanner([text.encode("utf-8") for text in ([stop] if isinstance(stop, str) else stop or []) if text])
    parts: list[str] = []
    spoken: list[int] = []  # for the cache's key
    finish_reason = "stop"  # unless max_tokens is reached
    loop = LoopDetector() if llm.detect_loops and (max_tokens is None or max_tokens <= 0) else None

    def chunk(text: str, reported: list[TokenLogprobs], finish_reason: str | None = None) -> dict[str, Any]:
        lists = _as_lists(reported) if reported else None
        return {**head, "choices": [{"text": text, "index": 0, "logprobs": lists, "finish_reason": finish_reason}]}

    processors = _with_bias(logits_processor, logit_bias)
    generated = llm.generate(tokens, temp=temperature, logits_processor=processors, **sampling)
    with contextlib.closing(generated):
        for token in generated:
            if llama_cpp.llama_vocab_is_eog(llm._model.vocab, token):
                break
            n_completion += 1
            if llm.cache:
                spoken.append(token)
            piece = detokenizer.piece(token)
            entry = reporter.entry(token, piece, llm.logits_of_sample()) if reporter else None
            for part in scanner.push(piece, entry):
                if stream:
                    yield chunk(part.text, part.logprobs)
                else:
                    parts.append(part.text)
            if entry and not stream:
                entries.append(entry)
            if scanner.stopped:
                break
            if max_tokens is not None and 0 < max_tokens <= n_completion:
                finish_reason = "length"
                break
            if loop is not None and loop.push(token):
                log.warning("Stopped after %d tokens: the model repeats itself. A repeat penalty helps.", n_completion)
                finish_reason = "length"
                break
    for part in scanner.flush():
        if stream:
            yield chunk(part.text, part.logprobs)
        else:
            parts.append(part.text)
    if llm.verbose:
        llm._ctx.print_timings()
    if stream:
        yield chunk("", [], finish_reason)
    if llm.cache:
        # the key is what the state really holds; the last token was sampled but not processed
        llm.cache[[*tokens.tolist(), *spoken][: llm.n_tokens]] = llm.save_state()
    if stream:
        return

    text = "".join(parts)
    response = chunk((_as_text(llm, prompt) if echo else "") + text, entries, finish_reason)
    if logprobs is not None:
        response["choices"][0]["logprobs"] = _as_lists(entries)
    usage = {"prompt_tokens": len(tokens), "completion_tokens": n_completion}
    yield {**response, "usage": {**usage, "total_tokens": len(tokens) + n_completion}}


def _as_text(llm: Llama, prompt: str | Sequence[int] | Tokens) -> str:
    if isinstance(prompt, str):
        return prompt
    text: bytes = llm.detokenize(as_tokens(prompt).tolist())
    return text.decode("utf-8", errors="ignore")


def _warn_of_two_bos(llm: Llama, tokens: Tokens) -> None:
    bos = llm.token_bos()
    if tokens[:2].tolist() == [bos, bos]:
        warnings.warn(
            f'The prompt begins with "{llm._model.token_get_text(bos)}" twice, which makes worse text: remove one.',
            RuntimeWarning,
            stacklevel=2,
        )


def _with_bias(processors: Any, logit_bias: dict[int, float] | None) -> Any:
    """The logits processors, and one more that adds the bias."""
    if not logit_bias:
        return processors
    ids = np.array([int(token) for token in logit_bias], dtype=np.intp)
    bias = np.array([float(value) for value in logit_bias.values()], dtype=np.float32)

    def add_bias(input_ids: Tokens, scores: Logits) -> Logits:
        biased: Logits = scores.copy()
        biased[ids] += bias
        return biased

    return llama_cpp.LogitsProcessorList([*(processors or []), add_bias])


def _load_from_cache(llm: Llama, cache: BaseLlamaCache, prompt: Tokens) -> None:
    """Takes up the state the cache has for this prompt (n_tokens,) if that saves more than the present one."""
    try:
        state = cache[prompt.tolist()]
        saved = Checkpoint.from_bytes(state.llama_state).reach(prompt)
        if saved > llm.stream.reach(prompt):
            llm.load_state(state)
            message = f"cache hit, {saved} tokens"
        else:
            message = "cache hit, not better than the present state"
    except KeyError:
        message = "cache miss"
    except CheckpointError as error:  # someone else's, as a disk cache may be shared
        message = f"cache miss ({error})"
    if llm.verbose:
        print(f"Llama._create_completion: {message}", file=sys.stderr)
