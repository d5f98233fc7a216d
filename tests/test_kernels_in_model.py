"""The whole model on the Triton kernels: the reference's numbers, under torch.compile, checkpointing and ZeRO-3."""

import json

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from msm_dist.config import Model
from msm_dist.model.mae import MaskedSpectrogramModel
from msm_kernels.attention import regime
from tests.kernel_checks import DEVICE, MARKS, ON_GPU, draw, relative_error
from tests.processes import run_ranks

pytestmark = MARKS  # pytest.mark.gpu where there is one

SMALL = {
    "embed_dim": 64,
    "depth": 2,
    "num_heads": 2,
    "decoder_embed_dim": 32,
    "decoder_depth": 1,
    "decoder_num_heads": 1,
}
FRAMES = 48
LONG = {"patch_size": "16x4"}  # 61 tokens in the decoder; the other patches give 31 at most


def build(backend, **settings):
    return MaskedSpectrogramModel(Model(**SMALL, backend=backend, **settings), 80, FRAMES, seed=5).to(DEVICE)


def batch(clips=3):
    ids = torch.stack([torch.full((clips,), 2), torch.arange(clips) * 7, torch.zeros(clips, dtype=torch.int64)], dim=1)
    return draw(clips, 1, 80, FRAMES), ids.to(DEVICE)


def gradients(model):
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"cls_token": False, "normalize_targets": True},
        {"patch_size": "80x4", "mask_ratio": 0.7},
        {"patch_size": "16x8", "key_bias": True, "decoder_positions": "2d"},
        LONG,
    ],
)
def test_loss_and_gradients_are_those_of_the_reference(settings):
    outputs = []
    for backend in ("triton", "reference"):
        model = build(backend, **settings)
        output = model(*batch())
        output.loss.backward()
        outputs.append((output, gradients(model)))
    (ours, our_gradients), (theirs, their_gradients) = outputs
    for one, other in zip(ours.masking, theirs.masking, strict=True):
        assert torch.equal(one, other)
    assert relative_error(ours.loss, theirs.loss) < 1e-6
    assert relative_error(ours.prediction, theirs.prediction) < 1e-5
    for name, gradient in our_gradients.items():
        assert relative_error(gradient, their_gradients[name]) < 1e-5, name


def test_long_sequences_reach_the_tiled_attention():
    spectrogram, _ = batch()
    num_tokens = spectrogram[0].numel() // (16 * 4) + 1
    assert regime(num_tokens, SMALL["decoder_embed_dim"] // SMALL["decoder_num_heads"], spectrogram.dtype) == "tiled"


def test_unmasked_features_are_those_of_the_reference():
    spectrogram = batch()[0]
    features = [build(backend).encoder.features(spectrogram) for backend in ("triton", "reference")]
    assert relative_error(*features) < 1e-5


@pytest.mark.parametrize("backend, settings", [("triton", {}), ("triton", LONG), ("reference", {})])
def test_the_bare_model_compiles_to_one_graph(backend, settings):
    """Without a GPU the graph runs as it was captured, forward and backward; with one Inductor compiles it."""
    torch.compiler.reset()
    plain, compiled = build(backend, **settings), build(backend, **settings)
    graph = torch.compile(compiled, fullgraph=True, backend="inductor" if ON_GPU else "aot_eager")
    expected, output = plain(*batch()), graph(*batch())
    expected.loss.backward()
    output.loss.backward()
    tolerance = 1e-5 if ON_GPU else 1e-6
    assert relative_error(output.loss, expected.loss) < tolerance
    assert relative_error(output.prediction, expected.prediction) < tolerance
    for name, gradient in gradients(compiled).items():
        assert relative_error(gradient, gradients(plain)[name]) < 10 * tolerance, name


@pytest.mark.parametrize("backend, settings", [("triton", {}), ("triton", LONG), ("reference", {})])
def test_activation_checkpointing_changes_no_bit(backend, settings):
    plain, thrifty = build(backend, **settings), build(backend, **settings)
    for part in (thrifty.encoder.blocks, thrifty.decoder.blocks):
        for block in part:
            block.forward = recomputing(block.forward)
    losses = [model(*batch()).loss for model in (plain, thrifty)]
    for loss in losses:
        loss.backward()
    assert torch.equal(*losses)
    for name, gradient in gradients(thrifty).items():
        assert torch.equal(gradient, gradients(plain)[name]), name


def recomputing(forward):
    return lambda x: checkpoint(forward, x, use_reentrant=False)


@pytest.mark.distributed
@pytest.mark.parametrize("size", [1] if ON_GPU else [2])
def test_three_steps_of_zero_3_are_those_of_plain_adamw(tmp_path, size):
    """Parameters are on hand only inside their module's forward and backward; the kernels must live with that."""
    if ON_GPU:
        pytest.importorskip("deepspeed", reason="DeepSpeed is not part of this GPU image; docs/benchmarks.md says how")
    run_ranks(["-m", "tests.zero3_worker", str(tmp_path)], size=size)
    result = json.loads((tmp_path / "results.json").read_text())
    assert result["partitioned"] > 0
    assert result["loss_error"] < 1e-6
    assert result["weight_error"] < 1e-5
