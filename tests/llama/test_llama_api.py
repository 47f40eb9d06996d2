"""Llama beside its stream: making one, what it refuses, states, caches, pickles, and that it is stock without lminf."""

from __future__ import annotations

import pickle
import shutil
import struct
import warnings
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
from conftest import TEXT, MakeLlama

from lminf_edge import CheckpointError, Llama, LMInfConfig, native
from lminf_edge.cache.token_log import Tokens
from lminf_edge.config import physical_memory

ONE_THREAD: dict[str, Any] = {"n_threads": 1, "n_threads_batch": 1, "verbose": False}


def assert_one_sentence(error: BaseException) -> None:
    assert "\n" not in str(error)
    assert ". " not in str(error)


# --- making one -------------------------------------------------------------------------------------------------------


def test_lminf_true() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        llm = Llama("nano", lminf=True, **ONE_THREAD)
    assert isinstance(llm, llama_cpp.Llama)
    assert llm.n_ctx() == 512
    params = native.load().params(llm.ctx)
    assert (params.n_global, params.n_local, params.max_distance) == (10, 502, 502)
    assert params.n_slack >= 64  # the cache is padded, and what is left over is slack
    assert llm.n_batch == 512
    llm.close()


def test_parameters_arrive(make_llama: MakeLlama) -> None:
    config = LMInfConfig(n_global=3, n_local=50, max_distance=40, n_slack=7, sink_mode="order", pos_bound=4096)
    llm = make_llama(lminf=config, type_k=8, type_v=8, flash_attn=True, n_batch=48, n_ubatch=24)
    params = native.load().params(llm.ctx)
    assert (params.n_global, params.n_local, params.max_distance) == (3, 50, 40)
    assert params.n_slack >= 7
    assert (params.sink_mode, params.pos_bound) == (1, 4096)
    assert (llm.n_ctx(), llm.n_batch, llm.context_params.n_ubatch) == (53, 48, 24)
    assert llm.stream_info().kv_bytes < make_llama(n_ubatch=24, n_batch=48).stream_info().kv_bytes


def test_n_ctx_is_the_window(make_llama: MakeLlama) -> None:
    assert make_llama(lminf=True, n_ctx=128).n_ctx() == 128
    assert make_llama(lminf=True, n_ctx=0).n_ctx() == 512
    assert make_llama(lminf=True, n_ctx=20, n_batch=256).n_batch == 256


def test_a_window_beyond_the_training_length_warns(make_llama: MakeLlama) -> None:
    with pytest.warns(UserWarning, match="600 tokens is longer than the 512"):
        make_llama(lminf=True, n_ctx=600)


def test_kv_overrides_change_the_training_length(make_llama: MakeLlama) -> None:
    assert make_llama(lminf=True, kv_overrides={"llama.context_length": 256}).n_ctx() == 256


def test_more_sinks_than_window_and_none_at_all(make_llama: MakeLlama, tokens: Tokens) -> None:
    for n_global, n_local in ((40, 8), (0, 16), (16, 1)):
        llm = make_llama(lminf=LMInfConfig(n_global=n_global, n_local=n_local))
        llm.eval(tokens[:500])
        assert llm.stream_info().sink_cells == n_global
        assert llm.stream_info().evicted == 500 - (n_local - 1) - n_global


def test_quiet(make_llama: MakeLlama, capfd: pytest.CaptureFixture[str]) -> None:
    make_llama()("Anna", max_tokens=3)
    assert capfd.readouterr() == ("", "")


