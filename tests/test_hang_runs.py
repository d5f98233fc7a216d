"""Real runs of two ranks that stand still in every way: named, on record, ended, and continued to the same bits."""

import re
import signal
from pathlib import Path

import pytest

from tests.processes import is_alive
from tests.test_divergence_runs import MOST_SECONDS, ShortRuns
from tests.test_pretrain import finish, wait_for

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(3000)]

SECONDS = 25
"""Without progress. No step of these runs takes anywhere near it, also on a machine that is busy with other work."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory, forker):
    runs = ShortRuns(tmp_path_factory.mktemp("runs"), forker)
    codes, output = runs.run("undisturbed")
    assert codes == [0, 0], output
    return runs


def hang(runs, kill: str, rank: int, *settings: str) -> tuple[list[int], str, dict[int, str]]:
    """A start that stands still: codes, output, and what the ranks wrote of their stacks."""
    processes = runs.start("hung", *settings, KILL=kill, KILL_RANK=str(rank), HANG_SECONDS=str(SECONDS))
    other = processes[1 - rank]
    # A rank that is stopped, or holds Python's lock, ends by a launcher only.
    wait_for(lambda: other.poll() is not None, [], timeout=MOST_SECONDS)
    if kill.startswith("stop"):
        assert processes[rank].poll() is None
        processes[rank].kill()
    codes, output = finish(processes, timeout=MOST_SECONDS, end_peers=False)
    folder = runs.folder / "hung" / "hang"
    assert (folder / "report.txt").read_text() in output
    stacks = {number: path.read_text() for number in (0, 1) if (path := folder / f"rank-{number:05d}.txt").exists()}
    for path in folder.iterdir():
        path.unlink()
    assert output.count("no progress for") == 1, output
    assert "Traceback" not in output
    assert "newest checkpoint" in output
    return codes, output, stacks


def test_run_that_stands_still_ends_with_the_rank_named_and_continues_to_the_same_weights(runs):
    # Before the first step, where the other rank waits for it too.
    codes, output, stacks = hang(runs, "pause:build", 1)
    assert codes == [4, 4], output
    assert "Held up by rank 1 (" in output
    assert ") at step 0 (corpus)" in output
    assert "in paused" in stacks[1] and "in paused" not in stacks[0]
    # An endless loop; the other rank waits in the next step for the agreement of all.
    codes, output, stacks = hang(runs, "loop:3", 1)
    assert codes == [4, 4], output
    assert "Held up by rank 1 (" in output
    assert ") at step 3 (update)" in output
    assert "Of the other 1, rank 0 is at step " in output
    assert "standing_still" in stacks[1]
    assert "standing_still" not in stacks[0]
    assert "worker " in stacks[1]
    # A read of a loader worker, which has no end.
    codes, output, stacks = hang(runs, "stuck:6", 1)
    assert codes == [4, 4], output
    assert "Held up by rank 1 (" in output
    assert "(data)" in output
    told = stacks[1].partition("\nworker ")[2]
    assert "in stuck" in told
    (fifo,) = runs.folder.glob("mark.fifo.*")
    worker = int(fifo.suffix.removeprefix("."))
    assert told.startswith(f"{worker}, waiting")
    wait_for(lambda: not is_alive(worker), [], timeout=60)
    fifo.unlink()
    # ... or of the rank itself.
    codes, output, stacks = hang(runs, "stuck:8", 0, "data.num_workers=0")
    assert codes == [4, 4], output
    assert "Held up by rank 0 (" in output
    assert "in stuck" in stacks[0]
    # A call that never gives Python's lock back: nothing in Python can tell of it.
    codes, output, stacks = hang(runs, "hold:9", 1)
    assert codes == [4, 1], output
    assert "Held up by rank 1 (" in output
    # Where it was a moment before is all that is known.
    assert re.search(
        r"does not answer \(waiting, or in a call that holds Python's lock\), last heard of at step \d+ \(", output
    )
    assert "standing_still" in stacks[1]
    # A stopped process, which can tell nothing at all: the rank that has the store, and one that has not.
    codes, output, stacks = hang(runs, "stop:10", 1)
    assert codes == [4, -signal.SIGKILL], output
    assert "does not answer (stopped by a signal, or " in output
    assert stacks[1] == ""
    codes, output, stacks = hang(runs, "stop:12", 0)
    assert codes == [-signal.SIGKILL, 4], output
    assert "Held up by rank 0, it seems" in output
    codes, output = runs.run("hung", HANG_SECONDS=str(SECONDS))
    assert codes == [0, 0], output
    assert "continued from" in output
    runs.is_as_undisturbed("hung")
    assert not (runs.folder / "hung" / "hang").exists()


def test_run_that_gets_on_is_left_alone_and_leaves_no_trace(runs):
    # Its steps take twice as long as it may stand still, all together.
    settings = ("train.steps=4", "train.valid_every=2")
    codes, output = runs.run("slow", *settings, KILL=f"slow:{SECONDS / 2}", HANG_SECONDS=str(SECONDS))
    assert codes == [0, 0], output
    assert not (runs.folder / "slow" / "hang").exists()
    assert not list(Path(runs.folder / "undisturbed").glob("hang*"))
