"""Text to tokens, at the cost of the new text only.

A chat client sends its whole history each turn, and it grows. Tokenizers cut text at control tokens such as <|im_end|>
before they do anything else, so what stands between two of them can be tokenized by itself, once. An answer is
remembered with the tokens the model wrote it in, which are not always those its text would be cut into.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import re
import string
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import llama_cpp
import numpy as np
from llama_cpp import llama_cpp as bindings
from llama_cpp.llama_tokenizer import LlamaTokenizer

from lminf_edge import native
from lminf_edge.cache.token_log import Tokens, as_tokens
from lminf_edge.engine.request import RequestCancelled
from lminf_edge.errors import UserError

_PART = 1 << 17  # characters of a long text that are tokenized at a time, where it can be cut
N_AT_ONCE = 2048  # tokens that become text or JSON at once: other threads wait for 0.1 ms
LONG_TEXT = 1 << 18  # characters of a text that is tokenized alone
_OVERHEAD = 300  # bytes of a remembered piece besides its text and tokens, about


def check_ids(tokens: Tokens, n_vocab: int) -> Tokens:
    """The same tokens (n_tokens,). Raises UserError if one is not in the vocabulary."""
    wrong = tokens[(tokens < 0) | (tokens >= n_vocab)]
    if len(wrong):
        raise UserError(f"Token {wrong[0]} is not in the vocabulary: this model's tokens are 0 to {n_vocab - 1}.")
    return tokens


class Tokenizer(LlamaTokenizer):
    """llama_cpp's, for pieces of any length, with token ids checked."""

    def tokenize(self, text: bytes, add_bos: bool = True, special: bool = True) -> list[int]:
        tokens: list[int] = self.token_array(text, add_bos, special).tolist()
        return tokens

    def token_array(
        self,
        text: bytes,
        add_bos: bool = True,
        special: bool = True,
        is_cancelled: Callable[[], bool] = lambda: False,
    ) -> Tokens:
        """The tokens of a text: int32 (n_tokens,), in one pass.

        llama_cpp's way takes a second for what is longer than the training length. Raises RequestCancelled.
        """
        # no token has less than a byte, those aside that are added
        tokens: Tokens = np.empty(len(text) + 16, dtype=np.int32)
        n_tokens = native.load().tokenize(self._model.vocab, text, tokens, add_bos, special, is_cancelled)
        if n_tokens >= 0:
            return np.array(tokens[:n_tokens])
        if is_cancelled():
            raise RequestCancelled
        return as_tokens(super().tokenize(text, add_bos, special))

    def detokenize(
        self, tokens: Sequence[int] | Tokens, prev_tokens: Sequence[int] | Tokens | None = None, special: bool = False
    ) -> bytes:
        """The text of tokens (n_tokens,). Raises UserError if one is not in the vocabulary."""
        model = self._model
        ids = check_ids(as_tokens(tokens), model.n_vocab())
        pieces, texts = dict[int, bytes](), list[bytes]()
        for begin in range(0, len(ids), N_AT_ONCE):
            part = ids[begin : begin + N_AT_ONCE].tolist()
            pieces |= {token: _piece(model.vocab, token, special) for token in set(part) - pieces.keys()}
            texts.append(b"".join(map(pieces.__getitem__, part)))
        text = b"".join(texts)
        # as in llama_cpp: at the beginning of a text the leading space is dropped
        return text[1:] if len(ids) and ids[0] == model.token_bos() and text[:1] == b" " else text


def use_tokenizer(llm: llama_cpp.Llama) -> None:
    """Gives a model this tokenizer in place of llama_cpp's, which drops tokens of more than 32 bytes from a text."""
    if type(llm.tokenizer_) is LlamaTokenizer:
        llm.tokenizer_ = Tokenizer(llm)


def _piece(vocab: Any, token: int, special: bool) -> bytes:
    n_bytes = 32
    while True:
        buffer = ctypes.create_string_buffer(n_bytes)
        n_written = bindings.llama_token_to_piece(vocab, token, buffer, n_bytes, 0, special)
        if n_written >= 0:
            return buffer.raw[:n_written]
        n_bytes = -n_written


