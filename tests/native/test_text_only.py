"""A Λ cache reads text from left to right: other batches are refused in a sentence, and the stream goes on."""

from __future__ import annotations

import ctypes
from pathlib import Path

import llama_cpp
import numpy as np
import numpy.typing as npt
import pytest
from native_context import NativeContext, last_error
from reference import gguf_file, models, tiny_models
from reference.random_model import N_EMBD

TOKENS = tiny_models.tokens(300)
L, G = 32, 4


def decode_embeddings(context: NativeContext, rows: npt.NDArray[np.float32], positions: list[int]) -> int:
    """What llama_decode makes of embeddings[n, n_embd] at positions[n], or for M-RoPE [4 * n]."""
    n = len(rows)
    zero = (llama_cpp.llama_seq_id * 1)(0)
    pointer = ctypes.POINTER(llama_cpp.llama_seq_id)
    batch = llama_cpp.llama_batch(
        n_tokens=n,
        embd=rows.ctypes.data_as(ctypes.POINTER(ctypes.c_float)),
        pos=(llama_cpp.llama_pos * len(positions))(*positions),
        n_seq_id=(ctypes.c_int32 * n)(*[1] * n),
        seq_id=(pointer * n)(*[ctypes.cast(zero, pointer)] * n),
        logits=(ctypes.c_int8 * n)(*[1] * n),
    )
    return int(llama_cpp.llama_decode(context.context, batch))


def decode_picture(context: NativeContext) -> int:
    """A picture of two lines with four patches each, all at one place in time."""
    place = context.next_pos(0, 8)
    lines, columns = [place + i // 4 for i in range(8)], [place + i % 4 for i in range(8)]
    rows = np.random.default_rng(0).normal(size=(8, N_EMBD)).astype(np.float32)
    return decode_embeddings(context, rows, [*[place] * 8, *lines, *columns, *[0] * 8])


def check_refusal(result: int, word: str) -> None:
    assert result != 0
    assert "\n" not in last_error()
    assert word in last_error()


@pytest.mark.parametrize("name", ["qwen2vl", "qwen3vl", "qwen35"])
def test_a_picture_is_refused_and_nothing_is_lost(tmp_path: Path, name: str) -> None:
    path = models.write(name, tmp_path)
    with NativeContext(path, None) as context:
        context.feed(TOKENS[:100])
        assert decode_picture(context) == 0  # so that the refusal is ours
    with NativeContext(path, L, G, n_ubatch=16) as context:
        expected = context.feed(TOKENS)
    with NativeContext(path, L, G, n_ubatch=16) as context:
        check_refusal(decode_picture(context), "text")  # as the first batch, and in the middle
        first = context.feed(TOKENS[:160])
        before = bytes(context.info())
        check_refusal(decode_picture(context), "text")
        assert bytes(context.info()) == before
        np.testing.assert_array_equal(np.concatenate([first, context.feed(TOKENS[160:])]), expected)


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen2vl", "qwen35", "lfm2", "deepseek2"])
def test_a_batch_without_order_is_refused_and_nothing_is_lost(tmp_path: Path, name: str) -> None:
    path = models.write(name, tmp_path)
    with NativeContext(path, L, G, n_ubatch=16) as context:
        expected = context.feed(TOKENS)
    with NativeContext(path, L, G, n_ubatch=16) as context:
        first = context.feed(TOKENS[:160])
        before = bytes(context.info())
        llama_cpp.llama_set_causal_attn(context.context, False)
        with pytest.raises(RuntimeError, match="llama_decode failed"):
            context.decode((0, TOKENS[160:168]))
        check_refusal(1, "causal")
        llama_cpp.llama_set_causal_attn(context.context, True)
        assert bytes(context.info()) == before
        np.testing.assert_array_equal(np.concatenate([first, context.feed(TOKENS[160:])]), expected)


@pytest.mark.parametrize("name", ["llama", "gpt-oss", "lfm2", "deepseek2"])
def test_embeddings_with_one_position_each_are_read_like_tokens(tmp_path: Path, name: str) -> None:
    path = models.write(name, tmp_path)
    rows = gguf_file.read(path).tensors["token_embd.weight"].astype(np.float32)[TOKENS]
    with NativeContext(path, L, G, n_ubatch=16) as context:
        expected = context.feed(TOKENS)
    with NativeContext(path, L, G, n_ubatch=16) as context:
        context.feed(TOKENS[:160])
        place = context.next_pos(0, 16)
        assert decode_embeddings(context, rows[160:176], list(range(place, place + 16))) == 0
        np.testing.assert_array_equal(context.feed(TOKENS[176:]), expected[176:])
