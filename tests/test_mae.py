import copy

import pytest
import torch

from msm_dist.config import Model
from msm_dist.errors import ConfigError
from msm_dist.model.mae import Encoder, MaskedSpectrogramModel, initialize
from msm_dist.model.patches import PatchGrid, patchify, sincos_2d
from msm_dist.model.transformer import Block, QueryKeyValue
from msm_kernels.patch_masking import masking_from_keep, random_masking

SMALL = {
    "embed_dim": 24,
    "depth": 2,
    "num_heads": 2,
    "decoder_embed_dim": 16,
    "decoder_depth": 1,
    "decoder_num_heads": 2,
}
PATCHES = ["16x16", "16x8", "16x4", "8x16", "8x8", "80x4", "80x2", "80x1"]


def small(frames: int = 96, seed: int = 0, **settings) -> MaskedSpectrogramModel:
    return MaskedSpectrogramModel(Model(**SMALL, **settings), 80, frames, seed)


def clips(batch: int = 2, frames: int = 96) -> torch.Tensor:
    return torch.randn(batch, 1, 80, frames, generator=torch.Generator().manual_seed(0))


def sample_ids(batch: int = 2) -> torch.Tensor:
    return torch.stack([torch.zeros(batch), torch.arange(batch), torch.zeros(batch)], dim=1).long()


@pytest.mark.parametrize("patch_size", PATCHES)
@pytest.mark.parametrize("frames", [96, 208, 304, 512, 608])
def test_every_patch_shape_and_duration_predicts_its_masked_patches(patch_size, frames):
    model = small(frames, patch_size=patch_size)
    with torch.no_grad():
        output = model(clips(frames=frames), sample_ids())
    num_masked = model.grid.num_patches - model.num_keep
    assert output.prediction.shape == (2, num_masked, model.grid.patch_pixels)
    assert output.loss.isfinite()


@pytest.mark.parametrize("cls_token", [True, False])
@pytest.mark.parametrize("key_bias", [True, False])
@pytest.mark.parametrize("decoder_positions", ["1d", "2d"])
@pytest.mark.parametrize("normalize_targets", [True, False])
def test_every_setting_trains_every_parameter(cls_token, key_bias, decoder_positions, normalize_targets):
    model = small(
        cls_token=cls_token,
        key_bias=key_bias,
        decoder_positions=decoder_positions,
        normalize_targets=normalize_targets,
    )
    model(clips(), sample_ids()).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize(
    "frames, patch_size, mask_ratio, num_keep",
    [
        (208, "16x16", 0.75, 16),
        (208, "16x16", 0.8, 12),  # 65 * (1 - 0.8) is 12.999...
        (208, "16x16", 0.7, 19),  # 19.5
        (608, "16x16", 0.7, 57),
    ],
)
def test_number_of_kept_patches_is_truncated(frames, patch_size, mask_ratio, num_keep):
    model = small(frames, patch_size=patch_size, mask_ratio=mask_ratio)
    assert model.draw_masking(sample_ids()).ids_keep.shape[1] == model.num_keep == num_keep


def test_masks_are_keyed_by_seed_and_sample_and_a_given_masking_wins():
    model = small(seed=5)
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    drawn = model(clips(), ids).masking
    for ours, expected in zip(drawn, random_masking(5, ids, 30, 7), strict=True):
        assert torch.equal(ours, expected)
    given = masking_from_keep(torch.tensor([[0, 1], [2, 3]]), 30)
    assert model(clips(), ids, masking=given).masking is given


def test_neither_sample_ids_nor_masking_is_an_error():
    with pytest.raises(ValueError, match="neither was given"):
        small()(clips())


def test_a_spectrogram_of_another_size_is_refused():
    with pytest.raises(ValueError, match=r"must be \[B, 1, 80, 96\]"):
        small()(clips(frames=112), sample_ids())


def test_hiding_every_patch_is_a_config_error():
    with pytest.raises(ConfigError, match="mask_ratio = 0.9: of 5 patches 0 stay visible"):
        small(frames=16, mask_ratio=0.9)


def test_loss_compares_prediction_with_the_masked_patches():
    model = small()
    loss, prediction, masking = model(clips(), sample_ids())
    target = patchify(clips(), (16, 16))
    errors = [(prediction[i] - target[i, masking.ids_masked[i]]) ** 2 for i in range(2)]
    torch.testing.assert_close(loss, torch.stack(errors).mean())


def test_the_encoder_does_not_see_masked_patches():
    model = small()
    _, prediction, masking = model(clips(), sample_ids())
    other = clips()
    row, column = divmod(int(masking.ids_masked[0, 0]), 6)
    other[0, 0, 16 * row : 16 * row + 16, 16 * column : 16 * column + 16] += 10
    assert torch.equal(model(other, masking=masking).prediction, prediction)


@pytest.mark.parametrize("cls_token", [True, False])
def test_the_decoder_uses_every_visible_token(cls_token):
    model = small(cls_token=cls_token)
    masking = model.draw_masking(sample_ids())
    latent = torch.randn(2, model.num_keep + cls_token, 24, requires_grad=True)
    model.decoder(latent, masking).sum().backward()
    assert (latent.grad.abs().sum(dim=-1) > 0).all()