def test_without_lminf_it_is_llama_cpp(nano_path: str, tokens: Tokens) -> None:
    ours, stock = Llama("nano", n_ctx=256, **ONE_THREAD), llama_cpp.Llama(nano_path, n_ctx=256, **ONE_THREAD)
    assert (ours.n_ctx(), ours.n_batch, ours.scores.shape) == (stock.n_ctx(), stock.n_batch, stock.scores.shape)
    text = [llm(TEXT[:100], max_tokens=20, temperature=0.0)["choices"][0]["text"] for llm in (ours, stock)]
    assert text[0] == text[1]
    assert list(ours.eval_tokens) == list(stock.eval_tokens)
    assert len(ours.eval_logits) == len(stock.eval_logits)
    ours.load_state(ours.save_state())
    assert ours.input_ids.shape == (256,)
    with pytest.raises(ValueError, match="Requested tokens"):
        ours.create_completion(tokens[:300].tolist())
    for use in (ours.stream_info, ours.checkpoint):
        with pytest.raises(ValueError, match="loaded without lminf"):
            use()
    copy = pickle.loads(pickle.dumps(ours))
    assert (copy.n_ctx(), copy.has_stream) == (256, False)
    for llm in (ours, stock, copy):
        llm.close()


def test_embeddings_use_a_stock_context(make_llama: MakeLlama) -> None:
    llm = make_llama(embedding=True, n_ctx=128)
    assert not llm.has_stream
    assert np.isfinite(llm.embed("Anna")).all()
    with pytest.raises(ValueError, match="embedding"):
        llm.stream_info()


# --- what is refused --------------------------------------------------------------------------------------------------


def refused(error: type[Exception], message: str, *args: Any, **kwargs: Any) -> None:
    with pytest.raises(error, match=message) as caught:
        Llama(*args, **{"lminf": True, "verbose": False, **kwargs})
    assert_one_sentence(caught.value)


def test_bad_arguments() -> None:
    refused(ValueError, "leaves no room", "nano", n_ctx=10)
    refused(ValueError, "give only one of n_ctx and n_local", "nano", n_ctx=100, lminf=LMInfConfig(n_local=100))
    refused(ValueError, "type_k=12345 is not a GGML type", "nano", type_k=12345)
    refused(TypeError, "lminf must be True, False or an LMInfConfig", "nano", lminf=7)
    handler = object.__new__(llama_cpp.llama_chat_format.Llava15ChatHandler)
    handler._exit_stack = None  # it frees nothing
    refused(ValueError, "Chat handlers for images", "nano", chat_handler=handler)


def test_a_window_larger_than_memory_is_refused_before_it_is_made() -> None:
    if physical_memory() is None:
        pytest.skip("this system does not tell its memory")
    refused(ValueError, "choose a smaller n_local", "nano", n_ctx=1 << 29, n_batch=1)
    refused(MemoryError, "smaller n_ctx or n_local", "nano", n_ctx=1 << 30)


