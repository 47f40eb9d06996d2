"""Prints what grammars allow, for the library that LLAMA_CPP_LIB_PATH names.

    python grammar_probe.py MODEL < grammars.json

grammars.json: {name: GBNF text}. One line per grammar: its name, the tokens drawn by it, and a digest of what it
allowed at each of them. It uses nothing of ours.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import sys

import llama_cpp
import numpy as np

SILENT = llama_cpp.llama_log_callback(lambda level, text, user_data: None)
TOKEN_DATA = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])  # struct llama_token_data
N_TOKENS = 40


def main() -> None:
    llama_cpp.llama_log_set(SILENT, ctypes.c_void_p(0))
    params = llama_cpp.llama_model_default_params()
    params.vocab_only = True
    model = llama_cpp.llama_model_load_from_file(sys.argv[1].encode(), params)
    vocab = llama_cpp.llama_model_get_vocab(model)
    n_vocab = llama_cpp.llama_vocab_n_tokens(vocab)
    for name, text in json.load(sys.stdin).items():
        grammar = llama_cpp.llama_sampler_init_grammar(vocab, text.encode(), b"root")
        if not grammar:
            print(name, "refused")
            continue
        digest, drawn, rng = hashlib.sha256(), 0, np.random.default_rng(0)
        while drawn < N_TOKENS:
            tokens = np.zeros(n_vocab, dtype=TOKEN_DATA)
            tokens["id"], tokens["logit"] = np.arange(n_vocab), rng.standard_normal(n_vocab)
            data = tokens.ctypes.data_as(llama_cpp.llama_token_data_p)
            llama_cpp.llama_sampler_apply(grammar, llama_cpp.llama_token_data_array(data, n_vocab, -1, False))
            digest.update(np.isfinite(tokens["logit"]).tobytes())
            ends = [token for token in range(n_vocab) if llama_cpp.llama_vocab_is_eog(vocab, token)]
            tokens["logit"][ends] = -np.inf  # as far as it goes
            chosen = int(np.argmax(tokens["logit"]))
            if not np.isfinite(tokens["logit"][chosen]):
                break
            llama_cpp.llama_sampler_accept(grammar, chosen)
            drawn += 1
        print(name, drawn, digest.hexdigest())
        llama_cpp.llama_sampler_free(grammar)


if __name__ == "__main__":
    main()
