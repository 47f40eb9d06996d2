"""30,000 tokens in one stream: what long runs find and short ones hide."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from lminf_edge import Llama, LMInfConfig
from lminf_edge.cli.demo import python_documentation
from lminf_edge.evaluate import nll_blocks

STATUS = Path("/proc/self/status")
N = 59 * 512  # tokens with a loss: whole batches, as a shorter one makes the allocator keep memory for its size


def resident_kb() -> int:
    return int(re.findall(r"^VmRSS:\s+(\d+) kB$", STATUS.read_text(), re.M)[0])


@pytest.mark.skipif(not STATUS.exists(), reason="resident memory is read from /proc")
def test_memory_and_loss_stay_where_they_are(nano_path: str) -> None:
    llm = Llama(nano_path, lminf=LMInfConfig(n_global=10, n_local=256), verbose=False)
    text = llm.tokenize(python_documentation().encode(), add_bos=False)[:8000]
    losses = np.full(N, np.inf)  # all of its memory is taken now
    warm_kb = 0
    for position, nll in nll_blocks(llm, text, N + 1):
        losses[position : position + len(nll)] = nll
        if not warm_kb and position >= 10_000:
            warm_kb = resident_kb()
    assert resident_kb() < 1.01 * warm_kb + 4096  # other tests ran in this process
    assert np.isfinite(losses).all()
    # the same text, 24,000 tokens apart
    assert losses[24_500:29_500].mean() == pytest.approx(losses[500:5500].mean(), rel=0.02)
    info = llm.stream_info()
    assert info.rebases > 10
    assert info.max_graph_position < 2048
    llm.close()
