"""Encoded audio -> mono samples at one rate; what can't be used has a named fault.

In: the bytes of a wav, flac, ogg or mp3 file (or an open binary file), any rate, any channel count. The
content decides the format, never a file name. Out: numpy arrays, mono by the mean of the channels. Fails
with BadClip, which carries a reason. Memory follows the samples that are there, not what a header claims, up to
MAX_SAMPLES of them at either rate: silence can be compressed ten-thousandfold.
"""

import io
import struct
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import BinaryIO, NamedTuple

import numpy as np
import soundfile
import soxr

from msm_dist.config import MAX_RATE
from msm_dist.data.mp3 import Prefixed, with_length
from msm_dist.data.ogg import damaged_page, is_ogg
from msm_dist.data.view import View
from msm_dist.errors import MsmError
from msm_dist.redact import redacted

FORMATS = {"WAV": "wav", "WAVEX": "wav", "RF64": "wav", "FLAC": "flac", "OGG": "ogg", "MP3": "mp3"}
MIN_RATE = 1_000
MAX_SAMPLES = 2**29
CHUNK_VALUES = 2**20
UNKNOWN_LENGTH = 2**62
NEAR_SAMPLES = 8192  # two FLAC frames
MP3_PREROLL = 16384
"""An MP3 frame holds bytes of up to 24 frames after it: behind a seek so many samples may be noise."""
UNKNOWN_WAV_BYTES = 0x7FFF0000  # programs that write to a pipe claim this or more
RESAMPLING = "VHQ"  # of soxr; chosen by benchmarks/resampling.py
FULL_SCALE = 32767 / 32768

Encoded = bytes | bytearray | memoryview | BinaryIO


class BadClip(MsmError):
    """A clip that can't be trained on.

    `reason` is one of: undecodable, unsupported_format, unsupported_rate, unknown_length, too_long, empty,
    truncated, non_finite, changed (no longer the clip that was packed); packing adds too_short and unreadable.
    """

    def __init__(self, reason: str, detail: str):
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return redacted(f"{self.reason} ({self.detail})")


@dataclass(frozen=True)
class AudioInfo:
    """What a header says: samples per channel, the file's own rate in Hz, channels, format (wav, flac...)."""

    samples: int
    sample_rate: int
    channels: int
    format: str


class Packed(NamedTuple):
    """What a clip's sidecar says of it: samples per channel, its own rate in Hz, format."""

    samples: int
    rate: int
    format: str


def probe(encoded: Encoded) -> AudioInfo:
    """Read the header only. A WAV that claims more samples than are there is truncated. Raises BadClip."""
    with _opened(encoded) as sound:
        if sound.format in ("WAV", "WAVEX"):
            _check_wav(encoded, sound)
        return AudioInfo(sound.frames, sound.samplerate, sound.channels, FORMATS[sound.format])


def decode(encoded: Encoded, sample_rate: int) -> np.ndarray:
    """The whole clip as float32 [S] in -1..1 at `sample_rate`, S = num_target_samples. Raises BadClip."""
    with _opened(encoded) as sound:
        return _span(sound, 0, sound.frames, sample_rate)


def decode_span(encoded: Encoded, start: int, stop: int, sample_rate: int) -> np.ndarray:
    """Samples [start, stop), at the file's own rate, as float32 [S] at `sample_rate`. Raises BadClip."""
    with _opened(encoded) as sound:
        return _span(sound, start, stop, sample_rate)


def decode_blocks(encoded: Encoded) -> Iterator[np.ndarray]:
    """The whole clip in blocks, float32 [S] each in -1..1 at its own rate: memory holds one. Raises BadClip."""
    with _opened(encoded) as sound:
        for block in _pieces(sound, 0, sound.frames, "float32"):
            yield _finite(block)


def decode_crop(
    encoded: Encoded, start: int, stop: int, num_samples: int, sample_rate: int, packed: Packed | None = None
) -> np.ndarray:
    """Samples [start, stop), counted at `sample_rate`, as int16 [stop - start]: see `decode_crops`. Raises BadClip."""
    return decode_crops(encoded, [start], stop - start, num_samples, sample_rate, packed)[0]


