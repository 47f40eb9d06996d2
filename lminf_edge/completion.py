"""Text completion over an unbounded stream: llama_cpp.Llama.create_completion at a constant cost per token.

The formats, the finish reasons and, for text that fits the window, the text itself are llama_cpp's. Three things are
not: max_tokens is never exceeded (llama_cpp exceeds it to complete a character), the earliest of several stop strings
ends the text (not the first in the list), and logprobs do not need logits_all.
"""

from __future__ import annotations

import random
import sys
import time
import uuid
import warnings
from collections.abc import Callable, Container, Generator, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from lminf_edge.cache.checkpoint import Checkpoint, CheckpointError
from lminf_edge.cache.token_log import TokenLog, Tokens, as_tokens
from lminf_edge.engine.request import PromptPart, Request, RequestCancelled
from lminf_edge.text.detokenizer import Detokenizer
from lminf_edge.text.generation import TextStream
from lminf_edge.text.logprobs import LogprobReporter, TokenLogprobs, as_lists
from lminf_edge.text.tokenizer import prompt_to_tokens

if TYPE_CHECKING:
    from llama_cpp.llama_cache import BaseLlamaCache

    from lminf_edge.cache.sequence import Logits


def complete(
    llm: Any,
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
    stopping_criteria: Any = None,
    preserved: Container[int] = frozenset(),
    **sampling: Any,
) -> Generator[Any, None, None]:
    """Yields the chunks of a streamed completion by a Llama, or the one response of another; see create_completion.

    preserved: special tokens whose text is part of the completion's.

    max_tokens None, 0 or less: until a stop string, a stopping criterion or the end-of-text token or, with
    llm.detect_loops, until the model loops; the finish reason is then "length", too.
    """
    tokens = prompt_to_tokens(llm, prompt, suffix)
    _warn_of_two_bos(llm, tokens)
    head = {"id": f"cmpl-{uuid.uuid4()}", "object": "text_completion", "created": int(time.time())}
    head["model"] = llm.model_path if model is None else model
    if llm.verbose:
        llm._ctx.reset_timings()
    if llm.cache:
        _load_from_cache(llm, llm.cache, tokens)
    # as in llama_cpp: without its own seed, each call depends on the one given to Llama
    llm.set_seed(random.Random(llm._seed).randint(0, 2**32) if seed is None else seed)

    # the text of an empty prompt begins with its BOS, which takes a leading space with it and counts as completion
    opening = [llm.token_bos()] if len(prompt) == 0 else []
    echo = echo and not stream  # llama_cpp's chunks never echo
    reporter = None if logprobs is None else LogprobReporter(llm, logprobs, 0 if echo else len(prompt))
    echoed = prompt_logprobs(llm, llm.prompt_logits(tokens), reporter) if echo and reporter else []
    limit = max_tokens if max_tokens is not None and max_tokens > 0 else None
    request = Request(
        tokens,
        llm._sampling({"temperature": temperature, **sampling}),
        ignore_eog=True,  # TextStream decides whether it ends the text
        wants_logits=reporter is not None or stopping_criteria is not None,
        draft_model=llm.draft_model,
    )
    text = TextStream(
        llm,
        llm.outputs(request, stopping_criteria),
        tokens,
        [stop] if isinstance(stop, str) else stop or [],
        max_tokens=limit,
        opening=opening,
        preserved=preserved,
        logprobs=reporter,
        detect_loops=llm.detect_loops and limit is None,
    )

    def chunk(text: str, reported: list[TokenLogprobs], finish_reason: str | None = None) -> dict[str, Any]:
        lists = as_lists(reported) if reported else None
        return {**head, "choices": [{"text": text, "index": 0, "logprobs": lists, "finish_reason": finish_reason}]}

    parts = []
    for part in text:
        if stream:
            yield chunk(part.text, part.logprobs)
        else:
            parts.append(part.text)
    if llm.verbose:
        llm._ctx.print_timings()
    if llm.cache and llm._guard.owns:
        # the key is what the state holds; the last token was sampled but not processed
        llm.cache[[*tokens.tolist(), *text.tokens][: llm.n_tokens]] = llm.save_state()
    if stream:
        yield chunk("", [], text.finish_reason)
        return
    response = chunk((as_text(llm, prompt) if echo else "") + "".join(parts), [], text.finish_reason)
    if logprobs is not None:
        response["choices"][0]["logprobs"] = as_lists([*echoed, *text.entries])
    usage = {"prompt_tokens": len(tokens), "completion_tokens": text.n_tokens}
    yield {**response, "usage": {**usage, "total_tokens": len(tokens) + text.n_tokens}}


def prompt_logprobs(
    llm: Any, parts: Iterator[PromptPart], reporter: LogprobReporter, is_cancelled: Callable[[], bool] = lambda: False
) -> list[TokenLogprobs]:
    """Reports on the tokens of a prompt, as `echo` with `logprobs` asks.

    A leading beginning-of-text token is left out; the first token reported has no probability. Raises RequestCancelled.
    """
    detokenizer = Detokenizer(llm, [], [])
    entries: list[TokenLogprobs] = []
    before: Logits | None = None  # logits of the token before this one
    for part in parts:
        for i, token in enumerate(part.tokens.tolist()):
            if is_cancelled():
                raise RequestCancelled
            entry = reporter.entry(token, detokenizer.piece(token), before if entries else None)
            entries += [entry] if entry else []
            before = part.logits[i]
    return entries


def as_text(llm: Any, prompt: str | Sequence[int] | Tokens) -> str:
    if isinstance(prompt, str):
        return prompt
    text: bytes = llm.detokenize(as_tokens(prompt).tolist())
    return text.decode("utf-8", errors="ignore")


def _warn_of_two_bos(llm: Any, tokens: Tokens) -> None:
    bos = llm.token_bos()
    if tokens[:2].tolist() == [bos, bos]:
        warnings.warn(
            f'The prompt begins with "{llm._model.token_get_text(bos)}" twice, which makes worse text: remove one.',
            RuntimeWarning,
            stacklevel=2,
        )


def _load_from_cache(llm: Any, cache: BaseLlamaCache, prompt: Tokens) -> None:
    """Loads the cache's state for this prompt (n_tokens,) if it saves more than the present one."""
    try:
        state = cache[prompt.tolist()]
        saved = Checkpoint.from_bytes(state.llama_state).reach(TokenLog(prompt))
        if saved > llm.reach(prompt):
            llm.load_state(state)
            message = f"cache hit, {saved} tokens"
        else:
            message = "cache hit, not better than the present state"
    except KeyError:
        message = "cache miss"
    except CheckpointError as error:  # of another model: a disk cache may be shared
        message = f"cache miss ({error})"
    if llm.verbose:
        print(f"Llama._create_completion: {message}", file=sys.stderr)
