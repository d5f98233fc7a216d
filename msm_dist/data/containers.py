"""Audio in containers that libsndfile can't open (m4a, mp4, webm, mkv, aac), through torchcodec and FFmpeg.

In: the bytes of a file, or an open binary file; the content decides, never a file name. Out: what the header says,
and spans of mono samples; in memory are the span or, of Matroska, its first two minutes. The extra [video] brings
torchcodec, which loads the FFmpeg libraries of the machine (4 to 8). Fails with BadClip; its reason is no_torchcodec
where these are missing.
"""

import io
from collections.abc import Iterator
from functools import lru_cache
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from msm_dist.data.audio import AudioInfo, BadClip, Encoded, check_size, resample

if TYPE_CHECKING:
    from torchcodec import AudioSamples
    from torchcodec.decoders import AudioDecoder

SUFFIXES = frozenset({".m4a", ".mp4", ".webm", ".mkv", ".mka", ".mov", ".aac"})
FORMAT = "container"
MISSING = "no_torchcodec"
TOLERANCE_SECONDS = 0.25
"""A container's length in its header and in its packets differ by padding and rounding: so much is no damage."""
EXACT_SECONDS = 120
"""Matroska's time stamps are rounded to milliseconds: up to here a span is cut from all before it, by samples."""
MAX_UNTIMED_SECONDS = 600
"""A bare AAC stream says nothing of its length: it is decoded to find out, up to here."""
LOOK_SECONDS = 30
BLOCK_SECONDS = 60
MATROSKA = b"\x1aE\xdf\xa3"
SEGMENT = b"\x18S\x80g"


def is_container(head: bytes) -> bool:
    """Whether a file that begins with these 12 bytes or more is for this module: MP4, Matroska or bare AAC."""
    return head[4:8] == b"ftyp" or head[:4] == MATROSKA or _is_bare_aac(head)


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
    """Read the header; decode where it has no length of the sound itself. Raises BadClip.

    Times are the file's: sound that begins late, or ends before the picture, has its samples where they are heard.
    """
    file = _file(encoded)
    decoder = _open(file)
    about = decoder.metadata
    if not about.sample_rate or not about.num_channels:
        raise BadClip("undecodable", "its audio stream has no rate or no channels")
    head = _head(file)
    seconds = about.duration_seconds_from_header
    if _is_bare_aac(head) or about.duration_seconds is None:
        samples = len(_decoded(decoder, 0.0, MAX_UNTIMED_SECONDS))
        if samples >= MAX_UNTIMED_SECONDS * about.sample_rate:
            limit = f"over {MAX_UNTIMED_SECONDS} s of a stream without a length"
            raise BadClip("unknown_length", f"{limit}; put it into a container: ffmpeg -i x.aac -c copy x.m4a")
    elif seconds is None:
        _check_segment(file)
        samples = round(_end(file) * about.sample_rate)
    else:
        samples = round((max(0.0, about.begin_stream_seconds_from_header or 0.0) + seconds) * about.sample_rate)
    if samples <= 0:
        raise BadClip("empty", "0 samples")
    return AudioInfo(samples, about.sample_rate, about.num_channels, FORMAT)


def decode_span(encoded: Encoded, start: int, stop: int, sample_rate: int) -> np.ndarray:
    """Samples [start, stop), at the file's own rate, as float32 mono [S] at `sample_rate`. Raises BadClip."""
    file = _file(encoded)
    decoder = _open(file)
    rate = decoder.metadata.sample_rate
    check_size(stop - start, rate, sample_rate)
    exact = _head(file)[:4] == MATROSKA and stop <= EXACT_SECONDS * rate
    begin = 0 if exact else start
    waveform = _decoded(decoder, begin / rate, stop / rate)[start - begin :]
    if stop - start - len(waveform) > TOLERANCE_SECONDS * rate:
        raise BadClip("truncated", f"{len(waveform)} of the {stop - start} samples from {start / rate:g} s on")
    if not np.isfinite(waveform).all():
        raise BadClip("non_finite", "NaN or infinite samples")
    return resample(waveform, rate, sample_rate)


def decode_blocks(encoded: Encoded) -> Iterator[np.ndarray]:
    """The whole sound in blocks, float32 mono [S] each, at the file's own rate: memory holds one. Raises BadClip."""
    info = probe(encoded)
    length = BLOCK_SECONDS * info.sample_rate
    for start in range(0, info.samples, length):
        yield decode_span(encoded, start, min(start + length, info.samples), info.sample_rate)


