"""What a KV cache should compute: policies as tables of distances, and a Llama in float64 numpy that follows them.

A table has a row for each query and a column for each key: how far the key seems from the query, UNSEEN where it is
not attended to. That is all a cache policy is. Nothing here is cached, evicted or rotated twice, so there is nothing
to get wrong but the table. Only numpy is needed; nothing is shared with any implementation.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Table = npt.NDArray[np.int64]
UNSEEN = -1


# --- policies ---------------------------------------------------------------------------------------------------------


def distances(
    n: int, policy: str, n_global: int = 0, n_local: int = 0, max_distance: int = 0, recall_distance: int = 0
) -> Table:
    """The table of a stream of n tokens. Query i sees keys j <= i:

    full             all of them at i - j
    window           those with i - j < n_local, at i - j; all of the following see these as well
    lminf            beside them the first n_global, all at max_distance (0: n_local): LM-Infinite
    sinks            the first n_global at the distance inside the cache, right before the window: StreamingLLM
    sinks-uncapped   the first n_global at their true distance i - j
    recall           lminf, and all other keys at recall_distance
    shift            llama.cpp's context shift in a context of n_global + n_local: see shift()
    """
    if policy == "shift":
        return shift(n, n_global + n_local, n_global)
    i, j = np.arange(n)[:, None], np.arange(n)
    true = i - j
    left = true >= n_local
    first = left & (j < n_global)
    if policy == "full":
        return np.where(true >= 0, true, UNSEEN)
    table = np.where((true >= 0) & ~left, true, UNSEEN)
    if policy == "window":
        return table
    if policy == "sinks":
        return np.where(first, np.minimum(i, n_global + n_local - 1) - j, table)
    if policy == "sinks-uncapped":
        return np.where(first, true, table)
    if policy == "recall":
        table = np.where(left, recall_distance, table)
    elif policy != "lminf":
        raise ValueError(f"there is no policy {policy}")
    return np.where(first, max_distance or n_local, table)


def shift(n: int, n_ctx: int, n_keep: int) -> Table:
    """Before a token that would fill the context, half of what is there after the first n_keep is discarded.

    What remains moves up, so that a key's place in the list of cells is its position.
    """
    table = np.full((n, n), UNSEEN)
    cells: list[int] = []
    for i in range(n):
        if len(cells) + 1 >= n_ctx:
            del cells[n_keep : n_keep + (len(cells) - n_keep) // 2]
        cells.append(i)
        table[i, cells] = np.arange(len(cells))[::-1]
    return table


# --- the model --------------------------------------------------------------------------------------------------------


def attend(q: Array, k: Array, v: Array, table: Table, frequencies: Array, slopes: Array | float = 0.0) -> Array:
    """[n, n_head, value_size] of q[n, n_head, size] and k, v[n, n_head_kv, ...], query by query.

    Pair p of a head, dimensions 2p and 2p + 1, is turned by distance * frequencies[p]; frequency 0 does not turn.
    slopes: [n_head] of ALiBi: -slope * distance is added to a score.
    """
    n, n_head, size = q.shape
    n_head_kv = k.shape[1]
    queries = (q[..., ::2] + 1j * q[..., 1::2]).reshape(n, n_head_kv, -1, size // 2)
    keys = k[..., ::2] + 1j * k[..., 1::2]
    steep = np.broadcast_to(slopes, n_head).reshape(n_head_kv, -1, 1)
    out = np.empty((n, n_head, v.shape[2]))
    for i in range(n):
        seen = np.flatnonzero(table[i] != UNSEEN)
        distance = table[i, seen]
        turned = keys[seen] * np.exp(-1j * distance[:, None, None] * frequencies)
        scores = (queries[i] @ turned.conj().transpose(1, 2, 0)).real / np.sqrt(size) - steep * distance
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        out[i] = (weights @ v[seen].transpose(1, 0, 2)).reshape(n_head, -1)
    return out


class Llama:
    """RMSNorm, RoPE of neighbouring dimensions, grouped queries, SwiGLU; from a GGUF file.

    metadata: the file's keys. tensors: float64 by the file's names, matrices as [n_out, n_in].
    """

    def __init__(self, path: Path) -> None:
        self.metadata, self.tensors = read_gguf(path)
        self.n_layer, self.n_head = self.key("block_count"), self.key("attention.head_count")
        self.epsilon = self.key("attention.layer_norm_rms_epsilon")
        self.head_size = len(self.tensors["blk.0.attn_q.weight"]) // self.n_head
        base, size = self.key("rope.freq_base", 10000.0), self.head_size
        self.frequencies = base ** (-np.arange(0, size, 2) / size)

    def key(self, name: str, default: Any = None) -> Any:
        return self.metadata.get(f"llama.{name}", default)

    def losses(self, tokens: npt.ArrayLike, table: Table) -> Array:
        """[n - 1], nats: -log p of every token but the first."""
        logits, targets = self.logits(tokens, table)[:-1], np.asarray(tokens)[1:]
        top = logits.max(axis=1)
        chosen = logits[np.arange(len(targets)), targets]
        return np.asarray(top + np.log(np.exp(logits - top[:, None]).sum(axis=1)) - chosen)

    def logits(self, tokens: npt.ArrayLike, table: Table) -> Array:
        """[n, n_vocab]: what the model expects after each of the tokens."""
        x = self.tensors["token_embd.weight"][np.asarray(tokens)]
        for layer in range(self.n_layer):
            at = f"blk.{layer}."
            h = self.norm(x, at + "attn_norm")
            q, k, v = (
                self.linear(h, f"{at}attn_{name}").reshape(len(x), -1, self.head_size) for name in ("q", "k", "v")
            )
            x = x + self.linear(attend(q, k, v, table, self.frequencies).reshape(len(x), -1), at + "attn_output")
            h = self.norm(x, at + "ffn_norm")
            gate = self.linear(h, at + "ffn_gate")
            x = x + self.linear(gate / (1 + np.exp(-gate)) * self.linear(h, at + "ffn_up"), at + "ffn_down")
        output = "output" if "output.weight" in self.tensors else "token_embd"
        return self.linear(self.norm(x, "output_norm"), output)

    def norm(self, x: Array, name: str) -> Array:
        scale = np.sqrt((x * x).mean(axis=-1, keepdims=True) + self.epsilon)
        return np.asarray(x / scale * self.tensors[name + ".weight"])

    def linear(self, x: Array, name: str) -> Array:
        return np.asarray(x @ self.tensors[name + ".weight"].T)


def read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, Array]]:
    """Metadata and tensors of a GGUF file of version 3 whose tensors are F32, F16 or Q8_0."""
    data, at = path.read_bytes(), 0

    def take(code: str) -> Any:
        nonlocal at
        (value,) = struct.unpack_from("<" + code, data, at)
        at += struct.calcsize("<" + code)
        return value

    def take_text() -> str:
        return str(take(f"{take('Q')}s"), "utf-8", "replace")

    def take_value(kind: int) -> Any:
        if kind == 8:
            return take_text()
        if kind == 9:
            kind, n = take("I"), take("Q")
            return [take_value(kind) for _ in range(n)]
        return take("BbHhIif?__Qqd"[kind])

    if take("4s") != b"GGUF" or take("I") != 3:
        raise ValueError(f"{path} is no GGUF file of version 3")
    n_tensors, n_keys = take("Q"), take("Q")
    metadata = {take_text(): take_value(take("I")) for _ in range(n_keys)}
    if metadata["general.architecture"] != "llama":
        raise ValueError(f"{path} is no Llama")
    places = [(take_text(), [take("Q") for _ in range(take("I"))], take("I"), take("Q")) for _ in range(n_tensors)]
    alignment = metadata.get("general.alignment", 32)
    begin = -(-at // alignment) * alignment
    block = np.dtype([("scale", "<f2"), ("values", "i1", 32)])
    types: dict[int, np.dtype[Any]] = {0: np.dtype("<f4"), 1: np.dtype("<f2"), 8: block}
    tensors = {}
    for name, shape, kind, offset in places:
        size = int(np.prod(shape)) // (32 if kind == 8 else 1)
        raw = np.frombuffer(data, types[kind], size, begin + offset)
        values = raw["scale"][:, None].astype(np.float64) * raw["values"] if kind == 8 else raw
        tensors[name] = np.asarray(values, dtype=np.float64).reshape(shape[::-1])
    return metadata, tensors
