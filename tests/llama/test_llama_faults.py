"""Uses of Llama that once crashed the process, mixed texts or said nothing: each ends in an error that says why."""

from __future__ import annotations

import gc
import inspect
import pickle
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
from conftest import MakeLlama

from lminf_edge import Llama, scores
from lminf_edge.cache.token_log import Tokens
from lminf_edge.errors import UserError
from lminf_edge.evaluate import token_nll
from lminf_edge.guard import ClosedError, StreamTakenError
from lminf_edge.model import Model
from lminf_edge.scores import DroppedError, ScoreWindow


@pytest.fixture(params=["lminf", "stock"])
def either(request: pytest.FixtureRequest, make_llama: MakeLlama) -> Llama:
    """A model with a Λ cache, and one without."""
    return make_llama() if request.param == "lminf" else make_llama(lminf=None, n_ctx=256)


def texts(chunks: Any) -> str:
    return "".join(chunk["choices"][0]["text"] for chunk in chunks)


# --- two users of one stream ------------------------------------------------------------------------------------------

MOVES: dict[str, Callable[[Llama], Any]] = {
    "completion": lambda llm: llm("Two", max_tokens=2),
    "chat": lambda llm: llm.create_chat_completion([{"role": "user", "content": "Hi"}], max_tokens=2),
    "stream": lambda llm: next(llm("Two", max_tokens=2, stream=True)),
    "generate": lambda llm: next(llm.generate([1, 2, 3])),
    "eval": lambda llm: llm.eval([5]),
    "reset": lambda llm: llm.reset(),
    "n_tokens": lambda llm: setattr(llm, "n_tokens", 1),
    "load_state": lambda llm: llm.load_state(llm.save_state()),
    "token_nll": lambda llm: token_nll(llm, [1, 5, 6, 7]),
}


@pytest.mark.parametrize("move", MOVES)
def test_a_stream_that_was_moved_is_lost(either: Llama, move: str) -> None:
    for open_stream in (
        either("Anna was late and", stream=True, temperature=0.0, max_tokens=30),
        either.generate([1, 5, 9, 200], temp=0.0),
    ):
        next(open_stream)
        MOVES[move](either)
        with pytest.raises(StreamTakenError, match="Another call has moved this model's stream"):
            list(open_stream)
    expected = texts(either("Anna", stream=True, temperature=0.0, max_tokens=8))
    assert either("Anna", temperature=0.0, max_tokens=8)["choices"][0]["text"] == expected


@pytest.mark.parametrize("below", [lambda llm: llm.slot.clear(), lambda llm: llm.slot.sequence.clear()])
def test_a_stream_that_was_moved_below_is_lost_as_well(make_llama: MakeLlama, below: Any) -> None:
    llm = make_llama()
    expected = llm("Anna was late and", temperature=0.0, max_tokens=30)["choices"][0]["text"]
    stream = llm("Anna was late and", stream=True, temperature=0.0, max_tokens=30)
    next(stream)
    below(llm)
    with pytest.raises(StreamTakenError):
        list(stream)
    assert llm("Anna was late and", temperature=0.0, max_tokens=30)["choices"][0]["text"] == expected


def test_only_what_moves_the_stream_takes_it(make_llama: MakeLlama, tokens: Tokens) -> None:
    llm = make_llama()
    expected = texts(llm("Anna was", stream=True, temperature=0.0, max_tokens=20))
    stream = llm("Anna was", stream=True, temperature=0.0, max_tokens=20)
    others = [llm("never begun", stream=True), llm.generate([1])]
    text = ""
    for chunk in stream:
        text += chunk["choices"][0]["text"]
        llm.tokenize(b"a text")
        llm.checkpoint(), llm.stream_info(), llm.save_state()
        assert llm.input_ids[: llm.n_tokens].tolist() == llm._input_ids.tolist()
    assert text == expected
    del others


