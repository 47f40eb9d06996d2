"""The text of a request, from its generated tokens."""

from __future__ import annotations

import contextlib
import logging
from array import array
from collections.abc import Container, Generator, Iterator, Sequence
from typing import Any, Literal

import llama_cpp
from llama_cpp import llama_cpp as bindings

from lminf_edge.cache.token_log import Tokens
from lminf_edge.engine.request import Output
from lminf_edge.loops import LoopDetector
from lminf_edge.text.detokenizer import Detokenizer, Part, StopScanner
from lminf_edge.text.logprobs import LogprobReporter, TokenLogprobs

log = logging.getLogger("lminf_edge.completion")


class TextStream:
    """Text that ends at a stop string, the end-of-generation token or max_tokens, whichever comes first."""

    def __init__(
        self,
        llm: llama_cpp.Llama,
        outputs: Generator[Output, Any, None],
        prompt: Tokens,
        stops: Sequence[str] = (),
        *,
        max_tokens: int | None = None,
        opening: Sequence[int] = (),
        preserved: Container[int] = frozenset(),
        logprobs: LogprobReporter | None = None,
        detect_loops: bool = False,
    ) -> None:
        """
        outputs       generated tokens; closed when the text ends
        prompt        int32 (n_prompt,), before the text
        opening       tokens without text that it begins with; they count as generated
        preserved     special tokens whose text is part of it
        logprobs      reports each token's log probability; needs its logits
        detect_loops  end the text when the model loops
        """
        self._outputs = outputs
        self._vocab = llm._model.vocab
        self._detokenizer = Detokenizer(llm, prompt, opening, preserved)
        self._scanner = StopScanner([stop.encode("utf-8", "replace") for stop in stops if stop])
        self._max_tokens = max_tokens
        self._logprobs = logprobs
        self._loop = LoopDetector() if detect_loops else None
        self.n_tokens = len(opening)
        self.tokens = array("i")  # generated, without the end-of-generation token
        self.entries: list[TokenLogprobs] = []  # of all tokens, including those whose text was cut off
        self.finish_reason: Literal["stop", "length"] = "stop"
        self.stop_type: Literal["eos", "word", "limit"] = "word"  # in llama.cpp's terms
        self.stop = ""  # the stop string that ended it

    def __iter__(self) -> Iterator[Part]:
        """Final parts of the text, with the logprobs of their tokens."""
        with contextlib.closing(self._outputs):
            for output in self._outputs:
                token = output.token
                if bindings.llama_vocab_is_eog(self._vocab, token):
                    self.stop_type = "eos"
                    break
                self.n_tokens += 1
                self.tokens.append(token)
                piece = self._detokenizer.piece(token)
                entry = self._logprobs.entry(token, piece, output.logits) if self._logprobs else None
                if entry is not None:
                    self.entries.append(entry)
                yield from self._scanner.push(piece, entry, token)
                if self._scanner.stopped:
                    break
                if self._max_tokens is not None and self.n_tokens >= self._max_tokens:
                    self.finish_reason, self.stop_type = "length", "limit"
                    break
                if self._loop is not None and self._loop.push(token):
                    log.warning(
                        "Stopped after %d tokens: the model repeats itself. A repeat penalty helps.", self.n_tokens
                    )
                    self.finish_reason, self.stop_type = "length", "limit"
                    break
        self.stop = self._scanner.stop
        yield from self._scanner.flush()
