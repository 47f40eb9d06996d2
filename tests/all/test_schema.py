"""Whatever the OpenAPI document allows or forbids, the server answers as the document says."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from served import serve

from lminf_edge import LMInfConfig
from lminf_edge.server import Settings


@pytest.fixture(scope="module")
def schema(nano_path: str) -> Iterator[Any]:
    server_settings = Settings(model_name="nano")
    with serve(nano_path, server_settings, lminf=LMInfConfig(n_global=4, n_local=64)) as served:
        yield schemathesis.openapi.from_url(f"{served.url}/openapi.json")


api = schemathesis.pytest.from_fixture("schema")


@api.parametrize()
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
def test_every_operation(case: Any) -> None:
    if isinstance(case.body, dict):  # an answer without an end is right, and takes for ever
        for name in ("max_tokens", "max_completion_tokens", "n_predict"):
            if case.body.get(name) is None or (isinstance(case.body[name], int) and case.body[name] > 3):
                case.body[name] = 3
    case.call_and_validate(timeout=60)
