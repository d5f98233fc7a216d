"""Validation: fixed crops and masks, means over clips, references that are what they say."""

import math
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from msm_dist.config import Config, parse_config
from msm_dist.errors import DataError
from msm_dist.features import LogMel, normalize
from msm_dist.model.mae import MaskedSpectrogramModel
from msm_dist.pictures import make_picture
from msm_dist.validate import (
    Validation,
    mel_mean_patches,
    nearest_patches,
    visible_mean_patches,
)
from msm_kernels.patch_masking import masking_from_keep, random_masking
from msm_kernels.reference import masked_patch_loss, patchify, select_rows
from tests.shards import damage_clip, noise_clips, write_corpus

NUM_CLIPS = 10
MEL_MEAN = tuple(-8 + 0.02 * band for band in range(80))


@dataclass
class FakeWorld:
    """One of `size` ranks that run as threads and meet in `sum`."""

    rank: int = 0
    size: int = 1
    barrier: threading.Barrier = field(default_factory=lambda: threading.Barrier(1))
    table: dict = field(default_factory=dict)
    device: torch.device = torch.device("cpu")

    @property
    def is_main(self):
        return self.rank == 0

    def sum(self, values):
        self.table[self.rank] = values
        self.barrier.wait()
        total = [sum(column) for column in zip(*(self.table[r] for r in range(self.size)), strict=True)]
        self.barrier.wait()
        return total


@pytest.fixture
def index(tmp_path):
    return write_corpus(tmp_path / "valid", noise_clips(NUM_CLIPS, longest=60000), clips_per_shard=4)


def settings(index, micro_batch=8, **changes) -> Config:
    values = {
        "data": {"valid_shards": str(index.root), "block": micro_batch},
        "features": {"mean": -7.0, "std": 2.0},
        "model": {"size": "tiny", **changes.pop("model", {})},
        "train": {"steps": 1, "micro_batch": micro_batch, "global_batch": 8, "valid_clips": 9},
        **changes,
    }
    return parse_config(values, "test")


def open_validation(cfg, index, world=None, mel_mean=MEL_MEAN):
    index = replace(index, mel_mean=mel_mean)
    corpus = SimpleNamespace(index=index, sources=(index,), features=cfg.features)
    return Validation.open(cfg, corpus, LogMel(cfg.features), world or FakeWorld())


def forward_of(cfg):
    model = MaskedSpectrogramModel(cfg.model, cfg.features.n_mels, cfg.data.crop_frames, cfg.seed)

    @torch.no_grad()
    def forward(spectrogram, sample_ids):
        return model(spectrogram, sample_ids=sample_ids)

    return forward


def spectrogram_of(validation):
    features = validation.features
    logmel = LogMel(features)(validation.crops)
    return normalize(logmel, features.mean, features.std)


def test_loss_is_the_mean_of_the_clips_losses(index):
    cfg = settings(index)
    validation, forward = open_validation(cfg, index), forward_of(cfg)
    spectrogram = spectrogram_of(validation)
    each = [forward(spectrogram[n : n + 1], validation.sample_ids[n : n + 1]).loss.item() for n in range(9)]
    assert validation.loss(forward) == {"valid_loss": pytest.approx(np.mean(each), rel=1e-6)}


def test_world_size_and_micro_batch_change_nothing_but_rounding(index):
    cfg = settings(index)
    alone = open_validation(cfg, index)
    expected = alone.loss(forward_of(cfg)) | alone.references(forward_of(cfg))
    smaller = settings(index, micro_batch=2)
    for size in (2, 3):
        barrier, table = threading.Barrier(size), {}
        worlds = [FakeWorld(rank, size, barrier, table) for rank in range(size)]
        parts = [open_validation(smaller, index, world) for world in worlds]
        clips = torch.cat([part.sample_ids for part in parts])
        assert sorted(clips[:, 1].tolist()) == list(range(9))
        with ThreadPoolExecutor(size) as pool:
            results = list(pool.map(lambda part: part.loss(forward_of(cfg)) | part.references(forward_of(cfg)), parts))
        for result in results:
            assert result == pytest.approx(expected, rel=1e-5)