@contextlib.contextmanager
def in_turn(lock: threading.Lock, is_cancelled: Callable[[], bool]) -> Iterator[None]:
    """Holds the lock, once it is free. Raises RequestCancelled."""
    while not lock.acquire(timeout=0.1):
        if is_cancelled():
            raise RequestCancelled
    try:
        yield
    finally:
        lock.release()


class CachedTokenizer:
    """Tokens of pieces of text, control tokens included, without a beginning-of-text token. For several threads.

    What is remembered of one owner's texts serves no other: the tokens of an answer would tell what it was.
    """

    def __init__(self, llm: llama_cpp.Llama, template: str | None, n_bytes_max: int) -> None:
        """Cuts at the control tokens that `template` uses; remembers pieces up to n_bytes_max bytes in all."""
        self._llm = llm
        self._tokenizer = Tokenizer(llm)
        self._n_bytes_max = n_bytes_max
        self.n_bytes = 0
        self._known: OrderedDict[tuple[str, str], Tokens] = OrderedDict()  # of an owner and a text
        self._lock = threading.Lock()
        self._long = threading.Lock()
        cuts = control_texts(llm, template or "")
        self._cuts = sorted(cuts)
        self._cut_tokens = list(cuts.values())
        self._seam = find_seam(llm)

    def split(self, text: str) -> list[str]:
        """The text in pieces; each but the first begins with a control token."""
        starts = {0}
        for cut in self._cuts:
            at = text.find(cut)
            while at >= 0:
                starts.add(at)
                at = text.find(cut, at + len(cut))
        ordered = sorted(starts)
        return [text[a:b] for a, b in zip(ordered, [*ordered[1:], len(text)], strict=True) if a < b]

    def begins_with_control(self, piece: str) -> bool:
        """Whether a piece begins with one of the control tokens that texts are cut at."""
        return piece.startswith(tuple(self._cuts))

    def encode(
        self, text: str, add_bos: bool, owner: str = "", is_cancelled: Callable[[], bool] = lambda: False
    ) -> tuple[Tokens, list[str], list[int]]:
        """The tokens of a text (n_tokens,), its pieces, and where they begin in the tokens, with the end of the last.

        Raises RequestCancelled once it is cancelled.
        """
        start: list[int] = self._llm.tokenize(b"", add_bos=True, special=True) if add_bos else []
        pieces = self.split(text)
        found = self._tokens_of_all(list(dict.fromkeys(pieces)), owner, is_cancelled)
        room = self._n_bytes_max
        for piece, tokens in found.items():
            if (size := _n_bytes(piece, tokens)) <= room:
                self._remember(owner, piece, tokens)
            room -= size
        # of what is too much for the memory the beginning is kept, not forgotten piece by piece as it is needed
        with self._lock:
            for key in ((owner, piece) for piece in reversed(found)):
                if key in self._known:
                    self._known.move_to_end(key)
        parts = [found[piece] for piece in pieces]
        starts = list(itertools.accumulate(map(len, parts), initial=len(start)))
        return np.concatenate([as_tokens(start), *parts]), pieces, starts

    def remember_answer(self, prompt: str, answer: str, answer_tokens: Tokens, owner: str = "") -> None:
        """The model generated `answer` in these tokens after `prompt`."""
        last = prompt[max([0, *map(prompt.rfind, self._cuts)]) :]
        if not answer or not last:
            return
        pieces, parts = self.split(last + answer), self._cut(as_tokens(answer_tokens))
        if len(pieces) == len(parts):  # else the model wrote the text of a control token in other ones
            parts[0] = np.concatenate([self.tokens_of(last, owner), parts[0]])
            for piece, part in zip(pieces, parts, strict=True):
                self._remember(owner, piece, part)

    def tokens_of(self, text: str, owner: str = "") -> Tokens:
        """The tokens of one piece of a text: int32 (n_tokens,); remembered."""
        tokens = self._tokens_of_all([text], owner, lambda: False)[text]
        self._remember(owner, text, tokens)
        return tokens

    def _tokens_of_all(self, pieces: Sequence[str], owner: str, is_cancelled: Callable[[], bool]) -> dict[str, Tokens]:
        """The tokens of each piece, those known and those not. Raises RequestCancelled."""
        with self._lock:
            found = {piece: self._known.get((owner, piece)) for piece in pieces}
        new: dict[str, Tokens] = {}
        batch: list[str] = []
        n_chars = 0
        for piece in [piece for piece, tokens in found.items() if tokens is None]:
            if n_chars + len(piece) > LONG_TEXT:
                new |= self._tokenize_batch(batch, is_cancelled)
                batch, n_chars = [], 0
            batch.append(piece)
            n_chars += len(piece)
        new |= self._tokenize_batch(batch, is_cancelled)
        return {piece: new[piece] if tokens is None else tokens for piece, tokens in found.items()}

    def _tokenize_batch(self, pieces: Sequence[str], is_cancelled: Callable[[], bool]) -> dict[str, Tokens]:
        """The same as one by one, as a control token stands between two; words they share are cut into tokens once."""
        if not pieces:
            return {}
        parts = self._cut(self.tokenize("".join(pieces), is_cancelled=is_cancelled))
        parts = parts if len(parts[0]) else parts[1:]
        if len(parts) != len(pieces):  # a control token that the tokenizer reads as something else
            parts = [self.tokenize(piece, is_cancelled=is_cancelled) for piece in pieces]
        return dict(zip(pieces, parts, strict=True))

    def _cut(self, tokens: Tokens) -> list[Tokens]:
        """Tokens up to the first control token that texts are cut at, then from each to the next."""
        parts = np.split(tokens, np.flatnonzero(np.isin(tokens, self._cut_tokens)))
        return [part.copy() for part in parts]  # else one of them would keep all of them

    def tokenize(
        self,
        text: str,
        add_bos: bool = False,
        special: bool = True,
        is_cancelled: Callable[[], bool] = lambda: False,
    ) -> Tokens:
        """What llama_cpp's tokenizer makes of a text: int32 (n_tokens,), a long one in parts where that is the same.

        Raises RequestCancelled, with BPE vocabularies once a part has been cut into words.
        """
        made = []
        for i, part in enumerate(self._parts(text)):
            # long ones take turns: llama.cpp takes 30 times their bytes while it tokenizes
            with in_turn(self._long, is_cancelled) if len(part) > LONG_TEXT else contextlib.nullcontext():
                if is_cancelled():
                    raise RequestCancelled
                data = part.encode("utf-8")
                made.append(self._tokenizer.token_array(data, add_bos and i == 0, special, is_cancelled))
        return np.concatenate(made)

    def _parts(self, text: str) -> Iterator[str]:
        """The text, cut at seams about _PART characters apart; the spaces that its tokenizer adds are left out."""
        start = 0
        while self._seam is not None and len(text) - start > 2 * _PART:
            seam = self._seam.letter.search(text, start + _PART)
            if seam is None:
                break
            yield text[start : seam.end()]
            start = seam.end() + self._seam.adds_space
        yield text[start:]

    def _remember(self, owner: str, text: str, tokens: Tokens) -> None:
        with self._lock:
            before = self._known.pop((owner, text), None)
            if before is not None:
                self.n_bytes -= _n_bytes(text, before)
            self._known[owner, text] = tokens
            self.n_bytes += _n_bytes(text, tokens)
            while self.n_bytes > self._n_bytes_max and self._known:
                (_, old), old_tokens = self._known.popitem(last=False)
                self.n_bytes -= _n_bytes(old, old_tokens)


