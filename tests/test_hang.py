"""When a run counts as hung, which ranks are named, and what is told of them."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from msm_dist.engine.hang import Idleness, Position, Progress, culprits, report
from msm_dist.engine.stacks import state_of

HERE = "here"


def position(step, count=1, waits=False, answers=True, pid=7, place="data"):
    return Position(step, count, place, HERE, pid, waits, answers)


def test_progress_counts_the_parts_of_a_step():
    progress = Progress()
    seen = []
    for step, place in [(1, "data"), (1, "forward"), (1, "validation"), (2, "data")]:
        progress.at(step, place)
        seen.append((progress.step, progress.count, progress.place))
    assert seen == [(1, 1, "data"), (1, 2, "forward"), (1, 3, "validation"), (2, 1, "data")]


def test_seconds_without_progress_add_up_and_end_with_any_progress():
    idleness = Idleness(poll=1.0)
    assert idleness.tick(4, 1, 100.0) == 0.0
    assert idleness.tick(4, 1, 101.0) == 1.0
    assert idleness.tick(4, 1, 102.5) == 2.5
    assert idleness.tick(4, 2, 103.5) == 0.0
    assert idleness.tick(4, 2, 104.0) == 0.5
    assert idleness.tick(5, 2, 105.0) == 0.0


def test_process_that_was_stopped_for_an_hour_is_not_idle_for_it():
    idleness = Idleness(poll=1.0)
    idleness.tick(4, 1, 100.0)
    assert idleness.tick(4, 1, 3700.0) == 2.0


@pytest.mark.parametrize(
    ("positions", "named"),
    [
        # Behind by a step, by a part of one.
        ([position(5), position(4), position(5)], [1]),
        ([position(5, 3), position(5, 3), position(5, 2)], [2]),
        # A rank that does not answer is named, wherever it was when it was last heard of.
        ([position(5), position(4), position(5, answers=False)], [2]),
        ([position(5, answers=False), position(4), position(5, answers=False)], [0, 2]),
        # All in the same part of the step: those that don't wait for others, if that tells them apart.
        ([position(5, waits=True), position(5), position(5, waits=True)], [1]),
        ([position(5, waits=True), position(5, waits=True)], [0, 1]),
        ([position(5), position(5)], [0, 1]),
        # One that is behind may wait for another collective than the others.
        ([position(5), position(4, waits=True)], [1]),
    ],
)
def test_ranks_that_hold_up_the_others_are_named(positions, named):
    assert culprits(dict(enumerate(positions))) == named


def test_report_says_who_where_and_what_to_do():
    text = report({0: position(5, place="update"), 1: position(4), 2: position(5)}, 1350.0, "in runs/a/hang")
    assert "no progress for 1350 s (0.75 of engine.timeout_minutes)" in text
    assert "Held up by rank 1 (here, process 7) at step 4 (data)." in text
    assert "Of the other 2, rank 0 is at step 5 (update)." in text
    assert "runs/a/hang" in text
    assert "the same command continues" in text
    many = report({rank: position(5) for rank in range(12)}, 1.0, "in x")
    assert "rank 7 (" in many
    assert "rank 8 (" not in many
    assert " and 4 more." in many


def test_report_tells_of_a_silent_rank_what_is_known():
    text = report({0: position(5, answers=False), 1: Position(0, 0, "start", "", 0)}, 1.0, "in x")
    assert "rank 0 (here, process 7), which does not answer (stopped, or in a call that holds Python's lock" in text
    assert "last heard of at step 5 (data); rank 1, which was never heard of." in text


def test_state_of_a_process_is_told():
    process = subprocess.Popen(["sleep", "600"])
    try:
        process.send_signal(signal.SIGSTOP)
        deadline = time.monotonic() + 600
        while state_of(process.pid) != "stopped by a signal":
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        process.kill()
        process.wait()
    assert state_of(process.pid) == "ended"


ALONE = """
import sys, time
from pathlib import Path
from msm_dist.engine import hang
from msm_dist.engine.world import join_world, leave_world
hang.ANSWERS = 0.01  # a minute for what takes a moment
progress, folder = hang.Progress(), Path(sys.argv[1])
world = join_world(1)
with hang.watching(progress, world, float(sys.argv[2]) / 60 / hang.SHARE) as watch:
    {before}watch.record_in(folder)
    progress.at(3, "forward")
    {action}
leave_world()
print("left")
"""


def alone(folder: Path, action: str, seconds: float, before: str = "") -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", ALONE.format(action=action, before=before), str(folder), str(seconds)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)


def test_process_that_stands_still_alone_ends_too(tmp_path):
    done = alone(tmp_path / "hang", "time.sleep(1000)", seconds=10.0)
    assert done.returncode == 4, done.stderr
    assert "Held up by rank 0 (" in done.stderr
    assert "at step 3 (forward)." in done.stderr
    assert "Traceback" not in done.stderr
    assert " in <module>" in (tmp_path / "hang" / "rank-00000.txt").read_text()
    assert (tmp_path / "hang" / "report.txt").read_text() in done.stderr


SLOWLY_WRITTEN = """write = hang.write_stacks
    hang.write_stacks = lambda *arguments: [time.sleep(0.5), write(*arguments)]
    """


def test_what_there_is_to_tell_before_there_is_a_folder_goes_to_stderr(tmp_path):
    done = alone(tmp_path / "hang", "pass", seconds=2.0, before=f"{SLOWLY_WRITTEN}time.sleep(1000); ")
    assert done.returncode == 4, done.stderr
    assert "Held up by rank 0 (" in done.stderr
    assert "at step 0 (start)." in done.stderr
    assert "Stacks of every rank that could write them are above, on stderr." in done.stderr
    assert " in <module>" in done.stderr.partition("msm-dist: no progress")[0]
    assert not (tmp_path / "hang").exists()


def test_block_that_ends_in_time_leaves_nothing(tmp_path):
    done = alone(tmp_path / "hang", "time.sleep(0.5)", seconds=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("left\n")
    assert not (tmp_path / "hang").exists()
    done = alone(tmp_path / "hang", "raise ValueError('its own')", seconds=300)
    assert done.returncode == 1
    assert "its own" in done.stderr
    assert not (tmp_path / "hang").exists()


def test_folder_that_can_not_be_written_is_an_error_with_its_name(tmp_path):
    (tmp_path / "hang").write_text("")
    done = alone(tmp_path / "hang", "pass", seconds=300)
    assert "rank-00000.txt: can't be written" in done.stderr
