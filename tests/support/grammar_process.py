"""Makes grammars and draws tokens by them, in a process that may have 400 MiB more than it begins with.

    python grammar_process.py MODEL

Reads lines of JSON, {"grammar": GBNF text} or {"schema": JSON schema}; answers each with one: seconds of work to make
it, the most for a token of 50, how many were drawn, and what was said instead of more.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from lminf_edge import Llama
from lminf_edge.engine.sampler import sample_checked
from lminf_edge.errors import UserError
from lminf_edge.server.errors import ApiError
from lminf_edge.server.grammars import schema_grammar, text_grammar

N_TOKENS = 50
ROOM = 400 << 20


def answer(llm: Llama, request: dict[str, Any]) -> dict[str, Any]:
    began = time.process_time()
    try:
        if "schema" in request:
            grammar = schema_grammar(llm, request["schema"], "schema")
        else:
            grammar = text_grammar(llm, request["grammar"], "grammar")
    except ApiError as error:
        return {"made": time.process_time() - began, "status": error.status, "error": error.message}
    sampler = llm._init_sampler(grammar=grammar, temp=1.0, top_k=0, top_p=1.0, min_p=0.0)
    result = {"made": time.process_time() - began, "step": 0.0, "drawn": 0}
    rng = np.random.default_rng(0)
    while result["drawn"] < N_TOKENS:
        logits = rng.standard_normal(llm.n_vocab()).astype(np.float32)
        began = time.process_time()
        try:
            token = sample_checked(sampler, logits)
        except UserError as error:
            result["error"] = str(error)
        result["step"] = max(result["step"], time.process_time() - began)
        if "error" in result or token == llm.token_eos():
            break
        result["drawn"] += 1
    sampler.close()
    return result


def main() -> None:
    llm = Llama(sys.argv[1], vocab_only=True, verbose=False)
    n_pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = n_pages * resource.getpagesize() + ROOM
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(llm, json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
