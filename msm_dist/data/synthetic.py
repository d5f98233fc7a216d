"""The embedded corpus: seeded, labelled, varied sounds laid out like AudioSet, for a first run without data.

In: numbers of clips and a seed. Out: OUT/train and OUT/valid with PCM16 wav files of 3 to 6 s (16 kHz, every
eighth at another rate), train_segments.csv, valid_segments.csv and class_labels_indices.csv. The same seed
gives the same bytes, and clip i does not depend on how many there are. Fails with ConfigError if the folder
holds other clips.
"""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import soundfile

from msm_dist.data.clips import Progress, quiet
from msm_dist.errors import ConfigError

RATE = 16_000
OTHER_RATES = (8_000, 22_050, 32_000, 44_100)
OTHER_RATE_EVERY = 8
FORMANTS = {  # Hz: first three formants of a male speaker's vowels (Peterson and Barney, 1952)
    "i": (270, 2290, 3010),
    "e": (530, 1840, 2480),
    "a": (730, 1090, 2440),
    "o": (570, 840, 2410),
    "u": (300, 870, 2240),
}

Rng = np.random.Generator
Sound = Callable[[Rng, int, int], np.ndarray]
"""(generator, samples, rate in Hz) -> waveform [samples] of any level."""


def write_corpus(out: Path, clips: int, valid_clips: int, seed: int, progress: Progress = quiet) -> None:
    """Write the corpus into `out`. Raises ConfigError if wav files of another corpus are there."""
    splits = {"train": clips, "valid": valid_clips}
    names = {split: [f"{split}{number:06d}" for number in range(count)] for split, count in splits.items()}
    for split, wanted in names.items():
        if strange := {path.stem for path in (out / split).glob("*.wav")} - set(wanted):
            raise ConfigError(
                f"{out / split}: holds {len(strange)} other clips, such as {min(strange)}.wav; choose "
                "another folder or remove this one"
            )
        (out / split).mkdir(parents=True, exist_ok=True)
    classes = [f"{number},/synth/{name},{name.replace('_', ' ').capitalize()}" for number, name in enumerate(CLASSES)]
    _write_lines(out / "class_labels_indices.csv", ["index,mid,display_name", *classes])
    for number, (split, wanted) in enumerate(names.items()):
        rows = ["# YTID, start_seconds, end_seconds, positive_labels"]
        for i, name in enumerate(wanted):
            waveform, rate, labels = make_clip(np.random.default_rng([seed, number, i]), i)
            (out / split / f"{name}.wav").write_bytes(_wav(waveform, rate))
            mids = ",".join(f"/synth/{label}" for label in labels)
            rows.append(f'{name}, 0.000, {len(waveform) / rate:.3f}, "{mids}"')
            progress(f"writing {split}", i + 1, len(wanted))
        _write_lines(out / f"{split}_segments.csv", rows)


def make_clip(rng: Rng, number: int) -> tuple[np.ndarray, int, list[str]]:
    """Clip `number` as float [S] within -1..1, its rate in Hz and its classes, the first by turns."""
    name = list(CLASSES)[number % len(CLASSES)]
    odd = number % OTHER_RATE_EVERY == OTHER_RATE_EVERY - 1
    rate = int(rng.choice(OTHER_RATES)) if odd else RATE
    samples = int(rng.uniform(3.0, 6.0) * 100) * rate // 100
    if name in COMBINED:
        event, parts = COMBINED[name](rng, samples, rate)
    else:
        event, parts = SIMPLE[name](rng, samples, rate), []
    event = _tilt(rng, _delay(rng, event), rate)
    event /= max(1e-9, np.sqrt(np.mean(event**2)))
    background = _tilt(rng, rng.standard_normal(samples), rate)
    background /= np.sqrt(np.mean(background**2))
    mixed = event + background * 10 ** (-rng.uniform(12, 42) / 20)
    level = 10 ** (-rng.uniform(1, 22) / 20)
    return mixed * level / np.abs(mixed).max(), rate, [name, *parts]


def tone(rng: Rng, samples: int, rate: int) -> np.ndarray:
    """A steady harmonic tone."""
    pitch = _log_uniform(rng, 80, 1500)
    return _harmonics(rng, np.full(samples, pitch), rate) * _fade(samples, rate)


def chirp(rng: Rng, samples: int, rate: int) -> np.ndarray:
    """A glide between two frequencies, once or again and again."""
    low, high = _log_uniform(rng, 100, 800), _log_uniform(rng, 1200, 3600)
    place = (np.arange(samples) / samples * rng.integers(1, 6)) % 1.0
    if rng.random() < 0.5:
        place = 1 - place
    return np.sin(_phase(low * (high / low) ** place, rate)) * _fade(samples, rate)


