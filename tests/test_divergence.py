"""What is told and kept of updates that are left out, and of the end of a run that leaves out too many."""

import json
import math
from types import SimpleNamespace

import pytest
import torch

from msm_dist.config import Optim, parse_config
from msm_dist.engine.divergence import UpdateGuard
from msm_dist.errors import CheckpointError, ConfigError, Diverged


class World:
    """Rank 0 of two."""

    is_main = True
    size = 2

    def gather(self, value):
        return [value, ["theirs"]]

    def mean(self, values):
        return values

    def on_main(self, action):
        return action()


def engine(overflow=True, norm=None):
    optimizer = SimpleNamespace(overflow=overflow, norm_found=norm)
    return SimpleNamespace(optimizer=optimizer, zero_optimization_stage=lambda: 0)


def guard(folder, step=0, skipped=(), overflow=True, norm=None, **settings):
    return UpdateGuard(engine(overflow, norm), Optim(**settings), World(), folder, step, skipped)


def note(guard, step, loss=math.nan, keys=("mine",)):
    guard.note(step, 1e-3, torch.tensor(loss), keys)


def test_clips_of_all_ranks_are_kept_and_the_first_are_told(tmp_path):
    mine = [f"clip{number}" for number in range(9)]
    said = r"step 7, lr 1.000e-03: the loss is not finite; .* clip7, ... \(all 10 in .*diverged.json\)"
    with pytest.raises(Diverged, match=said) as error:
        note(guard(tmp_path), 7, keys=mine)
    assert error.value.on_all_ranks
    assert error.value.exit_code == 3
    kept = json.loads((tmp_path / "diverged.json").read_text())
    assert kept == {
        "step": 7,
        "lr": 1e-3,
        "reason": "the loss is not finite",
        "loss": None,
        "grad_norm": None,
        "clips": [*mine, "theirs"],
        "skipped": [],
    }
    assert not (tmp_path / "skipped.jsonl").exists()


def test_update_that_was_made_is_no_matter(tmp_path):
    good = guard(tmp_path, overflow=False)
    note(good, 7, loss=2.0)
    assert good.skipped == ()
    assert good.counts == {}
    assert list(tmp_path.iterdir()) == []


def test_so_many_updates_are_left_out_then_the_run_ends_with_all_of_them(tmp_path):
    patient = guard(tmp_path, max_skipped_updates=2)
    note(patient, 3)
    note(patient, 8, loss=2.0)
    assert patient.skipped == (3, 8)
    assert patient.counts == {"skipped_updates": 2}
    lines = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    assert [(line["step"], line["reason"]) for line in lines] == [
        (3, "the loss is not finite"),
        (8, "a gradient is not finite"),
    ]
    assert lines[1]["loss"] == 2.0
    with pytest.raises(Diverged, match=r"max_skipped_updates = 2\). Left out before: 2, the last at 3, 8\. Clips"):
        note(patient, 9)
    assert json.loads((tmp_path / "diverged.json").read_text())["skipped"] == lines


def test_resumed_run_has_the_count_of_its_checkpoint_and_the_lines_up_to_it(tmp_path):
    first = guard(tmp_path, max_skipped_updates=3)
    for step in (3, 8):
        note(first, step)
    with (tmp_path / "skipped.jsonl").open("a") as file:
        file.write('{"step": 9, "rea')
    resumed = guard(tmp_path, step=6, skipped=[3], max_skipped_updates=1)
    assert [json.loads(line)["step"] for line in (tmp_path / "skipped.jsonl").read_text().splitlines()] == [3]
    with pytest.raises(Diverged, match="step 8"):
        note(resumed, 8)


@pytest.mark.parametrize(
    ("loss", "norm", "reason"),
    [
        (5.5, 1.0, "the loss 5.5 is above optim.skip_loss_above = 4.0"),
        (3.0, 70.0, "the gradient norm 70 is above optim.skip_norm_above = 60.0"),
        (5.5, 70.0, "the loss 5.5 is above optim.skip_loss_above = 4.0"),
        (3.0, math.inf, "a gradient is not finite"),
        (3.0, -1.0, "a gradient is not finite"),
        (math.inf, None, "the loss is not finite"),
    ],
)
def test_reason_names_value_and_bound(tmp_path, loss, norm, reason):
    bounds = {"skip_loss_above": 4.0, "skip_norm_above": 60.0, "max_skipped_updates": 1}
    norm = norm if norm is None else torch.tensor(norm)
    watchful = guard(tmp_path, **bounds)
    watchful._engine.optimizer.norm_found = norm
    note(watchful, 1, loss)
    line = json.loads((tmp_path / "skipped.jsonl").read_text())
    assert line["reason"] == reason
    assert line["grad_norm"] == (norm.item() if norm is not None and 0 <= norm < math.inf else None)
    # The norm of one update is not taken for that of the next.
    assert watchful._engine.optimizer.norm_found is None


def test_record_that_can_not_be_written_is_an_error_with_its_name(tmp_path):
    (tmp_path / "skipped.jsonl").mkdir()
    with pytest.raises(CheckpointError, match="skipped.jsonl: can't be written"):
        note(guard(tmp_path, max_skipped_updates=1), 1)


def test_bounds_are_refused_in_fp16_and_where_they_are_none():
    def settings(precision="fp16", **optim):
        return parse_config(
            {"data": {"shards": "x"}, "train": {"steps": 1, "precision": precision}, "optim": optim}, "x"
        )

    with pytest.raises(ConfigError, match=r"optim.skip_loss_above = 3.0: with train.precision = fp16"):
        settings(skip_loss_above=3.0)
    with pytest.raises(ConfigError, match=r"optim.skip_norm_above = 0: .*greater than 0"):
        settings("bf16", skip_norm_above=0)
    assert settings(max_skipped_updates=3).optim.max_skipped_updates == 3
    assert settings("bf16").optim.skip_norm_above is None
