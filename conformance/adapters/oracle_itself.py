"""The oracle against its own vectors: what other processors and versions of numpy make of it."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np
from implementation import Implementation
from vectors import Vectors

VERSIONS = {"numpy": np.__version__}


def implementations(vectors: Vectors) -> Iterator[Implementation]:
    for case in vectors.cases.values():
        table = case.table(len(vectors.tokens))
        yield Implementation("oracle", "at once", case.name, partial(vectors.oracle.losses, vectors.tokens, table))