def _file(encoded: Encoded) -> BinaryIO:
    return io.BytesIO(encoded) if isinstance(encoded, bytes | bytearray | memoryview) else encoded


def _head(file: BinaryIO) -> bytes:
    """Its first 64 bytes; the file's place is kept, for a decoder goes on there."""
    place = file.tell()
    file.seek(0)
    head = file.read(64)
    file.seek(place)
    return head


def _open(file: BinaryIO) -> "AudioDecoder":
    """A decoder at the start of the file."""
    if sentence := unusable():
        raise BadClip(MISSING, sentence)
    from torchcodec.decoders import AudioDecoder

    file.seek(0)
    try:
        return AudioDecoder(file)
    except (RuntimeError, ValueError) as error:
        text = str(error)
        if "audio stream" in text:
            raise BadClip("undecodable", "it holds no audio stream that FFmpeg can decode") from None
        raise BadClip("undecodable", _reason(text)) from None


def _decoded(decoder: "AudioDecoder", start_seconds: float, stop_seconds: float) -> np.ndarray:
    """Mono float32 [S] of a span; silence before sound that begins late."""
    rate, begin = decoder.metadata.sample_rate, decoder.metadata.begin_stream_seconds or 0.0
    if stop_seconds <= begin:
        return np.zeros(round((stop_seconds - start_seconds) * rate), np.float32)
    samples = _samples(decoder, start_seconds, stop_seconds)
    if samples is None:
        raise BadClip("truncated", f"nothing to decode from {start_seconds:g} s on")
    late = samples.pts_seconds - start_seconds
    if late > max(0.0, begin - start_seconds) + TOLERANCE_SECONDS:
        raise BadClip("truncated", f"nothing to decode from {start_seconds:g} s to {samples.pts_seconds:g} s")
    return np.pad(samples.data.mean(dim=0).numpy(), (round(max(0.0, late) * rate), 0))


def _samples(decoder: "AudioDecoder", start_seconds: float, stop_seconds: float) -> "AudioSamples | None":
    """What is decoded of a span; None where nothing is there. Raises BadClip."""
    try:
        return decoder.get_samples_played_in_range(start_seconds, stop_seconds)
    except RuntimeError as error:
        if "No audio frames were decoded" in str(error):
            return None
        raise BadClip("undecodable", _reason(str(error))) from None


def _end(file: BinaryIO) -> float:
    """When the sound ends, in s, by decoding; of a file that says only when its last stream does."""
    decoder, end = _open(file), None
    last = decoder.metadata.duration_seconds
    found = _samples(decoder, max(0.0, last - 1.0), last + 1.0)
    if found is None:
        # Piece by piece. Each begins a little after the one before it, for else FFmpeg starts anew at the beginning.
        decoder, start = _open(file), 0.0
        while start < last and (piece := _samples(decoder, start, start + LOOK_SECONDS)) is not None:
            end = piece.pts_seconds + piece.duration_seconds
            start += LOOK_SECONDS + TOLERANCE_SECONDS
        if end is None:
            raise BadClip("empty", "0 samples")
        found = _samples(decoder, max(0.0, end - 1.0), end + 1.0)
    return found.pts_seconds + found.duration_seconds


def _check_segment(file: BinaryIO) -> None:
    """Raise BadClip where a Matroska file ends before its segment: its sound would seem to end there."""
    head, place = _head(file), file.tell()
    first = head.find(SEGMENT)
    if head[:4] == MATROSKA and 0 <= first < len(head) - 12 and (lead := head[first + 4]):
        width = 9 - lead.bit_length()
        claimed = int.from_bytes(head[first + 4 : first + 4 + width]) & (1 << 7 * width) - 1
        there = file.seek(0, io.SEEK_END) - first - 4 - width
        file.seek(place)
        if there < claimed != (1 << 7 * width) - 1:
            raise BadClip("truncated", f"ends after {there} of {claimed} bytes")


def _is_bare_aac(head: bytes) -> bool:
    """The sync word of ADTS; in an MP3 the two bits behind it are not both 0."""
    return len(head) > 1 and head[0] == 0xFF and head[1] & 0xF6 == 0xF0


def _reason(text: str) -> str:
    """What FFmpeg says, without the place in torchcodec's source."""
    said = " ".join(text.strip().partition("\n")[0].rpartition(".cpp:")[2].split())
    return said.lstrip("0123456789, ")[:200] or "FFmpeg can't decode it"
