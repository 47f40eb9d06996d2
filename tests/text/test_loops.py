"""What is a loop, and what only looks like one."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from conftest import TEXT

from lminf_edge import Llama
from lminf_edge.cli import main
from lminf_edge.engine.loading import load_engine
from lminf_edge.engine.params import Defaults, SamplingParams
from lminf_edge.loops import MAX_PERIOD, MIN_REPEATS, MIN_TOKENS, LoopDetector
from lminf_edge.text.service import Exchange, TextService


def noticed_at(tokens: Any) -> int | None:
    """How many tokens it takes until the detector says so."""
    detector = LoopDetector()
    return next((n for n, token in enumerate(tokens, 1) if detector.push(int(token))), None)


def noise(n: int, seed: int = 0) -> list[int]:
    tokens: list[int] = np.random.default_rng(seed).integers(0, 30000, n).tolist()
    return tokens


@pytest.mark.parametrize("period", [1, 2, 3, 7, 64, 127, 128, 129, 300, MAX_PERIOD])
@pytest.mark.parametrize("before", [0, 1, 511, 5000])
def test_a_cycle_is_noticed_as_soon_as_it_is_long_enough(period: int, before: int) -> None:
    cycle = list(range(40_000, 40_000 + period))
    assert noticed_at([*noise(before), *cycle * 600]) == before + max(MIN_REPEATS * period, MIN_TOKENS)


def test_what_is_no_loop() -> None:
    assert noticed_at(noise(20_000)) is None
    assert noticed_at(noise(MAX_PERIOD + 1) * 8) is None  # a longer cycle than is looked for
    assert noticed_at([*noise(200) * 3, *noise(300, 1)] * 3) is None  # a refrain
    varied = []
    for i in range(400):
        varied += [*noise(30), 40_000 + i]  # a counter in every line
    assert noticed_at(varied) is None


def test_tables_lists_and_code_are_no_loops(nano_path: str) -> None:
    llm = Llama(nano_path, vocab_only=True, verbose=False)
    texts = [
        "| Name | Count | Price |\n|---|---|---|\n" + "".join(f"| item {i} | {i % 7} | 0.00 |\n" for i in range(300)),
        "".join(f"{i}. yes\n" for i in range(1, 400)),
        "- [ ] to do\n" * 30,
        "".join(f"    case {i}:\n        return 0;\n        break;\n" for i in range(150)),
        "0, " * 150 + "\n" + "=" * 400 + "\n" + "-" * 100,
        "<tr><td></td><td></td></tr>\n" * 12,
        "La la la la la, la la la la la la.\n" * 8 + TEXT * 3,
    ]
    for text in texts:
        assert noticed_at(llm.tokenize(text.encode(), add_bos=False)) is None, text[:40]
    llm.close()


# --- where it is asked ------------------------------------------------------------------------------------------------


def test_a_completion_without_a_limit_ends_once_it_loops(make_llama: Any, caplog: pytest.LogCaptureFixture) -> None:
    llm = make_llama()
    loop: dict[str, Any] = {"temperature": 0.0, "logit_bias": {300: 100.0}}
    done = llm.create_completion("Anna", max_tokens=None, **loop)
    assert (done["choices"][0]["finish_reason"], done["usage"]["completion_tokens"]) == ("length", MIN_TOKENS)
    assert "Stopped after 512 tokens" in caplog.text
    done = llm.create_completion("Anna", max_tokens=MIN_TOKENS + 40, **loop)
    assert done["usage"]["completion_tokens"] == MIN_TOKENS + 40
    llm.detect_loops = False
    chunks = llm.create_completion("Anna", max_tokens=-1, stream=True, **loop)
    assert sum(1 for _ in zip(chunks, range(MIN_TOKENS + 40), strict=False)) == MIN_TOKENS + 40
    chunks.close()


def test_the_engine_has_it_too_and_a_limit_for_requests_without_one() -> None:
    engine = load_engine("nano", n_ctx=256, verbose=False, n_threads=1, n_threads_batch=1)
    loop = SamplingParams(temperature=0.0, logit_bias={300: 100.0})

    def answered(limit: int | None, defaults: Defaults | None = None) -> tuple[str, int]:
        exchange = Exchange(TextService(engine, defaults))
        answer = exchange.answer(exchange.text_prompt("Anna"), loop, max_tokens=limit)
        assert "".join(part.text for part in answer)
        return answer.text.finish_reason, exchange.usage.n_completion

    try:
        assert answered(-1) == ("length", MIN_TOKENS)
        limited = Defaults(max_tokens=9, detect_loops=False)
        for limit, n_tokens in ((None, 9), (-1, 9), (4, 4), (20, 20)):
            assert answered(limit, limited) == ("length", n_tokens)
    finally:
        engine.close()
        engine.model.close()


def test_generate_without_a_limit_ends(capfd: pytest.CaptureFixture[str]) -> None:
    command = ["generate", "-m", "nano", "-p", "Anna", "-n", "-1", "--temp", "0", "--ignore-eos", "--n-local", "128"]
    assert main([*command, "--kv-type", "f32", "--threads", "1", "--json"]) == 0
    report = json.loads(capfd.readouterr().out)
    assert report["finish_reason"] == "length"
    assert MIN_TOKENS <= report["tokens"] < 5000