def test_crops_and_masks_are_the_same_at_every_opening_and_depend_on_the_seed(index):
    first, again = open_validation(settings(index), index), open_validation(settings(index), index)
    assert torch.equal(first.crops, again.crops)
    assert torch.equal(first.sample_ids, again.sample_ids)
    assert first.sample_ids.tolist() == [[0, clip, 0] for clip in range(9)]
    forward = forward_of(settings(index))
    assert first.references(forward) == again.references(forward)
    other = open_validation(settings(index, seed=1), index)
    assert not torch.equal(first.crops, other.crops)
    assert first.references(forward) != other.references(forward_of(settings(index, seed=1)))


def test_a_clip_that_does_not_decode_is_left_out_and_reported(index, caplog):
    whole = open_validation(settings(index), index)
    damage_clip(index, 5)
    validation = open_validation(settings(index), index)
    assert validation.sample_ids[:, 1].tolist() == [0, 1, 2, 3, 4, 6, 7, 8]
    kept = [0, 1, 2, 3, 4, 6, 7, 8]
    assert torch.equal(validation.crops, whole.crops[kept])
    assert "1 of 9 clips left out of validation" in caplog.text
    assert "clip-0005" in caplog.text


def test_a_set_in_which_nothing_decodes_is_an_error_on_all_ranks(index):
    for clip in range(NUM_CLIPS):
        damage_clip(index, clip)
    cfg = settings(index)
    validation = open_validation(cfg, index)
    with pytest.raises(DataError, match="none of the first 9 clips can be decoded") as raised:
        validation.loss(forward_of(cfg))
    assert raised.value.on_all_ranks
    with pytest.raises(DataError, match="none of the first 9"):
        validation.references(forward_of(cfg))


def test_a_corpus_without_band_means_names_the_command(index):
    with pytest.raises(DataError, match="msm-dist data stats"):
        open_validation(settings(index), index, mel_mean=None)


def test_without_valid_shards_there_is_no_validation(index):
    assert open_validation(settings(index, data={}), index) is None


def test_a_missing_shard_is_an_error_unless_allowed(index):
    index.shards[0].path.unlink()
    with pytest.raises(DataError, match="missing"):
        open_validation(settings(index), index)
    allowed = settings(index, data={"valid_shards": str(index.root), "allow_missing_shards": True})
    assert open_validation(allowed, index).sample_ids[:, 1].tolist() == [4, 5, 6, 7, 8]


@pytest.mark.parametrize("normalize_targets", [False, True])
def test_references_are_what_slow_loops_give(index, normalize_targets):
    cfg = settings(index, model={"normalize_targets": normalize_targets})
    validation = open_validation(cfg, index)
    spectrogram = spectrogram_of(validation).double()
    masking = random_masking(cfg.seed, validation.sample_ids, cfg.num_patches, cfg.num_keep)
    expected = dict.fromkeys(SLOW_PREDICTORS, 0.0)
    mel_mean = (torch.tensor(MEL_MEAN).double() + 7.0) / 2.0
    for clip, (keep, masked) in enumerate(zip(masking.ids_keep, masking.ids_masked, strict=True)):
        for name, slow in SLOW_PREDICTORS.items():
            for patch in masked.tolist():
                target = cut(spectrogram[clip, 0], patch)
                predicted = slow(spectrogram[clip, 0], keep.tolist(), patch, mel_mean)
                if normalize_targets:
                    target, predicted = whiten(target), whiten(predicted)
                error = (predicted - target).square().mean().item()
                expected[name] += error / len(masked) / len(spectrogram)
    assert validation.references(forward_of(cfg)) == pytest.approx(expected, rel=1e-5)


def cut(spectrogram, patch):
    row, column = divmod(patch, 13)
    return spectrogram[16 * row : 16 * row + 16, 16 * column : 16 * column + 16]


def whiten(patch):
    return (patch - patch.mean()) / (patch.var(correction=1) + 1e-6).sqrt()


def slow_mel_mean(spectrogram, keep, patch, mel_mean):
    row = patch // 13
    return mel_mean[16 * row : 16 * row + 16, None].expand(16, 16)