def test_files_that_are_no_models(tmp_path: Path, nano_path: str, capfd: pytest.CaptureFixture[str]) -> None:
    model = Path(nano_path).read_bytes()
    path = str(tmp_path / "model.gguf")
    refused(ValueError, "Model path does not exist", path)
    refused(ValueError, "is not a file", str(tmp_path))
    Path(path).write_bytes(b"not a model")
    refused(ValueError, "is not a GGUF model", path)
    Path(path).write_bytes(model[:500])
    refused(ValueError, "cut short or damaged", path)
    Path(path).write_bytes(model[: len(model) // 2])
    refused(ValueError, "is cut short or damaged: download or convert it again", path)
    assert capfd.readouterr() == ("", "")


def gguf(path: Path, n_tensors: int, **values: str | int) -> str:
    """A GGUF file of metadata alone."""
    data = b"GGUF" + struct.pack("<IQQ", 3, n_tensors, len(values))
    for key, value in values.items():
        name = key.replace("__", ".").encode()
        data += struct.pack("<Q", len(name)) + name
        if isinstance(value, str):
            data += struct.pack("<IQ", 8, len(value)) + value.encode()
        else:
            data += struct.pack("<II", 4, value)
    path.write_bytes(data)
    return str(path)


def test_files_that_are_no_adapters(tmp_path: Path) -> None:
    path = tmp_path / "adapter.gguf"
    refused(ValueError, "cannot be loaded as an adapter", "nano", lora_path=str(path))
    path.write_bytes(b"not an adapter")
    refused(ValueError, "cannot be loaded as an adapter", "nano", lora_path=str(path))


def test_a_vocabulary_without_weights(tmp_path: Path) -> None:
    path = gguf(tmp_path / "vocab.gguf", 0, general__architecture="llama", llama__context_length=512)
    refused(ValueError, "vocabulary without weights", path)


def test_an_unknown_architecture(tmp_path: Path) -> None:
    path = gguf(tmp_path / "odd.gguf", 1, general__architecture="odd", odd__context_length=512)
    refused(ValueError, "cannot be loaded|cut short", path)


def test_what_computes_the_attention(make_llama: MakeLlama) -> None:
    assert make_llama().stream_info().attention == "fused"
    assert make_llama(type_k=6, type_v=6).stream_info().attention == "stock"  # q5_0: the fused one does not take it
    stock = LMInfConfig(n_global=4, n_local=64, attention="stock")
    assert make_llama(lminf=stock).stream_info().attention == "stock"
    fused = LMInfConfig(n_local=64, attention="fused")
    refused(ValueError, "no fused attention for layer 0", "nano", lminf=fused, type_k=6, type_v=6)


def test_a_failed_context_does_not_reach_the_next_one(make_llama: MakeLlama, nano_path: str) -> None:
    refused(ValueError, "pos_bound", "nano", lminf=LMInfConfig(n_local=64, pos_bound=8))
    stock = Llama(nano_path, n_ctx=128, **ONE_THREAD)
    assert not stock.has_stream
    assert stock("Anna", max_tokens=2)["usage"]["completion_tokens"] == 2
    stock.close()
    assert make_llama().has_stream


# --- states, caches, pickles ------------------------------------------------------------------------------------------


def completion(llm: Llama, prompt: list[int]) -> str:
    response: Any = llm.create_completion(prompt, max_tokens=12, temperature=0.0)
    text: str = response["choices"][0]["text"]
    return text


def test_save_state_and_load_state(make_llama: MakeLlama, tokens: Tokens) -> None:
    llm = make_llama()
    llm.set_seed(42)
    llm.eval(tokens[:500])
    state = pickle.loads(pickle.dumps(llm.save_state()))
    assert state.scores.size == 0
    assert state.llama_state_size == len(state.llama_state)
    llm.eval(tokens[500:501])
    expected = llm.scores
    llm.set_seed(1)
    other = make_llama()
    other.eval(tokens[1000:1100])
    other.load_state(state)
    assert (other.n_tokens, other._seed) == (500, 42)
    assert other.input_ids.tolist() == tokens[:500].tolist()
    other.eval(tokens[500:501])
    np.testing.assert_allclose(other.scores, expected, atol=1e-5)


def test_a_state_of_a_stock_llama_is_refused(make_llama: MakeLlama, nano_f32_path: str, tokens: Tokens) -> None:
    stock = Llama(nano_f32_path, n_ctx=128, **ONE_THREAD)
    stock.eval(tokens[:10].tolist())
    llm = make_llama()
    llm.eval(tokens[:20])
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        llm.load_state(stock.save_state())
    assert llm.stream_info().position == 20
    stock.close()


@pytest.mark.parametrize("kind", ["ram", "disk"])
def test_caches(make_llama: MakeLlama, tokens: Tokens, tmp_path: Path, kind: str) -> None:
    llm = make_llama()
    first, second = tokens[:300].tolist(), tokens[1000:1300].tolist()
    expected = [completion(llm, first), completion(llm, second)]
    cache = llama_cpp.LlamaRAMCache() if kind == "ram" else llama_cpp.LlamaDiskCache(str(tmp_path))
    llm.set_cache(cache)
    llm.reset()
    processed = 0
    batch = llm.scheduler.model.batch
    decode = batch.decode

    def counted(runs: Any) -> list[int]:
        nonlocal processed
        processed += sum(len(run.tokens) for run in runs)
        return decode(runs)

    batch.decode = counted  # type: ignore[method-assign]
    assert [completion(llm, first), completion(llm, second)] == expected
    assert processed == 2 * (300 + 11)
    # the way back to the first prompt is in the cache: only its last token and the answer are processed
    processed = 0
    assert completion(llm, first) == expected[0]
    assert processed == 1 + 11
    streamed: Any = llm.create_completion(second, max_tokens=12, temperature=0.0, stream=True)
    assert "".join(chunk["choices"][0]["text"] for chunk in streamed) == expected[1]
    assert processed == 2 * (1 + 11)


def test_a_cache_with_states_of_others_is_a_miss(make_llama: MakeLlama, tokens: Tokens) -> None:
    cache = llama_cpp.LlamaRAMCache()
    prompt = tokens[:200].tolist()
    other = make_llama(lminf=LMInfConfig(n_global=4, n_local=32))
    other.set_cache(cache)
    completion(other, prompt)
    llm = make_llama()
    expected = completion(llm, prompt)
    llm.reset()
    llm.set_cache(cache)
    assert completion(llm, prompt) == expected


def test_pickle(make_llama: MakeLlama, tokens: Tokens) -> None:
    llm = make_llama(lminf=LMInfConfig(n_global=2, max_distance=30, n_checkpoints=1), n_ctx=80, type_k=8, seed=7)
    copy = pickle.loads(pickle.dumps(llm))
    assert copy.n_ctx() == 80
    assert copy.scheduler.model.config == llm.scheduler.model.config
    for each in (copy, llm):
        each.eval(tokens[:300])
    np.testing.assert_array_equal(copy.scores, llm.scores)
    assert copy("Anna", max_tokens=8)["choices"][0]["text"] == llm("Anna", max_tokens=8)["choices"][0]["text"]
    copy.close()


def test_seeds(make_llama: MakeLlama) -> None:
    def text(llm: Llama, **kwargs: Any) -> str:
        return str(llm("Anna", max_tokens=12, temperature=1.5, **kwargs)["choices"][0]["text"])

    llm = make_llama(seed=5)
    assert text(llm, seed=1) == text(llm, seed=1) != text(llm, seed=2)
    assert text(make_llama(seed=5)) == text(make_llama(seed=5)) != text(make_llama(seed=6))


def test_lora(make_llama: MakeLlama, nano_f32_path: str, tmp_path: Path, tokens: Tokens) -> None:
    from gguf import GGUFReader, GGUFWriter

    # an adapter that adds a rank-1 matrix to one projection
    target = next(t for t in GGUFReader(nano_f32_path).tensors if t.name == "blk.0.attn_q.weight")
    n_in, n_out = (int(n) for n in target.shape)
    path = tmp_path / "adapter.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_string("general.type", "adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 1.0)
    rng = np.random.default_rng(0)
    writer.add_tensor("blk.0.attn_q.weight.lora_a", rng.normal(size=(1, n_in)).astype(np.float32))
    writer.add_tensor("blk.0.attn_q.weight.lora_b", rng.normal(size=(n_out, 1)).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    plain, adapted = make_llama(), make_llama(lora_path=str(path))
    for llm in (plain, adapted):
        llm.eval(tokens[:300])
    assert np.abs(plain.scores - adapted.scores).max() > 0.01
    with pytest.raises(CheckpointError, match="another model, adapter"):
        plain.restore(adapted.checkpoint())
    shutil.rmtree(tmp_path)


def test_infill_uses_the_tokens_of_the_model(make_llama: MakeLlama, monkeypatch: pytest.MonkeyPatch) -> None:
    from lminf_edge.text.tokenizer import prompt_to_tokens

    llm = make_llama()
    without = prompt_to_tokens(llm, "Anna", " left").tolist()
    assert without.count(0) == 3
    assert prompt_to_tokens(llm, "Anna", "").tolist()[-2:] == [0, 0]
    for name, token in (("token_prefix", 100), ("token_suffix", 101), ("token_middle", 102)):
        monkeypatch.setattr(llm._model, name, lambda token=token: token)
    marks = [token for token in prompt_to_tokens(llm, "Anna", " left") if 100 <= token <= 102]
    assert marks == [100, 101, 102]
    llm.spm_infill = True
    marks = [token for token in prompt_to_tokens(llm, "Anna", " left") if 100 <= token <= 102]
    assert marks == [101, 100, 102]
