"""What `msm-dist doctor` foretells of checkpoints is what a start does, damage by damage, and it renames nothing."""

import shutil

import pytest

from msm_dist.data.clips import quiet
from msm_dist.doctor.checkpoints import State, findings, look_at, next_start
from msm_dist.errors import CheckpointError
from tests.test_resume import DAMAGES, HOSTILE, STATE, alter, flip, names, newest, root

__all__ = ["root"]


def foretold(folder) -> int | None:
    """The step that the next start takes; CheckpointError where it would end with one."""
    seen = look_at(folder, False, quiet)
    start = next_start(seen)
    told = list(findings(seen, is_alive=False))
    if (start and start.state is State.BLOCKED) or any(f.name == "checkpoints" and f.status == "fail" for f in told):
        assert any(finding.status == "fail" for finding in told)
        raise CheckpointError("foretold")
    return start.step if start else None


def does(take, *arguments: object) -> object:
    try:
        return take(*arguments)
    except CheckpointError:
        return "ends"


# The file that is copied from another step is that of step 10.
CASES = [
    (damage, steps)
    for damage in DAMAGES
    for steps in [(15,), (15, 10), (15, 10, 5), (10,), (5,), ()]
    if not (damage == "another step's file" and 10 in steps)
]


@pytest.mark.parametrize(("damage", "steps"), CASES)
def test_the_next_start_is_foretold(root, damage, steps):
    for step in steps:
        DAMAGES[damage](root / f"step-{step:08d}")
    (root / "other").unlink(missing_ok=True)
    before = names(root)
    expected = does(foretold, root)
    assert names(root) == before
    assert expected == does(newest, root)
    # The second start finds what the first has put aside.
    assert does(foretold, root) == does(newest, root)


@pytest.mark.parametrize("values", [values for values, _ in HOSTILE.values()], ids=HOSTILE)
def test_metadata_that_no_run_saves_ends_the_next_start_and_is_told_so(root, values):
    alter(root / "step-00000015", values)
    told = list(findings(look_at(root, False, quiet), is_alive=False))[-1]
    assert (told.name, told.status) == ("step-00000015", "fail") and "a start ends here: " in told.detail
    assert "meta.json" in told.detail and "move " in told.remedy
    assert does(foretold, root) == does(newest, root) == "ends"


def test_a_start_without_checkpoints_is_foretold(root, tmp_path):
    assert foretold(tmp_path / "none") is None
    shutil.rmtree(root / "step-00000015")
    (root / "step-00000020.partial").mkdir()
    (root / "step-00000010.old").mkdir()
    assert foretold(root) == newest(root) == 10


def test_all_of_them_are_told_in_order(root):
    flip(root / "step-00000015" / STATE)
    newest(root)  # puts it aside
    flip(root / "step-00000010" / STATE)
    told = [(finding.name, finding.status) for finding in findings(look_at(root, False, quiet), is_alive=False)]
    assert told == [("step-00000005", "ok"), ("step-00000010", "warn"), ("step-00000015", "warn")]


def test_progress_is_said(root):
    reported = []
    look_at(root, True, lambda *arguments: reported.append(arguments))
    assert reported == [("checking checkpoints", number, 3) for number in (1, 2, 3)]
