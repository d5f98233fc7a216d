"""Audio in containers that libsndfile can't open (m4a, mp4, webm, mkv, aac), through torchcodec and FFmpeg.

In: the bytes of a file, or an open binary file; the content decides, never a file name. Out: what the header says,
and spans of mono samples; only the span is held in memory. The extra [video] brings torchcodec, which loads the
FFmpeg libraries of the machine (4 to 8). Fails with BadClip; its reason is no_torchcodec where these are missing.
"""

import io
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from msm_dist.data.audio import MAX_SAMPLES, AudioInfo, BadClip, Encoded, resample

if TYPE_CHECKING:
    from torchcodec.decoders import AudioDecoder

SUFFIXES = frozenset({".m4a", ".mp4", ".webm", ".mkv", ".mka", ".mov", ".aac"})
FORMAT = "container"
MISSING = "no_torchcodec"
TOLERANCE_SECONDS = 0.25
"""A container's length in its header and in its packets differ by padding and rounding: so much is no damage."""
MAX_UNTIMED_SECONDS = 600
"""A bare AAC stream says nothing of its length: it is decoded to find out, up to here."""


def is_container(head: bytes) -> bool:
    """Whether a file that begins with these 12 bytes or more is for this module: MP4, Matroska or bare AAC."""
    return head[4:8] == b"ftyp" or head[:4] == b"\x1aE\xdf\xa3" or _is_bare_aac(head)


@lru_cache(1)
def unusable() -> str | None:
    """Why containers can't be read here and what to do about it; None where they can."""
    remedy = "pip install 'msm-dist[video]' in the version of constraints.txt"
    try:
        from torchcodec.decoders import AudioDecoder  # noqa: F401
    except ModuleNotFoundError:
        return f"m4a, mp4, webm, mkv and aac need torchcodec: {remedy}, and the FFmpeg libraries"
    except (ImportError, OSError, RuntimeError) as error:
        fault = str(error).strip().partition("\n")[0][:120]
        return (
            f"torchcodec is installed but does not load ({fault}): install the FFmpeg libraries (Debian, Ubuntu: "
            f"apt-get install ffmpeg), and torchcodec as a build for this torch: {remedy}"
        )
    return None


def probe(encoded: Encoded) -> AudioInfo:
    """Read the header; a bare AAC stream is decoded. Raises BadClip."""
    decoder, bare = _open(encoded)
    about = decoder.metadata
    if not about.sample_rate or not about.num_channels:
        raise BadClip("undecodable", "its audio stream has no rate or no channels")
    seconds = about.duration_seconds
    if bare or seconds is None:
        samples = len(_decoded(decoder, 0.0, MAX_UNTIMED_SECONDS))
        if samples >= MAX_UNTIMED_SECONDS * about.sample_rate:
            limit = f"over {MAX_UNTIMED_SECONDS} s of a stream without a length"
            raise BadClip("unknown_length", f"{limit}; put it into a container: ffmpeg -i x.aac -c copy x.m4a")
    else:
        samples = round(seconds * about.sample_rate)
    if samples <= 0:
        raise BadClip("empty", "0 samples")
    return AudioInfo(samples, about.sample_rate, about.num_channels, FORMAT)


def decode_span(encoded: Encoded, start: int, stop: int, sample_rate: int) -> np.ndarray:
    """Samples [start, stop), at the file's own rate, as float32 mono [S] at `sample_rate`. Raises BadClip."""
    if stop - start > MAX_SAMPLES:
        raise BadClip("too_long", f"{stop - start} samples; at most {MAX_SAMPLES} are decoded at once")
    decoder, _ = _open(encoded)
    rate = decoder.metadata.sample_rate
    waveform = _decoded(decoder, start / rate, stop / rate)
    if stop - start - len(waveform) > TOLERANCE_SECONDS * rate:
        raise BadClip("truncated", f"{len(waveform)} of the {stop - start} samples from {start / rate:g} s on")
    if not np.isfinite(waveform).all():
        raise BadClip("non_finite", "NaN or infinite samples")
    return resample(waveform, rate, sample_rate)


def _open(encoded: Encoded) -> tuple["AudioDecoder", bool]:
    """A decoder at the start of the file, and whether it is a bare AAC stream."""
    if sentence := unusable():
        raise BadClip(MISSING, sentence)
    from torchcodec.decoders import AudioDecoder

    file = io.BytesIO(encoded) if isinstance(encoded, bytes | bytearray | memoryview) else encoded
    file.seek(0)
    head = file.read(12)
    file.seek(0)
    try:
        return AudioDecoder(file), _is_bare_aac(head)
    except (RuntimeError, ValueError) as error:
        text = str(error)
        if "audio stream" in text:
            raise BadClip("undecodable", "it holds no audio stream that FFmpeg can decode") from None
        raise BadClip("undecodable", _reason(text)) from None


def _decoded(decoder: "AudioDecoder", start_seconds: float, stop_seconds: float) -> np.ndarray:
    """Mono float32 [S] of a span."""
    try:
        samples = decoder.get_samples_played_in_range(start_seconds, stop_seconds).data
    except RuntimeError as error:
        text = str(error)
        if "No audio frames were decoded" in text:
            raise BadClip("truncated", f"nothing to decode from {start_seconds:g} s on") from None
        raise BadClip("undecodable", _reason(text)) from None
    return samples.mean(dim=0).numpy()


def _is_bare_aac(head: bytes) -> bool:
    """The sync word of ADTS; in an MP3 the two bits behind it are not both 0."""
    return len(head) > 1 and head[0] == 0xFF and head[1] & 0xF6 == 0xF0


def _reason(text: str) -> str:
    """What FFmpeg says, without the place in torchcodec's source."""
    said = " ".join(text.strip().partition("\n")[0].rpartition(".cpp:")[2].split())
    return said.lstrip("0123456789, ")[:200] or "FFmpeg can't decode it"
