"""The masked-LM head of training, and what a training loop may ask of a model."""

import copy

import pytest
import torch
import torch.nn.functional as F
from tiny import RIGHT, inputs_for, one_is_quick, pair

import fastbert
from fastbert.testing import assert_within_budget

NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
LABELS = torch.randint(0, 99, (4, 9), generator=torch.Generator().manual_seed(4))
LABELS = LABELS.masked_fill((RIGHT == 0) | (LABELS > 40), -100)
NEXT = torch.tensor([0, 1, 1, 0])
HEADS = {"BertForMaskedLM": "logits", "BertForPreTraining": "prediction_logits"}


def masked_lm(device, head="BertForMaskedLM", **changes):
    theirs, ours = (m.train() for m in pair(head, device, **NO_DROPOUT, **changes))
    inputs = {**inputs_for(head, RIGHT, device), "labels": LABELS.clone().to(device)}
    if head == "BertForPreTraining":
        inputs["next_sentence_label"] = NEXT.to(device)
    return theirs, ours, inputs


def gradients(model, loss) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def close(actual: dict, expected: dict) -> None:
    assert actual.keys() == expected.keys()
    for name, g in expected.items():
        torch.testing.assert_close(actual[name], g, atol=2e-5 * g.abs().max().item() + 1e-6, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("head", HEADS)
def test_without_logits_the_head_sees_labelled_tokens_only(head, device, each_backend, monkeypatch):
    theirs, ours, inputs = masked_lm(device, head)
    rows = []
    real = fastbert.families.masked_lm.summed_cross_entropy
    monkeypatch.setattr(
        fastbert.families.masked_lm,
        "summed_cross_entropy",
        lambda x, *rest: (rows.append(x.shape[0]), real(x, *rest))[1],
    )
    expected = theirs(**inputs)
    output = ours(**inputs, skip_logits=True)
    assert rows == [int((LABELS != -100).sum())]
    assert list(output) == [*(k for k in expected if k != HEADS[head]), "num_correct"]
    right = expected[HEADS[head]].argmax(-1) == LABELS.to(device)
    assert output.num_correct == right.sum()
    assert output.get(HEADS[head]) is None
    close(gradients(ours, output.loss), gradients(theirs, expected.loss))
    with torch.no_grad():  # in evaluation too, if the call says so
        torch.testing.assert_close(ours.eval()(**inputs, skip_logits=True).loss, output.loss)
    assert len(rows) == 2
    assert HEADS[head] in ours.train()(**inputs)
    assert HEADS[head] in ours(**inputs, skip_logits=False)
    assert len(rows) == 2  # without it the whole head runs


@pytest.mark.usefixtures("on_torch")
@pytest.mark.parametrize("head", HEADS)
def test_a_model_can_leave_its_logits_out(head, tmp_path):
    """In training with labels; a call may say otherwise, `undo` takes it back."""
    theirs, _, inputs = masked_lm("cpu", head)
    theirs.save_pretrained(tmp_path)
    made = getattr(fastbert, head)
    handle = fastbert.accelerate(theirs, skip_logits=True)
    for model in (theirs, made(theirs.config, skip_logits=True).train(),
                  made.from_pretrained(tmp_path, skip_logits=True).train()):  # fmt: skip
        assert HEADS[head] not in model(**inputs)
        assert HEADS[head] in model(**inputs, skip_logits=False)
        assert HEADS[head] in model(input_ids=inputs["input_ids"])
        assert HEADS[head] in model.eval()(**inputs)
        assert HEADS[head] not in copy.deepcopy(model).train()(**inputs)
    assert not hasattr(handle.undo(), "skip_logits")
    assert HEADS[head] in theirs.train()(**inputs)
    assert made.from_pretrained(tmp_path).skip_logits is False


@pytest.mark.usefixtures("on_torch")
def test_logits_that_cannot_be_left_out():
    theirs, ours, inputs = masked_lm("cpu")
    del inputs["labels"]
    with pytest.raises(ValueError, match="expected labels with skip_logits=True"):
        ours(**inputs, skip_logits=True)
    classifier, encoder = pair("BertForSequenceClassification")
    with pytest.raises(ValueError, match="got a BertForSequenceClassification, which has no"):
        fastbert.accelerate(classifier, skip_logits=True)
    assert type(classifier) is type(pair("BertForSequenceClassification")[0])  # as it was
    with pytest.raises(ValueError, match="skip_logits"):
        fastbert.BertModel(theirs.config, skip_logits=True)
    with pytest.raises(TypeError, match="skip_logits"):
        encoder(**inputs, skip_logits=True)


@pytest.mark.slow_on_kernels
@pytest.mark.parametrize("head", HEADS)
def test_logits_of_training_are_transformers_own(head, device, each_backend):
    theirs, ours, inputs = masked_lm(device, head)
    field = HEADS[head]
    expected, actual = theirs(**inputs), ours(**inputs)
    real = RIGHT.bool().to(device)
    torch.testing.assert_close(
        getattr(actual, field)[real], getattr(expected, field)[real], atol=1e-4, rtol=1e-4
    )
    assert type(actual) is type(expected) and list(actual) == list(expected)
    assert [t.shape for t in actual.to_tuple()] == [t.shape for t in expected.to_tuple()]
    as_tuple = ours(**inputs, return_dict=False)
    assert [t.shape for t in as_tuple] == [t.shape for t in expected.to_tuple()]
    # A loss of one's own on the logits beside the model's, which somebody looked at before.
    grads = []
    for model in (theirs, ours):
        output = model(**inputs)
        with torch.no_grad():
            assert output[field].argmax(-1).shape == (4, 9)
        extra = getattr(output, field)[real].pow(2).mean()
        grads.append(gradients(model, output.loss + extra))
    close(grads[1], grads[0])


@pytest.mark.slow
@pytest.mark.parametrize("head", HEADS)
def test_accumulated_batches_give_the_gradient_of_the_whole(head, device, each_backend):
    """``num_items_in_batch``, as Trainer passes it."""
    _, ours, inputs = masked_lm(device, head)
    if head == "BertForPreTraining":  # the same number of labels in both halves of its batch
        inputs["labels"] = torch.full_like(inputs["labels"], -100)
        inputs["labels"][:, 0] = 7
    whole = gradients(ours, ours(**inputs).loss)
    num_items = (inputs["labels"] != -100).sum()
    for count, skip in ((num_items, False), (int(num_items), False), (num_items, True)):
        parts = [{k: v[i : i + 2] for k, v in inputs.items()} for i in (0, 2)]
        loss = sum(ours(**part, num_items_in_batch=count, skip_logits=skip).loss for part in parts)
        close(gradients(ours, loss), whole)
    evaluated = ours.eval()(**inputs, num_items_in_batch=2 * num_items).loss
    if head == "BertForMaskedLM":
        torch.testing.assert_close(evaluated, ours(**inputs).loss / 2)


@pytest.mark.slow_on_kernels
def test_no_label_at_all(device, each_backend):
    """A batch in which nothing was masked: the loss is 0 and moves nothing, in every mode."""
    _, ours, inputs = masked_lm(device)
    inputs["labels"] = torch.full_like(inputs["labels"], -100)
    for skip in (False, True):
        loss = ours(**inputs, skip_logits=skip).loss
        assert loss == 0.0
        assert not any(g.any() for g in gradients(ours, loss).values())
    assert ours.eval()(**inputs).loss == 0.0


def test_a_label_outside_the_vocabulary_is_named(device, each_backend):
    _, ours, inputs = masked_lm(device)
    inputs["labels"][0, 0] = 99
    with pytest.raises(ValueError, match="from 0 to 98, or -100"):
        ours(**inputs, skip_logits=True)


@pytest.mark.slow
def test_tied_and_untied_decoders(device, each_backend):
    for tie in (True, False):
        theirs, ours, inputs = masked_lm(device, tie_word_embeddings=tie)
        table = ours.bert.embeddings.word_embeddings.weight
        assert (ours.cls.predictions.decoder.weight is table) == tie
        expected = gradients(theirs, theirs(**inputs).loss)
        for skip in (False, True):
            close(gradients(ours, ours(**inputs, skip_logits=skip).loss), expected)


def test_another_head_keeps_running_as_it_is(device, each_backend):
    """A decoder with something around it, a hook on the transform, a subclass: all logits."""
    theirs, ours, inputs = masked_lm(device)
    expected = theirs(**inputs).loss

    class Doubled(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x) * 2.0

    odd = copy.deepcopy(ours)
    decoder = odd.cls.predictions.decoder
    decoder.__class__ = Doubled
    output = odd(**inputs, skip_logits=True)
    assert output.logits is None
    doubled = F.cross_entropy(
        theirs(**inputs).logits.flatten(0, 1) * 2.0, inputs["labels"].flatten()
    )
    torch.testing.assert_close(output.loss, doubled, atol=1e-4, rtol=1e-4)
    seen = []
    ours.cls.predictions.transform.register_forward_hook(lambda *args: seen.append(args[2].shape))
    loss = ours(**inputs, skip_logits=True).loss
    torch.testing.assert_close(loss, expected, atol=1e-4, rtol=1e-4)
    assert seen == [(4, 9, 32)] or seen == [(21, 32)]


@pytest.mark.slow_on_kernels
def test_frozen_parts(device, each_backend):
    """Only what is to be trained gets a gradient, and it is the same as transformers'."""
    for frozen in (
        "embeddings",
        "bert",
        "encoder.layer.0",
        "cls.predictions",
        "LayerNorm",
        "bias",
    ):
        theirs, ours, inputs = masked_lm(device)
        for model in (theirs, ours):
            for name, p in model.named_parameters():
                p.requires_grad_(frozen not in name)
        grads = [gradients(m, m(**inputs).loss) for m in (theirs, ours)]
        close(grads[1], grads[0])


@pytest.mark.slow_on_kernels
@pytest.mark.parametrize("reentrant", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_gradient_checkpointing(reentrant, dropout, device, each_backend):
    _, ours, inputs = masked_lm(device)
    for module in ours.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = dropout
    results = []
    for checkpoint in (False, True):
        if checkpoint:
            enable = getattr(ours, "activation_checkpointing_enable", None)  # transformers 5.20 on
            (enable or ours.gradient_checkpointing_enable)({"use_reentrant": reentrant})
            if reentrant:  # otherwise the embeddings' output would be cut off
                ours.enable_input_require_grads()
        torch.manual_seed(9)
        results.append(gradients(ours, ours(**inputs).loss))
    close(results[1], results[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_matches_transformers(dtype, device, each_backend):
    """Values, dtypes of outputs, fp32 gradients, with the scaler of fp16."""
    theirs, ours, inputs = masked_lm(device)
    exact = copy.deepcopy(theirs).double()
    losses, grads = [], []
    for model in (theirs, ours):
        with torch.autocast(device, dtype):
            output = model(**inputs)
            states = model.bert(**{k: v for k, v in inputs.items() if k != "labels"})[0]
        assert output.loss.dtype == torch.float32
        losses.append(output.loss.detach())
        grads.append(gradients(model, output.loss * 1024.0))
        if model is theirs:
            expected_dtype = states.dtype
        assert states.dtype == expected_dtype
    wanted = gradients(exact, exact(**inputs).loss * 1024.0)
    units = {n: g.abs().max() for n, g in wanted.items() if g.abs().max() > 1e-9}
    got, oracle, baseline = (
        torch.cat([(g[n].double() / unit).flatten() for n, unit in units.items()])
        for g in (grads[1], wanted, grads[0])
    )
    assert all(g.dtype == torch.float32 for g in grads[1].values())
    assert_within_budget(got.to(dtype), oracle, baseline, f"gradients under autocast to {dtype}")


def test_gradients_of_gradients(device, each_backend):
    """As transformers gives them with eager attention; never left out in silence elsewhere: kernels
    have no second order, and torch's attention on a CPU neither."""
    theirs, ours, inputs = masked_lm(device)
    if each_backend == "torch":
        ours.set_attn_implementation("sdpa")
    with pytest.raises(RuntimeError, match=r"backend\('torch'\).*eager|not implemented"):
        second_order(ours, inputs)
    ours.set_attn_implementation("eager")  # what the message says
    with fastbert.backend("torch"):
        close(second_order(ours.double(), inputs), second_order(theirs.double(), inputs))


def second_order(model, inputs) -> dict[str, torch.Tensor]:
    weight = model.bert.encoder.layer[0].output.dense.weight
    (grad,) = torch.autograd.grad(model(**inputs).loss, weight, create_graph=True)
    return gradients(model, grad.pow(2).sum())


# What a call returns lies on the way to its result


HIDDEN = {"output_hidden_states": True}


@pytest.mark.slow_on_kernels
@pytest.mark.parametrize("mask", [None, RIGHT, RIGHT.flip(1)], ids=["whole", "right", "left"])
@pytest.mark.parametrize("checkpoint", [None, False, True])
def test_hidden_states_have_the_gradients_of_transformers(mask, checkpoint, device, each_backend):
    head = "BertForSequenceClassification"
    grads = []
    for model in pair(head, device, **NO_DROPOUT):
        inputs = inputs_for(head, mask, device)
        if checkpoint is not None:
            model.train()
            enable = getattr(model, "activation_checkpointing_enable", None)
            (enable or model.gradient_checkpointing_enable)({"use_reentrant": checkpoint})
            model.enable_input_require_grads()
        states = model(**inputs, **HIDDEN)
        for hidden in states.hidden_states:
            hidden.retain_grad()
        states.logits[:, 0].sum().backward()
        real = slice(None) if mask is None else mask.bool().to(device)
        grads.append([hidden.grad[real] for hidden in states.hidden_states])
    for actual, expected in zip(grads[1], grads[0], strict=True):
        scale = expected.abs().max().item()
        torch.testing.assert_close(actual, expected, atol=1e-4 * scale, rtol=0)


@pytest.mark.slow_on_kernels
def test_what_an_encoder_returns_is_what_its_pooler_reads(device, each_backend):
    for flags in ({}, HIDDEN, {"output_attentions": True}):
        for mask in (None, RIGHT):
            grads = []
            for model in pair("BertModel", device, **NO_DROPOUT):
                output = model(**inputs_for("BertModel", mask, device), **flags)
                output.last_hidden_state.retain_grad()
                output.pooler_output.sum().backward()
                grads.append(output.last_hidden_state.grad)
            torch.testing.assert_close(grads[1], grads[0], atol=1e-5, rtol=1e-4)


def test_attentions_have_the_gradients_of_transformers(device, each_backend):
    """As methods that explain a prediction by its attention need them."""
    grads = []
    for model in pair("BertForSequenceClassification", device, **NO_DROPOUT):
        inputs = inputs_for("BertForSequenceClassification", RIGHT, device)
        output = model(**inputs, output_attentions=True)
        grads.append(torch.autograd.grad(output.logits[:, 0].sum(), output.attentions))
    real = RIGHT.bool().to(device)
    pairs = (real[:, None, :, None] & real[:, None, None, :]).expand_as(grads[0][0])
    for actual, expected in zip(grads[1], grads[0], strict=True):
        scale = expected.abs().max().item()
        torch.testing.assert_close(actual[pairs], expected[pairs], atol=1e-4 * scale, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("mask", [None, RIGHT, RIGHT.flip(1)], ids=["whole", "right", "left"])
def test_asking_for_more_does_not_change_a_seeded_step(mask, device, each_backend):
    _, ours = pair(
        "BertForMaskedLM", device, hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.3
    )
    inputs = {**inputs_for("BertForMaskedLM", mask, device), "labels": LABELS.to(device)}
    grads = []
    for flags in ({}, {"output_attentions": True}, HIDDEN):
        torch.manual_seed(3)
        grads.append(gradients(ours.train(), ours(**inputs, **flags).loss))
    close(grads[1], grads[0])
    close(grads[2], grads[0])


def test_attentions_of_packed_sequences_are_apart(device, each_backend):
    _, ours = pair("BertModel", device, attention_probs_dropout_prob=0.3)
    ids = inputs_for("BertModel", None, device)["input_ids"].flatten()[:12][None]
    ends = torch.tensor([0, 5, 5, 12], dtype=torch.int32, device=device)
    for training in (False, True):
        torch.manual_seed(3)
        output = ours.train(training)(ids, cu_seq_lens_q=ends, output_attentions=True)
        for shown in output.attentions:
            assert not shown[..., :5, 5:].any() and not shown[..., 5:, :5].any()
            assert shown[..., :5, :5].any() and shown[..., 5:, 5:].any()
        torch.manual_seed(3)
        torch.testing.assert_close(ours(ids, cu_seq_lens_q=ends)[0], output[0])


# What rules a forward pass rules what backward computes again


@pytest.mark.parametrize("how", one_is_quick(["reentrant", "not reentrant", "torch's wrapper"]))
def test_a_forced_backend_rules_the_recomputation(how, device, each_backend, monkeypatch):
    from fastbert.families import model as bert

    _, ours, inputs = masked_lm(device)
    if how == "torch's wrapper":
        from torch.distributed.algorithms._checkpoint import checkpoint_wrapper as wrapping

        wrapping.apply_activation_checkpointing(
            ours, check_fn=lambda module: isinstance(module, bert.PackedLayer)
        )
    else:
        enable = getattr(ours, "activation_checkpointing_enable", None)
        (enable or ours.gradient_checkpointing_enable)({"use_reentrant": how == "reentrant"})
        ours.enable_input_require_grads()
    seen = []
    real = bert.encode_layer
    monkeypatch.setattr(
        bert, "encode_layer", lambda *args: (seen.append(bert.forced()), real(*args))[1]
    )
    for choice in ("torch", each_backend):
        with fastbert.backend(choice):
            loss = ours(**inputs).loss
        with fastbert.backend("torch" if choice != "torch" else None):
            loss.backward()
        assert seen == [choice] * 4  # two layers, forward and again
        seen.clear()


def test_a_function_that_names_the_backend_can_be_pickled_with_its_globals():
    """As dill does with recurse=True, which datasets uses for its fingerprints."""
    import pickle

    from fastbert.families import model as bert
    from fastbert.ops import backend

    assert pickle.loads(pickle.dumps(backend._choice)) is backend._choice
    assert pickle.loads(pickle.dumps(bert._of_thread)) is bert._of_thread
