"""What llama.cpp and llama_cpp leave open about drawing tokens by a grammar."""

from __future__ import annotations

from typing import Any

import llama_cpp
import numpy as np
from llama_cpp import llama_cpp as bindings
from llama_cpp.llama_grammar import LlamaGrammar

from lminf_edge import native
from lminf_edge.errors import UserError
from lminf_edge.sequence import Logits

TOO_MUCH = "This grammar takes too much work: give it fewer optional parts, repetitions and alternatives"

_TOKEN_DATA = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])  # struct llama_token_data

# a character of a string as llama_cpp writes it for a JSON schema, and without what JSON forbids there
_LOOSE_CHARACTER, _CHARACTER = r'char ::= [^"\\] |', r'char ::= [^"\\\x7F\x00-\x1F] |'


def strict_strings(grammar: LlamaGrammar) -> LlamaGrammar:
    """A grammar that llama_cpp has made of a JSON schema, so that its strings are JSON: without line breaks."""
    return LlamaGrammar(_grammar=grammar._grammar.replace(_LOOSE_CHARACTER, _CHARACTER))


def sample_checked(sampler: Any, logits: Logits) -> int:
    """What llama_sampler_sample draws by a grammar from `logits` (n_vocab,), a copy of which it works on.

    Raises ValueError if there is no grammar, as it could not be parsed, if it allows no token, or if it takes too much
    work: llama.cpp would go on without it, end the process, or go on for ever.
    """
    chain = sampler.sampler
    if not all(bindings.llama_sampler_chain_get(chain, i) for i in range(bindings.llama_sampler_chain_n(chain))):
        raise UserError("The grammar cannot be used: it is none in llama.cpp's GBNF, or takes too much work.")
    candidates = np.zeros(len(logits), dtype=_TOKEN_DATA)
    candidates["id"], candidates["logit"] = np.arange(len(logits)), logits
    data = candidates.ctypes.data_as(llama_cpp.llama_token_data_p)
    array = llama_cpp.llama_token_data_array(data=data, size=len(candidates), selected=-1, sorted=False)
    library = native.load()
    with native.captured_errors():
        bindings.llama_sampler_apply(chain, array)
        if library.grammar_overran():
            raise UserError(f"{TOO_MUCH}.")
        if not 0 <= array.selected < array.size:
            raise UserError("No token could be drawn.")
        chosen = array.data[array.selected]
        if not np.isfinite(chosen.logit):
            raise UserError("The grammar allows no token of this model here.")
        bindings.llama_sampler_accept(chain, chosen.id)
        if library.grammar_overran():
            raise UserError(f"{TOO_MUCH}.")
    return int(chosen.id)
