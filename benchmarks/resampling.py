"""Resamplers for packing: what each keeps, what each lets through, how long each takes.

In: nothing but the packages. Every candidate takes tones and noise to the front end's rate. Out: a table, and
benchmarks/results/resampling-<device>.json. Three numbers decide:

    flatness   largest deviation of a tone's level in 50 Hz to 7.5 kHz (or what the old rate holds), dB
    alias      loudest that a tone above the new Nyquist frequency comes out, over all tones and all the output, dB
               (going up: what appears above the old Nyquist frequency)
    speed      seconds of audio a second of processor time, on one thread
"""

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import soxr
import torch
from torchaudio.functional import resample

from benchmarks.measure import RESULTS, write_results

TARGET = 16_000
RATES = (8_000, 22_050, 44_100, 48_000)
PASSBAND_HZ = 7_500
GUARD_HZ = 250
"""Between the new Nyquist frequency and the first tone that must be gone: no filter falls at once."""
SECONDS = 2.0
CLIP_SECONDS = 10.0
TURNS = 5
NUM_TONES = 60
AMPLITUDE = 0.5

Resampler = Callable[[np.ndarray, int], np.ndarray]


def main(arguments: Sequence[str]) -> int:
    """The exit code: 0."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.resampling", description=__doc__.partition("\n")[0])
    parser.add_argument("--turns", type=int, default=TURNS, help=f"of the timing ({TURNS})")
    parser.add_argument("--tones", type=int, default=NUM_TONES, help=f"of each sweep ({NUM_TONES})")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    found = {
        name: {str(rate): measure(resampler, rate, options.tones, options.turns) for rate in RATES}
        for name, resampler in candidates().items()
    }
    path = write_results(options.out, "resampling", {"target": TARGET, "soxr": soxr.__version__, "found": found})
    print(f"{summary_table(found)}\nwritten: {path}")
    return 0


def candidates() -> dict[str, Resampler]:
    """Each takes float32 [S] at a rate to the target rate."""

    def with_torchaudio(**settings: Any) -> Resampler:
        def run(waveform: np.ndarray, rate: int) -> np.ndarray:
            return resample(torch.from_numpy(waveform), rate, TARGET, **settings).numpy()

        return run

    def with_soxr(quality: str) -> Resampler:
        return lambda waveform, rate: soxr.resample(waveform, rate, TARGET, quality=quality)

    kaiser = {"resampling_method": "sinc_interp_kaiser", "lowpass_filter_width": 64, "rolloff": 0.9475937167399596}
    return {
        "torchaudio, as it comes": with_torchaudio(),
        "torchaudio, kaiser_best": with_torchaudio(**kaiser, beta=14.769656459379492),
        "soxr HQ": with_soxr("HQ"),
        "soxr VHQ": with_soxr("VHQ"),
    }


def measure(resampler: Resampler, rate: int, tones: int, turns: int) -> dict[str, float]:
    """flatness_db, alias_db, and speed in seconds of audio a second."""
    edge = min(PASSBAND_HZ, 0.45 * rate)
    flat = [abs(level_db(resampler, rate, frequency)) for frequency in np.geomspace(50, edge, tones)]
    if rate > TARGET:
        outside = np.linspace(TARGET / 2 + GUARD_HZ, 0.49 * rate, tones)
        alias = [leak_db(resampler, rate, frequency, 0, TARGET / 2) for frequency in outside]
    else:
        inside = np.linspace(100, 0.45 * rate, tones)
        alias = [leak_db(resampler, rate, frequency, rate / 2 + GUARD_HZ, TARGET / 2) for frequency in inside]
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, round(CLIP_SECONDS * rate)).astype(np.float32)
    resampler(noise, rate)
    taken = []
    for _ in range(turns):
        begin = time.process_time()
        resampler(noise, rate)
        taken.append(time.process_time() - begin)
    return {"flatness_db": max(flat), "alias_db": max(alias), "speed": CLIP_SECONDS / median(taken)}


def level_db(resampler: Resampler, rate: int, frequency: float) -> float:
    """How much louder a tone comes out: its amplitude by least squares, the ends left out."""
    middle = _middle(resampler(_tone(rate, frequency), rate))
    phase = 2 * np.pi * frequency * np.arange(len(middle)) / TARGET
    waves = np.stack([np.sin(phase), np.cos(phase)], axis=1)
    weights = np.linalg.lstsq(waves, middle, rcond=None)[0]
    return 20 * np.log10(np.hypot(*weights) / AMPLITUDE)


def leak_db(resampler: Resampler, rate: int, frequency: float, low: float, high: float) -> float:
    """The loudest frequency of the output in low..high Hz, against the tone that went in."""
    middle = _middle(resampler(_tone(rate, frequency), rate)).astype(np.float64)
    window = np.blackman(len(middle))
    spectrum = np.abs(np.fft.rfft(middle * window)) / (window.sum() / 2) / AMPLITUDE
    at = np.fft.rfftfreq(len(middle), 1 / TARGET)
    return 20 * np.log10(max(spectrum[(at >= low) & (at <= high)].max(), 1e-12))


def summary_table(found: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """A row per candidate and rate."""
    lines = [f"{'to 16 kHz with':<26} {'from Hz':>8} {'flatness dB':>12} {'alias dB':>9} {'s of audio/s':>13}"]
    for name, rates in found.items():
        for rate, values in rates.items():
            shown = f"{values['flatness_db']:>12.3f} {values['alias_db']:>9.1f} {values['speed']:>13.0f}"
            lines.append(f"{name:<26} {rate:>8} {shown}")
    return "\n".join(lines)


def _tone(rate: int, frequency: float) -> np.ndarray:
    return (AMPLITUDE * np.sin(2 * np.pi * frequency * np.arange(round(SECONDS * rate)) / rate)).astype(np.float32)


def _middle(waveform: np.ndarray) -> np.ndarray:
    return waveform[len(waveform) // 4 : -len(waveform) // 4]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
