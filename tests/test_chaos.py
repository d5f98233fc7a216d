"""The chaos harness: a drawn run in real processes, that the draw repeats, and that the harness can fail."""

import errno
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.chaos import __main__ as command
from tests.chaos import faults, rounds
from tests.chaos.driver import NAME, UNDISTURBED, BrokenPromise, Start, compare
from tests.chaos.faulty import NUM_RULES, SYNC, WRITE, Faulty, Where
from tests.test_pretrain import Runs

SEED, ROUNDS = 2086, 10
WANTED_HERE = {
    "kill-rank",
    "kill-worker",
    "kill-launcher",
    "requeue-burst",
    "disk-full",
    "checkpoint-flipped",
    "checkpoint-stale",
    "member-overwritten",
    "shard-deleted",
}


def test_draw_is_a_function_of_its_seed():
    assert rounds.draw(5, 30) == rounds.draw(5, 30)
    assert rounds.draw(5, 30)[0][:10] == rounds.draw(5, 10)[0]
    assert rounds.draw(5, 30) != rounds.draw(6, 30)


@pytest.mark.parametrize("seed", range(20))
def test_rounds_take_every_kind_in_turn_and_leave_each_start_its_steps(seed):
    drawn, total_steps = rounds.draw(seed, 40)
    assert [round.number for round in drawn] == list(range(1, 41))
    kinds = [round.kind for round in drawn]
    assert sorted(kinds[: len(rounds.KINDS)]) == sorted(rounds.KINDS)
    steps = [*(round.step for round in drawn), total_steps]
    for round, after in zip(drawn, steps[1:], strict=True):
        assert after >= round.step + rounds.KINDS[round.kind].reach
        assert round.place in rounds.KINDS[round.kind].places
        assert round.variant in rounds.KINDS[round.kind].variants
    assert len({str(round) for round in drawn}) == 40


def test_every_kind_has_its_fault():
    assert set(faults.FAULTS) == set(rounds.KINDS)


def test_table_of_the_runbook_has_a_row_for_every_kind():
    page = Path(__file__).parent.parent / "docs" / "operations.md"
    table = page.read_text(encoding="utf-8").partition("| fault |")[2].partition("\n\n")[0]
    shown = [line.rpartition("|")[0].rpartition("|")[2] for line in table.splitlines()[2:]]
    assert {kind for kind in rounds.KINDS if any(f"`{kind}`" in cell for cell in shown)} == set(rounds.KINDS)


def test_seed_of_these_tests_draws_the_faults_that_matter_most():
    assert {round.kind for round in rounds.draw(SEED, ROUNDS)[0]} >= WANTED_HERE


@pytest.fixture
def faulty(tmp_path):
    return Faulty(tmp_path)


