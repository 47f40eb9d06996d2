"""Finds the longest prefix of a prompt that is in the cache.

A stored stream serves a request only if every token in it is a token of the request, in the same place, and only
requests of the same owner. The one exception is a conversation that its client names: it may continue after the client
dropped whole messages right after the system block.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass

import numpy as np

from lminf_edge.cache.conversation import Conversation, Stored
from lminf_edge.cache.store import CheckpointStore
from lminf_edge.cache.token_log import TokenLog, Tokens, common_prefix
from lminf_edge.engine.request import Request
from lminf_edge.engine.slot import Slot, salt

_WORTH_RESTORING = 32  # tokens: restoring copies a whole cache, which costs as much as processing some
_MAX_TRIM_POINTS = 256  # candidates for the end of the dropped part that are compared in full, at most
_GLANCE = 16  # tokens that are compared first
_MAX_NAMED = 8  # conversations of one name that are looked at, the most recently used ones


@dataclass(frozen=True)
class PrefixMatch:
    """Where a request starts: in a slot, from a checkpoint, or (neither) with an empty stream."""

    n_cached: int = 0  # tokens of the prompt that need not be processed
    slot: Slot | None = None
    stored: Stored | None = None
    n_trimmed: int = 0  # length of the conversation's log to go back to before its oldest messages are dropped


def find_prefix(
    request: Request,
    n_sinks: int,
    may_skip: bool,
    free: Sequence[Slot],
    store: CheckpointStore,
    has_logits: Container[Slot] = (),
) -> PrefixMatch:
    """The longest known prefix of a prompt, without its last token, which must be processed for its logits.

    n_sinks     sinks of the request's stream
    may_skip    whether its stream may have skipped tokens
    has_logits  slots whose last token's logits are available: their prefix may be the whole prompt
    """
    if request.wants_prompt_logits or not request.reuses:
        return PrefixMatch()
    prompt = TokenLog(request.prompt)
    n_most = len(prompt) - 1
    best = PrefixMatch()
    for slot in free:
        if not _may_serve(slot, request, n_sinks, may_skip):
            continue
        n_same = slot.log.prefix_of(prompt)
        if n_same != len(slot) or slot not in has_logits:
            n_same = min(n_same, n_most)
        n_reached = slot.reach(n_same) if n_same > best.n_cached else 0
        if n_reached > best.n_cached:
            best = PrefixMatch(n_reached, slot=slot)
    labels = ["", request.label] if request.label else [""]
    salts = [salt(n_sinks, request.owner, label, skip) for label in labels for skip in {False, may_skip}]
    found = store.find(prompt, best.n_cached + (_WORTH_RESTORING if best.n_cached else 1), n_most, salts)
    if found is not None:
        best = PrefixMatch(found[1], stored=found[0])
    # a client may have several histories of one name: front ends ask for a chat's title in the chat's name
    for conversation in store.named(request.owner, request.label)[:_MAX_NAMED]:
        best = _find_trimmed(request, conversation, n_sinks, may_skip, free, store, best)
    return best


def _may_serve(slot: Slot, request: Request, n_sinks: int, may_skip: bool) -> bool:
    """Whether a slot's stream may serve the request, provided that its tokens match."""
    conversation = slot.conversation
    return (
        conversation is not None
        and slot.n_sinks == n_sinks
        and conversation.owner == request.owner
        and (slot.n_dropped == 0 or conversation.label == request.label != "")
        and (slot.n_skipped == 0 or may_skip)
    )


def _find_trimmed(
    request: Request,
    conversation: Conversation,
    n_sinks: int,
    may_skip: bool,
    free: Sequence[Slot],
    store: CheckpointStore,
    best: PrefixMatch,
) -> PrefixMatch:
    """Something better than `best`: a conversation of the request's name, whose client dropped its oldest messages."""
    n_system = request.n_system
    if n_system is None:
        return best
    slot = next((slot for slot in free if slot.conversation is conversation), None)
    if slot is not None:
        if not _may_serve(slot, request, n_sinks, may_skip):
            return best
        stored, n_log, reach = None, len(slot), slot.reach
    else:
        stored = newest_checkpoint(conversation, store, n_sinks, may_skip)
        if stored is None:
            return best
        n_log, reach = stored.n_tokens, stored.reach
    found = trim_point(store.log(conversation).recent()[:n_log], request.prompt, n_system, reach)
    return PrefixMatch(found[1], slot, stored, found[0]) if found and found[1] > best.n_cached else best


def newest_checkpoint(
    conversation: Conversation, store: CheckpointStore, n_sinks: int, may_skip: bool
) -> Stored | None:
    """The checkpoint that stands for most of the log of a conversation that no slot holds, if it may be taken up.

    Others are of what the conversation was before an edit.
    """
    if conversation.is_hot:
        return None
    log = store.log(conversation)
    for stored in sorted(conversation.checkpoints, key=lambda each: each.n_tokens, reverse=True):
        n_tokens, label = stored.n_tokens, conversation.label if stored.n_dropped else ""
        if n_tokens > len(log) or stored.n_sinks != n_sinks or (stored.n_skipped and not may_skip):
            continue
        if log.key(n_tokens, salt(n_sinks, conversation.owner, label, stored.n_skipped > 0)) in stored.keys:
            return stored
    return None


def trim_point(log: Tokens, prompt: Tokens, n_system: int, reach: Callable[[int], int]) -> tuple[int, int] | None:
    """Whether prompt (n_prompt,) goes on from log (n_log,), its oldest messages dropped.

    `reach` tells how much of the first n tokens of the log its stream can go back to. Returns the length of the log to
    go back to, and how many tokens of the prompt that covers; None if anything but whole messages right after the first
    n_system tokens is missing. Messages begin with the control token that stands there in both, and one of them at
    least must have come back as it was.
    """
    n_log, n_most = len(log), len(prompt) - 1
    if not n_system < min(n_log, n_most) or common_prefix(log, prompt[: n_system + 1]) <= n_system:
        return None
    starts = np.flatnonzero(log[n_system:] == prompt[n_system]) + n_system
    tail = prompt[n_system:n_most]
    n_compared = 0
    for start in starts[starts > n_system].tolist():
        n_glance = min(_GLANCE, n_log - start, len(tail))
        if not np.array_equal(log[start : start + n_glance], tail[:n_glance]):
            continue
        n_compared += 1
        if n_compared > _MAX_TRIM_POINTS:
            break
        n_same = common_prefix(log[start:], tail)
        others = starts[starts > start]
        is_whole = start + n_same == n_log or (len(others) > 0 and others[0] <= start + n_same)
        n_reached = reach(start + n_same) if is_whole else 0
        if n_reached > start:
            return n_reached, n_system + n_reached - start
    return None
