"""Reading the head of GGUF files, good and bad."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from lminf_edge.config import MAX_WINDOW
from lminf_edge.gguf_header import Header, read_header
from lminf_edge.models import embedded_models, find_model


def test_nano(nano_path: str) -> None:
    header = read_header(nano_path)
    assert (header.architecture, header.n_ctx_train) == ("llama", 512)
    assert header.n_tensors > 0


def value(key: str, kind: int, data: bytes) -> bytes:
    return struct.pack("<Q", len(key)) + key.encode() + struct.pack("<I", kind) + data


def text(data: str) -> bytes:
    return struct.pack("<Q", len(data)) + data.encode()


def test_arrays_are_stepped_over(tmp_path: Path) -> None:
    values = [
        value("tokenizer.ggml.tokens", 9, struct.pack("<IQ", 8, 2) + text("a") + text("b")),
        value("general.architecture", 8, text("x")),
        value("x.attention.head_count_kv", 9, struct.pack("<IQ2I", 4, 2, 3, 1)),
        value("x.context_length", 4, struct.pack("<I", 77)),
    ]
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 5, len(values)) + b"".join(values))
    header = read_header(path)
    assert header == Header("x", 5, 77)
    assert header.most_local(10, 5) == MAX_WINDOW
    assert header.most_local(10, 5, {"x.attention.indexer.top_k": 100}) == 85


@pytest.mark.parametrize(
    ("key", "number", "words"),
    [
        ("block_count", 0, "claims to have 0 layers, and llama.cpp runs 1 to 512"),
        ("block_count", 513, "claims to have 513 layers"),
        ("block_count", 2**32 - 1, "claims to have 4294967295 layers"),
        ("full_attention_interval", 0, "one layer in 0 has full attention"),
        ("attention.indexer.block_size", 0, "claims to select blocks of 0 tokens"),
    ],
)
def test_layers_that_would_end_the_process(tmp_path: Path, key: str, number: int, words: str) -> None:
    values = [
        value("general.architecture", 8, text("x")),
        value(f"x.{key}", 4, struct.pack("<I", number)),
        value("x.context_length", 4, struct.pack("<I", 77)),
    ]
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 5, len(values)) + b"".join(values))
    with pytest.raises(ValueError, match=words):
        read_header(path)


def test_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Model path does not exist"):
        read_header(tmp_path / "no.gguf")


def test_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a file"):
        read_header(tmp_path)


@pytest.mark.parametrize("data", [b"", b"GGU", b"PK\x03\x04", b"GGML" + bytes(100)])
def test_not_gguf(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(data)
    with pytest.raises(ValueError, match="is not a GGUF model"):
        read_header(path)


def test_every_cut_in_the_head_is_noticed(tmp_path: Path, nano_path: str) -> None:
    path = tmp_path / "model.gguf"
    head = Path(nano_path).read_bytes()[:200]
    for n_bytes in range(4, len(head)):
        path.write_bytes(head[:n_bytes])
        with pytest.raises(ValueError, match="cut short or damaged"):
            read_header(path)


@pytest.mark.parametrize(
    "item",
    [
        value("k", 99, b""),
        value("k", 9, struct.pack("<IQ", 9, 1)),
        value("k", 9, struct.pack("<IQ", 4, 2**60)),
        value("k", 9, struct.pack("<IQ", 8, 2**63)),
        struct.pack("<Q", 2**63),
        value("general.architecture", 8, struct.pack("<Q", 3) + b"\xff\xff\xff"),
    ],
)
def test_nonsense_is_noticed(tmp_path: Path, item: bytes) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 5, 1) + item)
    with pytest.raises(ValueError, match="cut short or damaged"):
        read_header(path)


def test_find_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_model("nano") == str(embedded_models()["nano"])
    (tmp_path / "nano").write_bytes(b"a file goes first")
    assert find_model("nano") == "nano"
    with pytest.raises(ValueError, match=r"does not exist: no\.gguf .*nano"):
        find_model("no.gguf")
