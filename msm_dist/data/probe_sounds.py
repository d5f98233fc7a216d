"""Sounds of the probe tasks: ways of synthesis that the embedded corpus does not use, and what disturbs a recording.

In: a generator. Out: tones (callables that follow a frequency), textures (callables that fill a time), and a
clean event set into a clip with a level, a background, a slope of its spectrum and a place drawn at random.
The corpus of msm_dist.data.synthetic adds sines, cuts bands out of noise and plucks strings; here are frequency
modulation (Chowning, 1973), wave folding, pulses and noise through resonances, and grains (Roads, 1978).
Half of the ways are kept for test clips.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

RATE = 16_000
CLIP_SECONDS = 3.0
CLIP_SAMPLES = int(CLIP_SECONDS * RATE)
MARGIN_SECONDS = 0.1  # at either end nothing but background, so that no clip begins or ends in its event
LOUDEST = 0.99
TOP_HZ = 7000.0  # no partial above it is asked for
TABLE = 4096
NOISE_SLOPES = {"brown": -6.0, "pink": -3.0, "white": 0.0, "blue": 3.0}  # dB per octave

Rng = np.random.Generator
Tone = Callable[[np.ndarray, Rng], np.ndarray]
"""(frequency in Hz [S], generator) -> waveform [S] with a root mean square of 1."""
Texture = Callable[[int, Rng], np.ndarray]
"""(samples, generator) -> waveform [samples] with a root mean square of 1."""


def fm(rng: Rng) -> Tone:
    """Frequency modulation: a sine whose phase another sine moves, at 1, 2 or 3 times its frequency."""
    ratio, index = int(rng.integers(1, 4)), rng.uniform(0.8, 3.0)

    def play(frequency: np.ndarray, _: Rng) -> np.ndarray:
        angle = _phase(frequency)
        held = min(index, max(0.3, (TOP_HZ / frequency.max() - 1) / ratio - 1))
        return unit(np.sin(angle + held * np.sin(ratio * angle)))

    return play


def reed(rng: Rng) -> Tone:
    """A pulse wave in one broad resonance."""
    width, centre, half_width = rng.uniform(0.15, 0.5), log_uniform(rng, 500, 1800), rng.uniform(250, 600)

    def play(frequency: np.ndarray, _: Rng) -> np.ndarray:
        number = _partials(frequency)
        pulse = np.abs(np.sin(np.pi * number * width)) / number
        return _wavetable(frequency, pulse * (0.15 + _peak(number * frequency.mean(), centre, half_width)))

    return play


def breath(rng: Rng) -> Tone:
    """Noise that goes round in a comb filter, as in a pipe that is blown softly."""
    feedback = rng.uniform(0.96, 0.99)

    def play(frequency: np.ndarray, noise: Rng) -> np.ndarray:
        period = max(8, int(RATE / frequency.max()))
        place = _phase(frequency) / (2 * np.pi) * period
        rounds = noise.standard_normal((int(place[-1]) // period + 2, period))
        rounds[0] /= np.sqrt(1 - feedback**2)
        for before, now in zip(rounds, rounds[1:], strict=False):
            now += feedback * before
        return unit(np.interp(place, np.arange(rounds.size), rounds.ravel()))

    return play


def grain_train(rng: Rng) -> Tone:
    """A grain per period: short enveloped sines of one region, each a little different."""
    centre, length = log_uniform(rng, 600, 2000), int(rng.uniform(0.003, 0.007) * RATE)

    def play(frequency: np.ndarray, noise: Rng) -> np.ndarray:
        starts = _periods(frequency)
        scatter = 2 ** noise.normal(0, 0.01, len(starts))
        return unit(_grains(len(frequency), starts, centre * scatter, noise.uniform(0.7, 1, len(starts)), length))

    return play


def fold(rng: Rng) -> Tone:
    """A sine driven through a folding curve, off centre."""
    drive, offset = rng.uniform(1.5, 4.5), rng.uniform(0.2, 0.7)

    def play(frequency: np.ndarray, _: Rng) -> np.ndarray:
        held = min(drive, TOP_HZ / frequency.max() - 1)
        return unit(np.sin(held * np.sin(_phase(frequency)) + offset) - np.sin(offset))

    return play


def resonances(rng: Rng) -> Texture:
    """Noise through two to four resonances."""
    count = int(rng.integers(2, 5))
    centres = log_uniform(rng, 300, 5000, count)
    half_widths = centres / rng.uniform(4, 20, count)

    def gain(hz: np.ndarray) -> np.ndarray:
        return sum(_peak(hz, centre, half_width) for centre, half_width in zip(centres, half_widths, strict=True))

    return lambda samples, noise: unit(shaped(noise.standard_normal(samples), gain))


def grain_cloud(rng: Rng) -> Texture:
    """Grains at random times with random frequencies within an octave."""
    centre, density, length = log_uniform(rng, 500, 4000), rng.uniform(150, 500), int(rng.uniform(0.006, 0.02) * RATE)

    def play(samples: int, noise: Rng) -> np.ndarray:
        count = max(2, int(density * samples / RATE))
        starts, frequencies = noise.integers(0, samples, count), centre * 2 ** noise.uniform(-0.5, 0.5, count)
        return unit(_grains(samples, starts, frequencies, noise.uniform(0.3, 1, count), length))

    return play


def crackle(rng: Rng) -> Texture:
    """Sparse impulses of random height in one resonance."""
    density, centre = rng.uniform(200, 800), log_uniform(rng, 600, 4000)
    half_width = centre / rng.uniform(1.5, 5)

    def play(samples: int, noise: Rng) -> np.ndarray:
        impulses = noise.exponential(1.0, samples) * noise.choice((-1, 1), samples)
        impulses *= noise.random(samples) < density / RATE
        impulses[noise.integers(0, samples)] += 1
        return unit(shaped(impulses, lambda hz: _peak(hz, centre, half_width)))

    return play


def stairs(rng: Rng) -> Texture:
    """Noise that holds each of its values for a while."""
    held = int(rng.integers(4, 17))

    def play(samples: int, noise: Rng) -> np.ndarray:
        return unit(np.repeat(noise.standard_normal(samples // held + 1), held)[:samples])

    return play


TONES: dict[bool, Mapping[str, Callable[[Rng], Tone]]] = {
    False: {"fm": fm, "reed": reed, "breath": breath},
    True: {"grain_train": grain_train, "fold": fold},
}
TEXTURES: dict[bool, Mapping[str, Callable[[Rng], Texture]]] = {
    False: {"resonances": resonances, "grain_cloud": grain_cloud},
    True: {"crackle": crackle, "stairs": stairs},
}
"""By name, whether test clips alone have them: True for those that training and validation clips lack."""

FORMANTS = {  # Hz: first three formants of women's vowels (Peterson and Barney, 1952)
    "a": (850, 1220, 2810),
    "i": (310, 2790, 3310),
    "u": (370, 950, 2670),
}
VOICES = {False: ("pulse", "whisper"), True: ("square", "grains")}


def vowel(voice: str, name: str, scale: float, frequency: np.ndarray, rng: Rng) -> np.ndarray:
    """A vowel of one of VOICES at a frequency [S] in Hz: [S], a root mean square of 1; `scale` moves its formants."""
    formants = [scale * formant for formant in FORMANTS[name]]
    strength = (1.0, 0.5, 0.25)

    def gain(hz: np.ndarray) -> np.ndarray:
        return sum(a * _peak(hz, formant, 70 + 0.03 * formant) for a, formant in zip(strength, formants, strict=True))

    if voice == "whisper":
        return unit(shaped(rng.standard_normal(len(frequency)), gain))
    if voice == "grains":
        starts = _periods(frequency)
        heights = rng.uniform(0.7, 1, len(starts))
        parts = [_grains(len(frequency), starts, np.full(len(starts), f), heights, 160) for f in formants]
        return unit(sum(a * part for a, part in zip(strength, parts, strict=True)))
    number = _partials(frequency)
    source = (number % 2 if voice == "square" else np.ones(len(number))) / number
    return _wavetable(frequency, source * gain(number * frequency.mean()))


def record(event: np.ndarray, rng: Rng) -> tuple[np.ndarray, dict[str, Any]]:
    """A clip [CLIP_SAMPLES] within -1..1 that holds an event [S], and how it was disturbed.

    The spectrum is sloped by -4 to 4 dB per octave, the event begins anywhere that leaves the margins, a background of
    one of four colours lies 0 to 20 dB below the event's mean power, the event's level is 20 dB around -33 dB.
    """
    tilt, place, snr_db = rng.uniform(-4, 4), rng.random(), rng.uniform(0, 20)
    colour, level_db = str(rng.choice(list(NOISE_SLOPES))), rng.uniform(-53, -13)
    background = rng.standard_normal(CLIP_SAMPLES)
    margin = int(MARGIN_SECONDS * RATE)
    room = CLIP_SAMPLES - 2 * margin - len(event)
    assert room >= 0, "an event must leave the margins"
    start = margin + int(place * room)
    clip = unit(sloped(background, NOISE_SLOPES[colour])) * 10 ** (-snr_db / 20)
    clip[start : start + len(event)] += unit(sloped(event, tilt))
    clip *= 10 ** (level_db / 20)
    clip *= min(1.0, LOUDEST / np.abs(clip).max())
    disturbed = {"tilt_db": tilt, "onset_seconds": start / RATE, "snr_db": snr_db, "noise": colour}
    return clip, {**disturbed, "level_db": level_db}


def log_uniform(rng: Rng, low: float, high: float, size: int | None = None) -> Any:
    """Random numbers, evenly spread over the logarithm."""
    return np.exp(rng.uniform(np.log(low), np.log(high), size))


def unit(waveform: np.ndarray) -> np.ndarray:
    """The waveform with a root mean square of 1."""
    return waveform / np.sqrt(np.mean(waveform**2) + 1e-30)


def sloped(waveform: np.ndarray, slope_db: float) -> np.ndarray:
    """The waveform with its spectrum sloped around 1 kHz, in dB per octave; flat below 50 Hz."""
    return shaped(waveform, lambda hz: 10 ** (np.log2(np.maximum(hz, 50) / 1000) * slope_db / 20))


def shaped(waveform: np.ndarray, gain: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """The waveform [S] filtered without delay by a gain over Hz."""
    size = -(-len(waveform) // 4096) * 4096
    spectrum = np.fft.rfft(waveform, size)
    return np.fft.irfft(spectrum * gain(np.fft.rfftfreq(size, 1 / RATE)), size)[: len(waveform)]


def _phase(frequency: np.ndarray) -> np.ndarray:
    return np.cumsum(2 * np.pi * frequency / RATE)


def _peak(hz: np.ndarray, centre: float, half_width: float) -> np.ndarray:
    return 1 / (1 + ((hz - centre) / half_width) ** 2)


def _partials(frequency: np.ndarray) -> np.ndarray:
    return np.arange(1, 1 + max(1, int(TOP_HZ // frequency.max())))


def _wavetable(frequency: np.ndarray, amplitudes: np.ndarray) -> np.ndarray:
    """A wave of partials with these amplitudes, played at a frequency [S]."""
    spectrum = np.zeros(TABLE // 2 + 1, dtype=complex)
    spectrum[1 : 1 + len(amplitudes)] = amplitudes * np.exp(1j * np.pi * np.arange(len(amplitudes)) ** 2 / 7)
    table = np.fft.irfft(spectrum, TABLE)
    return unit(table[(_phase(frequency) / (2 * np.pi) * TABLE).astype(np.int64) % TABLE])


def _periods(frequency: np.ndarray) -> np.ndarray:
    """When each period of a frequency [S] begins, in samples with their fractions."""
    angle = _phase(frequency) / (2 * np.pi)
    return np.interp(np.arange(int(angle[-1]) + 1), angle, np.arange(len(angle)))


def _grains(samples: int, starts: np.ndarray, hz: np.ndarray, heights: np.ndarray, length: int) -> np.ndarray:
    """Hann-shaped sines [length] of these frequencies, added at their starts, which may lie between samples."""
    first, inside = np.ceil(starts).astype(np.int64), np.arange(length)
    place = inside + (first - starts)[:, None]
    envelope = np.sin(np.pi * np.minimum(place / length, 1)) ** 2
    grains = np.sin(2 * np.pi * hz[:, None] * place / RATE) * (heights[:, None] * envelope)
    return np.bincount((first[:, None] + inside).ravel(), grains.ravel(), samples + length)[:samples]
