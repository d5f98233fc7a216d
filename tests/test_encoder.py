"""Embeddings of audio of any length: shapes, chunks, layers, statistics, and nothing taken from a neighbour."""

import itertools
import math
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import soundfile
import torch
from torch.nn.functional import pad

from msm_dist.config import Features, Model
from msm_dist.data.pack import PackSettings, pack
from msm_dist.errors import CheckpointError, ConfigError, DataError
from msm_dist.evaluate.encoder import Encoder
from msm_dist.evaluate.normalization import Statistics
from msm_dist.features import LogMel, normalize
from msm_dist.model.mae import MaskedSpectrogramModel
from msm_dist.model.weights import WeightsInfo, save

RATE = 16000
WIDTH = 192
INFO = WeightsInfo(Model(size="tiny"), Features(mean=-6.5, std=3.5), 208)
SMALL = replace(
    INFO,
    model=Model(embed_dim=32, depth=2, num_heads=1, decoder_embed_dim=32, decoder_depth=1, decoder_num_heads=1),
)
MIXED = torch.tensor([48000, 16000, 1, 33280, 33281, 20000])
"""Lengths of clips in samples."""


def noise(num_clips, num_samples, seed=0):
    return 0.1 * torch.randn(num_clips, num_samples, generator=torch.Generator().manual_seed(seed))


def model_of(info):
    return MaskedSpectrogramModel(info.model, 80, info.crop_frames, seed=3)


@pytest.fixture(scope="module")
def encoder():
    return Encoder(model_of(INFO), INFO)


@pytest.mark.parametrize(
    ("crop_frames", "patch_size", "steps", "rows"),
    [(208, "16x16", 63, 5), (512, "16x16", 63, 5), (208, "16x4", 250, 5), (208, "80x4", 250, 1)],
)
def test_ten_seconds_give_a_vector_per_patch_width(crop_frames, patch_size, steps, rows):
    info = replace(INFO, model=Model(size="tiny", patch_size=patch_size), crop_frames=crop_frames)
    encoder = Encoder(model_of(info), info)
    waveform = noise(1, 10 * RATE)
    frames = encoder.encode(waveform, RATE)
    assert frames.shape == (1, steps, rows * WIDTH)
    assert frames.dtype == torch.float32
    assert encoder.embedding_size == rows * WIDTH
    assert torch.allclose(encoder.embed(waveform, RATE), frames.mean(dim=1))


@pytest.mark.parametrize(
    ("num_samples", "steps"),
    [(1, 1), (200, 1), (2560, 1), (2561, 2), (33120, 13), (33280, 13), (33281, 14), (66560, 26), (66561, 27)],
)
def test_no_time_step_is_padding_alone(encoder, num_samples, steps):
    assert encoder.encode(noise(1, num_samples), RATE).shape[1] == steps


def test_a_time_step_is_its_patches_from_low_to_high_frequency(encoder):
    waveform = noise(2, 33120)
    model = model_of(INFO)
    spectrogram = normalize(LogMel(INFO.features)(waveform, centred=True), -6.5, 3.5)
    with torch.no_grad():
        tokens = model.encoder(spectrogram)[:, 1:]  # without CLS
    frames = encoder.encode(waveform, RATE)
    for f, t in ((0, 0), (1, 0), (4, 12), (2, 7)):
        vector = frames[:, t, f * WIDTH : (f + 1) * WIDTH]
        assert torch.allclose(vector, tokens[:, f * 13 + t], atol=1e-5)


def test_a_short_clip_runs_at_its_own_length(encoder):
    waveform = noise(1, RATE)
    padded = pad(waveform, (0, 160 * 111 - RATE))
    spectrogram = normalize(LogMel(INFO.features)(padded, centred=True), -6.5, 3.5)
    assert spectrogram.shape[-1] == 112
    with torch.no_grad():
        tokens = model_of(INFO).encoder(spectrogram)[:, 1:]
    expected = tokens.view(1, 5, 7, WIDTH).transpose(1, 2).flatten(2)
    assert torch.allclose(encoder.encode(waveform, RATE), expected, atol=1e-5)


def test_an_embedding_does_not_depend_on_its_neighbours(encoder):
    clip = noise(1, RATE)
    neighbours = torch.cat([5 * noise(3, RATE, seed=1), torch.zeros(1, RATE)])
    together = encoder.embed(torch.cat([neighbours[:2], clip, neighbours[2:]]), RATE)
    assert torch.allclose(together[2:3], encoder.embed(clip, RATE), atol=1e-5)
    assert not torch.allclose(together[0], together[2], atol=1e-2)


