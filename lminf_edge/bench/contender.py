"""What is measured: one library, one kind of cache, one test."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from lminf_edge.config import KV_TYPES, LMInfConfig, Recall, Window, physical_memory, resolve
from lminf_edge.errors import UserError

KV_TYPE_NUMBERS = {name: number for number, (name, _, _) in KV_TYPES.items()}

NO_RECALL = Recall()

Cache = Literal["lambda", "recall", "full", "window", "state"]


@dataclass(frozen=True)
class Contender:
    """A test as llama-bench names it, of one library with one kind of cache.

    library     "ours" or "stock"
    cache       "lambda": the Λ cache, its next token at stream position `depth`
                "recall": the same, and each layer recalls tokens
                "full": llama.cpp's own, of `depth` tokens, and room for the test
                "window": llama.cpp's own, of n_ctx = window tokens, which the test fills to the last one
                "state": llama.cpp's own of a purely recurrent model, whose size and speed do not depend on depth
    test        "pp": n_tokens in batches, "tg": one after the other
    depth       tokens processed before the test; "window" has window - n_tokens of them
    window      n_global + n_local of a Λ cache, n_ctx of a "window" cache
    prefilled   the tokens before the test were really processed; else their cells and archive are made up (state.py)
    recall      what "recall" recalls
    """

    library: str
    cache: Cache
    test: Literal["pp", "tg"]
    n_tokens: int
    depth: int
    window: int = 4096
    n_global: int = 10
    flash_attn: bool = False
    kv_type: str = "f16"
    n_ubatch: int = 512
    prefilled: bool = False
    recall: Recall = NO_RECALL

    def __post_init__(self) -> None:
        if self.cache == "window" and self.depth != self.window - self.n_tokens:
            raise UserError(f"A window of {self.window} tokens must be larger than a test of {self.n_tokens}.")
        if self.is_lambda and self.window <= self.n_global:
            raise UserError(f"A window of {self.window} tokens must be larger than n_global={self.n_global}.")

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Contender:
        """What `asdict` gave, perhaps with other values beside it, or before there was recall."""
        known = {name: values[name] for name in cls.__dataclass_fields__ if name in values}
        return cls(**{**known, "recall": Recall(**values.get("recall", {}))})

    @property
    def is_lambda(self) -> bool:
        return self.cache in ("lambda", "recall")

    @property
    def n_ctx(self) -> int:
        """Context size, in tokens, for llama.cpp's own cache."""
        return self.window if self.cache == "window" else self.depth + self.n_tokens

    @property
    def label(self) -> str:
        """ "tg32 @ d4096", in llama-bench's terms."""
        return f"{self.test}{self.n_tokens}" + (f" @ d{self.depth}" if self.depth else "")

    @property
    def cache_label(self) -> str:
        """The kind of cache in a few words."""
        if self.is_lambda:
            recalls = f", {self.recall.n_recall} recalled" if self.cache == "recall" else ""
            return f"Λ {self.n_global} + {self.window - self.n_global}{recalls}"
        if self.cache == "state":
            return "recurrent state"
        return f"n_ctx {self.window}" if self.cache == "window" else "full attention"

    def lambda_window(self) -> Window:
        """The parameters of the Λ cache; distances do not matter here, and an archive may take all memory."""
        recall = self.recall.recall_settings() if self.cache == "recall" else {}
        config = LMInfConfig(n_global=self.n_global, archive_memory=physical_memory(), **recall)
        return resolve(config, self.window, self.window)


def is_quantized(kv_type: str) -> bool:
    """Whether llama.cpp needs flash attention for values of this type."""
    return KV_TYPES[KV_TYPE_NUMBERS[kv_type]][2] > 1
