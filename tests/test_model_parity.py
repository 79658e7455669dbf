"""Every head against transformers: the same weights, ragged batches, both backends, three dtypes.

Each against transformers' model with the same weights, in fp64 and in the tested dtype. Only real
positions are compared; what padding holds is tested on its own.
"""

import copy
import sys

import pytest
import torch
from tiny import RIGHT, inputs_for, pair, specified_by

import fastbert
from fastbert.testing import assert_matches, assert_within_budget

HEADS = (
    "BertModel",
    "BertForMaskedLM",
    "BertForSequenceClassification",
    "BertForTokenClassification",
    "BertForQuestionAnswering",
    "BertForNextSentencePrediction",
    "BertForMultipleChoice",
    "BertForPreTraining",
    "BertLMHeadModel",
)
MASKS = {
    "none": None,
    "ones": torch.ones_like(RIGHT),
    "right": RIGHT,
    "right, bool": RIGHT.bool(),
    "right, float": RIGHT.float(),
    "left": RIGHT.flip(1),
    "hole": RIGHT * (torch.arange(9) != 2),
}
FLAGS = {"output_hidden_states": True, "output_attentions": True}


def flatten(output, real: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """Name -> tensor, padded positions removed, nested tuples numbered."""
    flat = {}
    for key, value in output.items():
        values = value if isinstance(value, tuple) else (value,)
        for i, tensor in enumerate(values):
            if real is not None and tensor.shape[:2] == real.shape:
                tensor = tensor[real]
            elif real is not None and tensor.dim() == 4:  # attention weights, by query
                tensor = tensor.transpose(1, 2)[real]
            flat[f"{key}.{i}"] = tensor
    return flat


def check(output, theirs, real, name, *others, **inputs):
    """Every tensor of an output against that of transformers' model.

    So is every tensor of other outputs, which need not have all of them.
    """
    flat = [flatten(o, real) for o in (output, *others)]

    def read(expected):
        expected = flatten(expected, real)
        assert expected.keys() == flat[0].keys()
        return [expected[key] for found in flat for key in found]

    specification, parameters = specified_by(theirs, read, **inputs)
    assert_matches([t for found in flat for t in found.values()], specification, parameters, name)


@pytest.mark.parametrize(
    "mask",
    [
        pytest.param(
            mask,
            id=name,
            marks=[pytest.mark.slow] * (name not in ("none", "right", "hole"))
            + [pytest.mark.slow_on_kernels] * (name != "hole"),
        )
        for name, mask in MASKS.items()
    ],
)
@pytest.mark.parametrize("head", HEADS)
def test_head_matches_transformers(head, mask, device, each_backend):
    theirs, ours = pair(head, device)
    inputs = inputs_for(head, mask, device)
    real = None if mask is None else mask.bool().to(device)
    with torch.no_grad():
        actual = ours(**inputs, **FLAGS)
        assert list(actual) == list(theirs(**inputs, **FLAGS))
        check(actual, theirs, real, head, **inputs, **FLAGS)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head", ["BertModel", "BertForMaskedLM"])
def test_half_precision_matches_transformers(head, dtype, device, each_backend):
    theirs, ours = pair(head, device)
    theirs.config.output_hidden_states = ours.config.output_hidden_states = True
    theirs, ours = theirs.to(dtype), ours.to(dtype)
    inputs = inputs_for(head, RIGHT, device)
    with torch.no_grad():
        check(ours(**inputs), theirs, RIGHT.bool().to(device), head, **inputs)


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_act": "relu"},
        {"hidden_act": "gelu_new"},
        {"hidden_act": "silu"},
        {"hidden_act": "tanh"},  # not one that is fused: called as a module
        {"num_attention_heads": 1},
        {"hidden_size": 48, "num_attention_heads": 3},
        {"type_vocab_size": 1},
        {"num_hidden_layers": 0},
        {"layer_norm_eps": 0.1},
    ],
    ids=str,
)
def test_config_matches_transformers(changes, device, each_backend):
    theirs, ours = pair("BertModel", device, **changes)
    inputs = inputs_for("BertModel", RIGHT, device)
    inputs["token_type_ids"] = None
    with torch.no_grad():
        check(ours(**inputs), theirs, RIGHT.bool().to(device), str(changes), **inputs)


