"""Cache policies for streams longer than the training length, compared on the same tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lminf_edge.config import LMInfConfig, SinkMode, Window
from lminf_edge.errors import UserError

if TYPE_CHECKING:
    from lminf_edge.evaluate.reader import Reader
    from lminf_edge.llama import Llama

N_RECALL = 32  # tokens that the policy "recall" recalls if nothing else is said


@dataclass(frozen=True)
class Policy:
    """One of them. All but full attention have n_global + n_local tokens in view and constant memory, but for recall.

    sink_mode   of our cache, through which all of these run but the two of stock llama.cpp, where it is None
    recalls     tokens that have left the window are attended to again
    """

    name: str
    summary: str
    sink_mode: SinkMode | None = None
    recalls: bool = False

    def arguments(self, window: Window, n_tokens: int, n_batch: int, on_gpu: bool) -> dict[str, Any]:
        """Llama's arguments for a stream of at most n_tokens, beside model, n_batch and number formats.

        Micro-batches are the same for all of them.
        """
        n_ubatch = min(n_batch, window.default_ubatch(on_gpu))
        if self.sink_mode is None:
            if self.name == "shift":  # llama.cpp can only shift if sliding layers have as many cells as the others
                return {"n_ctx": window.size, "n_ubatch": n_ubatch}
            return {"n_ctx": n_tokens, "n_ubatch": n_ubatch, "swa_full": False}
        n_global = 0 if self.name == "window" else window.n_global
        config = LMInfConfig(
            n_global=n_global,
            n_local=window.size - n_global,
            max_distance=window.max_distance,
            sink_mode=self.sink_mode,
            attention=window.attention,
            **(recall_of(window) if self.recalls else {}),
        )
        return {"lminf": config, "n_ubatch": n_ubatch}

    def reader(self, llm: Llama, window: Window) -> Reader:
        """A reader for a model made with these arguments. Raises ValueError if the model cannot be read this way."""
        from lminf_edge.evaluate.reader import ShiftReader, reader_of

        return ShiftReader(llm, window.size, window.n_global) if self.name == "shift" else reader_of(llm)


POLICIES = {
    policy.name: policy
    for policy in (
        Policy("full", "full attention, in a context as large as the text"),
        Policy("shift", "llama.cpp's context shift: when full, keep n_global and discard half of the rest"),
        Policy("window", "the last n_global + n_local tokens, no first ones", "ceiling"),
        Policy("sinks", "StreamingLLM: first and last tokens, at their positions inside the cache", "order"),
        Policy("sinks-uncapped", "first and last tokens, at their true distances", "true"),
        Policy("lminf", "LM-Infinite: first and last tokens, the first at one fixed distance", "ceiling"),
        Policy(
            "recall", "the same, and of the other tokens those that a layer looks for most", "ceiling", recalls=True
        ),
    )
}


WITHOUT_RECALL = {name: policy for name, policy in POLICIES.items() if not policy.recalls}


def recall_of(window: Window) -> dict[str, Any]:
    """What the policy "recall" recalls in this window: parameters of LMInfConfig."""
    found = {"n_recall": window.n_recall or N_RECALL, "n_archive": window.n_archive or None}
    return window.recall_settings() | found


def parse_policies(text: str) -> list[Policy]:
    """The policies of "all" or "full,lminf", in the order of the table, each once. Raises ValueError for others."""
    names = list(POLICIES) if text == "all" else text.split(",")
    for name in names:
        if name not in POLICIES:
            raise UserError(f"there is no policy {name!r}: give all, or some of {','.join(POLICIES)}")
    return [policy for policy in POLICIES.values() if policy.name in names]


def describe(policies: Sequence[Policy]) -> str:
    """A line for each."""
    return "\n".join(f"  {policy.name:<15} {policy.summary}" for policy in policies)
