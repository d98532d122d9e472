"""`yoco-ext bench`. The suite lives in bench/ at the top of the source tree and is installed as yoco_ext.bench."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path


def main(argv: list[str] | None = None) -> int:
    try:
        from yoco_ext import bench
    except ImportError:  # a source tree that is used without being installed
        folder = Path(__file__).parents[1] / "bench"
        spec = importlib.util.spec_from_file_location("yoco_ext.bench", folder / "__init__.py")
        if not folder.is_dir() or spec is None or spec.loader is None:
            raise
        bench = sys.modules["yoco_ext.bench"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(bench)
    return bench.main(argv)
