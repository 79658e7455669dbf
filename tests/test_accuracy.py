"""``python -m fastbert.benchmarks.accuracy``: a real model, ours as exact as transformers'."""

import pytest
import torch
from fastbert.benchmarks import accuracy
from tiny import tiny_config

import fastbert


@pytest.mark.slow
def test_rows_are_as_exact_as_those_of_transformers(minilm_folder, on_torch, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["accuracy", "--device", "cpu", "--texts", "12"])
    short = [passage | {"text": passage["text"][:200]} for passage in accuracy.passages()]
    monkeypatch.setattr(accuracy, "passages", lambda: short)
    accuracy.main()
    lines = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if "%" in line]
    rows = {(dtype.strip(), library.strip()): rest for dtype, library, *rest in lines}
    quantised = rows.pop(("int8", "fastbert, frozen"), None)
    assert quantised is None or 0.98 < float(quantised[1]) < 0.9999
    assert [dtype for dtype, _ in rows] == ["fp32"] * 3 + ["bf16"] * 3 + ["fp16"] * 2
    for (dtype, _), (off_by, cosine, first, ten) in rows.items():
        theirs = float(rows[dtype, "transformers"][0])
        assert float(off_by) <= 2 * theirs + torch.finfo(accuracy._DTYPES[dtype]).eps
        assert float(cosine) > 0.999 and first.strip() == "100.0%"
        assert ten.startswith(" 100.0%, in order 100.0%") or dtype != "fp32"


@pytest.mark.slow
def test_what_is_frozen_for_torch_is_not_shown_of_kernels():
    pytest.importorskip("triton")
    model = torch.nn.Sequential(fastbert.BertModel(tiny_config()))
    for backend, forms in (("torch", {"fastbert, frozen"}), ("triton", set())):
        with fastbert.backend(backend):
            found = {library for library, *_ in accuracy._ways(model, torch.device("cpu"))}
        assert found - {"transformers", "fastbert"} == forms


@pytest.mark.slow
def test_a_model_that_is_off_shows(minilm_folder, on_torch, monkeypatch):
    """Its vectors, and what it finds."""
    monkeypatch.setattr(accuracy, "_DTYPES", {"fp32": torch.float32})
    made = accuracy._vectors

    def worse(model, texts):
        found = made(model, texts)
        ours = type(model[0].model).__module__.startswith("fastbert")
        passages = len(texts[0]) > 60
        return found.roll(1, 0) if ours and passages else found

    monkeypatch.setattr(accuracy, "_vectors", worse)
    plain, ours, *_ = accuracy.measure("cpu", texts=12)
    assert plain.first == plain.set_of_ten == 1.0 and plain.off_by < 1e-6
    assert ours.first < 0.2 and ours.off_by > 0.1 and ours.cosine < 0.9
