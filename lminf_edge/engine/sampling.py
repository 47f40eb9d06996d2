"""What llama.cpp and llama_cpp leave open about drawing tokens by a grammar."""

from __future__ import annotations

from typing import Any

import llama_cpp
import numpy as np
from llama_cpp import llama_cpp as bindings
from llama_cpp.llama_grammar import LlamaGrammar

from lminf_edge.errors import UserError
from lminf_edge.sequence import Logits

TOKEN_DATA = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])  # struct llama_token_data

# a character of a string as llama_cpp writes it for a JSON schema, and without what JSON forbids there
_LOOSE_CHARACTER, _CHARACTER = r'char ::= [^"\\] |', r'char ::= [^"\\\x7F\x00-\x1F] |'


def strict_strings(grammar: LlamaGrammar) -> LlamaGrammar:
    """A grammar that llama_cpp has made of a JSON schema, so that its strings are JSON: without line breaks."""
    return LlamaGrammar(_grammar=grammar._grammar.replace(_LOOSE_CHARACTER, _CHARACTER))


def sample_checked(sampler: Any, logits: Logits) -> int:
    """What llama_sampler_sample draws from `logits` (n_vocab,), a copy of which it works on.

    A grammar may leave no token; llama.cpp would then end the process. Raises ValueError instead.
    """
    candidates = np.zeros(len(logits), dtype=TOKEN_DATA)
    candidates["id"], candidates["logit"] = np.arange(len(logits)), logits
    data = candidates.ctypes.data_as(llama_cpp.llama_token_data_p)
    array = llama_cpp.llama_token_data_array(data=data, size=len(candidates), selected=-1, sorted=False)
    bindings.llama_sampler_apply(sampler.sampler, array)
    if not 0 <= array.selected < array.size:
        raise UserError("No token could be drawn.")
    chosen = array.data[array.selected]
    if not np.isfinite(chosen.logit):
        raise UserError("The grammar allows no token of this model here.")
    bindings.llama_sampler_accept(sampler.sampler, chosen.id)
    return int(chosen.id)
