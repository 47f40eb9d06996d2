"""What each agent needs to know of our server: its command, arguments, environment and files."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field

CONTEXT = 1 << 30  # tokens: what the server advertises, as its streams do not end

KEY_VARIABLE = "LMINF_API_KEY"


@dataclass(frozen=True)
class Setup:
    """
    arguments    of the client, before the user's; {folder} stands for the folder of the files
    environment  added to the user's
    files        name -> text, written to a temporary folder
    """

    arguments: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Agent:
    """A client: its command, the package on npm that has it, and its setup from (url, model, key)."""

    command: str
    package: str
    setup: Callable[[str, str, str], Setup]


def codex(url: str, model: str, key: str) -> Setup:
    provider = f'{{name="lminf-edge",base_url="{url}/v1",wire_api="responses",env_key="{KEY_VARIABLE}"}}'
    settings = {
        "model_provider": '"lminf-edge"',
        "model_providers.lminf-edge": provider,
        "model": json.dumps(model),
        "model_context_window": str(CONTEXT),
    }
    arguments = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
    return Setup(arguments=arguments, environment={KEY_VARIABLE: key})


def claude(url: str, model: str, key: str) -> Setup:
    models = {f"ANTHROPIC_DEFAULT_{name}_MODEL": model for name in ("HAIKU", "SONNET", "OPUS")}
    return Setup(
        environment={
            "ANTHROPIC_BASE_URL": url,
            "ANTHROPIC_AUTH_TOKEN": key,
            "ANTHROPIC_API_KEY": "",  # the user's own is none of our server's business
            "ANTHROPIC_MODEL": model,
            **models,
            "CLAUDE_CODE_SUBAGENT_MODEL": model,
            "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
            "CLAUDE_CODE_ATTRIBUTION_HEADER": "0",  # a line of the system prompt that is of no use here
            "DISABLE_AUTO_COMPACT": "1",  # the stream does not overflow
        }
    )


def opencode(url: str, model: str, key: str) -> Setup:
    limit = {"context": CONTEXT, "output": 32_000}
    config = {
        "$schema": "https://opencode.ai/config.json",
        "autoupdate": False,
        "provider": {
            "lminf-edge": {
                "npm": "@ai-sdk/openai-compatible",
                "name": "lminf-edge",
                "options": {"baseURL": f"{url}/v1", "apiKey": f"{{env:{KEY_VARIABLE}}}"},
                "models": {model: {"name": model, "limit": limit}},
            }
        },
        "model": f"lminf-edge/{model}",
        "small_model": f"lminf-edge/{model}",
    }
    return Setup(environment={"OPENCODE_CONFIG_CONTENT": json.dumps(config), KEY_VARIABLE: key})


def continue_(url: str, model: str, key: str) -> Setup:
    entry = {
        "name": model,
        "provider": "openai",
        "model": model,
        "apiBase": f"{url}/v1",
        "apiKey": key,
        "contextLength": CONTEXT,
    }
    config = {"name": "lminf-edge", "version": "0.0.1", "schema": "v1", "models": [entry]}
    return Setup(
        arguments=["--config", "{folder}/config.yaml"],
        files={"config.yaml": json.dumps(config, indent=2) + "\n"},  # JSON is YAML
    )


AGENTS = {
    "codex": Agent("codex", "@openai/codex", codex),
    "claude": Agent("claude", "@anthropic-ai/claude-code", claude),
    "opencode": Agent("opencode", "opencode-ai", opencode),
    "continue": Agent("cn", "@continuedev/cli", continue_),
}
