"""The compatibility table of the README names tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

HERE = Path(__file__).parent


def test_every_row_of_the_compatibility_table_names_tests_that_exist() -> None:
    readme = (HERE.parent / "README.md").read_text(encoding="utf-8")
    rows = readme.split("| code base | served | test")[1].split("\n\n")[0].splitlines()[2:]
    assert len(rows) >= 10
    for row in rows:
        files = re.findall(r"`(test_\w+\.py)`", row)
        assert files, f"no test: {row}"
        defined = {name for file in files for name in re.findall(r"^def (test_\w+)", (HERE / file).read_text(), re.M)}
        for name in re.findall(r"`(test_\w+\*?)`", row):
            found = any(d.startswith(name[:-1]) for d in defined) if name.endswith("*") else name in defined
            assert found, f"{name} is not in {files}"