def start_program(faulty: Faulty, text: str, *arguments: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", text, *arguments],
        env={**faulty.environment, "RANK": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )


def printed(process: subprocess.Popen) -> str:
    output = process.communicate(timeout=600)[0]
    assert process.returncode == 0
    return output.strip()


WRITES = """
import os, sys
for name in sys.argv[1:]:
    with open(name, "wb", buffering=0) as file:
        try:
            print(file.write(b"0123456789"), file.write(b"more"), os.fsync(file.fileno()))
        except OSError as error:
            print(error.errno)
"""


def test_disk_is_full_where_it_is_said_to_be_after_a_part_is_written(faulty, tmp_path):
    (tmp_path / "full").mkdir()
    names = [str(tmp_path / name) for name in ("full/a", "b")]
    faulty.fail(Where(WRITE, f"{tmp_path}/full/*", rank=1), errno.ENOSPC)
    faulty.fail(Where(WRITE, f"{tmp_path}/b", rank=0), errno.ENOSPC)
    assert printed(start_program(faulty, WRITES, *names)).split("\n") == [str(errno.ENOSPC), "10 4 None"]
    assert Path(names[0]).read_bytes() == b"01234"
    faulty.clear()
    assert printed(start_program(faulty, WRITES, *names)) == "10 4 None\n10 4 None"


def test_flush_fails_where_it_is_said_to(faulty, tmp_path):
    name = str(tmp_path / "a")
    faulty.fail(Where(SYNC, name), errno.EIO)
    assert printed(start_program(faulty, WRITES, name)) == str(errno.EIO)
    assert Path(name).read_bytes() == b"0123456789more"


def test_process_waits_at_the_write_with_the_content_until_it_is_let_go(faulty, tmp_path):
    hold = faulty.pause(Where(WRITE, str(tmp_path / "b"), "789", passed=0))
    process = start_program(faulty, WRITES, str(tmp_path / "a"), str(tmp_path / "b"))
    while not hold.is_reached():
        assert process.poll() is None
    assert (tmp_path / "a").read_bytes() == b"0123456789more"
    assert (tmp_path / "b").read_bytes() == b""
    hold.let_go()
    assert printed(process) == "10 4 None\n10 4 None"


def test_clock_of_the_day_is_off_and_the_other_one_is_not(faulty):
    text = "import datetime, time; print(time.time(), datetime.datetime.now().timestamp(), time.monotonic())"
    true = [float(value) for value in printed(start_program(faulty, text)).split()]
    for shift in (-1e9, 1e8):
        faulty.shift_clock(shift)
        shifted = [float(value) for value in printed(start_program(faulty, text)).split()]
        moved = [round((mine - theirs) / 1e7) for mine, theirs in zip(shifted, true, strict=True)]
        assert moved == [shift / 1e7, shift / 1e7, 0]


def test_rules_are_many_enough_and_no_more_than_there_are(faulty):
    for _ in range(NUM_RULES):
        faulty.delay(Where(WRITE, "/nowhere"), 0.0)
    with pytest.raises(StopIteration):
        faulty.delay(Where(WRITE, "/nowhere"), 0.0)


class Ended:
    """A rank that has ended."""

    def __init__(self, returncode: int, output: str):
        self.returncode, self._output = returncode, output

    def poll(self) -> int:
        return self.returncode

    def communicate(self) -> tuple[str, None]:
        return self._output, None


@pytest.mark.parametrize(
    ("codes", "output", "told"),
    [
        ([0, 75], "saved", r"\[75, 75\] were promised, they are \[0, 75\]"),
        ([75, 75], "", "lacking: .'saved'"),
        ([75, 75], "saved\nTraceback (most recent call last)", "without a traceback"),
    ],
)
def test_exit_code_or_word_that_was_not_promised_fails(codes, output, told):
    Start([Ended(75, "saved"), Ended(75, "")]).expect([75, 75], "saved")
    with pytest.raises(BrokenPromise, match=told):
        Start([Ended(codes[0], output), Ended(codes[1], "")]).expect([75, 75], "saved")


def test_broken_promise_is_told_with_the_seed_and_the_command_that_repeats_it(tmp_path, monkeypatch, capsys):
    def broken(folder, seed, num_rounds, only):
        raise BrokenPromise("round 3 of 7: something")

    monkeypatch.setattr(command, "run", broken)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert command.main(["--rounds", "7", "--seed", "11"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "seed 11"
    assert "broken: round 3 of 7: something" in lines
    assert "repeat with: python -m tests.chaos --rounds 7 --seed 11" in lines
    assert command.main([]) == 1
    seed = capsys.readouterr().out.splitlines()[0].removeprefix("seed ")
    assert int(seed) >= 0


@pytest.fixture(scope="module")
def chaos(tmp_path_factory):
    return command.run(tmp_path_factory.mktemp("chaos"), SEED, ROUNDS)


@pytest.mark.distributed
@pytest.mark.timeout(3600)
def test_run_under_drawn_faults_equals_one_without(chaos):
    compare(chaos)
    assert chaos.losses(NAME)[-1][0] == chaos.total_steps


def changed_record(path: Path, name: str) -> None:
    lines = path.read_text().splitlines()
    record = json.loads(lines[20])
    assert name in record
    lines[20] = json.dumps(record | {name: 1})
    path.write_text("\n".join(lines) + "\n")


def another_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "losses": lambda folder: changed_record(folder / "metrics.jsonl", "loss"),
    "trace": lambda folder: changed_record(folder / "trace/rank-00001.jsonl", "audio"),
    "weights": lambda folder: another_byte(folder / "export/model.safetensors"),
    "last_checkpoint": lambda folder: shutil.rmtree(max((folder / "checkpoints").glob("step-????????"))),
}


@pytest.mark.distributed
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("what", DAMAGE)
def test_run_that_differs_is_told_from_the_undisturbed_one(chaos, tmp_path, what):
    for name in (NAME, UNDISTURBED):
        shutil.copytree(chaos.folder / name, tmp_path / name)
    runs = Runs.__new__(Runs)
    runs.folder = tmp_path
    compare(runs)
    DAMAGE[what](tmp_path / NAME)
    with pytest.raises(BrokenPromise, match=f"^{what} differ"):
        compare(runs)
