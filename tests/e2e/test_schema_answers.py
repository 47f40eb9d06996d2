"""Answers of a real model at temperature 1, held to schemas, are valid by them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from schemas import SCHEMAS

from lminf_edge import Llama
from lminf_edge.models.named import NAMED_MODELS

SMOL = Path(__file__).parents[2] / "build" / "models" / NAMED_MODELS["smollm2"].file


@pytest.fixture(scope="module")
def smollm() -> Iterator[Llama]:
    if not SMOL.exists():
        pytest.skip("make real-models downloads it")
    made = Llama(SMOL, lminf=True, verbose=False)
    yield made
    made.close()


@pytest.mark.parametrize("name", SCHEMAS)
def test_answers_are_valid(smollm: Llama, name: str) -> None:
    schema = SCHEMAS[name]
    asked = f"Write an example of this JSON schema, and nothing else:\n{json.dumps(schema)}"
    n_whole = 0
    for seed in range(40):  # which of them come to an end is another matter on each processor
        done: Any = smollm.create_chat_completion(
            [{"role": "user", "content": asked}],
            response_format={"type": "json_schema", "json_schema": {"name": "it", "schema": schema}},
            temperature=1.0,
            seed=seed,
            max_tokens=200,
        )
        choice = done["choices"][0]
        if choice["finish_reason"] == "stop":
            n_whole += 1
            jsonschema.validate(json.loads(choice["message"]["content"]), schema)
        if n_whole and seed >= 3:
            break
    assert n_whole
