"""Prompts that ask for what stands between two texts, in the way that llama-server makes them."""

from __future__ import annotations

from llama_cpp import llama_cpp as bindings

from lminf_edge.server.errors import ApiError
from lminf_edge.server.requests import InfillRequest
from lminf_edge.text.service import Exchange

MAX_ROOM = 2048
_SNIPPET = "\n\n--- snippet ---\n\n"  # begins a file where the model has no token for that


def infill_tokens(exchange: Exchange, request: InfillRequest) -> list[int]:
    """Other files, the text before the gap, the text after it, and how the gap begins, in the model's own tokens.

    Before and after share half of the window, 2048 tokens at most, three parts to one; the files have the other half.
    Raises ApiError for a model that has no such tokens, and RequestCancelled.
    """
    service = exchange.service
    vocab = service.llm._model.vocab
    before, after, middle = (
        token(vocab)
        for token in (bindings.llama_vocab_fim_pre, bindings.llama_vocab_fim_suf, bindings.llama_vocab_fim_mid)
    )
    if min(before, after, middle) < 0:
        raise ApiError(501, "This model has no tokens for infill.", "infill_not_supported")
    repository, file = bindings.llama_vocab_fim_rep(vocab), bindings.llama_vocab_fim_sep(vocab)

    def tokens(text: str, special: bool = False) -> list[int]:
        return list(service.tokenizer.tokenize(text, False, special, exchange.is_cancelled).tolist())

    def heading(name: str) -> list[int]:
        return tokens(_SNIPPET) if file < 0 else [file, *tokens(f"{name}\n")]

    n_window = service.engine.window.size
    room = min(n_window // 2, MAX_ROOM)
    begun = tokens(request.prompt, special=True)
    prefix = tokens(request.input_prefix)[-(3 * room // 4) :]
    suffix = tokens(request.input_suffix)[: max(0, room // 4 - 2 - len(begun))]

    extra = [] if repository < 0 else [repository, *tokens("myproject\n")]
    for chunk in request.input_extra or []:
        extra += heading(chunk.filename) + tokens(chunk.text)
    if file >= 0:
        extra += heading("filename")
    n_extra = max(0, n_window - room - 2 * max(request.n_predict or 0, 0))
    bos = [service.llm.token_bos()] if bindings.llama_vocab_get_add_bos(vocab) else []
    return [*extra[len(extra) - min(n_extra, len(extra)) :], *bos, before, *prefix, *begun, after, *suffix, middle]
