"""Text to tokens, paying only for text that was not seen before.

A chat client sends its whole history each turn, and it grows. Tokenizers cut text at control tokens such as <|im_end|>
before they do anything else, so what stands between two of them can be tokenized by itself, once. An answer is
remembered with the tokens the model wrote it in, which are not always those its text would be cut into.
"""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import llama_cpp
import numpy as np

from lminf_edge.engine.turn import TurnCancelled
from lminf_edge.history import Tokens, as_tokens

if TYPE_CHECKING:
    from lminf_edge.llama import Llama

_OVERHEAD = 300  # bytes of a remembered segment beside its text and tokens, about
_LONG = 1 << 18  # characters of a text that is tokenized alone


class SegmentTokenizer:
    """Tokens of pieces of text, control tokens included, without a beginning-of-text token. For several threads."""

    def __init__(self, llm: Llama, template: str | None, n_bytes_max: int) -> None:
        """Cuts at the control tokens that `template` uses; remembers segments of n_bytes_max bytes in all."""
        self._llm = llm
        self._n_bytes_max = n_bytes_max
        self.n_bytes = 0
        self._known: OrderedDict[str, Tokens] = OrderedDict()
        self._lock = threading.Lock()
        self._long = threading.Lock()
        self._cuts = control_texts(llm, template or "")

    def split(self, text: str) -> list[str]:
        """The text in pieces, each of which but the first begins with a control token."""
        starts = {0}
        for cut in self._cuts:
            at = text.find(cut)
            while at >= 0:
                starts.add(at)
                at = text.find(cut, at + len(cut))
        ordered = sorted(starts)
        return [text[a:b] for a, b in zip(ordered, [*ordered[1:], len(text)], strict=True) if a < b]

    def remember_answer(self, prompt: str, answer: str, answer_tokens: Tokens) -> None:
        """The model wrote `answer` in these tokens after `prompt`."""
        last = self.split(prompt)[-1] if prompt else ""
        if answer and last and len(self.split(last + answer)) == 1:
            self._remember(last + answer, np.concatenate([self.tokens_of(last), as_tokens(answer_tokens)]))

    def tokens_of(self, text: str, is_cancelled: Callable[[], bool] = lambda: False) -> Tokens:
        """The tokens of one piece of a text: int32 (n_tokens,). Raises TurnCancelled."""
        with self._lock:
            tokens = self._known.get(text)
            if tokens is not None:
                self._known.move_to_end(text)
                return tokens
        with self.turn_for(text):
            if is_cancelled():
                raise TurnCancelled
            tokens = as_tokens(self._llm.tokenize(text.encode("utf-8"), add_bos=False, special=True))
        self._remember(text, tokens)
        return tokens

    def turn_for(self, text: str) -> contextlib.AbstractContextManager[Any]:
        """To tokenize a text in: llama.cpp takes a hundred times its bytes for a while, so long ones come in turn."""
        return self._long if len(text) > _LONG else contextlib.nullcontext()

    def _remember(self, text: str, tokens: Tokens) -> None:
        with self._lock:
            before = self._known.pop(text, None)
            if before is not None:
                self.n_bytes -= _n_bytes(text, before)
            self._known[text] = tokens
            self.n_bytes += _n_bytes(text, tokens)
            while self.n_bytes > self._n_bytes_max and self._known:
                old, old_tokens = self._known.popitem(last=False)
                self.n_bytes -= _n_bytes(old, old_tokens)


def _n_bytes(text: str, tokens: Tokens) -> int:
    return len(text) + tokens.nbytes + _OVERHEAD


def control_texts(llm: Llama, template: str) -> list[str]:
    """The texts of the control tokens that a template uses, those aside that eat spaces before them."""
    vocab = llm._model.vocab
    texts: set[str] = set()
    if llama_cpp.llama_vocab_type(vocab) == llama_cpp.LLAMA_VOCAB_TYPE_NONE:
        return []
    for token in range(llm.n_vocab()):
        attributes = llama_cpp.llama_vocab_get_attr(vocab, token)
        if not attributes & llama_cpp.LLAMA_TOKEN_ATTR_CONTROL or attributes & llama_cpp.LLAMA_TOKEN_ATTR_LSTRIP:
            continue
        text = llama_cpp.llama_vocab_get_text(vocab, token).decode("utf-8", errors="replace")
        names = {llm.token_bos(): "bos_token", llm.token_eos(): "eos_token"}
        if text and (text in template or names.get(token, text) in template):
            texts.add(text)
    return sorted(texts)


def chat_template(llm: Llama) -> str:
    """The Jinja template of the model, "" if it has none; for some well-known ones llama_cpp has formats of its own."""
    default = llm.metadata.get("tokenizer.chat_template", "")
    return str(llm.metadata.get(f"tokenizer.{llm.chat_format}", default))  # chat_template.NAME, if it has several