def frequency_modulation(rng: Rng, samples: int, rate: int) -> np.ndarray:
    """A carrier with vibrato, slow and wide to fast and rough."""
    carrier, speed = _log_uniform(rng, 300, 2500), _log_uniform(rng, 2, 40)
    swing = np.sin(2 * np.pi * speed * _time(samples, rate) + rng.uniform(0, 6))
    return np.sin(_phase(carrier * 2 ** (rng.uniform(0.1, 0.8) * swing), rate)) * _fade(samples, rate)


def noise_band(rng: Rng, samples: int, rate: int) -> np.ndarray:
    """Noise in a band of one third to three octaves, its level slowly modulated."""
    centre, width = _log_uniform(rng, 200, 3000), 2 ** rng.uniform(1 / 6, 1.5)
    band = _band(rng, samples, rate, centre / width, centre * width)
    swell = 1 + rng.uniform(0, 0.9) * np.sin(2 * np.pi * rng.uniform(0.2, 4) * _time(samples, rate))
    return band * swell * _fade(samples, rate)


def bursts(rng: Rng, samples: int, rate: int) -> np.ndarray:
    """Clicks and bangs at random times, each a decaying band of noise."""
    centre = _log_uniform(rng, 300, 3000)
    length = int(rate * _log_uniform(rng, 0.03, 0.4))
    burst = _band(rng, length, rate, centre / 2, centre * 2) * np.exp(-6 * np.arange(length) / length)
    starts = rng.integers(0, samples - length, rng.integers(3, 14))
    return _place(samples, [(start, burst * rng.uniform(0.3, 1)) for start in starts])


def plucked_string(rng: Rng, samples: int, rate: int) -> np.ndarray:
    """Plucked notes (Karplus and Strong, 1983)."""
    count = int(rng.integers(2, 7))
    starts = np.sort(rng.integers(0, int(0.8 * samples), count))
    pitches = _log_uniform(rng, 90, 300) * 2 ** (rng.integers(0, 19, count) / 12)
    notes = zip(starts, pitches, strict=True)
    return _place(samples, [(s, _pluck(rng, min(samples - s, 2 * rate), rate, p)) for s, p in notes])


