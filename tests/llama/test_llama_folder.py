"""Streams that outlive their process, branches, and the guard of grammars: the same in Llama and in the engine."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
from conftest import MakeLlama

from lminf_edge import Llama, LMInfConfig
from lminf_edge.cache.token_log import Tokens, as_tokens
from lminf_edge.engine.engine import Engine
from lminf_edge.engine.loading import load_engine
from lminf_edge.engine.params import SamplingParams
from lminf_edge.engine.request import Request
from lminf_edge.errors import UserError

SCRIPT = """
import json, sys
from lminf_edge import Llama, LMInfConfig
config = LMInfConfig(n_global=4, n_local=64, n_checkpoints=0)
llm = Llama(sys.argv[1], lminf=config, verbose=False, n_threads=1, n_threads_batch=1, checkpoint_folder=sys.argv[2])
for prompt in json.loads(sys.argv[3]):
    answer = list(zip(llm.generate(prompt, temp=0.0), range(8), strict=False))
counters = llm.scheduler.counters
print(json.dumps([[token for token, _ in answer], counters.from_files, counters.prefilled_tokens]))
exec(sys.argv[4])
"""
ENDS = {
    "close": "llm.close()",
    "nothing": "",
    "reset": "llm.reset(); sys.exit('gone')",
}


def process(model: str, folder: Path, prompts: list[Tokens], end: str = "") -> tuple[list[int], int, int]:
    """What a process answers to the last prompt, checkpoints it read from files, and tokens it processed."""
    arguments = [model, str(folder), json.dumps([prompt.tolist() for prompt in prompts]), end]
    done = subprocess.run([sys.executable, "-c", SCRIPT, *arguments], capture_output=True, text=True, timeout=60)
    assert done.stderr in ("", "gone\n")
    answer, from_files, n_prefilled = json.loads(done.stdout)
    return answer, from_files, n_prefilled


@pytest.mark.parametrize("end", ENDS)
def test_another_process_goes_on(
    nano_f32_path: str, make_llama: MakeLlama, tokens: Tokens, tmp_path: Path, end: str
) -> None:
    process(nano_f32_path, tmp_path, [tokens[:300]], ENDS[end])
    assert process(nano_f32_path, tmp_path, [tokens[:350]]) == (ask_llama(make_llama())(tokens[:350], 8)[0], 1, 51)


def test_another_process_takes_up_either_branch(nano_f32_path: str, tokens: Tokens, tmp_path: Path) -> None:
    process(nano_f32_path, tmp_path, [tokens[:300], tokens[700:1000]])
    for prompt in (tokens[:310], tokens[700:1010]):
        assert process(nano_f32_path, tmp_path, [prompt])[1:] == (1, 11)


def test_models_and_windows_share_a_folder(
    make_llama: MakeLlama, nano_path: str, tokens: Tokens, tmp_path: Path
) -> None:
    kinds: list[dict[str, Any]] = [
        {},
        {"lminf": LMInfConfig(n_global=4, n_local=96)},
        {"model": nano_path},
        {"type_k": 0},
    ]
    for _ in range(2):
        opened = [make_llama(**kind, checkpoint_folder=tmp_path) for kind in kinds]
        for llm in opened:
            next(llm.generate(tokens[:300], temp=0.0))
            n_restored = llm.scheduler.counters.from_files
            llm.close()
        assert len(list(tmp_path.iterdir())) == len(kinds)
    assert n_restored == 1


def test_a_folder_has_one_user_at_a_time(make_llama: MakeLlama, tokens: Tokens, tmp_path: Path) -> None:
    llm = make_llama(checkpoint_folder=tmp_path)
    with pytest.raises(UserError, match="are in use, perhaps by another"):
        make_llama(checkpoint_folder=tmp_path)
    next(llm.generate(tokens[:50], temp=0.0))
    llm.close()
    make_llama(checkpoint_folder=tmp_path)


def test_a_pickled_model_has_its_folder(make_llama: MakeLlama, tokens: Tokens, tmp_path: Path) -> None:
    llm = make_llama(checkpoint_folder=os.fsencode(tmp_path))
    next(llm.generate(tokens[:300], temp=0.0))
    data = pickle.dumps(llm)
    llm.close()
    copy: Llama = pickle.loads(data)
    try:
        next(copy.generate(tokens[:310], temp=0.0))
        assert (copy.scheduler.counters.from_files, copy.scheduler.counters.prefilled_tokens) == (1, 10)
    finally:
        copy.close()


@pytest.mark.parametrize("bad", [3, ["a"], True])
def test_what_is_no_folder(make_llama: MakeLlama, bad: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="checkpoint_folder must be a path"):
        make_llama(checkpoint_folder=bad)
    (tmp_path / "file").write_text("a file")
    with pytest.raises(UserError, match="file"):
        make_llama(checkpoint_folder=tmp_path / "file")
    for stock in ({"lminf": None, "n_ctx": 64}, {"embedding": True}, {"vocab_only": True}):
        with pytest.raises(UserError, match="give lminf=True"):
            make_llama(checkpoint_folder=tmp_path, **stock)


def test_a_damaged_state_is_read_again(
    nano_f32_path: str, make_llama: MakeLlama, tokens: Tokens, tmp_path: Path
) -> None:
    process(nano_f32_path, tmp_path, [tokens[:300]])
    states = [path for path in tmp_path.rglob("*") if path.is_file() and path.stat().st_size > 0]  # one is a lock
    assert states
    for path in states:
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    arguments = [nano_f32_path, str(tmp_path), json.dumps([tokens[:310].tolist()]), ""]
    done = subprocess.run([sys.executable, "-c", SCRIPT, *arguments], capture_output=True, text=True, timeout=60)
    assert json.loads(done.stdout) == [ask_llama(make_llama())(tokens[:310], 8)[0], 0, 310]
    assert "damaged" in done.stderr


# --- both faces -------------------------------------------------------------------------------------------------------

Ask = Callable[..., tuple[list[int], int]]


def ask_llama(llm: Llama) -> Ask:
    def ask(prompt: Tokens, n_tokens: int = 6, **sampling: Any) -> tuple[list[int], int]:
        before = llm.scheduler.counters.cached_tokens
        answer = [token for token, _ in zip(llm.generate(prompt, temp=0.0, **sampling), range(n_tokens), strict=False)]
        return answer, llm.scheduler.counters.cached_tokens - before

    return ask


def ask_engine(engine: Engine) -> Ask:
    def ask(prompt: Tokens, n_tokens: int = 6, **sampling: Any) -> tuple[list[int], int]:
        params = SamplingParams(temperature=0.0, **sampling)
        request = Request(prompt, params, max_tokens=n_tokens, ignore_eog=True)
        engine.submit(request)
        return [output.token for output in engine.stream(request)], request.stats.n_cached

    return ask


@pytest.fixture(params=["llama", "engine"])
def opened(request: pytest.FixtureRequest, nano_f32_path: str) -> Iterator[Callable[[Path | None], Ask]]:
    """Opens either face with a folder, or without one, and closes the one that was open."""
    closing: list[Callable[[], None]] = []
    settings: dict[str, Any] = {"verbose": False, "n_threads": 1, "n_threads_batch": 1}
    settings["lminf"] = LMInfConfig(n_global=4, n_local=64)

    def open_(folder: Path | None = None) -> Ask:
        while closing:
            closing.pop(0)()
        if request.param == "llama":
            llm = Llama(nano_f32_path, checkpoint_folder=folder, **settings)
            closing.append(llm.close)
            return ask_llama(llm)
        engine = load_engine(nano_f32_path, folder=folder, **settings)
        closing.extend([engine.close, engine.model.close])
        return ask_engine(engine)

    yield open_
    while closing:
        closing.pop(0)()


def test_branches_go_on_where_they_parted(opened: Callable[..., Ask], tokens: Tokens, tmp_path: Path) -> None:
    trunk, left, right = tokens[:300], tokens[400:550], tokens[600:750]
    prompts = [np.concatenate(parts) for parts in ([trunk], [trunk, left], [trunk, right], [trunk, left, left[:9]])]
    ask = opened(tmp_path)
    answers = [ask(prompt) for prompt in prompts]
    n_cached = [n for _, n in answers]
    assert n_cached in ([0, 300, 300, 449], [0, 300, 299, 449])  # with or without a checkpoint
    for prompt, (answer, _) in zip(prompts, answers, strict=True):
        assert opened()(prompt)[0] == answer


def test_a_folder_serves_what_was_asked_before_it_was_closed(
    opened: Callable[..., Ask], tokens: Tokens, tmp_path: Path
) -> None:
    ask = opened(tmp_path)
    ask(tokens[:300])
    ask(tokens[1000:1300])
    ask = opened(tmp_path)
    assert ask(tokens[:320])[1] == 299
    assert ask(tokens[1000:1320])[1] == 299


def test_the_log_of_a_restored_stream_forgets_its_oldest_tokens(make_llama: MakeLlama, tokens: Tokens) -> None:
    llm = make_llama()
    ask = ask_llama(llm)
    ask(tokens[:300], 100)  # longer than the slack: there is a checkpoint of the prompt's end
    ask(tokens[1000:1300])
    assert ask(tokens[:310])[1] == 299
    assert llm.scheduler.counters.restored == 1
    llm.slot.log.extend([5] * 40_000)
    assert len(llm.slot.log.recent()) < 40_000


@pytest.mark.parametrize("face", ["llama", "stock", "engine"])
@pytest.mark.parametrize("grammar", ['root ::= "a" [z-a]', 'root ::= ("a"?){900}', "nothing"])
def test_a_grammar_ends_in_a_sentence(nano_f32_path: str, make_llama: MakeLlama, face: str, grammar: str) -> None:
    made = llama_cpp.LlamaGrammar.from_string(grammar, verbose=False)
    if face == "engine":
        engine = load_engine(nano_f32_path, n_ctx=68, verbose=False, n_threads=1)
        everything = {token: -float("inf") for token in range(engine.model.n_vocab)}
        try:
            for params in ({"grammar": made}, {"grammar": made, "logit_bias": everything}):
                with pytest.raises(UserError):
                    ask_engine(engine)(as_tokens([1, 300, 301]), 4, **params)
            assert len(ask_engine(engine)(as_tokens([1, 300, 301]), 4)[0]) == 4
        finally:
            engine.close()
            engine.model.close()
        return
    llm = make_llama(**({"lminf": None, "n_ctx": 256} if face == "stock" else {}))
    everything = {token: -float("inf") for token in range(llm.n_vocab())}
    for keywords in ({"grammar": made}, {"grammar": made, "logit_bias": everything}, {"logit_bias": everything}):
        with pytest.raises(UserError):
            llm.create_completion([1, 300, 301], max_tokens=4, **keywords)
    assert llm.create_completion([1, 300, 301], max_tokens=4)["usage"]["completion_tokens"] >= 1