def test_a_chunk_sees_nothing_of_later_ones(encoder):
    waveform = noise(1, 5 * RATE)
    other = waveform.clone()
    other[:, 36000:] = 0.5
    frames, changed = encoder.encode(waveform, RATE), encoder.encode(other, RATE)
    assert torch.allclose(frames[:, :13], changed[:, :13], atol=1e-6)
    assert not torch.allclose(frames[:, 13:], changed[:, 13:], atol=1e-2)


def test_a_probe_can_be_trained_on_embeddings(encoder):
    probe = torch.nn.Linear(encoder.embedding_size, 2)
    probe(encoder.encode(noise(2, 3200), RATE)).sum().backward()
    assert probe.weight.grad.abs().sum() > 0


def test_other_sample_rates_are_resampled(encoder):
    def tone(rate):
        return 0.3 * torch.sin(2 * math.pi * 700 * torch.arange(rate) / rate)[None]

    expected = encoder.embed(tone(RATE), RATE)
    assert torch.nn.functional.cosine_similarity(encoder.embed(tone(48000), 48000), expected) > 0.999


@pytest.mark.parametrize("rate", [44100.0, np.float64(44100), np.int64(44100), torch.tensor(44100)])
def test_a_rate_is_a_whole_number_of_any_type(encoder, rate):
    waveform = noise(1, 44100)
    expected = encoder.encode(waveform, 44100)
    assert torch.equal(encoder.encode(waveform, rate), expected)
    assert torch.equal(torch.cat(list(encoder.stream([waveform[0]], rate))), expected[0])
    assert encoder.num_steps(44100, rate) == expected.shape[1]
    assert encoder.for_dataset(waveform, rate).statistics == encoder.for_dataset(waveform, 44100).statistics


@pytest.mark.parametrize("rate", [44100.5, math.nan, "44100", None])
def test_what_is_no_rate_is_an_error(encoder, rate):
    for call in (encoder.encode, encoder.embed, encoder.for_dataset, lambda x, rate: list(encoder.stream(x, rate))):
        with pytest.raises(DataError, match="sample_rate = .* whole number of Hz"):
            call(noise(1, 16000), rate)


def test_an_encoder_goes_to_another_device_and_stays_behind(encoder):
    mine = encoder.with_statistics((-5.0, 2.0))
    there = mine.to("meta")
    assert (there.device.type, there.normalization, there.statistics) == ("meta", "dataset", (-5.0, 2.0))
    assert there.embed(torch.zeros(1, RATE), RATE).device.type == "meta"
    assert mine.to("cpu") is mine
    assert mine.embed(noise(1, RATE), RATE).device.type == "cpu"
    with pytest.raises(ConfigError, match="torch sees"):
        mine.to("cuda:99")


@pytest.mark.parametrize("rate", [RATE, 22050])
def test_numpy_arrays_give_what_tensors_give(encoder, rate):
    waveform, lengths = noise(2, 20000), torch.tensor([20000, 9000])
    expected = encoder.encode(waveform, rate, lengths)
    frozen = waveform.numpy().copy()
    frozen.flags.writeable = False
    backwards = waveform.flip(0, 1).numpy()[::-1, ::-1]
    for given in (waveform.numpy(), frozen, backwards, waveform.numpy().astype(">f4"), waveform.tolist()):
        assert torch.equal(encoder.encode(given, rate, lengths.numpy()), expected)
    assert torch.equal(encoder.embed(waveform.numpy(), rate), encoder.embed(waveform, rate))
    single = np.ascontiguousarray(waveform[:1].numpy())[
        ::-1
    ]  # one row backwards: contiguous, and yet of no use to torch
    assert torch.equal(encoder.encode(single, rate), encoder.encode(waveform[:1], rate))
    assert torch.equal(encoder.encode(waveform, rate, lengths.flip(0).numpy()[::-1]), expected)