def decode_crops(
    encoded: Encoded,
    starts: Sequence[int],
    length: int,
    num_samples: int,
    sample_rate: int,
    packed: Packed | None = None,
) -> list[np.ndarray]:
    """Samples [start, start + length) of each start, counted at `sample_rate`, as int16 [length]. Raises BadClip.

    Audio that is not as it was `packed` is no crop of that clip, however well it decodes: its reason is "changed".

    The clip counts as `num_samples` long: what it lacks is silence at its end. Positions before 0 or from
    num_samples on are reflected about the first and the last sample (numpy's "reflect"), so that a crop's
    uncentred spectrogram equals the slice of the whole clip's centred one. Only the spans are decoded where
    the file already has the rate, what two share once; 16-bit mono then keeps its very samples. Opus is decoded from
    the beginning.
    """
    places = [_places(start, length, num_samples) for start in starts]
    with _opened(encoded) as sound:
        found = Packed(sound.frames, sound.samplerate, FORMATS[sound.format])
        if packed and found != packed:
            raise BadClip("changed", f"{_described(found)}; packed was {_described(packed)}")
        spans = _joined([(low, high) for low, high, _ in places])
        if sound.subtype == "OPUS":
            # Its decoder goes on from what it last heard: seconds after a seek a voice can still be noise.
            spans = [(0, spans[-1][1])]
        if sound.samplerate == sample_rate:
            exact = sound.subtype == "PCM_16" and sound.channels == 1
            read = [
                _read(sound, min(a, sound.frames), min(b, sound.frames), "int16" if exact else "float32")
                for a, b in spans
            ]
        else:
            whole = _span(sound, 0, sound.frames, sample_rate)
            read = [whole[a:b] for a, b in spans]
    crops = [np.zeros(length, np.int16) for _ in places]
    for (begin, end), span in zip(spans, read, strict=True):
        span = span if span.dtype == np.int16 else to_int16(span)
        for crop, (low, high, positions) in zip(crops, places, strict=True):
            if begin <= low and high <= end:
                piece = span[low - begin : high - begin]
                if positions is None:
                    crop[: len(piece)] = piece
                else:
                    crop[:] = np.pad(piece, (0, high - low - len(piece)))[positions]
    return crops


