"""Tiny BERTs and batches that several test files share."""

import copy

import torch
import transformers

import fastbert

# Lengths 9 (full), 4, 1 and 7 of 9.
RIGHT = (torch.arange(9) < torch.tensor([9, 4, 1, 7])[:, None]).long()


def tiny_config(**changes) -> transformers.BertConfig:
    options = dict(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        vocab_size=99,
        max_position_embeddings=40,
        attn_implementation="eager",  # the one that returns attention weights
    )
    return transformers.BertConfig(**{**options, **changes})


def pair(head: str, device: str = "cpu", **changes):
    """transformers' model and ours with the same weights, larger than the usual initialisation."""
    torch.manual_seed(0)
    config = tiny_config(initializer_range=0.3, **changes)
    theirs = getattr(transformers, head)(copy.deepcopy(config)).eval().to(device)
    ours = getattr(fastbert, head)(copy.deepcopy(config)).eval().to(device)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def inputs_for(head: str, mask: torch.Tensor | None, device: str = "cpu") -> dict:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 99, (4, 9), generator=generator)
    types = torch.randint(0, 2, (4, 9), generator=generator)
    inputs = {"input_ids": ids, "token_type_ids": types, "attention_mask": mask}
    if head == "BertForMultipleChoice":
        inputs = {k: None if v is None else v.view(2, 2, 9) for k, v in inputs.items()}
    return {k: None if v is None else v.to(device) for k, v in inputs.items()}