def test_single_clips_may_be_numpy_arrays_that_run_backwards(encoder):
    clip = noise(1, 40000)[0]
    backwards = clip.flip(0).numpy()[::-1]
    assert torch.equal(encoder.encode_clips([encoder.sound(backwards)])[0], encoder.encode(clip[None], RATE)[0])
    assert encoder.for_dataset([backwards], RATE).statistics == encoder.for_dataset([clip], RATE).statistics
    assert torch.equal(torch.cat(list(encoder.stream([backwards], RATE))), encoder.encode(clip[None], RATE)[0])


@pytest.mark.parametrize("rate", [RATE, 22050])
def test_a_waveform_that_requires_a_gradient_is_taken_as_it_is(encoder, rate):
    waveform = noise(1, 9000)
    learned = waveform.clone().requires_grad_()
    assert torch.equal(encoder.encode(learned, rate), encoder.encode(waveform, rate))
    assert torch.equal(next(encoder.stream([learned[0]], rate)), next(encoder.stream([waveform[0]], rate)))


def test_timestamps_are_the_centres_of_the_time_steps(encoder):
    assert encoder.timestamps_ms(3).tolist() == [75.0, 235.0, 395.0]


def test_weights_load_from_a_run_or_from_its_export(tmp_path, encoder):
    waveform = noise(1, RATE)
    save(tmp_path / "run" / "export", model_of(INFO).state_dict(), INFO)
    (tmp_path / "run" / "config.yaml").write_text("")
    for folder in ("run", "run/export"):
        loaded = Encoder.load(tmp_path / folder)
        assert torch.equal(loaded.embed(waveform, RATE), encoder.embed(waveform, RATE))


def test_a_run_that_has_not_finished_is_named(tmp_path):
    (tmp_path / "config.yaml").write_text("")
    with pytest.raises(CheckpointError, match="without exported weights"):
        Encoder.load(tmp_path)


def test_a_folder_without_weights_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="no such file"):
        Encoder.load(tmp_path)


def test_clips_of_mixed_lengths_are_encoded_as_each_is_alone(encoder):
    waveform = noise(len(MIXED), 48000)
    for clip, length in zip(waveform, MIXED, strict=True):
        clip[length:] = math.nan  # nothing behind a clip's end may be looked at
    frames = encoder.encode(waveform, RATE, MIXED)
    mask = encoder.padding_mask(MIXED, RATE)
    assert mask.shape == frames.shape[:2]
    assert encoder.num_steps(MIXED, RATE).tolist() == (~mask).sum(dim=1).tolist() == [19, 7, 1, 13, 14, 8]
    assert not frames[mask].any()
    embeddings = encoder.embed(waveform, RATE, MIXED)
    for i, length in enumerate(MIXED):
        alone = encoder.encode(waveform[i : i + 1, :length], RATE)
        assert torch.allclose(frames[i : i + 1, : alone.shape[1]], alone, atol=2e-5)
        assert (~mask[i]).sum() == alone.shape[1]
        assert torch.allclose(embeddings[i], alone[0].mean(dim=0), atol=2e-5)


@pytest.mark.parametrize("rate", [RATE, 44100])
def test_one_chunk_at_a_time_gives_the_same_bits_in_any_batch(rate):
    one, encoder = (Encoder(model_of(SMALL), SMALL, chunk_batch=size) for size in (1, 4))
    lengths = MIXED * rate // RATE
    waveform = noise(len(MIXED), int(lengths.max()))
    frames = one.encode(waveform, rate, lengths)
    for i, length in enumerate(lengths):
        alone = one.encode(waveform[i : i + 1, :length], rate)
        assert torch.equal(frames[i : i + 1, : alone.shape[1]], alone)
    assert torch.allclose(frames, encoder.encode(waveform, rate, lengths), atol=2e-5)