@dataclass(frozen=True)
class Seam:
    """Where a text can be cut and its parts tokenized alone: behind this letter, before a space and another letter.

    adds_space  the tokenizer puts a space before each text, so the one at the seam is left out
    """

    letter: re.Pattern[str]
    adds_space: bool


def find_seam(llm: llama_cpp.Llama) -> Seam | None:
    """Of SentencePiece vocabularies; None for others, or if there is none.

    All that such a tokenizer joins is in its vocabulary. So nothing is joined across a letter and a space that no token
    has side by side. Special tokens are looked for first: none may end in that letter.
    """
    vocab = llm._model.vocab
    if llama_cpp.llama_vocab_type(vocab) != llama_cpp.LLAMA_VOCAB_TYPE_SPM or llm._model.add_eos_token():
        return None
    letters = set(string.ascii_lowercase)
    special = (
        llama_cpp.LLAMA_TOKEN_ATTR_CONTROL
        | llama_cpp.LLAMA_TOKEN_ATTR_USER_DEFINED
        | llama_cpp.LLAMA_TOKEN_ATTR_UNKNOWN
    )
    for token in range(llm.n_vocab()):
        text = llama_cpp.llama_vocab_get_text(vocab, token).decode("utf-8", errors="replace")
        letters -= {a for a, b in itertools.pairwise(text) if b in "\u2581 "}
        if llama_cpp.llama_vocab_get_attr(vocab, token) & special:
            letters.discard(text[-1:])
    adds_space = llm.metadata.get("tokenizer.ggml.add_space_prefix", "true") == "true"
    return Seam(re.compile(f"[{''.join(sorted(letters))}](?= [A-Za-z])"), adds_space) if letters else None


