"""model.activation_checkpointing: the same bits from less memory, in training only, at every ZeRO stage."""

import json

import pytest
import torch
from torch import nn

from msm_dist.config import Model
from msm_dist.model import transformer
from msm_dist.model.mae import MaskedSpectrogramModel
from msm_dist.model.transformer import Block
from tests.checkpointing_worker import FRAMES, SMALL
from tests.processes import run_ranks

CLIPS = 3
NUM_BLOCKS = SMALL["depth"] + SMALL["decoder_depth"]


def build(checkpointing, dtype=torch.float32):
    model = Model(**SMALL, activation_checkpointing=checkpointing)
    return MaskedSpectrogramModel(model, 80, FRAMES, seed=5).to(dtype)


def batch():
    spectrogram = torch.randn(CLIPS, 1, 80, FRAMES, generator=torch.Generator().manual_seed(1))
    return spectrogram, torch.tensor([[0, clip, 0] for clip in range(CLIPS)])


def kept_bytes(run, parameters):
    """What a forward pass keeps for its backward, beside the parameters."""
    own = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    kept = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # alive, so that no address comes twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        run()
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_and_gradients_are_the_same_bits(dtype):
    plain, thrifty = build(False, dtype), build(True, dtype)
    losses = [model(*batch()).loss for model in (plain, thrifty)]
    for loss in losses:
        loss.backward()
    assert torch.equal(*losses)
    for (name, parameter), other in zip(plain.named_parameters(), thrifty.parameters(), strict=True):
        assert torch.equal(parameter.grad, other.grad), name


def test_a_block_keeps_its_input_only():
    block = Block(32, 2, False, "reference", checkpointing=True)
    for parameter in block.parameters():
        nn.init.ones_(parameter)
    x = torch.randn(CLIPS, 7, 32, requires_grad=True)
    assert kept_bytes(lambda: block(x), block.parameters()) == x.numel() * 4
    block.checkpointing = False
    # At least queries, keys, values and four times the width before and after GELU.
    assert kept_bytes(lambda: block(x), block.parameters()) > 11 * x.numel() * 4


def test_the_whole_model_keeps_less_than_a_third():
    kept = {
        checkpointing: kept_bytes(lambda model=model: model(*batch()), model.parameters())
        for checkpointing in (False, True)
        for model in [build(checkpointing)]
    }
    assert kept[True] < kept[False] / 3


def test_nothing_is_recomputed_without_gradients_or_out_of_training(monkeypatch):
    calls = []

    def counting(function, block, x, **options):
        calls.append(block)
        return function(block, x)

    monkeypatch.setattr(transformer, "checkpoint", counting)
    model = build(True)
    model(*batch())
    assert len(calls) == NUM_BLOCKS
    with torch.no_grad():
        model(*batch())
    model.eval()
    model(*batch())
    model.encoder.features(batch()[0])
    assert len(calls) == NUM_BLOCKS


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpointing")
    run_ranks(["-m", "tests.checkpointing_worker", str(folder)], size=2)
    return json.loads((folder / "results.json").read_text())


@pytest.mark.distributed
@pytest.mark.parametrize("stage", ["0", "1", "2", "3"])
def test_training_at_every_stage_is_the_same_to_the_bit(results, stage):
    assert results[stage]["moved"]
    assert results[stage]["same_losses"]
    assert not results[stage]["different"]


@pytest.mark.distributed
def test_blocks_hold_no_whole_weights_between_forward_and_backward_at_stage_3(results):
    assert results["2"]["thrifty"]["whole"] > 0
    assert results["3"]["thrifty"]["whole"] == 0
    assert results["3"]["plain"]["whole"] == 0


@pytest.mark.distributed
def test_recomputing_leaves_deepspeeds_count_of_running_modules_as_it_was(results):
    # DeepSpeed pushes a module before its forward and pops it after; an aborted recomputation would not pop.
    assert results["3"]["thrifty"]["left_on_stack"] == results["3"]["plain"]["left_on_stack"]


@pytest.mark.distributed
def test_recomputing_gathers_no_weight_once_more(results):
    thrifty, plain = results["3"]["thrifty"], results["3"]["plain"]
    assert plain["gathers"] > 0
    assert (thrifty["gathers"], thrifty["gathered"]) == (plain["gathers"], plain["gathered"])
