import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from msm_dist.errors import ConfigError
from msm_dist.model.patches import PatchGrid, PositionTable, patchify, sincos_1d, sincos_2d, unpatchify


@given(rows=st.integers(1, 4), columns=st.integers(1, 5), height=st.integers(1, 4), width=st.integers(1, 4))
def test_unpatchify_inverts_patchify(rows, columns, height, width):
    grid = PatchGrid(rows * height, columns * width, (height, width))
    spectrogram = torch.arange(2.0 * grid.n_mels * grid.frames).reshape(2, 1, grid.n_mels, grid.frames)
    patches = patchify(spectrogram, grid.patch)
    assert patches.shape == (2, grid.num_patches, grid.patch_pixels)
    assert torch.equal(unpatchify(patches, grid), spectrogram)


def test_patches_are_frequency_major_and_pixels_row_major():
    spectrogram = torch.arange(8.0 * 6).reshape(1, 1, 8, 6)
    patches = patchify(spectrogram, (4, 2))[0]
    assert patches[1].tolist() == spectrogram[0, 0, :4, 2:4].flatten().tolist()  # next in time
    assert patches[3].tolist() == spectrogram[0, 0, 4:, :2].flatten().tolist()  # next in frequency


def test_grid_counts_patches():
    grid = PatchGrid(80, 208, (16, 16))
    assert (grid.shape, grid.num_patches, grid.patch_pixels) == ((5, 13), 65, 256)


@pytest.mark.parametrize("n_mels, frames", [(81, 208), (80, 209), (80, 0)])
def test_grid_refuses_a_fraction_of_a_patch(n_mels, frames):
    with pytest.raises(ConfigError, match=f"{n_mels} mel bands x {frames} frames.*16x16"):
        PatchGrid(n_mels, frames, (16, 16))


def test_encoder_table_is_golden():
    table = sincos_2d(PatchGrid(80, 208, (16, 16)), 768)
    expected = [0.909297, 0.944237, 0.000210, -0.416147, 0.841471, 0.815251, 0.540302]
    row = table[1 * 13 + 2]  # patch (f=1, t=2)
    assert row[[0, 1, 191, 192, 384, 385, 576]].tolist() == pytest.approx(expected, abs=6e-7)


def test_decoder_table_is_golden():
    expected = [0.650288, -0.759688, 0.987186, -0.159576, 0.873036, 0.487656]
    assert sincos_1d(65, 384)[15, :6].tolist() == pytest.approx(expected, abs=6e-7)


@pytest.mark.parametrize(
    "make", [lambda p: sincos_2d(PatchGrid(80, 208, (16, 16)), 64, p), lambda p: sincos_1d(65, 64, p)]
)
def test_prefix_rows_are_zero_and_patches_still_start_at_zero(make):
    assert torch.equal(make(1), torch.cat([torch.zeros(1, 64), make(0)]))


def test_an_odd_width_has_no_2d_table():
    with pytest.raises(ConfigError, match="multiple of 4"):
        sincos_2d(PatchGrid(80, 208, (16, 16)), 30)


def test_casts_never_cost_a_table_its_precision():
    exact = sincos_1d(65, 64)
    table = PositionTable(exact.clone())
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), table)
    for cast, dtype in [
        (model.bfloat16, torch.float32),
        (model.half, torch.float32),
        (lambda: model.to("cpu", torch.bfloat16), torch.float32),
        (model.double, torch.float64),
        (model.float, torch.float32),
    ]:
        cast()
        assert table().dtype == dtype
        assert torch.equal(table(), exact.to(dtype))
    assert not table.state_dict()


def test_table_follows_its_model_to_a_device():
    table = PositionTable(sincos_1d(4, 8))
    assert torch.nn.Sequential(table).to("meta")[0]().device.type == "meta"
