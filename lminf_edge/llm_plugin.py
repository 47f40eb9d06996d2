"""A plugin of llm (https://llm.datasette.io), which finds it by its entry point: our models, with a Λ cache.

llm -m lminf-smollm2 "What is a lighthouse?", or llm chat -m lminf-smollm2, for as long as you like.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import llm
from pydantic import Field

from lminf_edge.models import embedded_models
from lminf_edge.models.named import NAMED_MODELS

BASE_MODELS = ("nano", "nano-alibi", "gemma")  # they continue a text


@llm.hookimpl
def register_models(register: Callable[..., None]) -> None:
    for name in [*embedded_models(), *NAMED_MODELS]:
        register(LambdaModel(name))


class LambdaModel(llm.Model):
    """A model that is known by name, loaded when it is first asked."""

    can_stream = True

    class Options(llm.Options):
        max_tokens: int | None = Field(default=None, ge=1, description="Tokens to generate at most")
        temperature: float = Field(default=0.8, ge=0, description="0: always the likeliest token")
        repeat_penalty: float = Field(default=1.1, ge=0, description="1: none")

    def __init__(self, name: str) -> None:
        self.model_id = f"lminf-{name}"
        self.name = name
        self._llama: Any = None

    def execute(self, prompt: Any, stream: bool, response: Any, conversation: Any) -> Iterator[str]:
        del response
        settings = {name: getattr(prompt.options, name) for name in type(prompt.options).model_fields}
        if self._llama is None:
            from lminf_edge import Llama

            self._llama = Llama(self.name, lminf=True, verbose=False)
        if self.name in BASE_MODELS:
            for chunk in self._llama.create_completion(prompt.prompt, stream=True, **settings):
                yield chunk["choices"][0]["text"]
            return
        for chunk in self._llama.create_chat_completion(_messages(prompt, conversation), stream=True, **settings):
            yield chunk["choices"][0]["delta"].get("content") or ""


def _messages(prompt: Any, conversation: Any) -> list[dict[str, str]]:
    """The whole conversation: only what is new of it is processed."""
    messages: list[dict[str, str]] = []
    system = None
    turns = [(each.prompt, each.text()) for each in conversation.responses] if conversation is not None else []
    for asked, answer in [*turns, (prompt, None)]:
        if asked.system and asked.system != system:
            system = asked.system
            messages.append({"role": "system", "content": system})
        messages.append({"role": "user", "content": asked.prompt})
        if answer is not None:
            messages.append({"role": "assistant", "content": answer})
    return messages