def _n_bytes(text: str, tokens: Tokens) -> int:
    return len(text) + tokens.nbytes + _OVERHEAD


def control_texts(llm: llama_cpp.Llama, template: str) -> dict[str, int]:
    """The texts of the control tokens that a template uses, except those that strip spaces before them, and which they
    are."""
    vocab = llm._model.vocab
    texts: dict[str, int] = {}
    if llama_cpp.llama_vocab_type(vocab) == llama_cpp.LLAMA_VOCAB_TYPE_NONE:
        return {}
    for token in range(llm.n_vocab()):
        attributes = llama_cpp.llama_vocab_get_attr(vocab, token)
        if not attributes & llama_cpp.LLAMA_TOKEN_ATTR_CONTROL or attributes & llama_cpp.LLAMA_TOKEN_ATTR_LSTRIP:
            continue
        text = llama_cpp.llama_vocab_get_text(vocab, token).decode("utf-8", errors="replace")
        names = {llm.token_bos(): "bos_token", llm.token_eos(): "eos_token"}
        if text and (text in template or names.get(token, text) in template):
            texts.setdefault(text, token)
    return texts


# --- prompts of completions -------------------------------------------------------------------------------------------


def prompt_to_tokens(
    llm: llama_cpp.Llama,
    prompt: str | Sequence[int] | Tokens,
    suffix: str | None,
    tokenizer: CachedTokenizer | None = None,
    owner: str = "",
    is_cancelled: Callable[[], bool] = lambda: False,
) -> Tokens:
    """The tokens (n_tokens,) of a prompt or, with a suffix, of the text around a gap; tokens stay as they are.

    `tokenizer` remembers the text's pieces for this owner. Raises RequestCancelled.
    """
    if not isinstance(prompt, str) and suffix is None:
        return as_tokens(prompt)

    def tokenized(text: str, special: bool) -> Sequence[int] | Tokens:
        if tokenizer is None:
            return llm.tokenize(text.encode("utf-8"), add_bos=False, special=special)
        return tokenizer.tokenize(text, False, special, is_cancelled)

    model = llm._model
    bos = model.token_cls() if model.token_cls() != -1 else llm.token_bos()
    sep = model.token_sep()
    begin = [bos] if model.add_bos_token() and bos != -1 else []
    end = [sep if sep != -1 else llm.token_eos()] if model.add_eos_token() or sep != -1 else []
    text: Sequence[int] | Tokens = prompt if not isinstance(prompt, str) else []
    if isinstance(prompt, str) and prompt:
        if tokenizer is not None and suffix is None:
            text = tokenizer.encode(prompt, False, owner, is_cancelled)[0]
        else:
            text = tokenized(prompt, suffix is None)
    if suffix is None:
        return _joined(begin, text, end)

    # a model without fill-in-the-middle tokens gets token 0 for them, as llama_cpp does for every model
    before, after, middle = (
        max(token, 0) for token in (model.token_prefix(), model.token_suffix(), model.token_middle())
    )
    rest: Sequence[int] | Tokens = []
    if suffix:
        # a tokenizer that prefixes a space prefixes it to the smiley here, and both are cut off again
        spaced = llm.metadata.get("tokenizer.ggml.add_space_prefix", "true") == "true"
        rest = tokenized("☺" + suffix if spaced else suffix, False)
        rest = rest[2:] if spaced else rest
    halves = [_joined([before], text), _joined([after], rest)]
    if llm.spm_infill:
        halves.reverse()
    return _joined(begin, *halves, [middle], end)


def _joined(*parts: Sequence[int] | Tokens) -> Tokens:
    return np.concatenate([as_tokens(part) for part in parts])
