"""What autograd keeps of a stack of layers, by the command that prints it."""

import pytest
import torch

pytest.importorskip("triton")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_layers_of_bert_base_keep_at_most_three_fifths_of_transformers(dtype):
    """B8 S512 with dropout; the embeddings are in the whole, not in what a layer adds."""
    from fastbert.benchmarks.saved_memory import saved_bytes

    kept = {
        (kind, layers): saved_bytes(kind, layers=layers, dtype=dtype)
        for kind in ("fastbert", "transformers")
        for layers in (2, 12)
    }
    assert kept["fastbert", 12] <= 0.60 * kept["transformers", 12]
    ours, theirs = (kept[k, 12] - kept[k, 2] for k in ("fastbert", "transformers"))
    assert ours <= 0.60 * theirs
    # q, k, v, context, pre-activation and the sums of two norms: 10 units of T * E, no more than
    # a twentieth besides (statistics, seeds).
    unit = 8 * 512 * 768 * dtype.itemsize
    assert 10 * unit <= ours / 10 <= 10.5 * unit


@pytest.mark.slow
def test_the_command_prints_the_ratio(monkeypatch, capsys):
    from fastbert.benchmarks import saved_memory

    monkeypatch.setattr("sys.argv", ["saved_memory", "--model", "tiny"])
    saved_memory.main()
    assert capsys.readouterr().out.count("transformers sdpa") == 4