def slow_visible_mean(spectrogram, keep, patch, mel_mean):
    beside = [other for other in keep if other // 13 == patch // 13]
    if not beside:
        return slow_mel_mean(spectrogram, keep, patch, mel_mean)
    pixels = torch.cat([cut(spectrogram, other) for other in beside], dim=1)
    return pixels.mean(dim=1, keepdim=True).expand(16, 16)


def slow_nearest_patch(spectrogram, keep, patch, mel_mean):
    row, column = divmod(patch, 13)
    return cut(spectrogram, min(keep, key=lambda o: ((o // 13 - row) ** 2 + (o % 13 - column) ** 2, o)))


SLOW_PREDICTORS = {
    "reference_mel_mean": slow_mel_mean,
    "reference_visible_mean": slow_visible_mean,
    "reference_nearest_patch": slow_nearest_patch,
}


def loss_of(prediction, spectrogram, masking, patch):
    return masked_patch_loss(prediction, spectrogram, masking, patch, normalize=False).item()


def test_mel_mean_is_exact_on_the_mean_and_off_by_the_distance_from_it():
    mel_mean = torch.linspace(-1, 1, 80, dtype=torch.float64)
    spectrogram = mel_mean[None, None, :, None].expand(2, 1, 80, 208)
    masking = random_masking(0, torch.zeros(2, 3, dtype=torch.int64), 65, 16)
    prediction = mel_mean_patches(spectrogram, masking, (16, 16), mel_mean)
    assert loss_of(prediction, spectrogram, masking, (16, 16)) == 0
    assert loss_of(prediction, spectrogram + 0.5, masking, (16, 16)) == pytest.approx(0.25)


def test_visible_mean_is_exact_on_a_stationary_sound_and_falls_back_where_a_band_is_hidden():
    level = torch.linspace(3, 5, 80, dtype=torch.float64)
    spectrogram = level[None, None, :, None].expand(1, 1, 80, 208)
    hidden_row = masking_from_keep(torch.tensor([[0, 13, 26, 40]]), 65)  # none in the fifth row of patches
    prediction = visible_mean_patches(spectrogram, hidden_row, (16, 16), torch.zeros(80))
    target = select_rows(patchify(spectrogram, (16, 16)), hidden_row.ids_masked)
    in_fifth = hidden_row.ids_masked[0] >= 52
    assert torch.allclose(prediction[0, ~in_fifth], target[0, ~in_fifth])
    assert (prediction[0, in_fifth] == 0).all()


@pytest.mark.parametrize(("patch", "grid"), [((16, 16), (5, 13)), ((80, 4), (1, 52)), ((8, 16), (10, 13))])
def test_nearest_patch_is_exact_where_every_patch_repeats_its_nearest_neighbour(patch, grid):
    rows, columns = grid
    length = rows * columns
    values = torch.randn(length, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    masking = random_masking(3, torch.tensor([[0, 1, 0]]), length, length // 4)
    keep = masking.ids_keep[0].tolist()
    source = [
        min(keep, key=lambda o: ((o // columns - p // columns) ** 2 + (o % columns - p % columns) ** 2, o))
        for p in range(length)
    ]
    cells = values[source].view(rows, columns)
    spectrogram = cells.repeat_interleave(patch[0], 0).repeat_interleave(patch[1], 1)[None, None]
    prediction = nearest_patches(spectrogram, masking, patch)
    assert loss_of(prediction, spectrogram, masking, patch) == 0


def test_pictures_show_the_first_clips_and_only_rank_0_draws_them(index):
    cfg = settings(index)
    validation, forward = open_validation(cfg, index), forward_of(cfg)
    pictures = validation.pictures(forward)
    spectrogram, ids = spectrogram_of(validation)[:4], validation.sample_ids[:4]
    prediction = forward(spectrogram, ids).prediction
    for number in range(4):
        masking = random_masking(cfg.seed, ids[number : number + 1], cfg.num_patches, cfg.num_keep)
        expected = make_picture(spectrogram[number], masking, prediction[number], (16, 16), False, cfg.features)
        assert torch.equal(pictures[number].image, expected.image)
        assert torch.equal(pictures[number].audio["input"], expected.audio["input"])
    assert len(pictures) == 4
    other = open_validation(cfg, index, FakeWorld(rank=1, size=2))
    assert other.pictures(forward_of(cfg)) == []


def columns_of(sample_ids, num_keep=3):
    """Whole columns visible, others than `random_masking` draws."""
    kept = random_masking(9, sample_ids, 13, num_keep).ids_keep
    return masking_from_keep((13 * torch.arange(5)[:, None] + kept[:, None, :]).flatten(1), 65)


@dataclass
class Foreign:
    """The output of a model from outside."""

    loss: torch.Tensor
    prediction: torch.Tensor
    masking: object
    target: torch.Tensor | None = None


def test_references_and_pictures_follow_the_models_own_masks_and_target(index):
    cfg = settings(index)

    def forward(spectrogram, sample_ids, with_target=True):
        masking, target = columns_of(sample_ids), spectrogram.flip(-1) if with_target else None
        prediction = torch.zeros(len(sample_ids), 50, 256)
        judged_on = spectrogram if target is None else target
        loss = masked_patch_loss(prediction, judged_on, masking, (16, 16), normalize=False)
        return Foreign(loss, prediction, masking, target)

    validation = open_validation(cfg, index)
    spectrogram = spectrogram_of(validation)
    masking = columns_of(validation.sample_ids)
    target = spectrogram.flip(-1).double()
    visible = visible_mean_patches(target, masking, (16, 16), torch.zeros(80))
    nearest = nearest_patches(target, masking, (16, 16))
    assert validation.references(forward) == {
        "reference_visible_mean": pytest.approx(loss_of(visible, target, masking, (16, 16)), rel=1e-5),
        "reference_nearest_patch": pytest.approx(loss_of(nearest, target, masking, (16, 16)), rel=1e-5),
    }
    picture = validation.pictures(forward)[1]
    one = columns_of(validation.sample_ids[1:2])
    expected = make_picture(target[1].float(), one, torch.zeros(50, 256), (16, 16), False, cfg.features)
    assert torch.equal(picture.image, expected.image)

    own_masks = open_validation(cfg, index).references(lambda *batch: forward(*batch, with_target=False))
    mel_mean = (torch.tensor(MEL_MEAN).double() + 7.0) / 2.0
    patches = mel_mean_patches(spectrogram.double(), masking, (16, 16), mel_mean)
    assert own_masks.keys() == SLOW_PREDICTORS.keys()
    assert own_masks["reference_mel_mean"] == pytest.approx(
        loss_of(patches, spectrogram.double(), masking, (16, 16)), rel=1e-5
    )


@pytest.mark.parametrize("other", ["loss", "prediction"])
def test_other_losses_and_predictions_have_no_references(index, caplog, other):
    cfg, inner = settings(index), forward_of(settings(index))

    def forward(spectrogram, sample_ids):
        output = inner(spectrogram, sample_ids)
        if other == "loss":
            return output._replace(loss=output.loss.sqrt())
        return output._replace(prediction=output.prediction[..., :13])

    validation = open_validation(cfg, index)
    assert validation.references(forward) == {}
    assert "no references" in caplog.text
    assert bool(validation.pictures(forward)) == (other == "loss")


def test_every_rank_makes_as_many_forward_passes(index):
    """ZeRO 3 gathers weights in each of them: a rank that made fewer would leave the others waiting."""
    cfg = settings(index, micro_batch=2)
    alone = open_validation(cfg, index)
    expected = alone.loss(forward_of(cfg)) | alone.references(forward_of(cfg))
    for size in (2, 12):
        barrier, table = threading.Barrier(size, timeout=600), {}
        worlds = [FakeWorld(rank, size, barrier, table) for rank in range(size)]
        parts = [open_validation(cfg, index, world) for world in worlds]
        forwards = [Counting(forward_of(cfg)) for _ in parts]
        with ThreadPoolExecutor(size) as pool:
            results = list(pool.map(lambda part, f: part.loss(f) | part.references(f), parts, forwards))
        for result in results:
            assert result == pytest.approx(expected, rel=1e-5)
        for part, forward in zip(parts, forwards, strict=True):
            part.pictures(forward)
        assert [forward.count for forward in forwards] == [math.ceil(math.ceil(9 / size) / 2) + 2] * size


class Counting:
    """A forward pass that counts its calls."""

    def __init__(self, forward):
        self.forward, self.count = forward, 0

    def __call__(self, *batch):
        self.count += 1
        return self.forward(*batch)
