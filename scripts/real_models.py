#!/usr/bin/env python3
"""Downloads the real pretrained models that `lminf-edge get` knows into build/models, for tests and measurements.

    make real-models, or: scripts/real_models.py [NAME]...

What is there already is left alone.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from lminf_edge.errors import UserError  # noqa: E402
from lminf_edge.models.named import NAMED_MODELS, get  # noqa: E402

FOLDER = ROOT / "build" / "models"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(NAMED_MODELS)}; without: all")
    names = parser.parse_args().names or list(NAMED_MODELS)
    try:
        for name in names:
            if name not in NAMED_MODELS:
                raise UserError(f"There is no model {name}: choose from {', '.join(NAMED_MODELS)}.")
            print(get(name, FOLDER))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
