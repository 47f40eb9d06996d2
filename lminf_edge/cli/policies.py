"""The option --policies, and the models that go with it."""

from __future__ import annotations

import argparse
import contextlib
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lminf_edge.cli.common import CommandError, load, model_header, model_settings, resolved_window
from lminf_edge.cli.probe import probe, stock_refusal
from lminf_edge.config import Window, kv_bytes, physical_memory
from lminf_edge.evaluate.policies import POLICIES, Policy, describe, parse_policies
from lminf_edge.gguf_header import Header

if TYPE_CHECKING:
    from lminf_edge.evaluate.reader import Reader

EPILOG = "policies, all but full with n_global + n_local tokens in view:\n" + describe(list(POLICIES.values()))


def policies(text: str) -> list[Policy]:
    """An argparse type: "all", or some of the names with commas between them."""
    try:
        return parse_policies(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


@dataclass(frozen=True)
class Setup:
    """The model and the settings that all policies share."""

    path: str
    header: Header
    window: Window
    kv_type: int
    settings: dict[str, Any]  # Llama's arguments

    @contextlib.contextmanager
    def reader(self, policy: Policy, n_tokens: int) -> Iterator[Reader]:
        """A reader for a stream of at most n_tokens; its model is freed at the end of the `with` block."""
        arguments = policy.arguments(
            self.window, n_tokens, self.settings["n_batch"], on_gpu=bool(self.settings["n_gpu_layers"])
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # too long a window was warned of once, by `set_up`
            llm = load(self.path, **arguments, **self.settings)
        with contextlib.closing(llm):
            yield policy.reader(llm, self.window)

    def check(self, policies: Sequence[Policy], n_full: int) -> None:
        """Raises CommandError if one of them cannot run, full attention over n_full tokens."""
        for policy in policies:
            if policy.name == "full":
                refusal = self._memory_refusal(n_full) or stock_refusal(self.path, self.kv_type, n_full)
            elif policy.name == "shift":
                refusal = stock_refusal(self.path, self.kv_type, self.window.size, shift=True)
            else:
                refusal, _ = probe(self.path, self.kv_type, self.window.attention)
            if refusal:
                raise CommandError(f"The policy {policy.name} cannot run: {refusal}")

    def _memory_refusal(self, n_tokens: int) -> str | None:
        need, memory = kv_bytes(self.header, self.kv_type, n_tokens), physical_memory()
        if self.settings["n_gpu_layers"] or memory is None or need <= memory:
            return None
        return (
            f"its cache for {n_tokens} tokens would take {need:,} bytes and this machine has {memory:,} bytes of "
            "memory, so give it fewer tokens or leave it out."
        )


def set_up(args: argparse.Namespace) -> Setup:
    """From the options of add_model, add_window and add_compute."""
    path, header = model_header(args.model)
    settings = model_settings(args)
    window = resolved_window(args, header)
    return Setup(path, header, window, settings["type_k"], settings)
