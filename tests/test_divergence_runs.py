"""Whole runs that leave updates out: killed and continued they equal one never killed, and too many end them."""

import json
import signal

import pytest

from tests.test_preempt import ForkedRuns
from tests.test_pretrain import STEPS, finish

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(3000)]

MOST_SECONDS = 580
PATIENT = ("optim.max_skipped_updates=2", "optim.skip_loss_above=1e6", "optim.skip_norm_above=1e6")
POISON = {"POISON": "nan:6,1e9:11", "POISON_RANK": "1"}


class ShortRuns(ForkedRuns):
    """Runs of STEPS steps."""

    def command(self, name: str, *settings: str) -> list[str]:
        return super().command(name, f"train.steps={STEPS}", *settings)

    def run(self, name: str, *settings: str, **environment: str) -> tuple[list[int], str]:
        return finish(self.start(name, *settings, **environment), timeout=MOST_SECONDS, end_peers="KILL" in environment)

    def skipped(self, name: str) -> list[tuple[int, str]]:
        lines = (self.folder / name / "skipped.jsonl").read_text().splitlines()
        return [(line["step"], line["reason"]) for line in map(json.loads, lines)]

    def meta(self, name: str) -> dict:
        return json.loads(self.last_checkpoint(name)["meta.json"])


@pytest.fixture(scope="module")
def runs(tmp_path_factory, forker):
    return ShortRuns(tmp_path_factory.mktemp("runs"), forker)


def test_killed_run_leaves_out_what_one_never_killed_does(runs):
    codes, output = runs.run("skips", *PATIENT, **POISON)
    assert codes == [0, 0], output
    assert "step 6: the loss is not finite; the update was left out, 1 of at most 2" in output
    assert "step 11: the loss " in output
    assert "Traceback" not in output
    assert [step for step, _ in runs.skipped("skips")] == [6, 11]
    assert all(reason.startswith("the loss") for _, reason in runs.skipped("skips"))
    meta = runs.meta("skips")
    assert (meta["skipped_updates"], meta["optimizer_step"]) == ([6, 11], STEPS - 2)
    train = {line["step"]: line for line in runs.metrics("skips") if "lr" in line}
    assert sorted(train) == list(range(1, STEPS + 1))
    assert [step for step, line in train.items() if "grad_norm" not in line] == [6, 11]
    assert [train[step].get("skipped_updates") for step in (5, 6, 10, 11)] == [None, 1, 1, 2]
    clips = json.loads((runs.folder / "skips" / "skipped.jsonl").read_text().splitlines()[0])["clips"]
    assert sorted(clips) == sorted(record["key"] for record in runs.trace("skips") if record["step"] == 6)
    # Before and after the checkpoint of step 8, which knows of one.
    for step in (7, 10, 12):
        codes, output = runs.run("killed", *PATIENT, **POISON, KILL=f"step:{step}", KILL_RANK=str(step % 2))
        assert codes[step % 2] == -signal.SIGKILL, output
    codes, output = runs.run("killed", *PATIENT, **POISON)
    assert codes == [0, 0], output
    assert "continued from" in output
    runs.is_as_undisturbed("killed", "skips")
    assert runs.skipped("killed") == runs.skipped("skips")


def test_one_update_too_many_ends_the_run_and_a_higher_number_lets_it_go_on(runs):
    few = ("optim.max_skipped_updates=1", *PATIENT[1:])
    for _ in range(2):
        codes, output = runs.run("too-many", *few, **POISON)
        assert codes == [3, 3], output
        assert "step 11, lr " in output
        assert "Left out before: 1, the last at 6." in output
        assert "Traceback" not in output
    report = json.loads((runs.folder / "too-many" / "diverged.json").read_text())
    assert report["step"] == 11
    assert [line["step"] for line in report["skipped"]] == [6]
    codes, output = runs.run("too-many", *PATIENT, **POISON)
    assert codes == [0, 0], output
    runs.is_as_undisturbed("too-many", "skips")


def test_guard_that_finds_nothing_changes_nothing(runs):
    for name, settings in (("plain", ()), ("guarded", PATIENT)):
        codes, output = runs.run(name, *settings)
        assert codes == [0, 0], output
    assert runs.losses("guarded") == runs.losses("plain")
    assert runs.weights("guarded") == runs.weights("plain")
    assert not (runs.folder / "guarded" / "skipped.jsonl").exists()
