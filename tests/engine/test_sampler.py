"""One sampler: llama_cpp's draws where llama_cpp has the parameter, llama-server's rules for the others."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import llama_cpp
import numpy as np
import pytest

from lminf_edge import Llama, LMInfConfig
from lminf_edge.cache.sequence import Logits
from lminf_edge.engine.loading import load_engine
from lminf_edge.engine.params import SamplingParams
from lminf_edge.engine.sampler import make_sampler, sample_checked
from lminf_edge.errors import UserError
from lminf_edge.text.service import Exchange, TextService

N_DRAWS = 300


@pytest.fixture(scope="module")
def llm(nano_path: str) -> Iterator[Llama]:
    """For its vocabulary."""
    llm = Llama(nano_path, vocab_only=True, verbose=False)
    yield llm
    llm.close()


def logits_of(n_vocab: int, n: int = N_DRAWS, scale: float = 3.0) -> list[Logits]:
    rng = np.random.default_rng(7)
    return [(scale * rng.standard_normal(n_vocab)).astype(np.float32) for _ in range(n)]


def draws(sampler: Any, rows: list[Logits]) -> list[int]:
    return [sample_checked(sampler, row) for row in rows]


def ours(llm: Llama, rows: list[Logits], window: int = 128, previous: Any = (), **params: Any) -> list[int]:
    return draws(make_sampler(SamplingParams(**params), llm._model, window, previous=previous), rows)


PLAIN: list[dict[str, Any]] = [
    {},
    {"temp": 0.0},
    {"temp": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0},
    {"temp": 2.5, "top_k": 5, "typical_p": 0.6},
    {"temp": 0.7, "top_k": -1, "top_p": 0.5, "min_p": 0.2, "repeat_penalty": 1.3},
    {"temp": 0.0, "repeat_penalty": 1.9, "frequency_penalty": 0.5, "presence_penalty": -0.5},
    {"temp": 1.2, "mirostat_mode": 1},
    {"temp": 1.2, "mirostat_mode": 2, "mirostat_tau": 3.0, "mirostat_eta": 0.3},
    {"temp": 1.0, "tfs_z": 0.5, "penalize_nl": False},
    {"grammar": llama_cpp.LlamaGrammar.from_string('root ::= ("a" | "the" | " ")*', verbose=False)},
]


@pytest.mark.parametrize("keywords", PLAIN, ids=range(len(PLAIN)))
def test_plain_parameters_draw_what_llama_cpp_draws(llm: Llama, keywords: dict[str, Any]) -> None:
    rows = logits_of(llm.n_vocab())
    llm.set_seed(11)
    theirs = draws(llama_cpp.Llama._init_sampler(llm, **keywords), rows)
    llm.set_seed(11)
    assert draws(llm._init_sampler(**keywords), rows) == theirs
    assert len(set(theirs)) > 1


def test_logits_processors_see_what_llama_cpp_shows_them(llm: Llama) -> None:
    def forbid_likeliest(ids: Any, scores: Logits) -> Logits:
        scores[scores.argmax()] = -np.inf
        return scores

    processors = llama_cpp.LogitsProcessorList([forbid_likeliest, forbid_likeliest])
    rows = logits_of(llm.n_vocab(), 20)
    third = [int(np.argsort(row)[-3]) for row in rows]
    sampler = llm._init_sampler(temp=0.0, logits_processor=processors)
    assert [sampler.draw(row) for row in rows] == third
    assert draws(llama_cpp.Llama._init_sampler(llm, temp=0.0, logits_processor=processors), rows) == third


def test_penalties_look_back_as_far_as_asked(llm: Llama) -> None:
    # the same row again and again: with a penalty that cannot be outweighed, n different tokens, then over again
    row = [np.linspace(50, 1, llm.n_vocab()).astype(np.float32)] * 120
    penalty: dict[str, Any] = {"temperature": 0.0, "presence_penalty": 1000.0}
    for last_n, n_different in ((0, 1), (5, 6), (64, 65), (90, 91)):
        said = ours(llm, row, repeat_last_n=last_n, **penalty)
        assert said == [i % n_different for i in range(120)]
    assert ours(llm, row, repeat_last_n=-1, window=40, **penalty) == [i % 41 for i in range(120)]
    assert ours(llm, row[:3], previous=[0, 2], **penalty) == [1, 3, 4]
    assert ours(llm, row[:3], previous=[0, 2], repeat_last_n=1, **penalty) == [0, 1, 0]


def test_dry_stops_a_repetition_and_breakers_protect_it(llm: Llama) -> None:
    tokens = [llm.tokenize(text, add_bos=False)[-1] for text in (b"a", b"b", b"c", b"d")]
    favored = np.full(llm.n_vocab(), 0.0, dtype=np.float32)
    favored[tokens[3]] = 2.0
    favored[tokens[0]] = 1.0
    previous = [*tokens, *tokens[:3]]  # a b c d a b c: d would go on with the repetition
    dry: dict[str, Any] = {"temperature": 0.0, "dry_multiplier": 5.0}
    assert ours(llm, [favored], previous=previous, temperature=0.0) == [tokens[3]]
    assert ours(llm, [favored], previous=previous, **dry) == [tokens[0]]
    assert ours(llm, [favored], previous=previous, dry_allowed_length=4, **dry) == [tokens[3]]
    assert ours(llm, [favored], previous=previous, dry_penalty_last_n=3, **dry) == [tokens[3]]
    assert ours(llm, [favored], previous=previous, dry_penalty_last_n=0, **dry) == [tokens[3]]
    assert ours(llm, [favored], previous=previous, dry_sequence_breakers=["c"], **dry) == [tokens[3]]


def test_xtc_takes_the_likeliest_away(llm: Llama) -> None:
    row = np.full(llm.n_vocab(), -10.0, dtype=np.float32)
    row[:3] = [3.0, 2.9, 2.8]  # a third each
    xtc: dict[str, Any] = {"xtc_probability": 1.0, "xtc_threshold": 0.1}
    assert set(ours(llm, [row] * 30, temperature=1.0, **xtc)) == {2}
    assert set(ours(llm, [row] * 30, temperature=0.0, **xtc)) == {2}
    assert set(ours(llm, [row] * 30, temperature=0.0, xtc_probability=0.5, seed=1)) == {0, 2}
    assert set(ours(llm, [row] * 30, temperature=0.0, xtc_probability=1.0, xtc_threshold=0.6)) == {0}


def test_top_n_sigma_and_dynamic_temperature(llm: Llama) -> None:
    open_: dict[str, Any] = {"temperature": 100.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 3}
    row = np.zeros(llm.n_vocab(), dtype=np.float32)
    row[[4, 9]] = 8.0
    assert set(ours(llm, [row] * 60, top_n_sigma=1.0, **open_)) == {4, 9}
    assert len(set(ours(llm, [row] * 60, **open_))) > 10
    # a sure prediction gets the low end of the range, an unsure one the high end
    dynamic = {**open_, "temperature": 50.0, "dynatemp_range": 50.0}
    sure = row.copy()
    sure[4] = 40.0
    assert set(ours(llm, [sure] * 60, **dynamic)) == {4}
    assert len(set(ours(llm, [row * 0] * 60, **dynamic))) > 10
    assert len(set(ours(llm, [sure] * 60, **open_))) > 10


def test_what_llama_server_clamps(llm: Llama) -> None:
    rows = logits_of(llm.n_vocab(), 40)
    greedy = [int(row.argmax()) for row in rows]
    for temperature in (0.0, -1.0, -0.0, 1e-30):
        assert ours(llm, rows, temperature=temperature) == greedy
    assert ours(llm, rows, temperature=0.0, repeat_penalty=0.0) == greedy
    assert ours(llm, rows, seed=5, dry_multiplier=1.0, dry_base=0.5) == ours(llm, rows, seed=5, dry_multiplier=1.0)
    assert ours(llm, rows, seed=5, top_k=-7) == ours(llm, rows, seed=5, top_k=0)
    assert ours(llm, rows, seed=5, top_k=1 << 40) == ours(llm, rows, seed=5, top_k=0)
    assert ours(llm, rows, seed=2**32 + 5) == ours(llm, rows, seed=5)
    assert ours(llm, rows, seed=5, repeat_penalty=1.1, repeat_last_n=1 << 60)
    assert ours(llm, rows, seed=5, dry_multiplier=1.0, dry_penalty_last_n=1 << 60, dry_allowed_length=1 << 60)
    assert ours(llm, rows, seed=5, dry_multiplier=1.0, dry_sequence_breakers=["", "\0", "\ud800", "x" * 100])
    many = logits_of(llm.n_vocab(), 100, 0.1)
    assert ours(llm, many, temperature=2.0) != ours(llm, many, temperature=2.0)  # without a seed, another each time
    assert ours(llm, many, temperature=2.0, seed=-1) != ours(llm, many, temperature=2.0, seed=-1)


@pytest.mark.parametrize(
    ("params", "said"),
    [
        ({"repeat_last_n": -2}, "repeat_last_n must be -1"),
        ({"dry_penalty_last_n": -2}, "dry_penalty_last_n must be -1"),
        ({"temperature": float("nan")}, "temperature must be a number"),
        ({"frequency_penalty": float("inf")}, "frequency_penalty must be a number"),
        ({"dynatemp_range": 1e38}, "dynatemp_range must be a number"),
        ({"mirostat": 3}, "mirostat must be"),
        ({"dry_sequence_breakers": "abc"}, "list of strings"),
        ({"dry_sequence_breakers": ["x"] * 65}, "64 strings at most"),
        ({"logit_bias": {0: float("nan")}}, "logit_bias"),
    ],
)
def test_what_is_refused(params: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        SamplingParams(**params)


def test_what_this_model_cannot_do(llm: Llama) -> None:
    for params in ({"logit_bias": {llm.n_vocab(): 1.0}}, {"logit_bias": {-1: 1.0}}):
        with pytest.raises(UserError, match="tokens are 0 to"):
            ours(llm, [], **params)
    for grammar in ("nonsense", 'start ::= "a"', "root ::= other"):
        with pytest.raises(UserError, match="grammar cannot be used"):
            ours(llm, [], grammar=grammar)


def test_bias_and_grammar(llm: Llama) -> None:
    rows = logits_of(llm.n_vocab(), 10)
    assert ours(llm, rows, temperature=0.0, logit_bias={9: 100.0}) == [9] * 10
    (a,) = llm.tokenize(b"a", add_bos=False)[-1:]
    said = ours(llm, rows[:4], grammar='root ::= " a"*', logit_bias={a: 50.0}, temperature=0.0)
    assert said == [a] * 4


def test_no_token_left_is_a_sentence(make_llama: Any) -> None:
    model = make_llama()
    everything = dict.fromkeys(range(model.n_vocab()), -float("inf"))
    grammar = llama_cpp.LlamaGrammar.from_string('root ::= "a"', verbose=False)
    for keywords in ({"logit_bias": everything}, {"logit_bias": everything, "grammar": grammar}):
        with pytest.raises(UserError):
            model.create_completion("Anna", max_tokens=2, **keywords)
    assert model.create_completion("Anna", max_tokens=2)["usage"]["completion_tokens"] == 2


def test_what_a_processor_raises_is_raised(make_llama: Any) -> None:
    def broken(ids: Any, scores: Logits) -> Logits:
        raise ZeroDivisionError("here")

    def lengthened(ids: Any, scores: Logits) -> Logits:
        return np.append(scores, np.float32(0))

    model = make_llama()
    for processor, error in ((broken, ZeroDivisionError), (lengthened, ValueError)):
        with pytest.raises(error):
            model.create_completion("Anna", max_tokens=2, logits_processor=llama_cpp.LogitsProcessorList([processor]))


def test_a_request_to_the_engine_has_sampling_of_its_own() -> None:
    engine = load_engine("nano", n_ctx=256, verbose=False, n_threads=1, n_threads_batch=1)
    service = TextService(engine)

    def said(**params: Any) -> str:
        exchange = Exchange(service)
        answer = exchange.answer(exchange.text_prompt("Anna"), SamplingParams(temperature=0.0, **params), max_tokens=40)
        return "".join(part.text for part in answer)

    try:
        plain = said()
        assert said(dry_multiplier=2.0, dry_sequence_breakers=()) != plain
        assert said(repeat_last_n=0, repeat_penalty=2.0) == plain
        assert said(repeat_last_n=8, repeat_penalty=2.0) != said(repeat_last_n=64, repeat_penalty=2.0)
        assert said() == plain
    finally:
        engine.close()
        engine.model.close()


@pytest.mark.parametrize("lminf", [None, LMInfConfig(n_global=4, n_local=64)])
def test_both_faces_have_what_llama_cpp_has_no_argument_for(make_llama: Any, lminf: Any) -> None:
    model = make_llama(lminf=lminf)

    def said(**keywords: Any) -> str:
        done = model.create_completion("Anna", max_tokens=40, temperature=0.0, **keywords)
        return str(done["choices"][0]["text"])

    plain = said()
    model.sampling = SamplingParams(dry_multiplier=2.0, dry_sequence_breakers=[])
    assert said() != plain
    model.sampling = SamplingParams(repeat_last_n=0)
    assert said(repeat_penalty=2.0) == plain


@pytest.mark.parametrize("lminf", [None, LMInfConfig(n_global=4, n_local=64)])
def test_a_sample_without_logits_is_a_sentence(make_llama: Any, lminf: Any) -> None:
    model = make_llama(lminf=lminf)
    model.eval(list(range(300, 320)))
    last = model.sample(temp=0.0)
    assert model.sample(temp=0.0, idx=19) == last
    for idx in (-1, 3, 20, 1 << 20):
        with pytest.raises(RuntimeError, match="no logits"):
            model.sample(temp=0.0, idx=idx)
    assert model.sample(temp=0.0) == last
