"""Whole runs whose files change under them: what was saved is verified, what is trained on is what the index says."""

import contextlib
import shutil
import signal

import pytest

from tests.forking import Forker
from tests.test_preempt import ForkedRuns
from tests.test_pretrain import finish
from tests.test_resume import STATE, flip

pytestmark = pytest.mark.distributed

FIRST_OF_TWO = STATE.replace("of-00001", "of-00002")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    with contextlib.closing(Forker(folder)) as forker:
        runs = ForkedRuns(folder, forker)
        codes, output = runs.run("undisturbed")
        assert codes == [0, 0], output
        yield runs


def test_run_that_falls_back_to_an_older_checkpoint_equals_one_never_disturbed(runs):
    codes, output = runs.run("damaged", "checkpoint.keep=9", KILL="step:15", KILL_RANK="1")
    assert codes[1] == -signal.SIGKILL, output
    folder = runs.folder / "damaged" / "checkpoints"
    # The write of step 12 beside training may have ended or not; those before have.
    shutil.rmtree(folder / "step-00000012", ignore_errors=True)
    flip(folder / "step-00000008" / FIRST_OF_TWO.replace("00000-", "00001-"))
    (folder / "step-00000900.partial").mkdir()
    (folder / "latest").symlink_to("step-00000008")
    codes, output = runs.run("damaged", "checkpoint.keep=9")
    assert codes == [0, 0], output
    assert "step-00000008.damaged" in output
    assert f"continued from {folder / 'step-00000004'}" in output
    assert output.count("taken instead of step-00000008") == 1
    assert (folder / "step-00000008.damaged").is_dir() and (folder / "step-00000008").is_dir()
    (folder / "latest").unlink()
    shutil.rmtree(folder / "step-00000008.damaged")
    runs.is_as_undisturbed("damaged")


def test_run_without_a_good_checkpoint_stops_with_a_remedy_and_goes_on_when_one_is_brought_back(runs, tmp_path):
    codes, output = runs.run("spoilt", KILL="step:7", KILL_RANK="0")
    assert codes[0] == -signal.SIGKILL, output
    folder = runs.folder / "spoilt" / "checkpoints"
    shutil.copytree(folder / "step-00000004", tmp_path / "step-00000004")
    flip(folder / "step-00000004" / FIRST_OF_TWO, 0)
    for _ in range(2):
        codes, output = finish(runs.start("spoilt"), end_peers=False)
        assert codes == [2, 2], output
        assert "holds step-00000004.damaged, but no whole checkpoint; bring one back" in output
        assert "Traceback" not in output
    shutil.rmtree(folder / "step-00000004.damaged")
    shutil.copytree(tmp_path / "step-00000004", folder / "step-00000004")
    codes, output = runs.run("spoilt")
    assert codes == [0, 0], output
    runs.is_as_undisturbed("spoilt")
