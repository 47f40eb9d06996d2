"""Where things are in a checkout, and its scripts as modules."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

SUPPORT = Path(__file__).resolve().parent
ROOT = SUPPORT.parents[1]
# the library without patches: make stock
STOCK = Path(os.environ.get("LMINF_STOCK_LIB") or ROOT / "build" / "stock" / "bin")


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"script_{name}", ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
