"""What average spectra tell about the probe tasks: that the benchmark would see a task that gives itself away."""

import json

import numpy as np
import pytest

pytest.importorskip("sklearn", reason="needs scikit-learn: pip install 'msm-dist[eval]'")

from benchmarks import probe_statistics
from msm_dist.data import probe_tasks


def test_a_task_whose_classes_differ_in_level_over_time_is_seen(monkeypatch):
    whole = probe_tasks.make_clip

    def louder(name, seed, split, number):
        clip, made = whole(name, seed, split, number)
        return np.clip(clip * 100 ** (number % 2), -1, 1), made

    monkeypatch.setattr(probe_statistics, "make_clip", louder)
    found = probe_statistics.measure("order", seed=1, clips_per_class=20)
    assert found["chance"] == 0.5
    assert found["deviation"] == pytest.approx(0.0791, abs=1e-4)
    assert found["accuracy"].keys() == {"mean", "+ deviation", "differences", "all"}
    assert found["accuracy"]["mean"] > 0.7


def test_rehearsal_leaves_a_result(tmp_path, capsys):
    assert probe_statistics.main(["--clips", "2", "--task", "glide", "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.iterdir()
    content = json.loads(path.read_text())
    assert content["generator_version"] == probe_tasks.VERSION
    assert content["found"]["glide"]["chance"] == 0.5
    assert "glide" in capsys.readouterr().out
