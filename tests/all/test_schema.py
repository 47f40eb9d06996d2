"""Whatever the OpenAPI document allows or forbids, the server answers as the document says."""

from __future__ import annotations

from typing import Any

import schemathesis
import schemathesis.specs.openapi.checks as checks
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import not_a_server_error
from served import serve

from lminf_edge import Llama, LMInfConfig
from lminf_edge.server import Settings
from lminf_edge.server.state import Embedder

CHECKS = [
    not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
]
FEW_TOKENS = 3


def finite(case: Any) -> Any:
    """An answer without an end is right, and takes for ever."""
    if isinstance(case.body, dict):
        for name in ("max_tokens", "max_completion_tokens", "max_output_tokens", "n_predict"):
            value = case.body.get(name)
            if value is None or (isinstance(value, (int, float)) and not 1 <= value <= FEW_TOKENS):
                case.body[name] = FEW_TOKENS
    return case


def test_every_operation(nano_path: str) -> None:
    embedder = Llama(nano_path, embedding=True, n_ctx=512, verbose=False, n_threads=1)
    with serve(nano_path, Settings(model_name="nano"), Embedder(embedder), lminf=LMInfConfig(n_local=64)) as served:
        schema = schemathesis.openapi.from_url(f"{served.url}/openapi.json")
        n_operations = 0
        for result in schema.get_all_operations():
            operation = result.ok()
            n_operations += 1

            @given(case=operation.as_strategy())
            @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
            def ask(case: Any) -> None:
                finite(case).call_and_validate(checks=CHECKS, timeout=60)

            ask()
        assert n_operations >= 20
    embedder.close()