def test_a_lost_stream_leaves_the_next_one_alone(make_llama: MakeLlama, tokens: Tokens) -> None:
    llm = make_llama()
    lost = llm.generate(tokens[:50], temp=0.0)
    next(lost)
    llm.eval(tokens[100:200])
    before = llm.input_ids.tolist()
    lost.close()
    del lost
    gc.collect()
    assert llm.input_ids.tolist() == before


def test_a_cache_keeps_no_state_of_another_call(make_llama: MakeLlama, tokens: Tokens) -> None:
    llm = make_llama()
    prompt = tokens[:40].tolist()
    expected = llm(prompt, temperature=0.0, max_tokens=6)["choices"][0]["text"]
    llm.set_cache(llama_cpp.LlamaRAMCache())
    stream = llm(prompt, temperature=0.0, max_tokens=6, stream=True)
    chunk = next(stream)
    while chunk["choices"][0]["finish_reason"] is None:
        chunk = next(stream)
    llm.set_cache(None)
    llm.eval(tokens[500:600])
    llm.set_cache(llama_cpp.LlamaRAMCache())
    assert list(stream) == []
    assert llm(prompt, temperature=0.0, max_tokens=6)["choices"][0]["text"] == expected


@pytest.mark.parametrize("kind", ["logits_processor", "stopping_criteria"])
def test_a_callback_cannot_move_the_stream(make_llama: MakeLlama, kind: str) -> None:
    llm = make_llama()
    for move in MOVES.values():
        callback: Any = lambda ids, scores, move=move: move(llm)  # noqa: E731
        with pytest.raises(UserError, match="cannot move the stream"):
            llm("Anna", max_tokens=3, **{kind: [callback] if kind == "logits_processor" else callback})
    with pytest.raises(UserError, match="close it after the call"):
        llm("Anna", max_tokens=3, logits_processor=[lambda ids, scores: llm.close()])
    assert llm("Anna", max_tokens=3)["usage"]["completion_tokens"] == 3


def test_threads_wait_for_each_other(either: Llama) -> None:
    prompts = ["Anna", "The ferry", "Two of"]
    expected = [either(prompt, temperature=0.0, max_tokens=12)["choices"][0]["text"] for prompt in prompts]
    found: list[list[str]] = [[] for _ in prompts]
    errors: list[BaseException] = []

    def work(i: int) -> None:
        try:
            for _ in range(3):
                found[i].append(either(prompts[i], temperature=0.0, max_tokens=12)["choices"][0]["text"])
                either.detokenize(either.tokenize(b"in between"))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert found == [[text] * 3 for text in expected]


def test_streams_in_threads_end_or_say_why(make_llama: MakeLlama) -> None:
    llm = make_llama()
    expected = texts(llm("Anna", stream=True, temperature=0.0, max_tokens=25))
    results: list[Any] = []

    def work() -> None:
        try:
            results.append(texts(llm("Anna", stream=True, temperature=0.0, max_tokens=25)))
        except StreamTakenError as error:
            results.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    assert expected in results
    assert all(result == expected or isinstance(result, StreamTakenError) for result in results)


# --- after close ------------------------------------------------------------------------------------------------------

ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "tokenize": (b"a",),
    "detokenize": ([5],),
    "eval": ([5],),
    "generate": ([5],),
    "create_completion": ("a",),
    "__call__": ("a",),
    "create_chat_completion": ([{"role": "user", "content": "a"}],),
    "create_chat_completion_openai_v1": ([{"role": "user", "content": "a"}],),
    "create_embedding": ("a",),
    "embed": ("a",),
    "load_state": (None,),
    "restore": (None,),
    "set_cache": (None,),
    "set_seed": (1,),
    "prompt_logits": ([5],),
}