def num_target_samples(samples: int, rate: int, sample_rate: int) -> int:
    """Length at `sample_rate` of a clip of `samples` at `rate`: rounded up."""
    return -(-samples * sample_rate // rate)


def to_int16(waveform: np.ndarray) -> np.ndarray:
    """Float samples in -1..1 as int16, rounded; what is louder is clipped, never wrapped."""
    samples = np.empty(waveform.shape, np.int16)
    for start in range(0, len(waveform), CHUNK_VALUES):  # else a long clip would be held four times
        piece = waveform[start : start + CHUNK_VALUES]
        samples[start : start + CHUNK_VALUES] = np.rint(np.clip(piece, -1.0, FULL_SCALE) * 32768)
    return samples


def fit_int16(waveform: np.ndarray) -> tuple[np.ndarray, float]:
    """Float samples as int16, and the gain that was needed: a clip beyond full scale is scaled down as a whole."""
    peak = max(waveform.max(initial=0.0) / FULL_SCALE, -waveform.min(initial=0.0))
    gain = 1.0 if peak <= 1 else float(1 / peak)
    return to_int16(waveform if gain == 1 else waveform * np.float32(gain)), gain


def check_size(samples: int, rate: int, sample_rate: int) -> None:
    """Raise BadClip where a clip of `samples` at `rate` is too long to be held in memory at either rate."""
    if (most := max(samples, num_target_samples(samples, rate, sample_rate))) > MAX_SAMPLES:
        raise BadClip("too_long", f"{most} samples; at most {MAX_SAMPLES} are decoded at once")


def resample(waveform: np.ndarray, rate: int, sample_rate: int) -> np.ndarray:
    """Float32 [S] at another rate: num_target_samples of them."""
    if rate == sample_rate or not len(waveform):
        return waveform
    resampled = soxr.resample(waveform, rate, sample_rate, quality=RESAMPLING)
    target = num_target_samples(len(waveform), rate, sample_rate)
    return np.pad(resampled[:target], (0, max(0, target - len(resampled))))


def resample_blocks(blocks: Iterable[np.ndarray], rate: int, sample_rate: int) -> Iterator[np.ndarray]:
    """A recording that comes in blocks, float32 [S] each, at another rate: joined, the very samples of `resample`."""
    if rate == sample_rate:
        yield from blocks
        return
    stream = soxr.ResampleStream(rate, sample_rate, 1, dtype="float32", quality=RESAMPLING)
    given = made = 0
    for block in blocks:
        given += len(block)
        made += len(resampled := stream.resample_chunk(np.ascontiguousarray(block)))
        yield resampled
    if given:
        last = stream.resample_chunk(np.zeros(0, np.float32), last=True)
        missing = max(0, num_target_samples(given, rate, sample_rate) - made)
        yield np.pad(last[:missing], (0, max(0, missing - len(last))))


@contextmanager
def _opened(encoded: Encoded):
    """A soundfile.SoundFile whose header makes sense; faults of libsndfile come out as BadClip."""
    file = _file(encoded)
    file.seek(0)
    if not file.read(1):
        raise BadClip("empty", "0 bytes")
    if file is not encoded and is_ogg(encoded) and (place := damaged_page(encoded)) is not None:
        raise BadClip("undecodable", f"the ogg page at byte {place} is damaged")
    file = _file(with_length(encoded))
    file.seek(0)
    try:
        with soundfile.SoundFile(file) as sound:
            _check_header(sound)
            yield sound
    except soundfile.SoundFileError as error:
        detail = getattr(error, "error_string", str(error))
        raise BadClip("undecodable", " ".join(detail.split())) from None


def _file(encoded: Encoded | Prefixed) -> BinaryIO | View | Prefixed:
    return View(encoded) if isinstance(encoded, bytes | bytearray | memoryview) else encoded


def _check_header(sound: soundfile.SoundFile) -> None:
    if sound.format not in FORMATS:
        raise BadClip("unsupported_format", f"{sound.format}; use wav, flac, ogg or mp3")
    if not MIN_RATE <= sound.samplerate <= MAX_RATE:
        raise BadClip("unsupported_rate", f"{sound.samplerate} Hz; {MIN_RATE} to {MAX_RATE} are supported")
    if sound.frames == 0:
        raise BadClip("empty", "0 samples")
    if sound.frames > UNKNOWN_LENGTH:
        raise BadClip("unknown_length", f"{sound.format} header without a length; encode it to a file, not a pipe")


def _check_wav(encoded: Encoded, sound: soundfile.SoundFile) -> None:
    """Raise BadClip where the header of a WAV promises more samples than follow; libsndfile believes the file."""
    file = _file(encoded)
    place, end = file.tell(), file.seek(0, io.SEEK_END)
    try:
        block = 1
        file.seek(12)
        while len(header := file.read(8)) == 8:
            name, size = struct.unpack("<4sI", header)
            if name == b"data":
                if end - file.tell() < size < UNKNOWN_WAV_BYTES:
                    claimed = size // block
                    raise BadClip("truncated", f"ends after {sound.frames} of {claimed} samples")
                return
            content = file.read(min(size, 16))
            if name == b"fmt " and len(content) == 16:
                block = max(1, struct.unpack_from("<H", content, 12)[0])
            file.seek(size + size % 2 - len(content), io.SEEK_CUR)
    finally:
        file.seek(place)


def _described(clip: Packed) -> str:
    return f"{clip.samples} samples at {clip.rate} Hz in {clip.format}"


def _span(sound: soundfile.SoundFile, start: int, stop: int, sample_rate: int) -> np.ndarray:
    check_size(stop - start, sound.samplerate, sample_rate)
    return resample(_read(sound, start, stop, "float32"), sound.samplerate, sample_rate)


def _read(sound: soundfile.SoundFile, start: int, stop: int, dtype: str) -> np.ndarray:
    """Mono samples [start, stop) at the file's rate. A claimed length is met in pieces, never allocated."""
    check_size(stop - start, sound.samplerate, sound.samplerate)
    pieces = deque(_pieces(sound, start, stop, dtype))
    waveform = np.empty(sum(map(len, pieces)), dtype)
    filled = 0
    while pieces:  # each is let go when it is copied, or a long clip would be held twice
        piece = pieces.popleft()
        waveform[filled : filled + len(piece)] = piece
        filled += len(piece)
    return _finite(waveform) if dtype == "float32" else waveform


def _finite(waveform: np.ndarray) -> np.ndarray:
    if not np.isfinite(waveform).all():
        raise BadClip("non_finite", "NaN or infinite samples")
    return waveform


def _pieces(sound: soundfile.SoundFile, start: int, stop: int, dtype: str) -> Iterator[np.ndarray]:
    """Mono samples [start, stop) at the file's rate, up to CHUNK_VALUES at a time."""
    chunk = max(1, CHUNK_VALUES // sound.channels)
    preroll = MP3_PREROLL if FORMATS[sound.format] == "mp3" else 0
    if start and not preroll:
        sound.seek(start)
    while start < stop:
        # soundfile seeks after every read, so each block of an mp3 begins behind a seek.
        before = min(start, preroll)
        if before:
            sound.seek(start - before)
        # The place in a damaged mp3 may be past the length that its header gave.
        if sound.tell() > sound.frames:
            raise BadClip("undecodable", f"at sample {sound.tell()} of {sound.frames}")
        block = sound.read(before + min(stop - start, chunk), dtype=dtype, always_2d=True)[before:]
        if not len(block):
            raise BadClip("truncated", f"ends after {start} of {sound.frames} samples")
        yield block[:, 0] if sound.channels == 1 else block.mean(axis=1)
        start += len(block)


def _places(start: int, length: int, num_samples: int) -> tuple[int, int, np.ndarray | None]:
    """The samples [low, high) that a crop needs, and where in them each of its own is; None: all in their order."""
    if start >= 0 and start + length <= num_samples:
        return start, start + length, None
    positions = _reflect(np.arange(start, start + length), num_samples)
    low = int(positions.min())
    return low, int(positions.max()) + 1, positions - low


def _joined(spans: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Spans that overlap or nearly touch as one, ascending: reading on is cheaper than seeking."""
    joined: list[tuple[int, int]] = []
    for low, high in sorted(spans):
        if joined and low <= joined[-1][1] + NEAR_SAMPLES:
            joined[-1] = (joined[-1][0], max(high, joined[-1][1]))
        else:
            joined.append((low, high))
    return joined


def _reflect(positions: np.ndarray, length: int) -> np.ndarray:
    """Fold positions into 0..length-1 by reflection about both ends, the edges not repeated."""
    period = max(1, 2 * (length - 1))
    folded = positions % period
    return np.where(folded < length, folded, period - folded)
