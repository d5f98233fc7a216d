"""The benchmark of resamplers: that its numbers mean what they are called, and a rehearsal."""

import json

import numpy as np
import pytest

from benchmarks import resampling


def every_third(waveform, rate):
    return waveform[:: rate // resampling.TARGET]


def test_level_of_a_tone_is_found():
    assert resampling.level_db(lambda w, rate: every_third(w, rate) / 2, 48000, 1000.0) == pytest.approx(
        -6.02, abs=0.01
    )
    assert resampling.level_db(every_third, 48000, 7000.0) == pytest.approx(0, abs=0.01)


def test_alias_of_a_resampler_without_a_filter_is_all_of_the_tone():
    assert resampling.leak_db(every_third, 48000, 9000.0, 0, 8000) == pytest.approx(0, abs=0.1)
    assert resampling.leak_db(lambda w, rate: 0 * every_third(w, rate), 48000, 9000.0, 0, 8000) == -240


def test_what_packing_uses_keeps_more_and_lets_less_through_than_what_it_replaced():
    found = resampling.candidates()
    used = resampling.measure(found["soxr VHQ"], 44100, tones=6, turns=1)
    before = resampling.measure(found["torchaudio, as it comes"], 44100, tones=6, turns=1)
    assert used["alias_db"] < -96 < before["alias_db"]
    assert used["flatness_db"] < 0.5 < before["flatness_db"]


def test_rehearsal_leaves_a_result(tmp_path, capsys):
    assert resampling.main(["--turns", "1", "--tones", "3", "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.iterdir()
    found = json.loads(path.read_text())["found"]
    assert found.keys() == resampling.candidates().keys()
    assert all(np.isfinite(list(values.values())).all() for rates in found.values() for values in rates.values())
    assert "soxr VHQ" in capsys.readouterr().out