def test_after_close_everything_says_so(either: Llama) -> None:
    tokenizer, own = either.tokenizer(), either.tokenizer_
    stream = either("Anna", stream=True)
    next(stream)
    model, context = either._model, either._ctx
    either.close()
    either.close()
    names = {name for name in dir(Llama) if not name.startswith("_")} | {"__call__"}
    skipped = {"close", "from_pretrained", "logits_to_logprobs", "longest_token_prefix", "has_stream"}
    skipped |= {"sampling", "detect_loops", "guessed_format", "model_params"}  # plain values
    for name in names - skipped:
        with pytest.raises(ClosedError, match=r"^This model has been closed\.$"):
            getattr(either, name)(*ARGUMENTS.get(name, ()))
    uses: list[Callable[[], Any]] = [
        lambda: list(stream),
        lambda: tokenizer.tokenize(b"a"),
        lambda: tokenizer.detokenize([5]),
        lambda: own.tokenize(b"a"),  # type: ignore[union-attr]
        lambda: setattr(either, "n_tokens", 0),
        lambda: either._scores,
        lambda: model.token_bos(),
        lambda: context.n_ctx(),
    ]
    for use in uses:
        with pytest.raises((ValueError, RuntimeError), match="has been closed"):
            use()
    assert isinstance(ClosedError(), UserError)


def test_close_waits_for_a_call_of_another_thread(make_llama: MakeLlama) -> None:
    llm = make_llama()
    begun = threading.Event()
    results: list[Any] = []

    def watch(ids: Any, scores: Any) -> Any:
        begun.set()
        return scores

    def work() -> None:
        results.append(llm("Anna", max_tokens=60, temperature=0.0, logits_processor=[watch]))

    thread = threading.Thread(target=work)
    thread.start()
    begun.wait()
    llm.close()
    thread.join()
    assert results[0]["usage"]["completion_tokens"] == 60


def test_a_closed_model_can_be_pickled_and_one_that_failed_closed(make_llama: MakeLlama) -> None:
    llm = make_llama()
    llm.close()
    copy = pickle.loads(pickle.dumps(llm))
    assert copy("Anna", max_tokens=2)["usage"]["completion_tokens"] == 2
    copy.close()
    object.__new__(Llama).close()


def test_closing_is_quiet(make_llama: MakeLlama, capfd: pytest.CaptureFixture[str]) -> None:
    llm = make_llama("nano", lminf=True, n_batch=512, n_seq_max=8)
    llm.eval(range(3, 3003))  # needs more than was reserved, of which llama.cpp speaks when the context is freed
    llm.close()
    assert capfd.readouterr() == ("", "")


# --- tokens and text --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [[-1], [4096], [2**31], [2**70], [1, 10**9], [1.5], ["a"], [None], "ab", None])
def test_tokens_that_are_none(either: Llama, bad: Any) -> None:
    uses: list[Callable[[], Any]] = [
        lambda: either.detokenize(bad),
        lambda: either.tokenizer().detokenize(bad),
        lambda: either.eval(bad),
        lambda: either.generate(bad),
    ]
    if isinstance(bad, list):
        uses.append(lambda: either(bad, max_tokens=1))
    for use in uses:
        with pytest.raises(UserError):
            use()
    assert either("Anna", max_tokens=2)["usage"]["completion_tokens"] == 2


@pytest.mark.parametrize("bad", ["a text", None, 5, [b"a"]])
def test_a_text_that_is_not_bytes(either: Llama, bad: Any) -> None:
    with pytest.raises(UserError, match="must be bytes"):
        either.tokenize(bad)


def test_tokens_in_every_form(either: Llama) -> None:
    ids = either.tokenize(b"Anna was late")
    text = either.detokenize(ids)
    for form in (tuple(ids), np.array(ids), np.array(ids, dtype=np.uint8 if max(ids) < 256 else np.uint16)):
        assert either.detokenize(form) == text
        either.reset()
        either.eval(form)
        assert either.n_tokens == len(ids)
    assert either.detokenize([]) == b""


@pytest.mark.parametrize("n_spaces", [31, 32, 33, 47, 300])
def test_a_token_of_many_spaces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n_spaces: int) -> None:
    from reference import tiny_models

    pieces, piece_scores, types = tiny_models.vocabulary()
    token = len(pieces) - 1
    monkeypatch.setattr(tiny_models, "vocabulary", lambda: ([*pieces[:-1], "\u2581" * n_spaces], piece_scores, types))
    llm = Llama(tiny_models.write(next(iter(tiny_models.MODELS)), tmp_path), n_ctx=64, verbose=False, n_threads=1)
    for detokenize in (llm.detokenize, llm.tokenizer().detokenize):
        assert detokenize([token]) == b" " * n_spaces
        assert detokenize([token, 5, token]) == b" " * n_spaces + b"\x02" + b" " * n_spaces
    llm.close()


