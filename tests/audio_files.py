"""Audio files for tests, in every codec, and damaged on purpose."""

import io
import struct
from pathlib import Path

import numpy as np
import soundfile

CODECS = {
    "wav": ("WAV", "PCM_16"),
    "flac": ("FLAC", "PCM_16"),
    "ogg": ("OGG", "VORBIS"),
    "opus": ("OGG", "OPUS"),
    "mp3": ("MP3", None),
    "float.wav": ("WAV", "FLOAT"),
    "flac24": ("FLAC", "PCM_24"),
}


def noise(num_samples: int, seed: int = 0, channels: int = 1) -> np.ndarray:
    """int16 noise [S] or [S, channels]."""
    shape = num_samples if channels == 1 else (num_samples, channels)
    return np.random.default_rng(seed).integers(-8000, 8000, shape).astype(np.int16)


def encode(samples: np.ndarray, codec: str = "flac", rate: int = 16000) -> bytes:
    """The bytes of an audio file."""
    container, subtype = CODECS[codec]
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=container, subtype=subtype)
    return file.getvalue()


def write_audio(path: Path, samples: np.ndarray, codec: str = "flac", rate: int = 16000) -> Path:
    """An audio file, its folders made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode(samples, codec, rate))
    return path


def flac_claiming(samples: np.ndarray, total: int) -> bytes:
    """A FLAC whose header claims `total` samples; 0 means that the length is unknown."""
    content = bytearray(encode(samples, "flac"))
    content[21] = content[21] & 0xF0 | total >> 32
    content[22:26] = struct.pack(">I", total & 0xFFFFFFFF)
    return bytes(content)


def wav_claiming(data: bytes, channels: int = 1, rate: int = 16000, num_bytes: int | None = None) -> bytes:
    """A PCM16 WAV with a header of your choice."""
    size = len(data) if num_bytes is None else num_bytes
    block = channels * 2 & 0xFFFF
    form = struct.pack("<HHIIHH", 1, channels, rate, rate * block & 0xFFFFFFFF, block, 16)
    chunks = b"WAVEfmt " + struct.pack("<I", len(form)) + form + b"data" + struct.pack("<I", size)
    return b"RIFF" + struct.pack("<I", size + 36 & 0xFFFFFFFF) + chunks + data


def bad_files() -> dict[str, tuple[bytes, str]]:
    """{name: (content, reason that packing gives)}."""
    good = noise(16000)
    flac, mp3 = encode(good), encode(good, "mp3")
    flipped = bytearray(flac)
    flipped[len(flac) // 2] ^= 0xFF
    broken = good / 32768
    broken[100] = np.nan
    infinite = good / 32768
    infinite[-1] = np.inf
    return {
        "truncated.flac": (flac[: len(flac) // 2], "undecodable"),
        "flipped.flac": (bytes(flipped), "undecodable"),
        "halved.mp3": (mp3[: len(mp3) // 2], "truncated"),
        "nothing.wav": (b"", "empty"),
        "header_only.wav": (encode(good[:0], "wav"), "empty"),
        "text.wav": (b"this is no audio\n" * 100, "undecodable"),
        "zeros.flac": (bytes(5000), "undecodable"),
        "nan.wav": (encode(broken, "float.wav"), "non_finite"),
        "infinite.wav": (encode(infinite, "float.wav"), "non_finite"),
        "one_sample.wav": (encode(good[:1], "wav"), "too_short"),
        "piped.flac": (flac_claiming(good, 0), "unknown_length"),
        "claims_a_year.flac": (flac_claiming(good, 2**36 - 1), "undecodable"),
        "many_channels.wav": (wav_claiming(bytes(4000), channels=65535), "undecodable"),
        "no_rate.wav": (wav_claiming(bytes(4000), rate=0), "undecodable"),
        "wild_rate.wav": (wav_claiming(bytes(4000), rate=2**31 - 1), "unsupported_rate"),
    }
