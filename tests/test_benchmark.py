"""The CPU benchmark measures what it says, and measures nothing that is wrong."""

import dataclasses
import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from tiny import pair

pytestmark = pytest.mark.usefixtures("on_torch")
SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks/cpu_inference.py"


@pytest.fixture(scope="module")
def benchmark_script():
    spec = importlib.util.spec_from_file_location("cpu_inference", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["cpu_inference"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_cases_have_the_fill_they_are_named_for(benchmark_script):
    for case in benchmark_script.CASES:
        inputs = case.inputs(1000)
        mask = inputs["attention_mask"]
        assert inputs["input_ids"].shape == mask.shape == (case.batch, case.length)
        assert mask.sum(1).max() == case.length and mask.sum(1).min() >= 1
        assert abs(mask.float().mean() - 1 / (case.skew + 1)) < 0.08, case.name


def test_a_row_is_measured_after_a_check(benchmark_script):
    theirs, ours = pair("BertModel")
    case = benchmark_script.Case(4, 20, skew=1)
    row = benchmark_script.measure("tiny", theirs, ours, case, rounds=3)
    assert row.transformers_ms > 0 and row.fastbert_ms > 0 and row.max_difference < 1e-5
    assert row.mark == pytest.approx(1 / row.fill, rel=0.01)
    assert row.real_tokens == int(case.inputs(99)["attention_mask"].sum())
    slow = dataclasses.replace(row, speedup=0.5 * row.mark)
    assert not slow.passed and "missed" in benchmark_script.table([slow])


def test_a_wrong_model_is_not_timed(benchmark_script):
    theirs, ours = pair("BertModel")
    with torch.no_grad():
        ours.encoder.layer[0].output.dense.bias[0] += 0.1
    with pytest.raises(SystemExit, match=r"outputs differ by .* not timed"):
        benchmark_script.measure("tiny", theirs, ours, benchmark_script.Case(2, 8), rounds=3)