def test_layers_are_those_of_the_model_block_by_block(encoder):
    waveform = noise(2, RATE * 5 // 2)
    model = model_of(INFO).eval()
    expected = []
    spectrogram = normalize(LogMel(INFO.features)(pad(waveform, (0, 160 * 255 - 40000)), centred=True), -6.5, 3.5)
    with torch.no_grad():
        for chunk in spectrogram.split(208, dim=-1):
            patches = chunk.unfold(2, 16, 16).unfold(3, 16, 16).flatten(4).flatten(2, 3)[:, 0]  # [B, L, 256]
            positions = model.encoder._positions(chunk)
            x = patches @ model.encoder.patch_embed.weight.T + model.encoder.patch_embed.bias + positions[1:]
            x = torch.cat([(model.encoder.cls_token + positions[:1]).expand(2, -1, -1), x], dim=1)
            layers = [x]
            for block in model.encoder.blocks:
                layers.append(block(layers[-1]))
            layers.append(model.encoder.norm(layers[-1]))
            expected.append([x[:, 1:].unflatten(1, (5, -1)).transpose(1, 2).flatten(2) for x in layers])
    *layers, final = (torch.cat(parts, dim=1) for parts in zip(*expected, strict=True))
    assert encoder.depth == len(layers) - 1
    for number, layer in enumerate(layers):
        assert torch.allclose(encoder.encode(waveform, RATE, layer=number), layer, atol=2e-5)
    everything = encoder.encode(waveform, RATE, layer="all")
    assert everything.shape == (2, 16, 1 + encoder.depth, encoder.embedding_size)
    assert torch.allclose(everything, torch.stack(layers, dim=2), atol=2e-5)
    assert torch.allclose(encoder.encode(waveform, RATE), final, atol=2e-5)
    assert torch.allclose(encoder.embed(waveform, RATE, layer="all"), everything.mean(dim=1), atol=1e-6)


@pytest.mark.parametrize("layer", [-1, 13, "last"])
def test_a_layer_that_is_not_there_is_an_error(encoder, layer):
    with pytest.raises(ConfigError, match=f"layers 0 to {encoder.depth}"):
        encoder.encode(noise(1, RATE), RATE, layer=layer)


@pytest.mark.parametrize("lengths", [[8000], [8000, 0], [8000, 16001], [0.5, 1.0], [[1], [1]]])
def test_lengths_that_are_not_those_of_the_clips_are_an_error(encoder, lengths):
    with pytest.raises(DataError, match="lengths is"):
        encoder.encode(noise(2, RATE), RATE, torch.tensor(lengths))


@pytest.mark.parametrize(
    ("num_samples", "rate", "block", "chunk_batch"),
    [
        (1, RATE, 1, 2),
        (33280, RATE, 7, 1),
        (33281, RATE, 16000, 1),
        (199_999, RATE, 1000, 2),
        (299_520, RATE, 33280, 3),
        (400_000, 44100, 5000, 2),
        (160_000, RATE, 160_000, 1),
        (400_000, RATE, 170_000, 2),
    ],
)
def test_a_stream_gives_what_the_whole_recording_gives(num_samples, rate, block, chunk_batch):
    encoder = Encoder(model_of(SMALL), SMALL, chunk_batch=chunk_batch)
    waveform = noise(1, num_samples)
    pieces = list(encoder.stream(waveform[0].split(block), rate))
    assert torch.equal(torch.cat(pieces), encoder.encode(waveform, rate)[0])


def test_a_stream_runs_its_chunks_in_the_groups_of_the_whole_recording(monkeypatch):
    encoder = Encoder(model_of(SMALL), SMALL, chunk_batch=2)
    groups = []
    encode = encoder._encode
    monkeypatch.setattr(
        encoder, "_encode", lambda windows, *rest: groups.append(len(windows)) or encode(windows, *rest)
    )
    waveform = noise(1, 400_000)
    encoder.encode(waveform, RATE)
    whole = groups.copy()
    groups.clear()
    list(encoder.stream(waveform[0].split(190_000), RATE))
    assert groups == whole == [2, 2, 2, 2, 2, 2, 1]


def test_a_stream_gives_vectors_as_they_are_ready():
    one = Encoder(model_of(SMALL), SMALL, chunk_batch=1)
    given = itertools.count(1)
    stream = one.stream((noise(1, 8000, seed=next(given))[0] for _ in itertools.count()), RATE, layer=1)
    assert next(stream).shape == (13, one.embedding_size)
    assert next(given) == 6  # 2.5 s of the endless recording were enough for 2.08 s and half a window
    assert next(iter(one.stream([noise(1, 40000)[0]], RATE, layer="all"))).shape == (
        13,
        1 + one.depth,
        one.embedding_size,
    )


@pytest.mark.parametrize(
    ("blocks", "message"),
    [([], "no samples"), ([torch.full((9,), math.nan)], "NaN"), ([torch.zeros(1, 9)], r"\[samples\]")],
)
def test_a_stream_of_what_is_no_audio_is_an_error(encoder, blocks, message):
    with pytest.raises(DataError, match=message):
        list(encoder.stream(blocks, RATE))


def test_a_stream_may_come_in_one_buffer_that_is_filled_again_and_again(encoder):
    waveform = noise(1, 4000)

    def filled():
        buffer = np.empty(1000, np.float32)
        for part in waveform[0].split(1000):
            buffer[:] = part.numpy()
            yield buffer

    assert torch.equal(torch.cat(list(encoder.stream(filled(), RATE))), encoder.encode(waveform, RATE)[0])


def test_hours_stream_in_the_memory_of_a_minute():
    """A quarter of an hour at 16 kHz is 58 MB in float32, and twice that for its spectra alone in float64."""
    source = """
import resource, torch
from tests.test_encoder import INFO, RATE, model_of
from msm_dist.evaluate.encoder import Encoder
from msm_dist.model.weights import WeightsInfo
from msm_dist.config import Model

torch.set_num_threads(1)
# The smallest model there is: what counts is what is kept of the audio.
info = WeightsInfo(Model(embed_dim=32, depth=1, num_heads=1, patch_size="80x16"), INFO.features, 208)
encoder = Encoder(model_of(info), info, chunk_batch=4)
minute = 0.1 * torch.randn(60 * RATE)

def peak(minutes):
    steps = sum(len(piece) for piece in encoder.stream((minute for _ in range(minutes)), RATE))
    assert steps == minutes * 375, steps
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

before = peak(2)
print(peak(15) - before)
"""
    child = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    assert int(child.stdout) < 30 * 2**20


def test_the_statistics_of_a_data_set_are_those_that_packing_measures(tmp_path, encoder):
    clips = [noise(1, length, seed=length)[0] * (1 + i) for i, length in enumerate((16000, 30000, 8000))]
    (tmp_path / "audio").mkdir()
    for i, clip in enumerate(clips):
        soundfile.write(tmp_path / "audio" / f"{i}.wav", clip.numpy(), RATE, subtype="PCM_16")
    clips = [torch.from_numpy(soundfile.read(tmp_path / "audio" / f"{i}.wav", dtype="float32")[0]) for i in range(3)]
    index = pack(tmp_path / "audio", tmp_path / "shards", PackSettings())
    mine = encoder.for_dataset(clips, RATE)
    assert mine.normalization == "dataset"
    assert (encoder.normalization, encoder.statistics) == ("checkpoint", (-6.5, 3.5))
    np.testing.assert_allclose(mine.statistics, (index.mean, index.std), rtol=1e-6)
    # The same weights under those statistics are another encoder's with these in its checkpoint.
    info = replace(INFO, features=Features(mean=mine.statistics.mean, std=mine.statistics.std))
    other = Encoder(model_of(info), info)
    assert torch.equal(mine.encode(clips[0][None], RATE), other.encode(clips[0][None], RATE))
    assert not torch.allclose(mine.encode(clips[0][None], RATE), encoder.encode(clips[0][None], RATE), atol=1e-2)


def test_a_clip_depends_on_its_batch_with_the_statistics_of_the_batch_alone(encoder):
    clip, quiet, loud = noise(1, RATE), 0.01 * noise(2, RATE, seed=1), 5 * noise(2, RATE, seed=2)
    lengths = torch.full((3,), RATE)
    for make in (lambda: encoder, lambda: encoder.for_dataset([clip[0], loud[0]], RATE)):
        one = make()
        first, second = (one.embed(torch.cat([clip, other]), RATE, lengths)[0] for other in (quiet, loud))
        assert torch.allclose(first, second, atol=1e-5)
    batch = Encoder(model_of(INFO), INFO, normalization="batch")
    first, second = (batch.embed(torch.cat([clip, other]), RATE)[0] for other in (quiet, loud))
    assert (first - second).norm() > 0.1 * first.norm()
    dataset = encoder.for_dataset([clip[0], *loud], RATE)
    assert torch.allclose(second, dataset.embed(torch.cat([clip, loud]), RATE)[0], atol=1e-5)


def test_padding_counts_in_no_statistics():
    batch = Encoder(model_of(INFO), INFO, normalization="batch")
    clips = noise(2, 32000)
    padded = pad(clips, (0, 48000))
    lengths = torch.tensor([32000, 32000])
    assert torch.allclose(batch.encode(padded, RATE, lengths), batch.encode(clips, RATE), atol=1e-5)


def test_a_result_says_what_it_was_made_with(encoder):
    told = encoder.for_dataset([noise(1, RATE)[0]], RATE).describe()
    assert told["normalization"] == "dataset"
    assert told["mean"] != -6.5
    assert encoder.describe()["normalization"] == "checkpoint"
    assert encoder.describe()["mean"] == -6.5
    assert told["encoder_sha256"] == encoder.describe()["encoder_sha256"] == encoder.digest()
    twin = Encoder(MaskedSpectrogramModel(INFO.model, 80, 208, seed=4), INFO)
    assert twin.digest() != encoder.digest()
    assert told["embedding_size"] == encoder.embedding_size


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"normalization": "global"}, "checkpoint, dataset, batch"),
        ({"normalization": "dataset"}, "for_dataset"),
        ({"statistics": Statistics(-7.0, 4.0)}, "normalization = dataset"),
        ({"normalization": "dataset", "statistics": (math.nan, 4.0)}, "statistics = .*nan"),
        ({"normalization": "dataset", "statistics": (-7.0, math.inf)}, "statistics = .*inf"),
        ({"normalization": "dataset", "statistics": (-7.0, 0.0)}, "above 0"),
        ({"normalization": "dataset", "statistics": (-7.0, -4.0)}, "above 0"),
        ({"normalization": "dataset", "statistics": (-7.0,)}, "mean and the standard deviation"),
        ({"normalization": "dataset", "statistics": ("loud", 4.0)}, "finite numbers"),
        ({"device": "gpu"}, "cpu, cuda"),
        ({"device": "cuda:99"}, "torch sees"),
    ],
)
def test_a_setting_that_can_not_be_is_an_error(settings, message):
    with pytest.raises(ConfigError, match=message):
        Encoder(model_of(INFO), INFO, **settings)


