"""The README stays true: commands are CI's, code runs, numbers are the committed ones."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

from scripts.benchmark_tables import PAGES, RESULTS, TABLE, filled

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def test_the_test_command_is_what_ci_runs() -> None:
    commands = re.findall(r"^    (pip install .*)$", README, re.MULTILINE)
    assert len(commands) == 2
    assert commands[1] in (ROOT / ".ci" / "run").read_text().splitlines()
    assert commands[0] == "pip install -e . && canvasmar-rt demo"


def test_the_python_example_runs(tmp_path: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "(1, 2, 64, 64, 3) (1, 8, 8)" in done.stdout
    assert "(8, 2, 64, 64, 3)" in done.stdout


def test_the_numbers_are_the_committed_ones() -> None:
    for path in PAGES:
        page = path.read_text()
        assert TABLE.search(page)
        assert filled(page) == page, f"{path.name}: python -m scripts.benchmark_tables"
    for path in RESULTS.glob("*.json"):
        cpu = json.loads(path.read_text())["metadata"]["cpu"]
        assert re.search(re.escape(cpu) + r"(?! \(family)", README), path.name


def test_links_and_pictures_exist() -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