@pytest.mark.parametrize("bad", [[1, 2], [], None, 3, [b"a"]])
def test_embeddings_of_what_is_no_text(make_llama: MakeLlama, bad: Any) -> None:
    llm = make_llama(embedding=True, n_ctx=64)
    with pytest.raises(UserError, match="Embeddings are made of text"):
        llm.embed(bad)


@pytest.mark.parametrize("bias", [{99999: 1.0}, {-1: 1.0}, {"a": 1.0}, {5: "x"}, {5: None}, [5]])
def test_a_bias_of_what_is_no_token(make_llama: MakeLlama, bias: Any) -> None:
    with pytest.raises(UserError, match="logit_bias"):
        make_llama()("Anna", max_tokens=1, logit_bias=bias)


# --- logits processors ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [KeyError("mine"), KeyboardInterrupt(), AssertionError("mine")])
def test_what_a_processor_raises_ends_the_completion(
    either: Llama, error: BaseException, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    calls = []

    def third_time(ids: Any, scores: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise error
        return scores

    expected = either("Anna", max_tokens=4, temperature=0.0)
    with pytest.raises(type(error)) as caught:
        either("Anna", max_tokens=9, logits_processor=llama_cpp.LogitsProcessorList([third_time]))
    assert caught.value is error
    assert len(calls) == 3
    calls.clear()
    with pytest.raises(type(error)):
        list(either("Anna", max_tokens=9, stream=True, logits_processor=[third_time]))
    either.reset()
    either.eval([1, 5])
    either._sampler = None
    with pytest.raises(ZeroDivisionError):
        either.sample(logits_processor=[lambda ids, scores: 1 / 0])
    assert either("Anna", max_tokens=4, temperature=0.0)["choices"] == expected["choices"]
    assert capfd.readouterr().err == ""
    assert caplog.records == []  # it is no bug of ours


def test_a_processor_must_return_scores(either: Llama) -> None:
    for wrong in (lambda ids, scores: None, lambda ids, scores: scores[:5], lambda ids, scores: 1.0):
        with pytest.raises(UserError, match="must return scores"):
            either("Anna", max_tokens=2, logits_processor=[wrong])
    with pytest.raises(UserError, match="must be a function"):
        either("Anna", max_tokens=2, logits_processor=["x"])


def test_processors_follow_each_other(either: Llama) -> None:
    def add(token: int, value: float) -> Any:
        def process(ids: Any, scores: Any) -> Any:
            new = scores.copy()
            new[token] += value
            return new

        return process

    response = either("Anna", max_tokens=2, temperature=0.0, logits_processor=[add(300, 1000), add(301, 2000)])
    assert response["choices"][0]["text"].strip() == (either.detokenize([301]).decode() * 2).strip()
    response = either("Anna", max_tokens=2, temperature=0.0, logits_processor=add(300, 1000))
    assert response["choices"][0]["text"].strip() == (either.detokenize([300]).decode() * 2).strip()


# --- what llama_cpp keeps in arrays -----------------------------------------------------------------------------------


def test_the_usual_likelihood_loop(make_llama: MakeLlama, nano_f32_path: str, tokens: Tokens) -> None:
    stock = llama_cpp.Llama(nano_f32_path, n_ctx=128, logits_all=True, verbose=False, n_threads=1, n_threads_batch=1)
    llm = make_llama(lminf=True, n_ctx=128, n_batch=32, logits_all=True)
    loss = []
    for each in (stock, llm):
        each.reset()
        each.eval(tokens[:100].tolist())
        rows = [each.logits_to_logprobs(each.scores[i])[tokens[i + 1]] for i in range(each.n_tokens - 1)]
        loss.append(rows)
        assert each._scores.shape == (100, each.n_vocab())
        assert len(each.eval_logits) == 100
    np.testing.assert_allclose(loss[0], loss[1], atol=0.02)
    stock.close()


def test_scores_follow_the_stream(make_llama: MakeLlama, tokens: Tokens) -> None:
    llm = make_llama(logits_all=True, n_batch=32)
    llm.eval(tokens[:80])
    whole = llm.scores
    kept = whole.copy()
    llm.n_tokens = 50
    np.testing.assert_array_equal(llm.scores, kept[:50])
    llm.eval(tokens[100:110])
    assert llm.scores.shape[0] == 60
    np.testing.assert_array_equal(whole, kept)  # what was handed out stays
    next(llm.generate(tokens[:70], temp=0.0))
    np.testing.assert_allclose(llm.scores, kept[:70], atol=1e-3)
    checkpoint = llm.checkpoint()
    llm.reset()
    assert len(llm.scores) == 0
    llm.restore(checkpoint)
    assert len(llm.scores) == 0
    llm.eval(tokens[70:72])
    np.testing.assert_allclose(llm.scores[70:], kept[70:72], atol=1e-3)
    with pytest.raises(DroppedError):
        llm.scores[3]


def test_scores_beyond_the_budget(make_llama: MakeLlama, tokens: Tokens, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = make_llama(logits_all=True, n_batch=32)
    llm._scores_kept = ScoreWindow(llm.n_vocab(), budget=64 * 4 * llm.n_vocab())
    llm.eval(tokens[:300])
    rows = llm.scores
    assert 48 <= len(rows) <= 64
    llm2 = make_llama(logits_all=True, n_batch=32)
    llm2.eval(tokens[:300])
    np.testing.assert_allclose(rows[299], llm2.scores[299], atol=1e-3)
    np.testing.assert_allclose(rows[-1], llm2.scores[299], atol=1e-3)
    np.testing.assert_allclose(rows[270:280, 5], llm2.scores[270:280, 5], atol=1e-3)
    assert len(list(rows)) == len(rows)
    for use in (lambda: rows[0], lambda: rows[100, 5], lambda: rows[0:10], lambda: (rows * 2)[0]):
        with pytest.raises(UserError, match="not kept any more, only those of tokens 2"):
            use()
    with pytest.raises(IndexError):
        rows[300]
    assert scores.BUDGET == 256 << 20


def test_a_score_window_is_the_end_of_a_list() -> None:
    rng = np.random.default_rng(0)
    window, rows = ScoreWindow(3, budget=20 * 12), np.empty((0, 3), dtype=np.float32)
    for _ in range(300):
        if rng.random() < 0.2:
            n_tokens = int(rng.integers(0, len(rows) + 1))
            window.truncate(n_tokens)
            rows = rows[:n_tokens]
        new = rng.random((int(rng.integers(1, 30)), 3), dtype=np.float32)
        window.push(len(rows), new)
        rows = np.concatenate([rows, new])
        kept = window.rows(len(rows))
        assert len(kept) <= 20
        assert kept.start + len(kept) == len(rows)
        np.testing.assert_array_equal(kept, rows[kept.start :])
        assert len(kept) >= min(len(new), 20)


def test_input_ids_can_be_kept_and_changed(make_llama: MakeLlama, tokens: Tokens) -> None:
    llm = make_llama()
    llm.eval(tokens[:100])
    ids = llm.input_ids
    ids[:] = 0
    assert llm.input_ids[: llm.n_tokens].tolist() == llm._input_ids.tolist() == tokens[:100].tolist()
    for name in ("input_ids", "scores"):
        with pytest.raises(UserError):
            setattr(llm, name, ids)


@pytest.mark.parametrize("bad", [-1, 101, 1.5, None, "a"])
def test_n_tokens_cannot_be_just_anything(make_llama: MakeLlama, tokens: Tokens, bad: Any) -> None:
    llm = make_llama()
    llm.eval(tokens[:100])
    with pytest.raises(UserError, match="n_tokens must be"):
        llm.n_tokens = bad
    assert llm.n_tokens == 100


def test_signatures() -> None:
    stock = inspect.signature(llama_cpp.Llama)
    ours = inspect.signature(Llama)
    assert list(ours.parameters)[: len(stock.parameters) - 1] == list(stock.parameters)[:-1]
    added = [name for name in ours.parameters if name not in stock.parameters]
    assert added == ["lminf", "checkpoint_folder", "rpc_servers"]
    assert inspect.signature(Llama.__init__).parameters["n_ctx"].default is None
    for name in ("generate", "sample", "create_completion", "create_chat_completion", "tokenize", "__call__"):
        stock, ours = inspect.signature(getattr(llama_cpp.Llama, name)), inspect.signature(getattr(Llama, name))
        more = len(ours.parameters) - len(stock.parameters)
        assert list(ours.parameters.values())[: len(stock.parameters)] == list(stock.parameters.values())
        assert (more > 0) == (name == "create_chat_completion")
        assert getattr(Llama, name).__doc__


# --- parameters -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        *((name, bad) for name in ("n_batch", "n_seq_max") for bad in (0, -1, 1.5, "8", 2**40)),
        *(
            (name, bad)
            for name in ("n_ubatch", "n_threads", "n_threads_batch", "n_ctx")
            for bad in (-1, 0.5, "a", 2**40)
        ),
        *((name, bad) for name in ("n_gpu_layers", "main_gpu", "last_n_tokens_size") for bad in (-2, 1.5, [])),
        *(("seed", bad) for bad in (-2, 1.5, "a", True)),
    ],
)
def test_whole_numbers(name: str, bad: Any) -> None:
    load: Any = Model.load if name == "n_seq_max" else partial(Llama, lminf=True)
    with pytest.raises(UserError, match=f"^{name} must be ") as caught:
        load("nano", verbose=False, **{name: bad})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("bad", ["q8_0", 99, -1, 1.5, [1], {}])
def test_cache_types(bad: Any) -> None:
    for name in ("type_k", "type_v"):
        with pytest.raises(UserError, match="is not a GGML type"):
            Llama("nano", lminf=True, verbose=False, **{name: bad})


def test_a_batch_larger_than_memory() -> None:
    with pytest.raises(MemoryError, match="smaller n_batch"):
        Llama("nano", lminf=True, verbose=False, n_batch=1 << 28)


def test_numbers_of_numpy(make_llama: MakeLlama) -> None:
    llm = make_llama(lminf=True, n_ctx=np.int64(64), n_batch=np.int32(32), n_threads=np.int8(1), type_k=np.int64(8))
    assert (llm.n_ctx(), llm.n_batch) == (64, 32)


def test_a_random_seed(make_llama: MakeLlama) -> None:
    def text(llm: Llama, **kwargs: Any) -> str:
        return str(llm("Anna", max_tokens=12, temperature=2.0, **kwargs)["choices"][0]["text"])

    assert len({text(make_llama(seed=-1)) for _ in range(3)}) > 1
    llm = make_llama(seed=3)
    assert len({text(llm, seed=-1) for _ in range(4)}) > 1
    llm.set_seed(-1)
    first = llm._seed
    llm.set_seed(-1)
    assert llm._seed != first


def test_paths_of_every_kind(tmp_path: Path, nano_path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "ä model.gguf").symlink_to(nano_path)
    monkeypatch.setenv("HOME", str(home))
    for lminf in (True, None):
        for path in ("~/ä model.gguf", "~/ä model.gguf".encode(), home / "ä model.gguf", Path("~/ä model.gguf")):
            llm = Llama(path, lminf=lminf, n_ctx=64, verbose=False)
            assert llm.n_ctx() >= 64
            llm.close()
    with pytest.raises(UserError, match=r"home.none\.gguf"):
        Llama("nano", lminf=True, verbose=False, lora_path="~/none.gguf")
    for bad in (None, 3, [], ["nano"]):
        with pytest.raises(UserError, match="model_path must be a path"):
            Llama(bad, verbose=False)
