"""Models and texts for the tests. What lies in the shared folder is optional: tests that need it are skipped."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_hub import Hub, serve_hub
from reference.gguf_file import copy_as_f32

# waiting threads sleep: spinning ones would starve the others on a busy machine, and in the processes that tests start
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from lminf_edge import Llama, LMInfConfig
from lminf_edge.cache.token_log import Tokens
from lminf_edge.engine.engine import Engine
from lminf_edge.engine.loading import load_engine
from lminf_edge.models import find_model, hub

SHARED = Path(os.environ.get("LMINF_SHARED") or Path(__file__).resolve().parents[2] / "shared")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """tests/e2e needs a browser and node, and agents take an hour: they are only run where they are asked for."""
    if collection_path == Path(__file__).parent / "e2e":
        return not any("e2e" in Path(argument).parts for argument in config.args)
    if collection_path.name == "llama_server":  # what test_llama_server.py runs in a process of its own
        return True
    if collection_path.name.startswith("test_agent"):  # make test-agents
        return not any(Path(argument.partition("::")[0]).name == collection_path.name for argument in config.args)
    return None


# a few sentences of our own, so that the tests need no corpus
TEXT = (
    "The ferry left at six, an hour before the sun came over the hills, and nobody on board had slept. "
    "Anna counted the lamps on the quay until they ran into one line, and then she counted the waves instead. "
    "“You will be late,” her brother had said, “you always are”; but for once she had been early, and he had not come. "
)

MakeLlama = Callable[..., Llama]
MakeEngine = Callable[..., Engine]
MakeHub = Callable[..., Hub]

# with everything in f32, another order of additions is all that can differ
F32: dict[str, Any] = {"type_k": 0, "type_v": 0}
# a window that is soon full, and one thread
SMALL: dict[str, Any] = {
    "lminf": LMInfConfig(n_global=4, n_local=64),
    "verbose": False,
    "n_threads": 1,
    "n_threads_batch": 1,
}


@pytest.fixture(scope="session")
def nano_path() -> str:
    """A model of 4 M parameters, trained on windows of 512 tokens."""
    return find_model("nano")


@pytest.fixture(scope="session")
def stories_path() -> str:
    """A pretrained model of 260 K parameters, trained on windows of 512 tokens."""
    path = SHARED / "models" / "stories260K.gguf"
    if not path.exists():
        pytest.skip("stories260K.gguf is not in the shared folder")
    return str(path)


@pytest.fixture(scope="session")
def nano_f32_path(nano_path: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The same in f32, without the noise of rounding activations: there, equal means equal to the last digits."""
    path = tmp_path_factory.mktemp("models") / "nano-f32.gguf"
    copy_as_f32(nano_path, path)
    return str(path)


@pytest.fixture
def make_llama(nano_f32_path: str) -> Iterator[MakeLlama]:
    """Makes models that are freed after the test: nano in f32 with a window of 64 + 4 tokens unless told otherwise."""
    made: list[Llama] = []

    def make(model: str = nano_f32_path, **kwargs: Any) -> Llama:
        made.append(Llama(model, **{**SMALL, **kwargs}))
        return made[-1]

    yield make
    for llm in made:
        llm.close()


@pytest.fixture
def make_engine(nano_f32_path: str) -> Iterator[MakeEngine]:
    """Makes engines that are closed after the test: of two slots, with the same window, in f32, nothing on disk."""
    made: list[Engine] = []

    def make(**kwargs: Any) -> Engine:
        made.append(load_engine(nano_f32_path, **{"parallel": 2, **SMALL, **F32, **kwargs}))
        return made[-1]

    yield make
    for engine in made:
        engine.close()
        engine.model.close()


@pytest.fixture
def expected(make_llama: MakeLlama) -> Callable[..., Any]:
    """Logits (n_vocab,) after a stream of tokens, by a single stream that processes them from its start."""
    llm = make_llama(**F32)

    def logits(*parts: Sequence[int] | Tokens) -> Any:
        llm.reset()
        for part in parts:
            llm.eval(part)
        return llm.scores[-1].copy()

    return logits


@pytest.fixture(scope="session")
def tokens(nano_path: str) -> Tokens:
    """3000 tokens of text for the nano model, with its BOS in front."""
    llm = Llama(nano_path, vocab_only=True, verbose=False)
    piece = llm.tokenize(TEXT.encode(), add_bos=False)
    llm.close()
    # repeated text would be too easy to predict: a window must not look like the one before it
    rng = np.random.default_rng(0)
    text = np.concatenate([rng.permutation(piece) for _ in range(3000 // len(piece) + 1)])
    return np.concatenate([[1], text])[:3000].astype(np.int32)


@pytest.fixture
def make_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[MakeHub]:
    """Makes Hugging Face hubs on this machine, of which the last one is asked."""
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(hub, "_WAIT", 0.0)
    with contextlib.ExitStack() as stack:

        def make(**answers: Any) -> Hub:
            made = Hub(**answers)
            stack.enter_context(serve_hub(made))
            monkeypatch.setenv("HF_ENDPOINT", made.url)
            return made

        yield make
