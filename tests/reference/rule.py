"""The Λ-attention rule, and attention that follows it.

LM-Infinite (Han et al., NAACL 2024, doi 10.18653/v1/2024.naacl-long.222), section 3: query i attends to key j <= i

    i - j <  n_local                   at its true distance i - j
    i - j >= n_local and j < n_global  at one fixed distance, the ceiling
    otherwise                          not at all

and, with recall, to some of the others at one more distance: see Recall.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from reference.gguf_file import Array

Positions = npt.NDArray[np.int64]
Tokens = npt.NDArray[np.integer[Any]]
Mode = Literal["ceiling", "order", "true"]


@dataclass(frozen=True)
class Recall:
    """What a layer attends to beside sinks and window, micro-batch by micro-batch.

    Candidates are the keys that no query of the micro-batch has in its window, sinks not counted. Every one of its last
    n_votes queries gives each of its heads one vote, by the softmax of its scores of all candidates. A vote counts
    for the tokens around, too, at distance d as 1 - d / n_near. The one with most is chosen with its neighbors, n_span
    tokens of the stream in all, half of them before it; then, of those not chosen yet, again the one with most, until
    there are n. One is left out with its neighbors if these n_span tokens are the same, in the same order, as n_span
    around a token less than n_near from one that was chosen so: it comes after all others. All queries attend to what
    is chosen, at this distance. Confidence is the share of the softmax that all of them have, for each query that of
    the head with the largest, in the mean over those that vote: log(min(1, confidence / sure)) is added to their
    scores.

    n: tokens recalled.
    distance: where they stand for every query.
    n_batch: tokens of a micro-batch.
    since: the first layer that recalls.
    paper: LM-Infinite's code: the newest query of each batch alone, with n keys of its own for each head.
    """

    n: int
    distance: int
    n_batch: int
    since: int = 0
    paper: bool = False
    n_votes: int = 32
    n_span: int = 16
    n_near: int = 8
    sure: float = 0.125


@dataclass(frozen=True)
class Rule:
    """Who attends to whom, and how far apart they seem; `Rule()` is plain causal attention.

    n_local: window in tokens, the query counted; None for no window at all.
    n_global: sinks, the first tokens of the stream.
    max_distance: the ceiling in tokens, n_local by default.
    chunk: nobody attends across multiples of so many positions; None for no such limit.
    mode: where a sink stands for a query whose window it has left.
        ceiling: at max_distance, all of them (LM-Infinite).
        order: in order right before the window, min(i, n_global + n_local - 1) - j (StreamingLLM's cache positions).
        true: at its true distance i - j.
    recall: what else is attended to.
    """

    n_local: int | None = None
    n_global: int = 0
    max_distance: int | None = None
    mode: Mode = "ceiling"
    chunk: int | None = None
    recall: Recall | None = None

    @property
    def ceiling(self) -> int | None:
        """The distance ceiling in tokens, None without a window."""
        return self.n_local if self.max_distance is None else self.max_distance

    def sink_positions(self, i: Positions, j: Positions) -> tuple[Positions, Positions]:
        """Positions that queries i and sinks j take for each other, so that their difference is the rule's distance."""
        if self.n_local is None or self.ceiling is None:
            raise ValueError("a rule without a window has no sinks apart")
        if self.mode == "ceiling":
            return np.full_like(i, self.ceiling), np.zeros_like(j)
        if self.mode == "order":
            return np.minimum(i, self.n_global + self.n_local - 1), j
        return i, j


@dataclass(frozen=True)
class Rope:
    """Rotary position encoding: pair k of n_rot dimensions of a head turns by position * frequencies[k].

    frequencies: [n_rot / 2], radians per token. Empty for a layer without RoPE.
    adjacent: pairs are (2k, 2k + 1), otherwise (k, k + n_rot / 2).
    magnitude: factor on the rotated dimensions (YaRN and LongRoPE).
    begin: the first rotated dimension.
    """

    frequencies: Array
    adjacent: bool = False
    magnitude: float = 1.0
    begin: int = 0

    def rotate(self, x: Array, positions: Positions) -> Array:
        """Turn the heads x[n_tokens, n_head, head_size] to positions[n_tokens]; returns a new array."""
        n, at = len(self.frequencies), self.begin
        angles = positions[:, None, None] * self.frequencies
        cos, sin = self.magnitude * np.cos(angles), self.magnitude * np.sin(angles)
        if self.adjacent:
            first, second = slice(at, at + 2 * n, 2), slice(at + 1, at + 2 * n, 2)
        else:
            first, second = slice(at, at + n), slice(at + n, at + 2 * n)
        turned = np.array(x)
        turned[..., first] = x[..., first] * cos - x[..., second] * sin
        turned[..., second] = x[..., first] * sin + x[..., second] * cos
        return turned


def attend(
    q: Array,
    k: Array,
    v: Array,
    rule: Rule,
    rope: Rope,
    slopes: Array,
    score: Callable[[Array], Array],
    block: int = 64,
    positions: Positions | None = None,
    learned_sinks: Array | None = None,
    tokens: Tokens | None = None,
) -> Array:
    """Attention over a whole stream, by blocks of queries so that memory and time follow the window.

    q: [n_tokens, n_head, head_size], k: [n_tokens, n_head_kv, head_size], v: [n_tokens, n_head_kv, value_size], all
    before RoPE. Query heads h * n_head / n_head_kv and following share key head h.
    slopes: [n_head], ALiBi: -slope * distance is added to a score; zeros without ALiBi.
    score: what becomes of q.k before ALiBi and softmax (scaling, capping).
    block: queries handled at once.
    positions: [n_tokens], ascending, where the tokens stand in the stream; 0, 1, 2, ... unless tokens were skipped.
    learned_sinks: [n_head], one more logit in the softmax of each head, that no value belongs to.
    tokens: [n_tokens], what the tokens are; None where no two are the same.
    Returns [n_tokens, n_head, value_size].
    """
    n_tokens, n_head, head_size = q.shape
    n_head_kv = k.shape[1]
    stream = np.arange(n_tokens) if positions is None else positions
    words = np.arange(n_tokens) if tokens is None else np.asarray(tokens)
    slopes = slopes.reshape(n_head_kv, -1, 1, 1)
    nothing = np.full(n_head, -np.inf) if learned_sinks is None else learned_sinks
    nothing = nothing.reshape(n_head_kv, -1, 1, 1)
    n_local = int(stream[-1]) + 1 if rule.n_local is None else rule.n_local

    def scores(q_rows: Array, q_pos: Positions, k_rows: Array, k_pos: Positions) -> Array:
        """[n_head_kv, n_group, n_queries, n_keys]"""
        turned_q = rope.rotate(q_rows, q_pos).reshape(len(q_pos), n_head_kv, -1, head_size).transpose(1, 2, 0, 3)
        turned_k = rope.rotate(k_rows, k_pos).transpose(1, 2, 0)[:, None]
        return score(turned_q @ turned_k) - slopes * (q_pos[:, None] - k_pos)

    recall = rule.recall
    block = recall.n_batch if recall else block
    out = np.empty((n_tokens, n_head, v.shape[2]))
    for begin in range(0, n_tokens, block):
        rows = slice(begin, begin + block)
        i = stream[rows]
        near = slice(np.searchsorted(stream, i[0] + 1 - n_local), begin + len(i))
        distance = i[:, None] - stream[near]
        seen = (distance >= 0) & (distance < n_local)
        if rule.chunk is not None:
            seen &= i[:, None] // rule.chunk == stream[near] // rule.chunk
        logits = scores(q[rows], i, k[near], stream[near])
        values = v[near]
        n_sinks = int(np.searchsorted(stream, min(rule.n_global, i[-1] + 1 - n_local)))
        if n_sinks:
            sinks = stream[:n_sinks]
            q_pos, k_pos = rule.sink_positions(i, sinks)
            logits = np.concatenate([scores(q[rows], q_pos, k[:n_sinks], k_pos), logits], axis=-1)
            seen = np.concatenate([i[:, None] - sinks >= n_local, seen], axis=-1)
            values = np.concatenate([v[:n_sinks], values])
        logits = np.where(seen, logits, -np.inf)
        if recall:
            last = stream[begin + len(i) - 1] if recall.paper else i[0]
            candidates = np.flatnonzero((stream >= rule.n_global) & (stream <= last - n_local))
            q_pos = np.full(len(i), recall.distance)
            all_scores = scores(q[rows], q_pos, k[candidates], np.zeros(len(candidates), dtype=np.int64))
            chosen, extra = choose(all_scores, stream[candidates], words[candidates], recall)
            logits = np.concatenate([extra, logits], axis=-1)
            values = np.concatenate([v[candidates[chosen]], values])
        top = np.maximum(logits.max(axis=-1, keepdims=True), nothing)
        weights = np.exp(logits - top)
        weights /= weights.sum(axis=-1, keepdims=True) + np.exp(nothing - top)
        mixed = weights @ values.transpose(1, 0, 2)[:, None]
        out[rows] = mixed.transpose(2, 0, 1, 3).reshape(len(i), n_head, -1)
    return out


def choose(scores: Array, candidates: Positions, tokens: Tokens, recall: Recall) -> tuple[Positions, Array]:
    """Which of the candidates are recalled, ascending, and their scores as they enter the softmax.

    scores: [n_head_kv, n_group, n_queries, n_candidates], with the recalled ones' distance.
    candidates: [n_candidates], where they stand in the stream, ascending.
    tokens: [n_candidates], what they are.
    """
    n_candidates = scores.shape[-1]
    if recall.paper:
        logits = np.full_like(scores, -np.inf)
        if n_candidates >= recall.n:
            newest = scores[:, :, -1]
            best = np.argsort(-newest, axis=-1, kind="stable")[..., : recall.n]
            np.put_along_axis(logits[:, :, -1], best, np.take_along_axis(newest, best, axis=-1), axis=-1)
        return np.arange(n_candidates), logits
    if not n_candidates:
        return np.arange(0), scores
    voting = scores[:, :, -recall.n_votes :]
    shares = np.exp(voting - voting.max(axis=-1, keepdims=True))
    shares /= shares.sum(axis=-1, keepdims=True)
    apart = np.abs(candidates[:, None] - candidates)
    votes = np.maximum(1 - apart / recall.n_near, 0) @ shares.sum(axis=(0, 1, 2))
    half, n = recall.n_span // 2, min(recall.n, n_candidates)
    offsets = sorted(range(-half, half), key=lambda offset: (abs(offset), offset))
    words = dict(zip(candidates.tolist(), tokens.tolist(), strict=True))

    def span(i: int) -> list[int | None]:
        return [words.get(i + offset) for offset in range(-half, half)]

    is_chosen, is_left_out = np.zeros((2, n_candidates), dtype=bool)
    hits: list[int] = []
    around = range(1 - recall.n_near, recall.n_near)
    while is_chosen.sum() < n:
        is_free = ~is_chosen & ~is_left_out
        if not is_free.any():
            is_left_out[:], around = False, range(0)  # now they come
            continue
        hit = int(candidates[np.argmax(np.where(is_free, votes, -1.0))])
        is_copy = None not in span(hit) and any(span(other + k) == span(hit) for other in hits for k in around)
        for offset in offsets:
            at = np.flatnonzero(candidates == hit + offset)
            if is_copy:
                is_left_out[at] = True
            elif is_chosen.sum() < n:
                is_chosen[at] = True
        if not is_copy:
            hits.append(hit)
    chosen = np.flatnonzero(is_chosen)
    confidence = shares[..., chosen].sum(axis=-1).max(axis=(0, 1)).mean()
    return chosen, scores[..., chosen] + np.log(min(1.0, confidence / recall.sure))
