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
calls = (arg.split() for arg in sys.argv[1:])
print(json.dumps([host.measure(kind, **dict.fromkeys(asked, True), **options).facts()
                  for kind, *asked in calls]))
"""
pytestmark = pytest.mark.slow
CALLS = ("forward", "forward padded", "training", "training padded", "training autocast")


@pytest.fixture(scope="module")
def costs() -> dict[str, dict]:
    done = forked(MEASURE, *CALLS)
    assert done.returncode == 0, done.stderr
    return dict(zip(CALLS, json.loads(done.stdout), strict=True))


def looked_up(found: dict) -> int:
    """How many launches had their kernel looked up by what they are launched on."""
    return found["parts"][-1]["calls"]


@pytest.mark.parametrize("call", CALLS[:2])
def test_forward(costs, call):
    found = costs[call]
    assert found["layer_launches"] == {
        "_attention_fwd_kernel": 1, "_bias_activation_fwd_kernel": 1, "_layernorm_fwd_kernel": 2,
    }  # fmt: skip
    assert sum(found["launches"].values()) == 1 + 4 * found["layers"]
    assert (found["products"], found["layer_products"]) == (6 * found["layers"], 6)
    assert found["layer_operations"] == {}
    assert looked_up(found) == 1 + 4, "layers that are alike make the first one's again"
    assert found["waits"] == ("padded" in call), "for the lengths, and for nothing else"


@pytest.mark.parametrize("call", CALLS[2:])
def test_training(costs, call):
    found = costs[call]
    assert found["layer_launches"] == {
        "_attention_fwd_kernel": 1, "_attention_bwd_kernel_whole": 1,
        "_bias_activation_fwd_kernel": 1, "_activation_bwd_kernel": 1,
        "_layernorm_fwd_kernel": 2, "_layernorm_again_kernel": 2, "_layernorm_bwd_kernel": 2,
        "_column_sums_kernel": 3,
    }  # fmt: skip
    assert found["layer_products"] == 12
    # Weights are joined again in backward, unless they were converted.
    joined = {"cat": 2, "copy_": 13, "add_": 2} if "autocast" in call else {"cat": 3}
    assert found["layer_operations"] == {"randint": 1, "sum": 1, **joined}
    outside = sum(found["launches"].values()) - 13 * found["layers"]
    # Below the first layer are the embeddings, whose norm is of another dtype.
    assert looked_up(found) == outside + 13 + 1, "layers that are alike make the first one's again"
    assert found["waits"] == 1 + ("padded" in call), "for the labels and for the lengths"


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
