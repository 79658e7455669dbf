"""`transformers.Trainer` over our models: accumulated batches are one batch, a run that goes on is
the run."""

import copy

import pytest
import torch
import transformers
from test_families import OTHERS, SAME, config_of, inputs_of, labels_for
from tiny import RIGHT, inputs_for, one_is_quick, pair

import fastbert
from fastbert.families import registry

pytestmark = pytest.mark.usefixtures("on_torch")
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
GENERATOR = torch.Generator().manual_seed(4)
BY_TOKEN = torch.randint(0, 2, (4, 9), generator=GENERATOR)
BY_TOKEN = BY_TOKEN.masked_fill((RIGHT == 0) | (torch.arange(9) % 3 == 1), -100)
LABELS = {
    "BertForMaskedLM": BY_TOKEN,
    "BertForTokenClassification": BY_TOKEN,
    "BertForSequenceClassification": torch.tensor([0, 1, 1, 0]),
    "BertForNextSentencePrediction": torch.tensor([0, 1, -100, 0]),
    "regression": torch.tensor([0.3, -1.0, 2.0, 0.0]),
    "several labels": torch.tensor([[1.0, 0.0], [0.0, 0.0], [1.0, 1.0], [0.0, 1.0]]),
}


def model_and_rows(name: str):
    changes = {"regression": {"num_labels": 1}, "several labels": {}}.get(name, {})
    if name == "several labels":
        changes = {"problem_type": "multi_label_classification"}
    head = name if name.startswith("Bert") else "BertForSequenceClassification"
    _, model = pair(head, **NO_DROPOUT, **changes)
    inputs = {**inputs_for(head, RIGHT), "labels": LABELS[name]}
    return model.train(), [{k: v[i] for k, v in inputs.items()} for i in range(4)]


def step(model, rows, folder, batch_size: int) -> dict[str, torch.Tensor]:
    """How one optimizer step with a plain SGD moves the weights."""
    model = copy.deepcopy(model)
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=batch_size, max_steps=1,
        gradient_accumulation_steps=4 // batch_size, learning_rate=1.0, optim="sgd",
        lr_scheduler_type="constant", max_grad_norm=0.0, report_to=[], save_strategy="no",
        use_cpu=True, disable_tqdm=True, seed=3,
    )  # fmt: skip
    before = {k: p.detach().clone() for k, p in model.named_parameters()}
    transformers.Trainer(model, arguments, train_dataset=rows).train()
    return {k: p.detach() - before[k] for k, p in model.named_parameters()}


@pytest.mark.parametrize("name", one_is_quick(LABELS))
def test_accumulated_batches_give_the_step_of_the_whole(name, tmp_path):
    model, rows = model_and_rows(name)
    whole, parts = (step(model, rows, tmp_path, size) for size in (4, 1))
    assert any(change.abs().max() > 1e-3 for change in whole.values())
    for key, change in whole.items():
        scale = change.abs().max().item()
        torch.testing.assert_close(parts[key], change, atol=1e-4 * scale + 1e-6, rtol=0, msg=key)


def test_an_evaluation_reports_the_mean(tmp_path):
    model, rows = model_and_rows("BertForSequenceClassification")
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), per_device_eval_batch_size=2, report_to=[], use_cpu=True,
        disable_tqdm=True,
    )  # fmt: skip
    reported = transformers.Trainer(model, arguments, eval_dataset=rows).evaluate()["eval_loss"]
    batch = {k: torch.stack([row[k] for row in rows]) for k in rows[0]}
    with torch.no_grad():
        assert reported == pytest.approx(model.eval()(**batch).loss.item(), rel=1e-4)


MASKED_LM = [
    (family, head)
    for family in ("bert", *OTHERS)
    if family not in SAME
    for head in registry.load(family).heads
    if head.endswith("ForMaskedLM")
]


@pytest.mark.parametrize(("family", "head"), one_is_quick(MASKED_LM))
def test_a_run_that_goes_on_is_the_run(family, head, tmp_path):
    """With dropout, whose random state is in the checkpoint; other weights are there before."""
    inputs = {**inputs_of(head, RIGHT), **labels_for(head, config_of(family))}
    rows = [{k: v[i] for k, v in inputs.items()} for i in range(4)] * 3

    def trained(name: str, seed: int, resume: str | None = None) -> torch.nn.Module:
        torch.manual_seed(seed)
        model = getattr(fastbert, head)(config_of(family))
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path / name), per_device_train_batch_size=2, max_steps=6,
            save_steps=3, learning_rate=1e-2, report_to=[], use_cpu=True, disable_tqdm=True,
        )  # fmt: skip
        trainer = transformers.Trainer(model, arguments, train_dataset=rows)
        trainer.train(
            resume_from_checkpoint=str(tmp_path / "whole/checkpoint-3") if resume else None
        )
        return model

    whole = trained("whole", 0)
    parts = trained("parts", 1, resume=str(tmp_path / "whole/checkpoint-3"))
    for (name, one), other in zip(whole.named_parameters(), parts.parameters(), strict=True):
        assert torch.equal(one, other), name
