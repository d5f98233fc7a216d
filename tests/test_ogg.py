"""Ogg pages: every flipped bit is found, no whole file is called damaged."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from msm_dist.data.audio import BadClip, decode, decode_crop
from msm_dist.data.ogg import damaged_page
from tests.audio_files import encode, noise

FILES = {codec: encode(noise(48000), codec) for codec in ("ogg", "opus")}


@pytest.mark.parametrize("codec", FILES)
@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_whole_files_pass(codec, kind):
    assert damaged_page(kind(FILES[codec])) is None


@given(st.sampled_from(sorted(FILES)), st.floats(0, 1, exclude_max=True), st.integers(0, 7))
def test_every_flipped_bit_is_found(codec, place, bit):
    content = bytearray(FILES[codec])
    at = int(place * len(content))
    content[at] ^= 1 << bit
    found = damaged_page(content)
    assert found is not None and found <= at
    assert content[found : found + 4] == b"OggS" or at - found < 4


@given(st.sampled_from(sorted(FILES)), st.floats(0, 1, exclude_max=True))
def test_a_file_cut_off_or_zeroed_at_its_end_is_found(codec, share):
    content = FILES[codec]
    kept = 1 + int(share * (len(content) - 1))
    whole_pages = damaged_page(content[:kept]) is None
    assert not whole_pages or content[kept : kept + 4] == b"OggS"
    assert damaged_page(content[:kept] + bytes(len(content) - kept)) is not None


@pytest.mark.parametrize("codec", FILES)
@pytest.mark.parametrize("tail", [b"\0", bytes(100), b"TAG" + b"title".ljust(125, b"\0"), b"Ogg"])
def test_bytes_behind_the_last_page_are_not_of_the_sound(codec, tail):
    whole = FILES[codec]
    assert damaged_page(whole + tail) is None
    np.testing.assert_array_equal(decode(whole + tail, 16000), decode(whole, 16000))
    # With another page behind them, or before the end of the stream, they are damage.
    assert damaged_page(whole + tail + whole) == len(whole)
    last = whole.rindex(b"OggS")
    assert damaged_page(whole[:last] + tail + b"x" * 40) == last
    assert damaged_page(tail + b"x" * 40) == 0


def test_the_end_of_one_stream_is_not_that_of_another():
    vorbis, opus = FILES["ogg"], FILES["opus"]
    place = opus.rindex(b"OggS")
    assert damaged_page(opus[:place] + vorbis + opus[place:]) is None
    assert damaged_page(opus[:place] + vorbis + b"-" + opus[place + 1 :]) == place + len(vorbis)


@pytest.mark.parametrize("codec", FILES)
def test_a_damaged_page_is_no_audio_anywhere_in_the_clip(codec):
    content = bytearray(FILES[codec])
    content[len(content) * 3 // 4] ^= 0xFF
    for read in (
        lambda: decode(bytes(content), 16000),
        lambda: decode_crop(memoryview(content), 0, 8000, 48000, 16000),
    ):
        with pytest.raises(BadClip, match=r"undecodable \(the ogg page at byte \d+ is damaged\)"):
            read()
    assert np.abs(decode_crop(FILES[codec], 0, 8000, 48000, 16000)).max() > 1000
