"""attn_implementation="fastbert", in encoders that have no family."""

import copy

import pytest
import torch
import transformers
from tiny import RIGHT, one_is_quick, specified_by, tiny_config

import fastbert
from fastbert.testing import assert_matches

IDS = torch.randint(5, 99, (4, 9), generator=torch.Generator().manual_seed(0))
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
         "intermediate_size": 64, "vocab_size": 99, "pad_token_id": 0}  # fmt: skip
MODELS = {
    "NomicBertModel": lambda: transformers.NomicBertConfig(**SIZES),
    "EuroBertModel": lambda: transformers.EuroBertConfig(**SIZES, num_key_value_heads=2),
    "BertModel": lambda: tiny_config(initializer_range=0.3),
}


@pytest.fixture(autouse=True)
def _registered():
    fastbert.register_attention()


def both(name, device="cpu", **changes):
    if not hasattr(transformers, name):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    config = MODELS[name]()
    for key, value in changes.items():
        setattr(config, key, value)
    torch.manual_seed(0)
    theirs = getattr(transformers, name)(copy.deepcopy(config)).eval().to(device)
    theirs.set_attn_implementation("eager")
    ours = getattr(transformers, name)(copy.deepcopy(config)).eval().to(device)
    ours.load_state_dict(theirs.state_dict())
    ours.set_attn_implementation("fastbert")
    return theirs, ours


@pytest.mark.parametrize("mask", [None, RIGHT, RIGHT.flip(1), RIGHT * (torch.arange(9) != 2)])
@pytest.mark.parametrize("name", one_is_quick(MODELS))
def test_encoders_without_a_family_are_as_exact(name, mask, device, each_backend):
    theirs, ours = both(name, device)
    inputs = {
        "input_ids": IDS.to(device),
        "attention_mask": None if mask is None else mask.to(device),
    }
    real = torch.ones_like(RIGHT) if mask is None else mask

    def read(output):
        return [output.last_hidden_state[real.bool().to(device)]]

    specification, parameters = specified_by(theirs, read, **inputs)
    with torch.no_grad():
        for _ in range(2):  # a batch is remembered by its mask
            assert_matches(read(ours(**inputs)), specification, parameters, name)


def test_gradients(on_torch):
    theirs, ours = both("EuroBertModel", attention_dropout=0.0)
    squares = lambda out: out[0][RIGHT.bool()].square().sum()  # noqa: E731
    specified, parameters = specified_by(
        theirs.train(), squares, input_ids=IDS, attention_mask=RIGHT
    )

    def gradients(*given):
        given = [t.detach().requires_grad_() for t in given]
        return torch.autograd.grad(specified(*given), given)

    loss = squares(ours.train()(IDS, attention_mask=RIGHT))
    assert_matches(
        torch.autograd.grad(loss, [*ours.parameters()]), gradients, parameters, "gradients"
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_one_graph_for_any_mask(name, on_torch):
    theirs, ours = both(name)
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="eager")
    for mask in (RIGHT, RIGHT.flip(1), torch.ones_like(RIGHT)):
        inputs = {"input_ids": IDS, "attention_mask": mask}
        real = mask.bool()

        def read(output, real=real):
            return [output.last_hidden_state[real]]

        specification, parameters = specified_by(theirs, read, **inputs)
        with torch.no_grad():
            assert_matches(read(compiled(**inputs)), specification, parameters, name)


def test_what_is_not_an_encoders_attention_is_refused(on_torch):
    sizes = {**SIZES, "pad_token_id": 0}
    decoder = transformers.LlamaModel(transformers.LlamaConfig(**sizes))
    decoder.set_attn_implementation("fastbert")
    with pytest.raises(NotImplementedError, match="got is_causal in a LlamaAttention"):
        decoder(IDS)
    local = transformers.ModernBertModel(
        transformers.ModernBertConfig(**sizes, global_attn_every_n_layers=2)
    )
    local.set_attn_implementation("fastbert")
    with pytest.raises(NotImplementedError, match="got sliding_window in a ModernBertAttention"):
        local(IDS)
    _, ours = both("NomicBertModel")
    with pytest.raises(NotImplementedError, match="a mask \\[batch, length\\] for padding"):
        ours(IDS, attention_mask=torch.ones(4, 1, 9, 9, dtype=torch.bool))


@pytest.mark.parametrize("name", one_is_quick(MODELS))
def test_packed_sequences_stay_apart(name, device, each_backend):
    """As with transformers' flash attentions, which the bounds are for."""
    theirs, ours = both(name, device)
    lengths = [4, 1, 7]
    ids = IDS.flatten()[: sum(lengths)].to(device)
    positions = torch.cat([torch.arange(n) for n in lengths])[None].to(device)
    bounds = torch.tensor([0, 4, 5, 12], dtype=torch.int32, device=device)
    packed = {"position_ids": positions, "cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds,
              "max_length_q": 7, "max_length_k": 7}  # fmt: skip
    with torch.no_grad():
        apart = torch.cat([theirs(part[None])[0][0] for part in ids.split(lengths)])
        found = ours(ids[None], **packed)[0][0]
        torch.testing.assert_close(found, apart)
        bounds[1:3] = torch.tensor([2, 9])  # other sequences in the same tensor
        parts = ids.split([2, 7, 3])
        places = torch.cat([torch.arange(len(part)) for part in parts])[None].to(device)
        apart = torch.cat([theirs(part[None])[0][0] for part in parts])
        found = ours(ids[None], **{**packed, "position_ids": places})[0][0]
        torch.testing.assert_close(found, apart)
        with pytest.raises(ValueError, match=r"rise from 0 .*got \[0, 2, 9, 12\] for .*\(1, 9\)"):
            ours(ids[None, :9], cu_seq_lens_q=bounds)
        mask = torch.ones(1, 12, dtype=torch.long, device=device)
        mask[0, -1] = 0
        with pytest.raises(NotImplementedError, match="got a mask beside cu_seq_lens_q in a"):
            ours(ids[None], attention_mask=mask, cu_seq_lens_q=bounds)
        with pytest.raises(NotImplementedError, match="cu_seq_lens_k as cu_seq_lens_q, got"):
            ours(ids[None], cu_seq_lens_q=bounds, cu_seq_lens_k=bounds[[0, 1, 3]])


def test_a_family_is_packed_all_the_same(on_torch):
    from fastbert.families.obstacle import obstacle

    _, ours = both("BertModel")
    fastbert.accelerate(ours)
    assert obstacle(ours) is None
