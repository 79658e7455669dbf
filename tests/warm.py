"""What the server of `forked` does once, so that no process that it forks need do it."""

import gc

import sentence_transformers  # noqa: F401
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from typer.testing import CliRunner

import fastbert.cli.kernels
import fastbert.finetuning.finetune
import fastbert.tasks.embed_file
import fastbert.training.pretraining
import fastbert.workbench.terminal
from fastbert.cli import app
from fastbert.families.registry import class_names

for name in class_names():
    getattr(fastbert, name)
get_checkpoint_conversion_mapping("bert")  # of all models, at half a second
CliRunner().invoke(app, ["embed", "--help"])
gc.collect()
gc.freeze()  # for the processes: no collection of theirs need look at it
