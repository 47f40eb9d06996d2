"""One request to the engine, in the shape of a llama_cpp.Llama: what llama_cpp's chat formats and tools speak to."""

from __future__ import annotations

import array
import contextlib
import random
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import replace
from typing import Any

import llama_cpp
import numpy as np
from llama_cpp import llama_chat_format

from lminf_edge.completion import complete
from lminf_edge.engine.engine import Engine
from lminf_edge.engine.params import SamplingParams
from lminf_edge.engine.sampler import make_sampler
from lminf_edge.engine.sampling import strict_strings
from lminf_edge.engine.token_log import TokenLog
from lminf_edge.engine.turn import Progress, Turn
from lminf_edge.history import N_RECENT, Tokens, as_tokens
from lminf_edge.sequence import Logits

# beginnings of messages nearer to the next than this are not worth a snapshot of their own, in tokens
_MIN_MESSAGE = 8

_NO_LOGITS: Logits = np.empty(0, dtype=np.float32)


class Voice:
    """Everything a Llama has, with the stream of one request; used by one thread, cancelled by any."""

    def __init__(
        self,
        engine: Engine,
        pin_system: bool | None = None,
        on_progress: Callable[[Progress], None] | None = None,
        sampling: SamplingParams | None = None,
    ) -> None:
        """
        pin_system  whether the system block becomes the conversation's sinks; None: as the engine has it
        sampling    what the arguments of a completion leave out; None: as the engine has it
        """
        self.engine = engine
        self.turn: Turn | None = None  # the last one
        self.n_completion = 0  # tokens sampled, in all turns
        self.warning: str | None = None
        self.cancelled = False
        self._llm = engine.llm
        self._seed = random.getrandbits(32)  # of what is drawn where the request gives none
        self._pin_system = engine.pin_system if pin_system is None else pin_system
        self._on_progress = on_progress
        self.sampling = engine.defaults.sampling if sampling is None else sampling
        self.detect_loops = engine.defaults.detect_loops
        self._messages: Sequence[dict[str, Any]] = ()
        self._is_chat = False
        self._max_tokens: int | None = None  # of a chat
        self._text = ""  # of the last prompt
        self._boundaries: list[int] = []
        self._n_sinks: int | None = None
        self._wants_logits = False
        self._seen = TokenLog()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._llm, name)

    # --- what the formats call ----------------------------------------------------------------------------------------

    def create_chat_completion(self, messages: Sequence[dict[str, Any]], **kwargs: Any) -> Any:
        """As llama_cpp.Llama.create_chat_completion."""
        kwargs = self._completed(kwargs)
        self._messages, self._is_chat, self._max_tokens = messages, True, kwargs.get("max_tokens")
        llm = self._llm
        name = str(llm.chat_format)
        handler: Any = llm.chat_handler or llm._chat_handlers.get(name)
        if handler is None:
            handler = llama_chat_format.get_chat_completion_handler(name)
        return handler(llama=self, messages=messages, **kwargs)

    def create_completion(self, *args: Any, **kwargs: Any) -> Any:
        """As llama_cpp.Llama.create_completion."""
        self._wants_logits = kwargs.get("logprobs") is not None
        if self._is_chat:
            # some formats forget the limit, and make grammars of tools' parameters themselves
            if kwargs.get("max_tokens") is None:
                kwargs["max_tokens"] = self._max_tokens
            if kwargs.get("grammar") is not None:
                kwargs["grammar"] = strict_strings(kwargs["grammar"])
        kwargs = self._completed(kwargs)
        chunks = complete(self, *args, **kwargs)  # type: ignore[arg-type]
        return chunks if kwargs.get("stream") else next(chunks)

    __call__ = create_completion

    def _completed(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """A completion's arguments with the defaults for those left out."""
        limit = kwargs.get("max_tokens")
        if limit is None or limit < 0:
            limit = self.engine.defaults.max_tokens
        return {**self.sampling.completion_arguments(), **kwargs, "max_tokens": limit}

    def tokenize(self, text: bytes, add_bos: bool = True, special: bool = False) -> Sequence[int]:
        """As llama_cpp.Llama.tokenize; whole prompts at the price of what is new in them."""
        if not special:
            tokens: list[int] = self._llm.tokenize(text, add_bos=add_bos, special=False)
            return tokens
        segments = self.engine.segments
        self._text = text.decode("utf-8", errors="replace")
        pieces = [segments.tokens_of(piece) for piece in segments.split(self._text)]
        start: list[int] = self._llm.tokenize(b"", add_bos=True, special=True) if add_bos else []
        ends = (np.cumsum([len(piece) for piece in pieces]) + len(start)).tolist()
        self._boundaries = _spaced([len(start), *ends[:-1]])
        self._choose_sinks([len(start), *ends])
        # not a list: to make one, and an array of it again, takes longer than all else here
        return array.array("i", np.concatenate([as_tokens(start), *pieces]).tobytes())

    def set_seed(self, seed: int) -> None:
        self._seed = seed

    @property
    def cache(self) -> None:
        """The engine keeps what can be kept."""
        return None

    @property
    def verbose(self) -> bool:
        return False

    @property
    def _input_ids(self) -> Tokens:
        return self._seen.view()

    # --- the turn -----------------------------------------------------------------------------------------------------

    def generate(
        self, tokens: Sequence[int] | Tokens, reset: bool = True, stopping_criteria: Any = None, **sampling: Any
    ) -> Generator[int, None, None]:
        """Tokens that follow `tokens`, without an end of its own; arguments as for llama_cpp.Llama.generate."""
        prompt = as_tokens(tokens)
        self._seen = TokenLog(prompt[-N_RECENT:])
        params = replace(self.sampling.updated(sampling), seed=self._seed)
        turn = self._begin(prompt, make_sampler(params, self._model, self.n_ctx(), self._seen.view))
        answer: list[int] = []
        try:
            with contextlib.closing(turn.tokens()) as given:
                for token in given:
                    if stopping_criteria is not None and stopping_criteria(self._seen.view(), _NO_LOGITS):
                        return
                    self.n_completion += 1
                    answer.append(token)
                    yield token
                    self._seen.extend([token])
        finally:
            self._remember(prompt, answer)

    def prompt_logits(self, tokens: Tokens) -> Iterator[tuple[Tokens, Logits]]:
        """Processes tokens (n_tokens,) from an empty stream; yields parts, and their logits (n_part, n_vocab)."""
        sampler = make_sampler(SamplingParams(temperature=0.0), self._model, self.n_ctx())
        turn = self._begin(tokens, sampler, wants_prompt_logits=True)
        with contextlib.closing(turn.prompt_parts()) as parts:
            yield from parts

    def logits_of_sample(self) -> Logits:
        """Logits (n_vocab,) that the last token was sampled from."""
        assert self.turn is not None
        assert self.turn.logits is not None
        return self.turn.logits

    def cancel(self) -> None:
        """Stops the work, from any thread."""
        self.cancelled = True
        if self.turn is not None:
            self.turn.cancel()

    def _begin(self, prompt: Tokens, sampler: Any, wants_prompt_logits: bool = False) -> Turn:
        self.turn = self.engine.begin(
            prompt,
            sampler,
            boundaries=self._boundaries,
            n_sinks=self._n_sinks,
            wants_logits=self._wants_logits,
            wants_prompt_logits=wants_prompt_logits,
            on_progress=self._on_progress,
        )
        if self.cancelled:
            self.turn.cancel()
        return self.turn

    def _remember(self, prompt: Tokens, answer: list[int]) -> None:
        if answer and llama_cpp.llama_vocab_is_eog(self._llm._model.vocab, answer[-1]):
            answer.pop()
        if not self._text or not answer:
            return
        text: bytes = self._llm.detokenize(answer, prev_tokens=prompt[-16:].tolist())
        with contextlib.suppress(UnicodeDecodeError):
            self.engine.segments.remember_answer(self._text, text.decode("utf-8"), as_tokens(answer))

    # --- sinks --------------------------------------------------------------------------------------------------------

    def _choose_sinks(self, starts: list[int]) -> None:
        """The system block as sinks, if it is to be pinned; the text's pieces begin at the tokens `starts`."""
        self._n_sinks = self.engine.n_sinks
        if not self._pin_system:
            return
        at = _end_of_system(self._messages, self._text)
        if at is None:
            return
        offset, n_system = 0, 0
        for i, (piece, start) in enumerate(zip(self.engine.segments.split(self._text), starts, strict=False)):
            if offset + len(piece) > at:
                # what comes before the first message ends with the piece before, if there is one
                n_system = start if i else start + len(self._llm.tokenize(piece[:at].encode("utf-8"), False, True))
                break
            offset += len(piece)
        limit = self.engine.max_sinks
        if n_system > limit:
            self.warning = (
                f"The system block has {n_system} tokens, of which the first {limit} are kept as sinks: "
                "give a larger --max-sinks to keep all of it."
            )
        self._n_sinks = max(self.engine.n_sinks, min(n_system, limit))


def _spaced(starts: list[int]) -> list[int]:
    """Those after which there is something before the next: of several close together, the last."""
    return [start for start, after in zip(starts, [*starts[1:], 1 << 62], strict=True) if after - start >= _MIN_MESSAGE]


def _end_of_system(messages: Sequence[dict[str, Any]], text: str) -> int | None:
    """Where in the text the first message's content begins that is no system message; None if none comes before it."""
    offset, found = 0, False
    for message in messages:
        content = message.get("content")
        if not isinstance(content, str) or not content.strip():
            return None
        offset = text.find(content.strip(), offset)
        if offset < 0:
            return None
        if message.get("role") not in ("system", "developer"):
            return offset if found else None
        offset += len(content.strip())
        found = True
    return None
