"""The probes of all synthetic tasks in one command: what counts as won, and a rehearsal with a tiny model."""

import json
from dataclasses import replace

import pytest

from benchmarks import probes
from benchmarks.measure import environment
from msm_dist.evaluate.probe_report import Compared, Outcome, Scored
from msm_dist.evaluate.scores import Interval
from tests.labelled import write_weights


def outcome(task: str, random: float, logmel: float, saturated: bool = False) -> Outcome:
    """A task whose encoder is so far above the baselines, give or take 0.05."""
    scored = Scored(8, 0.7, 0.01, Interval(0.6, 0.8), (0.7,), (0.7,), {"top1_acc": 0.7}, ())
    compared = {
        name: Compared(difference, Interval(difference - 0.05, difference + 0.05))
        for name, difference in (("random_weights", random), ("logmel", logmel))
    }
    by_name = dict.fromkeys(("trained", *compared), scored)
    return Outcome(task, "top1_acc", 2, False, 1, 20, 4, 8, 2, (), None, by_name, compared, saturated)


def test_won_is_above_both_baselines_with_the_whole_interval_and_not_saturated():
    assert probes.won(outcome("a", 0.06, 0.2))
    assert not probes.won(outcome("b", 0.04, 0.2))
    assert not probes.won(outcome("c", 0.2, -0.1))
    assert not probes.won(outcome("d", 0.2, 0.2, saturated=True))


def test_verdict_names_every_task_and_whether_three_are_won():
    outcomes = [outcome("a", 0.1, 0.2), outcome("b", 0.01, 0.2), outcome("c", 0.2, 0.2, saturated=True)]
    said = probes.verdict(outcomes)
    assert "above zero: 1 (a); saturated: 1 (c); not won: 1 (b). Wanted: 3 won; not met." in said
    assert probes.verdict([replace(outcomes[0], task=name) for name in "xyz"]).endswith("Wanted: 3 won; met.")


def test_rehearsal_prints_every_task_and_leaves_results(tmp_path, capsys, monkeypatch):
    # A machine with a GPU that is not used.
    monkeypatch.setattr(probes, "environment", lambda: environment() | {"device": "NVIDIA H200"})
    weights, out = write_weights(tmp_path / "tiny"), tmp_path / "results"
    names = ("order", "glide")
    arguments = [str(weights), "--tasks", str(tmp_path / "tasks"), "--out", str(out), "--name", "A tiny one"]
    arguments += ["--labels", "2", "3", "--seeds", "1", "--clips", "3", "1", "2"]
    for name in names:
        arguments += ["--task", name]
    assert probes.main(arguments) == 0
    content = json.loads((out / "probes-a-tiny-one-cpu.json").read_text())
    assert (content["subject"], content["device"]) == ("probes-a-tiny-one", "CPU")
    assert content["tasks"]["clips_per_class"] == {name: [3, 1, 2] for name in names}
    done = [(found["protocol"], found["labels_per_class"]) for found in content["probes"]]
    assert done == [("linear", 2), ("linear", 3), ("hear", 2), ("hear", 3)]
    for found in content["probes"]:
        assert found["settings"]["protocol"] == found["protocol"]
        assert [task["task"] for task in found["tasks"]] == list(names)
        assert [task["num_train"] for task in found["tasks"]] == [2 * found["labels_per_class"]] * 2
        assert all(set(task["scored"]) == {"trained", "random_weights", "logmel"} for task in found["tasks"])
    text = (out / "probes-a-tiny-one-cpu.md").read_text()
    assert text in capsys.readouterr().out
    for expected in (
        "# Probes of A tiny one",
        "linear, 2 labels",
        "linear, 3 labels",
        "hear, 3 labels",
        "| order",
        "| glide",
    ):
        assert expected in text


def test_a_folder_without_weights_is_one_message(tmp_path):
    from msm_dist.errors import CheckpointError

    with pytest.raises(CheckpointError):
        probes.main([str(tmp_path), "--tasks", str(tmp_path / "tasks"), "--task", "order", "--clips", "1", "1", "1"])
