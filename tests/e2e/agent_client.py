"""An agent that calls a tool in every turn and gets a long output, by each of the three APIs."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import anthropic
import openai

SYSTEM = "You are an agent. You look pages up, one after the other, and tell what is on them."
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"page": {"type": "integer", "minimum": 1, "maximum": 9}, "mode": {"enum": ["whole", "part"]}},
    "required": ["page", "mode"],
}
NAME, ABOUT = "look_up", "Looks a page up."
ALWAYS: Any = {"model": "any"}
MAX_TOKENS = 40
PINNED = {"pin_system": True}


@dataclass
class Turn:
    """
    n_new     tokens of the prompt that were not in the cache
    n_prompt  tokens of the prompt
    """

    n_new: int
    n_prompt: int
    arguments: dict[str, Any]
    n_sinks: int
    is_compacted: bool = False


@dataclass
class Agent:
    """Its history, in the words of its API."""

    url: str
    history: list[Any] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)

    def ask(self, said: str | None, output: str | None) -> Turn:
        raise NotImplementedError


class ChatAgent(Agent):
    def ask(self, said: str | None, output: str | None) -> Turn:
        client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)
        if not self.history:
            self.history.append({"role": "system", "content": SYSTEM})
        if output is not None:
            call_id = self.history[-1]["tool_calls"][0]["id"]
            self.history.append({"role": "tool", "tool_call_id": call_id, "content": output})
        if said is not None:
            self.history.append({"role": "user", "content": said})
        function = {"name": NAME, "description": ABOUT, "parameters": SCHEMA}
        stream = client.chat.completions.create(
            **ALWAYS,
            max_tokens=MAX_TOKENS,
            messages=self.history,
            tools=[{"type": "function", "function": function}],  # type: ignore[list-item]
            tool_choice="required",
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"lminf": PINNED, "temperature": 0},
        )
        chunks = list(stream)
        calls = [call for chunk in chunks for choice in chunk.choices for call in choice.delta.tool_calls or []]
        arguments = "".join(call.function.arguments for call in calls)
        call = {"id": calls[0].id, "type": "function", "function": {"name": NAME, "arguments": arguments}}
        self.history.append({"role": "assistant", "content": None, "tool_calls": [call]})
        usage = chunks[-1].usage
        n_new = usage.prompt_tokens - usage.prompt_tokens_details.cached_tokens
        return Turn(n_new, usage.prompt_tokens, json.loads(arguments), chunks[-1].lminf["sink"])


class ResponsesAgent(Agent):
    compact_at = 50_000

    def ask(self, said: str | None, output: str | None) -> Turn:
        client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)
        if output is not None:
            call_id = self.history[-1]["call_id"]
            self.history.append({"type": "function_call_output", "call_id": call_id, "output": output})
        if said is not None:
            self.history.append({"role": "user", "content": said})
        tool = {"type": "function", "name": NAME, "description": ABOUT, "parameters": SCHEMA, "strict": False}
        stream = client.responses.create(
            **ALWAYS,
            max_output_tokens=MAX_TOKENS,
            instructions=SYSTEM,
            input=self.history,
            tools=[tool],  # type: ignore[list-item]
            tool_choice="required",
            store=False,
            stream=True,
            context_management=[{"type": "compaction", "compact_threshold": self.compact_at}],
            extra_body={"lminf": PINNED, "temperature": 0},
        )
        events = list(stream)
        answer = events[-1].response
        assert answer.status == "completed", answer.error
        is_compacted = answer.output[0].type == "compaction"
        if is_compacted:
            self.history = []
        self.history += [item.model_dump(exclude_none=True) for item in answer.output]
        usage = answer.usage
        n_new = usage.input_tokens - usage.input_tokens_details.cached_tokens
        arguments = json.loads(answer.output[-1].arguments)
        return Turn(n_new, usage.input_tokens, arguments, answer.lminf["sink"], is_compacted)


class MessagesAgent(Agent):
    compact_at = 50_000

    def ask(self, said: str | None, output: str | None) -> Turn:
        client = anthropic.Anthropic(base_url=self.url, api_key="none", max_retries=0)
        blocks: list[Any] = []
        if output is not None:
            call_id = self.history[-1]["content"][-1]["id"]
            blocks.append({"type": "tool_result", "tool_use_id": call_id, "content": output})
        if said is not None:
            blocks.append({"type": "text", "text": said})
        self.history.append({"role": "user", "content": blocks})
        edit = {"type": "compact_20260112", "trigger": {"type": "input_tokens", "value": self.compact_at}}
        stream = client.beta.messages.create(
            **ALWAYS,
            max_tokens=MAX_TOKENS,
            system=SYSTEM,
            messages=self.history,
            tools=[{"name": NAME, "description": ABOUT, "input_schema": SCHEMA}],
            tool_choice={"type": "any"},
            stream=True,
            context_management={"edits": [edit]},  # type: ignore[list-item]
            betas=["compact-2026-01-12"],
            extra_body={"lminf": PINNED, "temperature": 0},
        )

        def is_content(event: Any) -> bool:
            return event.type == "content_block_delta" and event.delta.type == "input_json_delta"

        events = list(stream)
        begun = [
            event.content_block.model_dump(exclude_none=True) for event in events if event.type == "content_block_start"
        ]
        text = ""
        for event in events:
            if event.type == "content_block_delta" and event.delta.type == "compaction_delta":
                begun[0].update(content=event.delta.content, encrypted_content=event.delta.encrypted_content)
            elif is_content(event):
                text += event.delta.partial_json
        begun[-1]["input"] = json.loads(text)
        is_compacted = begun[0]["type"] == "compaction"
        if is_compacted:
            self.history = []
        self.history.append({"role": "assistant", "content": begun})
        last = events[-2]
        assert last.delta.stop_reason == "tool_use"
        usage = last.usage
        n_prompt = usage.input_tokens + usage.cache_read_input_tokens
        return Turn(usage.input_tokens, n_prompt, begun[-1]["input"], last.lminf["sink"], is_compacted)


AGENTS = {"chat": ChatAgent, "responses": ResponsesAgent, "messages": MessagesAgent}
