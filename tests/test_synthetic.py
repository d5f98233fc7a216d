"""The embedded corpus: reproducible, labelled, varied, laid out like AudioSet."""

from pathlib import Path

import numpy as np
import pytest
import soundfile

from msm_dist.data.audioset import check_labels, match_files, read_class_names, read_segments
from msm_dist.data.synthetic import CLASSES, COMBINED, RATE, make_clip, write_corpus
from msm_dist.errors import ConfigError


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("synth")
    write_corpus(out, clips=30, valid_clips=10, seed=3)
    return out


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_same_seed_gives_the_same_bytes_whatever_the_number_of_clips(corpus, tmp_path):
    write_corpus(tmp_path, clips=10, valid_clips=3, seed=3)
    for path in tmp_path.rglob("*.wav"):
        assert path.read_bytes() == (corpus / path.relative_to(tmp_path)).read_bytes()
    lines = (tmp_path / "train_segments.csv").read_text().splitlines()
    assert (corpus / "train_segments.csv").read_text().splitlines()[: len(lines)] == lines


def test_another_seed_gives_other_clips(corpus, tmp_path):
    write_corpus(tmp_path, clips=10, valid_clips=3, seed=4)
    wavs = [path.read_bytes() for folder in (corpus, tmp_path) for path in folder.rglob("*.wav")]
    assert len(wavs) == len(set(wavs)) == 53


def test_training_and_held_out_clips_are_all_different(corpus):
    wavs = [path.read_bytes() for path in corpus.rglob("*.wav")]
    assert len(wavs) == len(set(wavs)) == 40


def test_layout_is_that_of_audioset(corpus):
    names = read_class_names(corpus / "class_labels_indices.csv")
    for split, count in (("train", 30), ("valid", 10)):
        segments = read_segments(corpus / f"{split}_segments.csv")
        check_labels(segments, names, corpus)
        matches = match_files([path.name for path in (corpus / split).iterdir()], segments)
        assert len(matches.segments) == count
        assert (matches.num_unlisted, matches.num_absent) == (0, 0)
        for file, segment in matches.segments.items():
            assert soundfile.info(corpus / split / file).duration == pytest.approx(segment.end_seconds, abs=1e-3)


def test_every_class_has_its_share_and_combinations_name_their_parts(corpus):
    segments = read_segments(corpus / "train_segments.csv")
    first = [segment.labels[0].removeprefix("/synth/") for segment in segments]
    counts = [first.count(name) for name in CLASSES]
    assert len(CLASSES) == 10
    assert max(counts) - min(counts) <= 1
    assert all(len(set(s.labels)) == (3 if f in COMBINED else 1) for s, f in zip(segments, first, strict=True))


def test_clips_are_three_to_six_seconds_and_mostly_16_khz(corpus):
    infos = [soundfile.info(path) for path in corpus.rglob("*.wav")]
    assert {info.subtype for info in infos} == {"PCM_16"}
    assert all(2.9 < info.duration <= 6 for info in infos)
    rates = [info.samplerate for info in infos]
    assert 0.8 < rates.count(RATE) / len(rates) < 1


def test_level_noise_and_onset_vary_and_nothing_clips(corpus):
    clips = [soundfile.read(path)[0] for path in corpus.rglob("*.wav")]
    peaks = np.array([np.abs(clip).max() for clip in clips])
    assert peaks.max() < 1
    assert np.ptp(20 * np.log10(peaks)) > 12
    frames = [clip[: len(clip) // 400 * 400].reshape(-1, 400).std(axis=1) for clip in clips]
    floors = [20 * np.log10(np.quantile(levels, 0.05) / levels.max()) for levels in frames]
    assert np.ptp(floors) > 20
    starts = [int(np.argmax(levels > 0.3 * levels.max())) for levels in frames]
    assert len(set(starts)) > 10


def concentration(values: np.ndarray) -> float:
    """Share of the sum in the largest fiftieth."""
    return float(np.sort(values)[-len(values) // 50 :].sum() / values.sum())


def test_classes_sound_as_their_names_say():
    clips = {
        name: [make_clip(np.random.default_rng([9, i]), number)[0] for i in range(3)]
        for number, name in enumerate(CLASSES)
    }
    in_frequency = {
        name: np.median([concentration(np.abs(np.fft.rfft(clip)) ** 2) for clip in group])
        for name, group in clips.items()
    }
    in_time = {
        name: np.median([concentration(clip[: len(clip) // 100 * 100].reshape(-1, 100).var(axis=1)) for clip in group])
        for name, group in clips.items()
    }
    assert in_frequency["tone"] > 0.9 > in_frequency["bursts"] + 0.1
    assert in_time["tone"] < 0.1 < in_time["bursts"]


def test_folder_with_other_clips_is_left_alone(corpus, tmp_path):
    write_corpus(tmp_path, clips=3, valid_clips=1, seed=0)
    before = contents(tmp_path)
    with pytest.raises(ConfigError, match="holds 1 other clips, such as train000002.wav"):
        write_corpus(tmp_path, clips=2, valid_clips=1, seed=0)
    assert contents(tmp_path) == before
