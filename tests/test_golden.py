"""Golden values of the method: parameters by formula under published names, the whole model in float64."""

import functools
import math

import pytest
import torch

from msm_dist.model.mae import MaskedSpectrogramModel
from msm_dist.model.weights import from_published, to_published
from msm_kernels.patch_masking import masking_from_keep
from tests.published import BASE, PAPER, RERUN, shapes, tables

PIXELS = [0.88440338, 0.20265479, -0.79158845]


@functools.cache
def ramp(numel: int) -> torch.Tensor:
    return 0.02 * torch.sin(0.7 * torch.arange(numel, dtype=torch.float64))


@functools.lru_cache(maxsize=1)
def golden_model(frames: int, patch_size: str, generation: str = PAPER) -> MaskedSpectrogramModel:
    """The base model from a published state dict with 0.02 sin(0.7 n), plus 1 for the weights of norms.

    float32 values made float64. In the re-run's generation queries and values get the paper's biases and keys one too:
    it adds the same to all scores of a query, which the softmax takes away again.
    """
    patch = tuple(int(side) for side in patch_size.split("x"))
    state = tables(frames, patch, generation, BASE)
    for name, shape in shapes(patch, generation, BASE).items():
        is_norm = "norm" in name and name.endswith("weight")
        values = ramp(shape[0] // 3).repeat(3) if name.endswith("qkv.bias") else ramp(math.prod(shape))
        state[name] = (values.reshape(shape) + is_norm).float()
    return from_published(state).double()


@pytest.fixture(scope="module", autouse=True)
def nothing_is_kept():
    """A base model in float64 takes 0.8 GB."""
    yield
    golden_model.cache_clear()
    ramp.cache_clear()


def with_settings(model: MaskedSpectrogramModel, **settings) -> MaskedSpectrogramModel:
    """The same parameters under other settings."""
    config = model.config.model_copy(update=settings)
    other = MaskedSpectrogramModel(config, model.grid.n_mels, model.grid.frames).double()
    other.load_state_dict(model.state_dict())
    return other


def run(model: MaskedSpectrogramModel):
    """A forward pass on the golden input, with every fourth patch kept."""
    num_patches, frames = model.grid.num_patches, model.grid.frames
    n = torch.arange(2 * 80 * frames, dtype=torch.float64)
    spectrogram = (torch.sin(0.013 * n) + 0.1 * torch.cos(1.7 * n)).reshape(2, 1, 80, frames)
    kept = torch.arange(0, 4 * (num_patches // 4), 4).repeat(2, 1)
    with torch.no_grad():
        return model(spectrogram, masking=masking_from_keep(kept, num_patches))


@pytest.mark.parametrize(
    "frames, patch_size, generation, settings, num_patches, num_keep, loss, pixels",
    [
        (208, "16x16", PAPER, {}, 65, 16, 0.8041194786, PIXELS),
        (208, "16x16", PAPER, {"normalize_targets": True}, 65, 16, 1.2943053511, PIXELS),
        (
            208,
            "16x16",
            PAPER,
            {"decoder_positions": "2d"},
            65,
            16,
            0.8917815942,
            [0.94212122, 0.17984420, -0.85809371],
        ),
        (208, "16x16", RERUN, {}, 65, 16, 0.8917815942, [0.94212122, 0.17984420, -0.85809371]),
        (96, "16x4", PAPER, {}, 120, 30, 0.7950192566, [0.88444457, 0.20270933, -0.79160864]),
        (304, "80x4", PAPER, {}, 76, 19, 0.7970700661, [0.88432091, 0.20266390, -0.79150248]),
    ],
)
def test_loss_and_prediction_are_golden(frames, patch_size, generation, settings, num_patches, num_keep, loss, pixels):
    model = golden_model(frames, patch_size, generation)
    output = run(with_settings(model, **settings) if settings else model)
    assert (output.masking.ids_restore.shape[1], output.masking.ids_keep.shape[1]) == (num_patches, num_keep)
    assert output.loss.item() == pytest.approx(loss, abs=1e-10)
    assert output.masking.ids_masked[0, 0] == 1
    assert output.prediction[0, 0, :3].tolist() == pytest.approx(pixels, abs=6e-9)


def test_base_model_has_the_published_size():
    model = golden_model(208, "16x16")
    trainable = sum(parameter.numel() for parameter in model.parameters())
    tables = sum(table.numel() for table in model.buffers())
    encoder = sum(value.numel() for value in [*model.encoder.parameters(), *model.encoder.buffers()])
    assert [round(count / 1e6, 2) for count in (trainable, trainable + tables)] == [92.74, 92.81]
    assert round(encoder / 1e6, 1) == 85.3
    assert len(to_published(model)) == 222
    assert len(to_published(golden_model(208, "16x16", RERUN))) == 222 - 16


def test_bias_of_the_keys_is_the_files_in_the_later_generation():
    qkv = golden_model(208, "16x16", RERUN).encoder.blocks[3].attn.qkv
    assert torch.equal(qkv.bias[768:1536], ramp(768).float().double())
