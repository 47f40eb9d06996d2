"""The option --policies, and the models that go with it."""

from __future__ import annotations

import argparse
import contextlib
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lminf_edge.cli.common import (
    CommandError,
    load,
    model_header,
    model_settings,
    options_named,
    resolved_window,
    show_note,
    weightless,
)
from lminf_edge.config import DEFAULT_WINDOW, Window, physical_memory, warn_of_window
from lminf_edge.evaluate.policies import POLICIES, Policy, describe, parse_policies
from lminf_edge.gguf_header import Header

if TYPE_CHECKING:
    from lminf_edge.evaluate.reader import Reader
    from lminf_edge.weightless import Weightless

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

    def able(self, policies: Sequence[Policy]) -> list[Policy]:
        """Of all policies those that there are for this kind of model, with a note for each other; of some, all."""
        if len(policies) < len(POLICIES):
            return list(policies)
        with weightless(self.path) as model:
            reasons = {policy: self._kind_refusal(model, policy) for policy in policies}
        for policy, reason in reasons.items():
            if reason:
                show_note(f"Left out of all policies is {policy.name}: {reason}")
        return [policy for policy, reason in reasons.items() if not reason]

    def check(self, policies: Sequence[Policy], n_full: int) -> None:
        """Raises CommandError if one of them cannot run, full attention over n_full tokens."""
        with weightless(self.path) as model:
            for policy in policies:
                if policy.name == "full":
                    refusal = self._memory_refusal(model, n_full) or model.stock_refusal(self.kv_type, n_full)
                else:
                    refusal = self._kind_refusal(model, policy)
                    if not refusal and policy.name != "shift":
                        refusal = model.refusal(self.kv_type, self.window.attention)
                if refusal:
                    raise CommandError(f"The policy {policy.name} cannot run: {refusal}")

    def _kind_refusal(self, model: Weightless, policy: Policy) -> str | None:
        """Why there is no such policy for models that the Λ cache runs, in one sentence."""
        if policy.name == "shift":
            return model.stock_refusal(self.kv_type, self.window.size, shift=True)
        if model.is_constant and policy.name not in ("full", "lminf"):
            return "the model is purely recurrent and has no attention to limit."
        return None

    def _memory_refusal(self, model: Weightless, n_tokens: int) -> str | None:
        need, memory = model.stock_bytes(n_tokens, self.kv_type), physical_memory()
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
    with weightless(path) as model:
        if model.is_constant:
            from lminf_edge.model import constant_note

            show_note(constant_note(header.architecture))
        else:
            with options_named():
                warn_of_window(window, header.n_ctx_train or DEFAULT_WINDOW, model.n_swa)
    return Setup(path, header, window, settings["type_k"], settings)
