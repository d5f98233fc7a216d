"""The encoder with a linear head: layers and their rates, pooling, positions of other durations, files."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from msm_dist.errors import CheckpointError, ConfigError, DataError
from msm_dist.evaluate import classifier
from msm_dist.evaluate.classifier import Classifier, Head, Tagger, clip_grid, fit_length, interpolated_positions
from msm_dist.evaluate.encoder import Encoder
from msm_dist.features import LogMel
from msm_dist.model.patches import PatchGrid, sincos_2d
from msm_dist.model.weights import weights_folder
from tests.labelled import INFO, RATE, new_model

HEAD = Head(("a", "b", "c"), multilabel=False, pooling="mean", positions="computed", num_samples=16000, table_frames=96)


def new_classifier(head=HEAD, model=INFO.model):
    made = Classifier(model, INFO.features, head, seed=5)
    made.encoder.load_state_dict(new_model(replace(INFO, model=model)).encoder.state_dict())
    return made


def trained_classifier(head=HEAD):
    """One whose head says something."""
    made = new_classifier(head)
    with torch.no_grad():
        made.head.weight.normal_(generator=torch.Generator().manual_seed(2))
    return made


def spectrograms(count, frames=112):
    return torch.randn(count, 1, 80, frames, generator=torch.Generator().manual_seed(0))


def saved(folder, head=HEAD):
    made = trained_classifier(head)
    decoder = {name: value for name, value in new_model().state_dict().items() if name.startswith("decoder.")}
    return classifier.save(folder, made.state_dict(), decoder, INFO, head), made


def test_learning_rates_decay_from_the_head_down():
    made = new_classifier()
    names = {id(parameter): name for name, parameter in made.named_parameters()}
    groups = classifier.layer_groups(made, depth=2, weight_decay=0.05, layer_decay=0.5)
    scale = {names[id(parameter)]: group["lr_scale"] for group in groups for parameter in group["params"]}
    assert set(scale) == set(names.values())
    assert scale["head.weight"] == scale["head.bias"] == scale["encoder.norm.weight"] == 1
    assert scale["encoder.blocks.1.attn.proj.weight"] == scale["encoder.blocks.1.norm1.bias"] == 0.5
    assert scale["encoder.blocks.0.mlp.fc1.weight"] == 0.25
    assert scale["encoder.patch_embed.weight"] == scale["encoder.cls_token"] == 0.125


def test_one_dimensional_parameters_are_not_decayed():
    for group in classifier.layer_groups(new_classifier(), depth=2, weight_decay=0.05, layer_decay=0.75):
        assert {parameter.ndim > 1 for parameter in group["params"]} == {group["weight_decay"] == 0.05}


def test_a_new_head_has_no_opinion():
    output = new_classifier()(spectrograms(2), torch.eye(3)[:2])
    assert output.logits.softmax(-1).tolist() == [pytest.approx([1 / 3] * 3, abs=1e-3)] * 2
    assert output.loss.item() == pytest.approx(math.log(3), abs=1e-3)


def test_the_head_sees_the_mean_over_patches_or_the_cls_token():
    pictures = spectrograms(2)
    for pooling in ("mean", "cls"):
        made = trained_classifier(replace(HEAD, pooling=pooling))
        with torch.no_grad():
            tokens = made.encoder(pictures)
            pooled = tokens[:, 0] if pooling == "cls" else tokens[:, 1:].mean(1)
            assert torch.allclose(made.logits(pictures), made.head(pooled), atol=1e-6)


def test_pooling_by_a_cls_token_that_is_not_there_is_refused():
    model = INFO.model.model_copy(update={"cls_token": False})
    with pytest.raises(ConfigError, match=r"model.pooling = cls: .* model.pooling=mean"):
        new_classifier(replace(HEAD, pooling="cls"), model)


def test_dropped_patches_are_not_seen():
    made, pictures = trained_classifier(), spectrograms(1)
    kept = torch.arange(35).view(5, 7)[[0, 2, 3]][:, [1, 4, 5, 6]].reshape(1, -1)
    other = pictures.clone()
    other[:, :, 16:32] += 1  # the second row
    other[:, :, :, 32:64] -= 1  # the third and fourth column
    with torch.no_grad():
        assert torch.equal(made.logits(pictures, kept), made.logits(other, kept))
        assert not torch.allclose(made.logits(pictures), made.logits(other), atol=1e-3)


@pytest.mark.parametrize("multilabel", [False, True])
def test_the_loss_of_mixed_labels_is_the_mixture_of_losses(multilabel):
    logits = torch.tensor([[1.0, -0.5, 0.3]])
    one, other = torch.tensor([[1.0, 0, 0]]), torch.tensor([[0, 0, 1.0]])
    mixed = classifier.loss_of(logits, 0.3 * one + 0.7 * other, multilabel)
    expected = 0.3 * classifier.loss_of(logits, one, multilabel) + 0.7 * classifier.loss_of(logits, other, multilabel)
    assert mixed.item() == pytest.approx(expected.item(), rel=1e-6)


def test_probabilities_of_several_labels_stand_by_themselves():
    logits = torch.tensor([[0.0, 0.0, 100.0]])
    assert classifier.probabilities(logits, multilabel=True).tolist() == [[0.5, 0.5, 1.0]]
    assert classifier.probabilities(logits, multilabel=False).tolist() == [pytest.approx([0, 0, 1])]


def test_an_interpolated_table_of_the_same_duration_is_the_table():
    grid = PatchGrid(80, 96, (16, 16))
    assert torch.allclose(interpolated_positions(grid, grid, 32, 1), sincos_2d(grid, 32, 1), atol=1e-6)


def test_an_interpolated_table_is_stretched_in_time_alone():
    before, after = PatchGrid(80, 160, (16, 16)), PatchGrid(80, 480, (16, 16))
    old = sincos_2d(before, 32).view(5, 10, 32)
    new = interpolated_positions(before, after, 32, 0).view(5, 30, 32)
    # The middle one of three new columns stands where an old one stood.
    assert torch.allclose(new[:, 4:-4:3], old[:, 1:-1], atol=1e-5)
    assert torch.allclose(new[0, :, 16:], old[0, :1, 16:], atol=1e-5)
    assert not torch.allclose(new[:, :10], old, atol=0.1)


def test_a_computed_table_continues_and_an_interpolated_one_does_not():
    computed, stretched = (
        Classifier(INFO.model, INFO.features, replace(HEAD, num_samples=32000, positions=positions)).encoder.positions()
        for positions in ("computed", "interpolated")
    )
    assert torch.equal(computed, sincos_2d(PatchGrid(80, 208, (16, 16)), 32, 1))
    assert stretched.shape == computed.shape
    assert not torch.allclose(stretched, computed, atol=0.1)


def test_clips_are_cut_to_their_middle_or_padded_at_their_end():
    clip = np.arange(1.0, 8)
    assert fit_length(clip, 3).tolist() == [3, 4, 5]
    assert fit_length(clip, 3, 4).tolist() == [5, 6, 7]
    assert fit_length(clip, 9).tolist() == [*range(1, 8), 0, 0]


def test_a_clip_has_the_patches_that_the_encoder_of_embeddings_gives_it():
    encoder = Encoder(new_model(), INFO)
    for num_samples in (1, 2560, 2561, 15360):
        grid = clip_grid(INFO.model, INFO.features, num_samples)
        assert encoder.encode(torch.zeros(1, num_samples), RATE).shape[1] == grid.shape[1]


def test_spectrogram_of_a_clip_is_that_of_the_encoder(tmp_path):
    folder, made = saved(tmp_path)
    encoder = Encoder.load(folder)
    waveform = 0.1 * torch.randn(2, 16000, generator=torch.Generator().manual_seed(1))
    spectrogram = classifier.clip_spectrogram(LogMel(INFO.features), waveform, made.grid)
    with torch.no_grad():
        features = made.encoder.features(spectrogram)  # [B, L, D]
    assert torch.allclose(encoder.embed(waveform, RATE), features.view(2, 5, 7, 32).mean(2).flatten(1), atol=1e-5)


def test_a_saved_classifier_gives_the_same_probabilities(tmp_path):
    _, made = saved(tmp_path / "run" / "export")
    waveform = 0.1 * torch.randn(2, 16000, generator=torch.Generator().manual_seed(1))
    spectrogram = classifier.clip_spectrogram(LogMel(INFO.features), waveform, made.grid)
    with torch.no_grad():
        expected = made.logits(spectrogram).softmax(-1)
    for path in (tmp_path / "run", tmp_path / "run" / "export"):
        tagger = Tagger.load(path)
        assert tagger.labels == ("a", "b", "c")
        assert torch.allclose(tagger.predict(waveform, RATE), expected, atol=1e-6)


def test_tagger_takes_other_rates_and_lengths(tmp_path):
    tagger = Tagger.load(saved(tmp_path)[0])
    time = torch.arange(48000 * 3) / 48000
    tone = 0.3 * torch.sin(2 * math.pi * 500 * time)[None]
    expected = tagger.predict(tone[:, ::3][:, 16000:32000], RATE)
    assert torch.allclose(tagger.predict(tone, 48000), expected, atol=0.05)


def test_tagger_takes_numpy_as_the_encoder_does(tmp_path):
    tagger = Tagger.load(saved(tmp_path)[0])
    waveform = 0.1 * torch.randn(2, 16000, generator=torch.Generator().manual_seed(1))
    expected = tagger.predict(waveform, RATE)
    assert torch.equal(tagger.predict(waveform.numpy(), RATE), expected)
    assert torch.equal(tagger.predict(waveform.double().numpy(), np.float64(RATE)), expected)
    backwards = np.ascontiguousarray(waveform.numpy()[:, ::-1])[:, ::-1]
    assert torch.equal(tagger.predict(backwards, RATE), expected)


@pytest.mark.parametrize(
    ("waveform", "rate", "message"),
    [
        (np.zeros(9), RATE, r"\[clips, samples\]"),
        (np.full((1, 9), math.nan), RATE, "NaN"),
        (np.zeros((1, 9)), 0, "rate"),
    ],
)
def test_what_is_no_audio_is_an_error_to_the_tagger(tmp_path, waveform, rate, message):
    with pytest.raises(DataError, match=message):
        Tagger.load(saved(tmp_path)[0]).predict(waveform, rate)


def test_encoder_is_not_read_with_another_table_than_it_was_tuned_with(tmp_path):
    head = replace(HEAD, positions="interpolated", num_samples=32000)
    folder, made = saved(tmp_path / "export", head)
    for path in (tmp_path, folder):
        with pytest.raises(CheckpointError, match="only .*Tagger"):
            Encoder.load(path)
    assert weights_folder(tmp_path) == tmp_path / "export"
    waveform = 0.1 * torch.randn(1, 32000, generator=torch.Generator().manual_seed(1))
    spectrogram = classifier.clip_spectrogram(LogMel(INFO.features), waveform, made.grid)
    with torch.no_grad():
        expected = made.logits(spectrogram).softmax(-1)
    assert torch.allclose(Tagger.load(tmp_path).predict(waveform, RATE), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "head.json").unlink(), "no fine-tuned classifier"),
        (lambda folder: (folder / "head.json").write_text("{"), "not the description of a classifier"),
        (lambda folder: edit(folder, version=2), "must be msm-dist classifier version 1"),
        (lambda folder: edit(folder, labels=[]), "labels are missing"),
        (lambda folder: edit(folder, labels=["a"]), "its tensors are not those"),
        (lambda folder: edit(folder, unknown=1), "not the description"),
        (lambda folder: (folder / "head.safetensors").write_bytes(b"x"), "not a readable head"),
        (lambda folder: (folder / "model.safetensors").unlink(), "not readable weights"),
    ],
)
def test_damaged_classifier_is_an_error(tmp_path, damage, message):
    folder, _ = saved(tmp_path)
    damage(folder)
    with pytest.raises(CheckpointError, match=message):
        Tagger.load(folder)


def edit(folder, **values):
    path = folder / "head.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_waveform_without_clips_is_an_error(tmp_path):
    tagger = Tagger.load(saved(tmp_path)[0])
    with pytest.raises(DataError, match=r"floating point \[clips, samples\]"):
        tagger.predict(torch.zeros(16000), RATE)
