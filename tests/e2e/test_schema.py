"""Whatever the OpenAPI document allows or forbids, the server answers as the document says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import schemathesis
import schemathesis.specs.openapi.checks as checks
from hypothesis import HealthCheck, given, settings
from served import serve

from lminf_edge import Llama, LMInfConfig
from lminf_edge.server import Settings
from lminf_edge.server.embedder import Embedder


def no_fault_of_ours(_: Any, response: Any, case: Any) -> None:
    """501 is what this model or this server's options do not have, and documented."""
    assert response.status_code < 500 or response.status_code == 501, response.text


CHECKS = [
    no_fault_of_ours,
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


def test_every_operation(nano_path: str, tmp_path: Path) -> None:
    embedder = Llama(nano_path, embedding=True, n_ctx=512, verbose=False, n_threads=1)
    settings_ = Settings(model_name="nano", slot_folder=tmp_path)
    with serve(nano_path, settings_, Embedder(embedder), lminf=LMInfConfig(n_local=64)) as served:
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