def mask_4d(kind: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    keep = torch.rand(4, 2, 9, 9, generator=generator) < 0.7
    keep |= torch.eye(9, dtype=torch.bool)  # every query sees itself
    shaped = {"per head": keep, "shared": keep[:, :1], "one for all": keep[:1, :1]}[kind]
    return torch.zeros(shaped.shape).masked_fill(~shaped, -torch.inf)


@pytest.mark.parametrize("kind", ["per head", "shared", "one for all"])
def test_mask_per_query_matches_transformers(kind, device, each_backend):
    theirs, ours = pair("BertModel", device)
    inputs = inputs_for("BertModel", mask_4d(kind), device)
    with torch.no_grad():
        for mask in (inputs["attention_mask"], inputs["attention_mask"] == 0):
            actual = ours(**{**inputs, "attention_mask": mask})
            check(actual, theirs, None, f"4-D mask {kind}", **inputs)


@pytest.mark.parametrize("recomputed", [False, True])
def test_a_mask_per_query_is_made_ready_once_for_all_layers(recomputed, device, monkeypatch):
    module = sys.modules["fastbert.ops.attention"]
    level, made = module._leveled, []
    monkeypatch.setattr(module, "_leveled", lambda *args: made.append(1) or level(*args))
    theirs, ours = pair("BertModel", device)
    inputs = inputs_for("BertModel", mask_4d("shared"), device)
    upstream = torch.randn(4, 9, 32).to(device)
    if recomputed:
        ours.gradient_checkpointing_enable({"use_reentrant": True})
        ours.train()
        for dropout in (m for m in ours.modules() if isinstance(m, torch.nn.Dropout)):
            dropout.p = 0.0
    with fastbert.backend("triton"):
        ours(**inputs).last_hidden_state.backward(upstream)
        with torch.no_grad():
            check(ours(**inputs), theirs, None, "4-D mask", **inputs)
    assert len(made) == 2
    theirs(**inputs).last_hidden_state.backward(upstream)
    for name, parameter in theirs.encoder.named_parameters():
        found = ours.encoder.get_parameter(name).grad
        torch.testing.assert_close(found, parameter.grad, rtol=1e-3, atol=1e-4, msg=name)


def test_embeddings_and_positions_match_transformers(device, each_backend):
    theirs, ours = pair("BertModel", device)
    generator = torch.Generator().manual_seed(3)
    real = RIGHT.bool().to(device)
    positions = torch.randint(0, 40, (4, 9), generator=generator).to(device)
    embeds = torch.randn(4, 9, 32, generator=generator).to(device)
    ids = inputs_for("BertModel", None, device)["input_ids"]
    for inputs in (
        {"inputs_embeds": embeds},
        {"inputs_embeds": embeds, "position_ids": positions},
        {"input_ids": ids, "position_ids": positions},
        {"input_ids": ids, "position_ids": positions[:1]},
    ):
        inputs["attention_mask"] = real
        with torch.no_grad():
            check(ours(**inputs), theirs, real, str(list(inputs)), **inputs)


@pytest.mark.slow_on_kernels
def test_return_dict_false_gives_the_same_tuple(device, each_backend):
    for head in HEADS:
        theirs, ours = pair(head, device)
        inputs = inputs_for(head, RIGHT, device)
        for flags in ({}, FLAGS):
            with torch.no_grad():
                expected = theirs(**inputs, **flags, return_dict=False)
                actual = ours(**inputs, **flags, return_dict=False)
            assert [type(t) for t in actual] == [type(t) for t in expected], head


LABELS = torch.randint(0, 99, (4, 9), generator=torch.Generator().manual_seed(4))
LOSSES = {
    "masked LM": ("BertForMaskedLM", {"labels": LABELS.masked_fill(RIGHT == 0, -100)}),
    "masked LM, few labels, no logits": (
        "BertForMaskedLM",
        {"labels": LABELS.masked_fill((RIGHT == 0) | (LABELS > 30), -100)},
    ),
    "masked LM, labels at padding": ("BertForMaskedLM", {"labels": LABELS}),
    "masked LM, labels at padding, no logits": ("BertForMaskedLM", {"labels": LABELS}),
    "tokens": (
        "BertForTokenClassification",
        {"labels": (LABELS % 2).masked_fill(RIGHT == 0, -100)},
    ),
    "tokens, labels at padding": ("BertForTokenClassification", {"labels": LABELS % 2}),
    "answers": (
        "BertForQuestionAnswering",
        {
            "start_positions": torch.tensor([1, 2, 0, 3]),
            "end_positions": torch.tensor([3, 3, 0, 4]),
        },
    ),
    "classes": ("BertForSequenceClassification", {"labels": torch.tensor([0, 1, 1, 0])}),
    **dict.fromkeys(
        ("pre-training", "pre-training, no logits"),
        (
            "BertForPreTraining",
            {
                "labels": LABELS.masked_fill(RIGHT == 0, -100),
                "next_sentence_label": torch.tensor([0, 1, 1, 0]),
            },
        ),
    ),
    "next sentence": ("BertForNextSentencePrediction", {"labels": torch.tensor([0, 1, 1, 0])}),
    "multiple choice": ("BertForMultipleChoice", {"labels": torch.tensor([0, 1])}),
}


MODES = {
    "eval": (False, torch.float32),
    "training": (True, torch.float32),
    "training, fp16": (True, torch.float16),
    "training, bf16": (True, torch.bfloat16),
}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def modes_of(losses):
    """Each in training in fp32 and bf16; in turn in fp16, or as in training without dropout."""
    for i, name in enumerate(losses):
        yield name, "training"
        for mode in ("training, bf16", ("eval", "training, fp16")[i % 2]):
            yield pytest.param(name, mode, marks=pytest.mark.slow)


@pytest.mark.parametrize(("name", "mode"), [*modes_of(LOSSES)])
def test_loss_and_gradients_match_transformers(name, mode, device, every_backend):
    head, labels = LOSSES[name]
    training, dtype = MODES[mode]
    theirs, ours = (m.train(training).to(dtype) for m in pair(head, device, **NO_DROPOUT))
    inputs = inputs_for(head, RIGHT, device) | {k: v.to(device) for k, v in labels.items()}
    ours_too = {"skip_logits": True} if name.endswith("no logits") else {}
    # transformers' default attention: in 16 bits either may be several times the other's error.
    other = copy.deepcopy(theirs)
    other.set_attn_implementation("sdpa")
    eager, sdpa = (specified_by(m, lambda out: out.loss, **inputs)[0] for m in (theirs, other))
    parameters = specified_by(theirs, None)[1]
    exact = gradients(eager, [p.double() for p in parameters])
    # One comparison over all gradients, each in units of its own largest value. A key's bias has
    # none: softmax does not see a shift.
    units = [g.abs().max() if g is not None else torch.zeros(()) for g in exact]

    def together(grads):
        parts = [(g.double() / u).flatten() for g, u in zip(grads, units, strict=True) if u > 1e-12]
        return torch.cat(parts)

    def results(loss):
        def run(*parameters):
            leaves = [p.detach().requires_grad_() for p in parameters]
            out = loss(*leaves)
            grads = torch.autograd.grad(out, leaves, allow_unused=True)
            return [out.detach(), together(grads)] * len(every_backend)

        return run

    actual = []
    for backend in every_backend:
        ours.zero_grad()
        with fastbert.backend(backend):
            loss = ours(**inputs, **ours_too).loss
            loss.backward()
        assert [p.grad is None for p in ours.parameters()] == [g is None for g in exact]
        actual += [loss.detach(), together([p.grad for p in ours.parameters()])]
    specification, more = results(eager), results(sdpa)
    label = f"{name}, loss and gradients by {' and '.join(every_backend)}"
    assert_matches([t.to(dtype) for t in actual], specification, parameters, label, others=[more])


def gradients(function, parameters):
    leaves = [p.detach().requires_grad_() for p in parameters]
    return torch.autograd.grad(function(*leaves), leaves, allow_unused=True)


def test_padding_is_zeros_and_cannot_be_an_answer(device, each_backend):
    padding = (RIGHT == 0).to(device)
    with torch.no_grad():
        _, ours = pair("BertModel", device)
        assert not ours(**inputs_for("BertModel", RIGHT, device))[0][padding].any()
        _, ours = pair("BertForQuestionAnswering", device)
        output = ours(**inputs_for("BertForQuestionAnswering", RIGHT, device))
    lowest = torch.finfo(torch.float32).min
    assert (output.start_logits[padding] == lowest).all()
    assert (output.end_logits[padding] == lowest).all()


def test_a_sequence_does_not_see_its_neighbours(device, each_backend):
    """Alone, beside others, in another order, with more padding: the same up to rounding."""
    theirs, ours = pair("BertModel", device)
    inputs = inputs_for("BertModel", RIGHT, device)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    with torch.no_grad():
        together = ours(ids, mask)[0]
        oracle = theirs.double()(ids, mask)[0]
        order = torch.tensor([2, 0, 3, 1], device=device)
        permuted = ours(ids[order], mask[order])[0]
        wider = ours(torch.nn.functional.pad(ids, (0, 5)), torch.nn.functional.pad(mask, (0, 5)))[0]
        lengths = mask.sum(1).tolist()
        alone = torch.cat([ours(ids[i : i + 1, :n])[0][0] for i, n in enumerate(lengths)])
    real, exact = mask.bool(), oracle[mask.bool()]
    assert_within_budget(together[real], exact, alone, "beside others")
    assert_within_budget(permuted[order.argsort()][real], exact, alone, "permuted")
    assert_within_budget(wider[:, :9][real], exact, alone, "padded further")


def test_padding_on_the_left_with_its_positions_changes_nothing(device, each_backend):
    _, ours = pair("BertModel", device)
    inputs = inputs_for("BertModel", RIGHT, device)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    shift = (9 - mask.sum(1, keepdim=True)).long()
    column = (torch.arange(9, device=device) - shift) % 9
    left_ids, left_mask = ids.gather(1, column), mask.gather(1, column)
    with torch.no_grad():
        right = ours(ids, mask)[0]
        left = ours(left_ids, left_mask, position_ids=column)[0]
        exact = pair("BertModel", device)[0].double()(ids, mask)[0]
    assert_within_budget(left[left_mask.bool()], exact[mask.bool()], right[mask.bool()], "left")


def test_packed_input_keeps_its_sequences_apart(device, each_backend):
    _, ours = pair("BertModel", device)
    inputs = inputs_for("BertModel", RIGHT, device)
    ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()
    lengths = mask.sum(1).tolist()
    flat = ids[mask][None]
    positions = torch.cat([torch.arange(n) for n in lengths])[None].to(device)
    cu_seqlens = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    with torch.no_grad():
        expected = ours(ids, mask)[0][mask]
        by_length = ours(flat, position_ids=positions, cu_seq_lens_q=cu_seqlens.to(device))[0][0]
        ours.config._attn_implementation = "flash_attention_2"
        by_position = ours(flat, position_ids=positions)[0][0]
    torch.testing.assert_close(by_position, expected)
    torch.testing.assert_close(by_length, expected)
    with pytest.raises(ValueError, match="cu_seq_lens_q to rise"):
        ours(flat, cu_seq_lens_q=cu_seqlens[:-1].to(device))
