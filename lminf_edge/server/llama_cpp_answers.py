"""Completions in llama-server's format: whole answers, or parts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, cast

from lminf_edge.engine.request import Request
from lminf_edge.server.arguments import AskedLlamaCpp
from lminf_edge.server.events import begin_answer
from lminf_edge.server.responses import progress_of
from lminf_edge.text.chat import ChatPrompt
from lminf_edge.text.logprobs import TokenLogprobs
from lminf_edge.text.service import Answer, Exchange, Usage


def llama_cpp_answer(
    exchange: Exchange, asked: AskedLlamaCpp, prompts: Sequence[ChatPrompt], model: str
) -> dict[str, Any] | list[dict[str, Any]]:
    """Whole answers: one, or a list if there are several."""
    answers: list[dict[str, Any]] = []
    texts: list[str] = []
    tokens: list[int] = []
    probabilities: list[dict[str, Any]] = []
    for chunk in llama_cpp_chunks(exchange, asked, prompts, model):
        texts.append(chunk["content"])
        tokens += chunk["tokens"]
        probabilities += chunk.get("completion_probabilities", [])
        if chunk["stop"]:
            whole = {**chunk, "content": "".join(texts), "tokens": tokens if asked.return_tokens else []}
            if asked.n_top is not None:
                whole["completion_probabilities"] = probabilities
            answers.append(_only(asked.response_fields, whole))
            texts, tokens, probabilities = [], [], []
    return answers[0] if len(answers) == 1 else answers


def llama_cpp_chunks(
    exchange: Exchange, asked: AskedLlamaCpp, prompts: Sequence[ChatPrompt], model: str
) -> Iterator[dict[str, Any]]:
    """Parts of text, `asked.n` answers to each of the prompts one after the other; each ends with a part of its own."""
    llm = exchange.service.llm
    for i in range(len(prompts) * asked.n):
        prompt, number = prompts[i // asked.n], i % asked.n
        answer = begin_answer(exchange, asked, prompt, number)
        has_new_line = False
        for part in answer:
            if asked.only_reads:
                continue
            has_new_line = has_new_line or "\n" in part.text
            chunk = {**_head(answer, i, part.text), "tokens": part.tokens, "stop": False}
            if asked.timings:
                chunk["timings"] = answer.usage.timings()
            if part.logprobs:
                chunk["completion_probabilities"] = probabilities_of(part.logprobs, asked.after_sampling)
            yield chunk
        usage = answer.usage
        if asked.only_reads:
            usage.n_completion = 0
        yield {
            **_head(answer, i, ""),
            "tokens": [],
            "stop": True,
            "model": model,
            "tokens_predicted": usage.n_completion,
            "tokens_cached": usage.n_cached,
            "generation_settings": asked.settings,
            "prompt": llm.detokenize(cast(Any, prompt.tokens), special=True).decode("utf-8", errors="replace"),
            "has_new_line": has_new_line,
            "truncated": False,
            "stop_type": answer.text.stop_type,
            "stopping_word": answer.text.stop,
            "timings": usage.timings(),
            "lminf": exchange.stream_info(),
        }


def _head(answer: Answer, index: int, content: str) -> dict[str, Any]:
    usage = answer.usage
    return {
        "index": index,
        "content": content,
        "id_slot": answer.slot,
        "tokens_predicted": usage.n_completion,
        "tokens_evaluated": usage.n_prompt,
    }


def _only(paths: Sequence[str], answer: dict[str, Any]) -> dict[str, Any]:
    """What a client wants of an answer, by paths with slashes; all of it if it names none."""
    if not paths:
        return answer
    found = {}
    for path in paths:
        value: Any = answer
        for name in path.split("/"):
            value = value.get(name, _MISSING) if isinstance(value, dict) else _MISSING
        if value is not _MISSING:
            found[path] = value
    return found


_MISSING = object()


def probabilities_of(entries: Sequence[TokenLogprobs], after_sampling: bool) -> list[dict[str, Any]]:
    """Of each token, and of the likeliest in its place: log probabilities, or probabilities after sampling."""

    def told(token: int, piece: bytes, logprob: float | None) -> dict[str, Any]:
        text = piece.decode("utf-8", errors="ignore")
        value = {"prob": _probability(logprob)} if after_sampling else {"logprob": logprob}
        return {"id": token, "token": text, "bytes": list(piece), **value}

    likeliest = "top_probs" if after_sampling else "top_logprobs"
    return [
        {
            **told(entry.id, entry.piece, entry.logprob),
            likeliest: [told(each.id, each.piece, each.logprob) for each in entry.likeliest],
        }
        for entry in entries
    ]


def _probability(logprob: float | None) -> float:
    return 1.0 if logprob is None else min(math.exp(logprob), 1.0)


def llama_cpp_progress(request: Request, seconds: float, has_timings: bool) -> dict[str, Any]:
    """A part of a stream that reports prefill progress."""
    stats = request.stats
    chunk = {
        "index": 0,
        "content": "",
        "tokens": [],
        "stop": False,
        "id_slot": stats.slot,
        "tokens_predicted": 0,
        "tokens_evaluated": len(request.prompt),
        "prompt_progress": progress_of(request, seconds),
    }
    if has_timings:
        n_known = stats.n_cached + stats.n_skipped
        usage = Usage(n_prompt=n_known + stats.n_prefilled, n_cached=stats.n_cached, n_skipped=stats.n_skipped)
        usage.first_token = usage.started + (seconds if stats.n_prefilled else 0.0)
        chunk["timings"] = {**usage.timings(), "predicted_ms": 0.0}
    return chunk
