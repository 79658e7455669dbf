"""What the host launches in a call, and how often it waits: counted over a driver that is a stub.

The counts are promises: one more launch in a layer costs a short batch on a GPU microseconds, and a
wait costs it everything that could have been queued meanwhile.
"""

import json

import pytest
from forked import COMMAND, forked

MEASURE = """
import json, sys, torch
torch.set_num_threads(1)
from fastbert.workbench import host
options = {"model": "minilm", "layers": 3, "batch": 2, "length": 32, "calls": 2}
found = [host.measure(kind, padded=padded, **options).facts()
         for kind in host.KINDS for padded in (False, True)]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def costs() -> dict[tuple[str, bool], dict]:
    done = forked(MEASURE)
    assert done.returncode == 0, done.stderr
    kinds = [(kind, padded) for kind in ("forward", "training") for padded in (False, True)]
    return dict(zip(kinds, json.loads(done.stdout), strict=True))


@pytest.mark.parametrize("padded", [False, True])
def test_forward(costs, padded):
    found = costs["forward", padded]
    assert found["layer_launches"] == {
        "_attention_fwd_kernel": 1, "_bias_activation_fwd_kernel": 1, "_layernorm_fwd_kernel": 2,
    }  # fmt: skip
    assert sum(found["launches"].values()) == 1 + 4 * found["layers"]
    assert (found["products"], found["layer_products"]) == (6 * found["layers"], 6)
    assert found["layer_operations"] == {}
    assert found["waits"] == (1 if padded else 0), "for the lengths, and for nothing else"


@pytest.mark.parametrize("padded", [False, True])
def test_training(costs, padded):
    found = costs["training", padded]
    assert found["layer_launches"] == {
        "_attention_fwd_kernel": 1, "_attention_bwd_kernel_whole": 1,
        "_bias_activation_fwd_kernel": 1, "_activation_bwd_kernel": 1,
        "_layernorm_fwd_kernel": 2, "_layernorm_again_kernel": 2, "_layernorm_bwd_kernel": 2,
        "_column_sums_kernel": 3,
    }  # fmt: skip
    assert found["layer_products"] == 12
    assert found["layer_operations"] == {"cat": 3, "randint": 3, "sum": 1}
    assert found["waits"] == (2 if padded else 1), "for the labels and for the lengths"


def test_times_are_of_the_parts(costs):
    for found in costs.values():
        outer = [part for part in found["parts"] if part["depth"] == 0][:-1]  # last: the launches
        assert len(outer) >= 5
        assert all(part["calls"] and part["seconds"] > 0 for part in found["parts"])
        assert found["machine"]["triton"] and found["seconds"] > 0


@pytest.mark.parametrize(
    ("variables", "why"),
    [({"PATH": "", "CC": ""}, "no C compiler"), ({"TRITON_INTERPRET": "1"}, "unset TRITON")],
)
def test_what_is_missing_is_said(variables, why):
    done = forked(COMMAND, "kernels", "host", **variables)
    assert done.returncode != 0
    assert why in " ".join(done.stderr.split())
