"""CONTRIBUTING.md's "A kernel in one afternoon", followed step by step in a copy."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from checkout import copy_checkout

pytest.importorskip("triton")
pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[1]
STEP = re.compile(
    r"(?P<verb>New|Append\s+to)\s+`(?P<path>[^`]+)`:\n\n```python\n(?P<code>.*?)```"
    r"|Replace\s+in\s+`(?P<target>[^`]+)`:\n\n```python\n(?P<old>.*?)```\n\nwith:\n\n"
    r"```python\n(?P<new>.*?)```"
    r"|```sh\n(?P<commands>.*?)```",
    re.S,
)
COMMANDS = {
    "fastbert": ["-c", "from fastbert.cli import main; main()"],
    "pytest": ["-m", "pytest", "-p", "no:cacheprovider"],
}


def test_the_guide_leads_to_a_kernel_that_is_right_screened_and_measured(tmp_path):
    checkout = copy_checkout(tmp_path)
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8").partition("## A kernel in one")[2]
    ours = ("TRITON_INTERPRET", "PYTEST_")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(ours)}
    # What torch compiles runs as it is written, without a C++ compiler's seconds.
    environment |= {"PYTHONPATH": str(checkout), "TORCHDYNAMO_DISABLE": "1"}
    outputs: list[tuple[str, int, str]] = []
    written = 0
    for step in STEP.finditer(text):
        if step["verb"]:
            path = checkout / step["path"]
            assert path.exists() == step["verb"].startswith("Append"), step["path"]
            with path.open("a") as file:
                file.write(("\n\n" if step["verb"] != "New" else "") + step["code"])
            written += 1
        elif step["target"]:
            path = checkout / step["target"]
            source = path.read_text()
            assert source.count(step["old"]) == 1, step["old"]
            path.write_text(source.replace(step["old"], step["new"]))
            written += 1
        else:
            for line in step["commands"].strip().splitlines():
                name, *args = line.split()
                done = subprocess.run(
                    [sys.executable, *COMMANDS[name], *args],
                    cwd=checkout, env=environment, capture_output=True, text=True,
                )  # fmt: skip
                outputs.append((line, done.returncode, done.stdout + done.stderr))
    assert written == 9
    screened, inspected, parity, fuzz, bench = outputs
    assert screened[1] == 0 and "12 variants, 0 with faults" in screened[2], screened
    assert inspected[1] == 0 and "global memory" in inspected[2], inspected
    assert parity[1] == 0 and "11 passed" in parity[2], parity
    assert fuzz[1] == 0 and "random cases passed" in fuzz[2], fuzz
    assert bench[1] == 0 and "3 passed" in bench[2], bench
    lint = [sys.executable, "-m", "ruff", "check", "--no-cache", "."]
    done = subprocess.run(lint, cwd=checkout, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