def vowel(rng: Rng, samples: int, rate: int) -> np.ndarray:
    """A voice that moves from vowel to vowel: harmonics under moving formants."""
    path = rng.choice(list(FORMANTS), int(rng.integers(2, 6)))
    coarse = np.linspace(0, len(path) - 1, 1 + samples // 64)
    scale = rng.uniform(0.9, 1.25)
    peaks = [np.interp(coarse, np.arange(len(path)), [scale * FORMANTS[v][i] for v in path]) for i in range(3)]
    fine = np.linspace(0, len(path) - 1, samples)
    drift = np.sin(2 * np.pi * rng.uniform(0.3, 6) * _time(samples, rate))
    base = _log_uniform(rng, 90, 260)
    phase = _phase(base * (1 + rng.uniform(0.01, 0.12) * drift), rate)
    voice = np.zeros(samples)
    # sin(h x) = 2 cos(x) sin((h - 1) x) - sin((h - 2) x)
    turn, before, wave = 2 * np.cos(phase), np.zeros(samples), np.sin(phase)
    for harmonic in range(1, int(min(3800, 0.4 * rate) // base) + 1):
        gain = sum(1 / (1 + ((harmonic * base - peak) / 90) ** 2) for peak in peaks)
        voice += np.interp(fine, coarse, gain) * wave
        before, wave = wave, turn * wave - before
    syllables = 0.55 - 0.45 * np.cos(2 * np.pi * rng.uniform(1, 5) * _time(samples, rate))
    return voice * syllables


def rhythm(rng: Rng, samples: int, rate: int) -> np.ndarray:
    """A repeated pattern of drum-like hits: low thumps and high ticks."""
    step = int(rate * rng.uniform(0.09, 0.25))
    pattern = rng.integers(0, 3, int(rng.choice([4, 6, 8])))
    pattern[0] = 1
    decay = np.exp(-5 * np.arange(step) / step)
    thump = np.sin(_phase(_log_uniform(rng, 60, 140) * (1 + 2 * decay**4), rate)) * decay
    tick = 0.7 * _band(rng, step, rate, _log_uniform(rng, 1500, 3000), 0.49 * rate) * decay**2
    hits = [(start, pattern[i % len(pattern)]) for i, start in enumerate(range(0, samples, step))]
    return _place(samples, [(start, (thump, tick)[kind - 1]) for start, kind in hits if kind])


def sequence(rng: Rng, samples: int, rate: int) -> tuple[np.ndarray, list[str]]:
    """Two sounds one after the other."""
    names = _pick(rng)
    split = int(samples * rng.uniform(0.35, 0.65))
    parts = [SIMPLE[name](rng, count, rate) for name, count in zip(names, (split, samples - split), strict=True)]
    return np.concatenate([part / (1e-9 + np.abs(part).max()) for part in parts]), names


def mixture(rng: Rng, samples: int, rate: int) -> tuple[np.ndarray, list[str]]:
    """Two sounds at once, the second up to 12 dB softer."""
    names = _pick(rng)
    first, second = (SIMPLE[name](rng, samples, rate) for name in names)
    softer = 10 ** (-rng.uniform(0, 12) / 20)
    return first / (1e-9 + np.abs(first).max()) + softer * second / (1e-9 + np.abs(second).max()), names


SIMPLE: dict[str, Sound] = {
    "tone": tone,
    "chirp": chirp,
    "frequency_modulation": frequency_modulation,
    "noise_band": noise_band,
    "bursts": bursts,
    "plucked_string": plucked_string,
    "vowel": vowel,
    "rhythm": rhythm,
}
COMBINED = {"sequence": sequence, "mixture": mixture}
CLASSES = (*SIMPLE, *COMBINED)


def _pick(rng: Rng) -> list[str]:
    return [str(name) for name in rng.choice(list(SIMPLE), 2, replace=False)]


def _log_uniform(rng: Rng, low: float, high: float) -> float:
    return float(np.exp(rng.uniform(np.log(low), np.log(high))))


def _time(samples: int, rate: int) -> np.ndarray:
    return np.arange(samples) / rate


def _phase(frequency: np.ndarray, rate: int) -> np.ndarray:
    return np.cumsum(2 * np.pi * frequency / rate)


def _fade(samples: int, rate: int) -> np.ndarray:
    """Rise and fall over 20 ms, against clicks."""
    edge = np.minimum(np.arange(samples), np.arange(samples)[::-1])
    return np.minimum(1.0, edge / (0.02 * rate))


def _harmonics(rng: Rng, pitch: np.ndarray, rate: int) -> np.ndarray:
    phase = _phase(pitch, rate)
    fall = rng.uniform(0.5, 2.5)
    count = min(int(rng.integers(1, 10)), int(0.45 * rate // pitch.max()))
    return sum(np.sin(k * phase + rng.uniform(0, 6)) / k**fall for k in range(1, count + 1))


def _band(rng: Rng, samples: int, rate: int, low: float, high: float) -> np.ndarray:
    """Gaussian noise between two frequencies in Hz, made in the frequency domain."""
    size = _fast_size(samples)
    frequency = np.fft.rfftfreq(size, 1 / rate)
    spectrum = rng.standard_normal((2, len(frequency)))
    inside = (frequency >= low) & (frequency <= min(high, 0.49 * rate))
    return np.fft.irfft((spectrum[0] + 1j * spectrum[1]) * inside, size)[:samples] * np.sqrt(size)


def _tilt(rng: Rng, waveform: np.ndarray, rate: int) -> np.ndarray:
    """A random slope of -6 to 2 dB per octave around 1 kHz."""
    size = _fast_size(len(waveform))
    octaves = np.log2(np.maximum(np.fft.rfftfreq(size, 1 / rate), 50) / 1000)
    slope = 10 ** (octaves * rng.uniform(-6, 2) / 20)
    return np.fft.irfft(np.fft.rfft(waveform, size) * slope, size)[: len(waveform)]


def _fast_size(samples: int) -> int:
    """The next multiple of 4,096: its transform is fast, whatever the length asked for."""
    return -(-samples // 4096) * 4096


def _delay(rng: Rng, waveform: np.ndarray) -> np.ndarray:
    """A random onset within the first fifth."""
    onset = int(rng.uniform(0, 0.2) * len(waveform))
    return np.concatenate([np.zeros(onset), waveform[: len(waveform) - onset]])


def _pluck(rng: Rng, samples: int, rate: int, pitch: float) -> np.ndarray:
    """A period of noise that goes round and round, each time averaged with its neighbour and damped."""
    period = max(2, round(rate / pitch))
    rounds = np.empty((-(-samples // period), period + 1))
    rounds[0] = rng.uniform(-1, 1, period + 1)
    damping = 0.5 * rng.uniform(0.985, 0.999)
    for i in range(1, len(rounds)):
        rounds[i, 1:] = damping * (rounds[i - 1, 1:] + rounds[i - 1, :-1])
        rounds[i, 0] = rounds[i - 1, -1]
    return rounds[:, 1:].ravel()[:samples]


def _place(samples: int, events: list[tuple[int, np.ndarray]]) -> np.ndarray:
    """Events added at their starts; what passes the end is cut."""
    waveform = np.zeros(samples)
    for start, event in events:
        event = event[: samples - start]
        waveform[start : start + len(event)] += event
    return waveform


def _wav(waveform: np.ndarray, rate: int) -> bytes:
    encoded = io.BytesIO()
    soundfile.write(encoded, np.rint(waveform * 32767).astype(np.int16), rate, format="WAV", subtype="PCM_16")
    return encoded.getvalue()


def _write_lines(path: Path, lines: list[str]) -> None:
    path.write_text("\n".join([*lines, ""]), encoding="utf-8")