@pytest.mark.parametrize("statistics", [(math.nan, 4.0), (math.inf, 4.0), (-7.0, 0.0), (-7.0, -4.0), None, (1, 2, 3)])
def test_statistics_given_by_hand_are_checked(encoder, statistics):
    with pytest.raises(ConfigError, match="statistics = "):
        encoder.with_statistics(statistics)


def test_a_stream_has_no_batch_to_be_normalised_with():
    with pytest.raises(ConfigError, match="a stream has no batch"):
        next(Encoder(model_of(INFO), INFO, normalization="batch").stream([noise(1, RATE)[0]], RATE))


def test_a_silent_data_set_is_an_error(encoder):
    with pytest.raises(DataError, match="silent"):
        encoder.for_dataset([torch.zeros(RATE)], RATE)
    with pytest.raises(DataError, match="no clip"):
        encoder.for_dataset([], RATE)


@pytest.mark.gpu
@pytest.mark.parametrize("layer", [None, 3, "all"])
def test_a_gpu_gives_what_the_cpu_gives(encoder, layer):
    gpu = encoder.to("cuda")
    waveform = noise(len(MIXED), 48000)
    expected = encoder.encode(waveform, RATE, MIXED, layer)
    for given in (waveform, waveform.cuda()):
        found = gpu.encode(given, RATE, MIXED, layer)
        assert found.device.type == "cuda"
        assert (found.cpu() - expected).norm() < 1e-4 * expected.norm()
    assert torch.equal(encoder.encode(waveform, RATE, MIXED, layer), expected)  # the encoder has stayed where it was
    pieces = list(gpu.stream(waveform[0].split(5000), RATE, layer))
    assert (torch.cat(pieces).cpu() - expected[0]).norm() < 1e-4 * expected[0].norm()


@pytest.mark.parametrize(
    ("waveform", "rate", "message"),
    [
        (torch.zeros(16000), RATE, r"waveform\[None\]"),
        (torch.zeros(1, 16000, dtype=torch.int16), RATE, "32768"),
        (torch.zeros(1, 0), RATE, "at least one"),
        (torch.full((1, 16000), math.nan), RATE, "NaN"),
        (torch.zeros(1, 16000), 0, "sample_rate"),
        (np.zeros((1, 16000), np.int16), RATE, "32768"),
        (np.full((1, 16000), math.nan), RATE, "NaN"),
        (["dog.wav"], RATE, "waveform is a list"),
        (np.array([None]), RATE, "waveform is a ndarray"),
    ],
)
def test_a_waveform_that_can_not_be_embedded_is_an_error(encoder, waveform, rate, message):
    with pytest.raises(DataError, match=message):
        encoder.encode(waveform, rate)