def test_initial_weights_are_a_function_of_the_seed_alone():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = small(seed=3).state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    second, other = small(seed=3).state_dict(), small(seed=4).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["encoder.patch_embed.weight"], other["encoder.patch_embed.weight"])


def test_initial_weights_are_those_of_the_recipe():
    model = MaskedSpectrogramModel(Model(size="tiny"), 80, 208)
    for name, value in model.state_dict().items():
        if value.ndim == 3:
            assert value.std().item() == pytest.approx(0.02, rel=0.25), name
        elif value.ndim == 2:
            bound = (6 / sum(value.shape)) ** 0.5
            assert value.abs().max() <= bound, name
            assert value.std().item() == pytest.approx(bound / 3**0.5, rel=0.05), name
        else:
            is_norm = "norm" in name and name.endswith("weight")
            assert torch.equal(value, torch.full_like(value, float(is_norm))), name


def test_keys_have_no_bias_by_default():
    tokens = torch.zeros(1, 1, 4)
    for key_bias in (False, True):
        projection = QueryKeyValue(4, key_bias)
        for parameter in projection.parameters():
            torch.nn.init.ones_(parameter)
        assert projection(tokens)[0, 0].tolist() == [1] * 4 + [float(key_bias)] * 4 + [1] * 4
        assert all("k_bias" not in name for name, _ in projection.named_parameters())


def test_norms_use_the_epsilon_of_the_recipe():
    norms = [m for m in small().modules() if isinstance(m, torch.nn.LayerNorm)]
    assert len(norms) == 8
    assert {norm.eps for norm in norms} == {1e-6}


def test_gelu_is_exact():
    mlp = Block(4, 1, False, "auto").mlp
    x = torch.tensor([1.0])
    assert mlp.act(x).item() == pytest.approx(0.8413447, abs=1e-6)  # tanh gives 0.841192


def test_a_bfloat16_model_keeps_tables_and_loss_in_float32():
    model = small()
    low = copy.deepcopy(model).bfloat16()
    output = low(clips(), sample_ids())
    assert output.loss.dtype == torch.float32
    assert {table.dtype for table in low.buffers()} == {torch.float32}
    assert output.prediction.dtype == torch.bfloat16
    output.loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in low.parameters())
    rounded = copy.deepcopy(low).float()
    reference = rounded(clips(), sample_ids())
    error = (output.prediction - reference.prediction).norm() / reference.prediction.norm()
    assert error < 0.02


def test_norms_of_a_bfloat16_model_take_their_statistics_in_float32():
    norm = copy.deepcopy(small().encoder.norm).bfloat16()
    x = (torch.randn(64, 24, generator=torch.Generator().manual_seed(0)) + 8).bfloat16()
    exact = torch.nn.functional.layer_norm(x.double(), (24,), eps=1e-6)
    error = (norm(x) - exact).norm() / exact.norm()
    assert error < 0.5 * torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("cls_token", [True, False])
@pytest.mark.parametrize("frames", [16, 96, 160])
def test_features_of_any_duration_leave_out_the_cls_token(cls_token, frames):
    encoder = small(cls_token=cls_token).encoder
    features = encoder.features(clips(frames=frames))
    assert features.shape == (2, 5 * frames // 16, 24)
    assert torch.equal(features, encoder(clips(frames=frames))[:, int(cls_token) :])


def test_features_of_another_duration_use_the_table_of_its_own_grid():
    model = small(frames=96)
    shorter = small(frames=48)
    shorter.load_state_dict(model.state_dict())
    assert torch.equal(model.encoder.features(clips(frames=48)), shorter.encoder.features(clips(frames=48)))
    assert torch.equal(shorter.encoder.positions()[1:], sincos_2d(PatchGrid(80, 48, (16, 16)), 24))


@pytest.mark.parametrize("shape", [(2, 1, 80, 100), (2, 1, 64, 96), (2, 80, 96), (2, 1, 80, 0)])
def test_features_refuse_what_does_not_fit(shape):
    with pytest.raises(ValueError, match="multiple of the patch width 16"):
        small().encoder.features(torch.zeros(shape))


def test_encoding_without_a_masking_sees_every_patch():
    encoder = small().encoder
    everything = masking_from_keep(torch.arange(30).repeat(2, 1), 30)
    assert torch.equal(encoder(clips(), everything), encoder(clips()))


def test_the_model_compiles_into_one_graph():
    model = small()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(compiled(clips(), sample_ids()).loss, model(clips(), sample_ids()).loss)


def test_an_encoder_alone_has_its_parameters_set_by_initialize():
    model = Model(**SMALL)
    encoder = Encoder(model, PatchGrid(80, 96, model.patch))
    initialize(encoder, seed=0)
    whole = small(seed=0).encoder.state_dict()
    assert all(torch.equal(value, whole[name]) for name, value in encoder.state_dict().items())
