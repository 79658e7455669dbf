"""Writes the CPU table of README.md from a result file, so that it holds only what was measured.

python benchmarks/readme.py            # write
python benchmarks/readme.py --check    # fail if the table is not that of the newest result
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from cpu_inference import ROOT, Row, table

README = ROOT / "README.md"
BLOCK = re.compile(r"(<!-- cpu-table:begin -->\n).*?(<!-- cpu-table:end -->)", re.S)


def rendered() -> str:
    """README.md with the table of the newest result."""
    newest = max((ROOT / "benchmarks/results").glob("cpu-*.json"))
    result = json.loads(newest.read_text("utf-8"))
    facts = result["machine"]
    caption = (
        f"\n\n{facts['cpu']}, {facts['instruction_set']}, {facts['threads']} threads; "
        f"torch {facts['torch']}, transformers {facts['transformers']}, fp32, "
        f"{result['rounds']} rounds, {facts['date']} (`benchmarks/results/{newest.name}`).\n"
    )
    rows = [Row(**row) for row in result["rows"]]
    text = README.read_text("utf-8")
    return BLOCK.sub(lambda found: found[1] + table(rows) + caption + found[2], text)


def main() -> int:
    text = rendered()
    if "--check" in sys.argv[1:]:
        return 0 if text == README.read_text("utf-8") else 1
    README.write_text(text, "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
