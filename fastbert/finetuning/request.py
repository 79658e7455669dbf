"""What ``fastbert finetune`` is asked for."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Request"]


@dataclass(frozen=True)
class Request:
    """What was asked for; the names are the options of the command.

    Attributes:
        train, dev, test: tables; what is not given is split off from ``train``.
        output: the folder of the run.
        model: a checkpoint of a BERT.
        task: of `kinds.TASKS` or ``"embeddings"``, or None for what the columns say.
        epochs: how often every row is trained on, at most.
        batch_size: rows of a step, on average: batches are counted in tokens.
        device_tokens: of one forward and backward pass.
        max_length: tokens of an example at most.
        long: what becomes of a longer row, ``"cut"`` or ``"windows"``: several examples.
        dropout: of every layer and the head; None for what the checkpoint has.
        freeze: layers that stay as they are, from the first on, and the embeddings with them.
        lora: rank of the updates to all products of the layers, which stay as they are otherwise.
        balance: rare classes weigh as much as frequent ones in the loss.
        label_smoothing: share of the target that is spread over all classes.
        dev_share, test_share: of the rows, where no file is given; no test without a share.
        patience: evaluations without gain that end the run; 0 for never.
    """

    train: str
    output: str
    model: str
    dev: str | None = None
    test: str | None = None
    task: str | None = None
    epochs: float = 3.0
    batch_size: int = 32
    device_tokens: int = 8192
    max_length: int = 128
    long: str = "cut"
    learning_rate: float = 5e-5
    weight_decay: float = 0.01
    warmup: float = 0.06
    dropout: float | None = None
    freeze: int | None = None
    lora: int | None = None
    balance: bool = False
    label_smoothing: float = 0.0
    dev_share: float = 0.1
    test_share: float = 0.0
    patience: int = 2
    evaluate_every: int | None = None
    seed: int = 0
    workers: int = 0
    device: str = "auto"
    cache_dir: str | None = None
