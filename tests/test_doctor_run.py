"""`msm-dist doctor RUN` on a real run folder: a healthy one is ok, and each damage has its finding and its remedy."""

import hashlib
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from msm_dist.changed import CHANGED_FILE
from msm_dist.data.clips import quiet
from msm_dist.data.index import load_index
from msm_dist.doctor import run as doctor_run
from msm_dist.doctor import where as doctor_where
from msm_dist.doctor.findings import Finding
from msm_dist.engine.runfolder import DEAD_AFTER_SECONDS
from tests.processes import HERE
from tests.test_hostile_checkpoints import PRETRAINED
from tests.test_pretrain import STEPS, Runs

pytestmark = pytest.mark.distributed

NAME = "trained"
NEWEST, BEFORE = f"step-{STEPS:08d}", "step-00000012"
STATE = "state-00000-of-00001.safetensors"
Usage = namedtuple("Usage", "total used free")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    runs = Runs(tmp_path_factory.mktemp("runs"))
    codes, output = runs.run(NAME, ranks=1)
    assert codes == [0], output
    return runs


@pytest.fixture
def finished(runs, tmp_path) -> Path:
    """A run that is done, in a folder of the test's own."""
    return Path(shutil.copytree(runs.folder / NAME, tmp_path / "runs" / NAME))


@pytest.fixture
def killed(finished) -> Path:
    """The same, as a kill after step 14 left it: saved at step 12, logged further, a line torn, a dead owner."""
    shutil.rmtree(finished / "export")
    shutil.rmtree(finished / "checkpoints" / NEWEST)
    with (finished / "metrics.jsonl").open("a") as file:
        file.write('{"step": 15, "lo')
    write_lock(finished, pid=2**22 + 1)
    return finished


def write_lock(folder: Path, **values: object) -> Path:
    owner = {"host": socket.gethostname(), "job": None, "restart": None, "pid": os.getpid(), "started": "1"}
    path = folder / "lock.json"
    path.write_text(json.dumps(owner | values))
    return path


def examine(folder: Path, quick: bool = False) -> list[Finding]:
    return list(doctor_run.examine_run(folder, quick, quiet))


def not_ok(folder: Path, quick: bool = False) -> list[Finding]:
    return [finding for finding in examine(folder, quick) if finding.status != "ok"]


def only(folder: Path, status: str, name: str, *says: str, quick: bool = False) -> Finding:
    """The one finding that is not ok, which says all that."""
    found = not_ok(folder, quick)
    assert [(finding.status, finding.name) for finding in found] == [(status, name)], found
    assert all(word in f"{found[0].detail}\n{found[0].remedy}" for word in says), found
    assert found[0].remedy or status == "note", found
    return found[0]


def of(folder: Path, name: str) -> Finding:
    return next(finding for finding in examine(folder) if finding.name == name)


def flip(path: Path, place: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def complete(checkpoint: Path, **values: object) -> None:
    """Change a checkpoint's meta.json, and mark it complete as if it had been written so."""
    path = checkpoint / "meta.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    (checkpoint / "complete").write_text(hashlib.sha256(path.read_bytes()).hexdigest())


def everything(folder: Path) -> dict[str, tuple]:
    """All that a look must leave alone, at and above a folder."""
    return {
        str(path): (path.lstat().st_mtime_ns, path.lstat().st_mode, path.lstat().st_size)
        for path in [folder.parent, *folder.parent.rglob("*")]
    }


def test_a_finished_run_is_ok_and_left_as_it_is(finished):
    before = everything(finished)
    found = examine(finished)
    assert [finding for finding in found if finding.status != "ok"] == []
    told = {finding.name: finding.detail for finding in found}
    assert told["next"] == f"finished: all {STEPS} steps, exported"
    assert told["export"].endswith(f"each as in {NEWEST}") and "digests as saved" in told[NEWEST]
    assert "the one the run began with" in next(f.detail for f in found if f.name == "corpus")
    assert everything(finished) == before


def test_a_killed_run_is_ok_and_continues_by_the_printed_command(killed):
    before = everything(killed)
    found = {finding.name: finding for finding in examine(killed)}
    assert {finding.status for finding in found.values()} == {"ok"}, found
    assert everything(killed) == before
    assert f"a start goes on from step 12 of {STEPS}" in found["next"].detail
    assert "it has ended; the next start takes it over" in found["lock"].detail
    assert "the last torn by a kill; 3 past step 12" in found["metrics"].detail
    words = shlex.split(found["next"].remedy)
    assert words[:2] == ["msm-dist", "pretrain"]
    done = subprocess.run(
        [sys.executable, "-m", "msm_dist", *words[1:]], capture_output=True, text=True, cwd=HERE.parent, timeout=550
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert not_ok(killed) == []
    assert of(killed, "next").detail.startswith("finished")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: [b", "not valid YAML"),
        ("!!python/object/apply:os.system ['touch EVIL']", "not valid YAML"),
        ("a: &a [x, x, x, x, x, x, x, x, x]\n" + "\n".join(
            f"{one}: &{one} [{', '.join([f'*{other}'] * 9)}]" for other, one in zip("abcdefgh", "bcdefghi", strict=True)
        ), "aliases"),
        ("train: {stepz: 3}", "did you mean train.steps?"),
        ("[1, 2]", "must hold settings"),
        ("extends: /etc/hostname", "extends"),
    ],
    ids=["broken", "python tag", "bomb", "unknown key", "list", "other file"],
)  # fmt: skip
def test_settings_that_a_start_refuses_fail(killed, text, says, monkeypatch):
    monkeypatch.chdir(killed.parent)
    (killed / "config.yaml").write_text(text)
    found = {finding.name: finding for finding in not_ok(killed)}
    assert found["settings"].status == "fail" and says in found["settings"].detail
    assert "put it back" in found["settings"].remedy
    assert found["next"].status == "fail"
    assert not (killed.parent / "EVIL").exists()


def test_lost_settings_fail_but_the_rest_is_still_looked_at(killed):
    (killed / "config.yaml").unlink()
    assert doctor_where.kind_of(str(killed)) == "run"
    found = {finding.name: finding for finding in examine(killed)}
    assert found["settings"].status == "fail" and "submission/config.yaml" in found["settings"].remedy
    assert found[BEFORE].status == "ok"


def test_a_renamed_folder_is_called_back(killed):
    other = killed.rename(killed.with_name("renamed"))
    finding = only(other, "fail", "settings", "run.name=trained", "called renamed")
    assert finding.remedy == f"mv {other} {killed}"


def test_owners_of_the_lock_are_told_apart(killed):
    start = Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]
    write_lock(killed, started=start)
    assert "this machine: it lives" in of(killed, "lock").detail
    assert "the run is going on; saved at step 12" in of(killed, "next").detail
    write_lock(killed)
    assert "this machine: it has ended" in of(killed, "lock").detail
    path = write_lock(killed, host="elsewhere", job="123")
    assert "being written by process" in of(killed, "lock").detail and "job '123'" in of(killed, "lock").detail
    old = time.time() - DEAD_AFTER_SECONDS - 60
    os.utime(path, (old, old))
    told = of(killed, "lock").detail
    assert "left by process" in told and re.search("(1[89]|2[0-9])[0-9] s ago", told)
    path.write_text("torn{")
    only(killed, "fail", "lock", "not a lock of ours", f"rm {path}")


def test_other_versions_than_the_runs_cost_equal_bits(killed, finished):
    path = killed / "environment.json"
    content = json.loads(path.read_text())
    content["versions"]["torch"] = "1.13.1"
    path.write_text(json.dumps(content | {"device": "NVIDIA Abacus"}))
    finding = only(killed, "warn", "environment", "torch '1.13.1' then", "device 'NVIDIA Abacus' then", "not bit-equal")
    assert "install those versions" in finding.remedy
    path.write_text("[]")
    only(killed, "warn", "environment", "no JSON object", f"rm {path}")


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda folder: os.truncate(folder / STATE, 1000), "1000 bytes"),
        (lambda folder: flip(folder / STATE), "are not those that were saved"),
        (lambda folder: (folder / STATE).unlink(), "no longer there"),
        (lambda folder: flip(folder / "meta.json", 20), "not the one that was completed"),
        (lambda folder: (folder / "complete").unlink(), "complete"),
    ],
    ids=["truncated", "flipped", "gone", "meta", "unmarked"],
)
def test_a_damaged_newest_checkpoint_costs_the_steps_since_the_one_before(finished, damage, says):
    shutil.rmtree(finished / "export")
    damage(finished / "checkpoints" / NEWEST)
    only(finished, "warn", NEWEST, "damaged: ", says, "a whole copy put back", "else the next start sets it aside")
    assert "from step 12 of 14; 2 steps that were saved are computed anew" in of(finished, "next").detail


def test_a_flipped_bit_is_not_looked_for_when_it_is_to_be_quick(killed):
    flip(killed / "checkpoints" / BEFORE / STATE)
    assert not_ok(killed, quick=True) == []
    assert "sizes as saved" in next(f.detail for f in examine(killed, quick=True) if f.name == BEFORE)
    found = not_ok(killed)
    assert [(finding.status, finding.name) for finding in found] == [
        ("fail", BEFORE),
        ("fail", "checkpoints"),
        ("fail", "next"),
    ]
    assert "none is whole" in found[1].detail and "mv " in found[1].remedy
    assert "where a start goes on can't be told" in found[2].detail


def test_an_older_damaged_checkpoint_is_no_reason_to_act(finished):
    flip(finished / "checkpoints" / BEFORE / STATE)
    only(finished, "warn", BEFORE, "damaged", "nothing: a newer one is good")


def test_what_is_unfinished_or_set_aside_is_explained(killed):
    root = killed / "checkpoints"
    shutil.copytree(root / BEFORE, root / f"{NEWEST}.partial")
    only(killed, "warn", NEWEST, "unfinished", "deletes it", "rm -r")
    write_lock(killed, started=Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    assert "being written" in of(killed, NEWEST).detail and not_ok(killed) == []
    (root / f"{NEWEST}.partial").rename(root / f"{NEWEST}.damaged")
    flip(root / f"{NEWEST}.damaged" / STATE)
    finding = only(killed, "warn", NEWEST, "set aside by a start as damaged", "not those that were saved", "smartctl")
    assert STATE in finding.detail


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"cursor": 5}, "its cursor 5 is not that of step 12"),
        ({"format": 99}, "format 99"),
        ({"step": 11, "optimizer_step": 11.0}, "checkpoint of step 11"),
    ],
    ids=["cursor", "format", "step"],
)
def test_a_checkpoint_on_which_a_start_ends_fails(killed, values, says):
    complete(killed / "checkpoints" / BEFORE, **values)
    found = [finding for finding in examine(killed) if finding.status == "fail"]
    assert [finding.name for finding in found] == [BEFORE, "next"]
    assert says in found[0].detail and str(killed / "checkpoints" / BEFORE) in found[0].remedy


@pytest.mark.parametrize(
    ("name", "value"),
    [("bad_samples", None), ("optimizer_step", "x"), ("skipped_updates", 7), ("loss_scale", {"a": 1})],
)
def test_metadata_that_no_run_saves_fails_by_field(killed, name, value):
    complete(killed / "checkpoints" / BEFORE, **{name: value})
    found = [finding for finding in examine(killed) if finding.status == "fail"]
    assert [finding.name for finding in found] == [BEFORE, "next"]
    assert f"a start ends here: {killed / 'checkpoints' / BEFORE / 'meta.json'}: {name}" in found[0].detail
    assert f"move {killed / 'checkpoints' / BEFORE} away" in found[0].remedy


def test_a_start_refuses_metadata_that_no_run_saves_in_one_line(killed):
    words = shlex.split(of(killed, "next").remedy)
    path = killed / "checkpoints" / BEFORE / "meta.json"
    meta = json.loads(path.read_text())
    assert meta.keys() == {"format", "step", "files", "optimizer_step", "loss_scale"} | PRETRAINED.keys()
    assert meta["corpus"][0].keys() == PRETRAINED["corpus"][0].keys()
    del meta["bad_samples"]
    path.write_text(json.dumps(meta))
    complete(path.parent)
    there = everything(path.parent)
    done = subprocess.run(
        [sys.executable, "-m", "msm_dist", *words[1:]], capture_output=True, text=True, cwd=HERE.parent, timeout=550
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stdout + done.stderr
    said = [line for line in done.stderr.splitlines() if line.startswith("msm-dist: ")]
    assert len(said) == 1 and f"{path}: bad_samples is missing" in said[0] and "away to go on" in said[0], done.stderr
    assert everything(path.parent) == there


HOSTILE = {
    "names above": lambda folder: complete(
        folder, files={"../../../outside": {"bytes": 6, "sha256": hashlib.sha256(b"secret").hexdigest()}}
    ),
    "huge step": lambda folder: complete(folder, step=10**30),
    "huge size": lambda folder: complete(folder, files={STATE: {"bytes": 10**30, "sha256": "0" * 64}}),
    "lists for numbers": lambda folder: complete(folder, files=[[[]]], cursor={}),
    "deep": lambda folder: (folder / "meta.json").write_text("[" * 200_000),
    "link to a file": lambda folder: swap(folder / STATE, lambda path: path.symlink_to(outside(folder))),
    "link to meta.json": lambda folder: swap(folder / "meta.json", lambda path: path.symlink_to(outside(folder))),
    "pipe": lambda folder: swap(folder / "meta.json", os.mkfifo),
    "link to a folder": lambda folder: swap(folder, lambda path: path.symlink_to(outside(folder).parent)),
    "file for a folder": lambda folder: swap(folder, Path.touch),
}


def outside(folder: Path) -> Path:
    """A file beside the run folder, which nobody is to read: looks at it would change when it was last read."""
    return folder.parents[2] / "outside"


def swap(path: Path, make) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    make(path)


@pytest.mark.parametrize("hostile", HOSTILE.values(), ids=HOSTILE)
def test_hostile_checkpoints_are_named_and_nothing_outside_is_opened(killed, hostile, opened):
    outside(killed / "checkpoints" / BEFORE).write_bytes(b"secret")
    hostile(killed / "checkpoints" / BEFORE)
    opened.clear()
    found = [finding for finding in examine(killed) if finding.status == "fail"]
    assert BEFORE in [finding.name for finding in found], found
    assert not any("outside" in path for path in opened)
    assert any(path.endswith("config.yaml") for path in opened), "the watch sees what is opened"


@pytest.fixture
def opened():
    """Every path that Python opens from now on, followed to where it leads."""
    paths: list[str] = []
    listening.append(paths)
    yield paths
    listening.remove(paths)


listening: list[list[str]] = []


def hear(event: str, arguments: tuple) -> None:
    if listening and event == "open" and isinstance(arguments[0], str | os.PathLike):
        listening[-1].append(os.path.realpath(os.fspath(arguments[0])))


sys.addaudithook(hear)  # one for good: a hook can't be taken away


@pytest.mark.parametrize(
    "name", ["metrics.jsonl", "environment.json", "lock.json", "plan.json", "config.yaml", "trace"]
)
def test_links_in_the_run_folder_are_not_followed(killed, name, opened):
    (killed.parent / "outside").mkdir()
    (killed.parent / "outside" / "rank-00000.jsonl").write_text("secret\n")
    aside = killed.parent / "outside" / "aside"
    (killed / name).rename(aside)
    (killed / name).symlink_to(killed.parent / "outside" if name == "trace" else aside)
    opened.clear()
    assert any("is a link to" in finding.detail for finding in not_ok(killed))
    assert not any("outside" in path for path in opened), opened


def test_a_damaged_line_of_metrics_has_its_number(killed):
    path = killed / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:3], "\x00\x00garbage\n", *lines[3:]]))
    only(killed, "fail", "metrics", "line 4 is no record", f"sed -i '4d' {path}")


def test_lost_and_mixed_lines_of_metrics_are_told(killed):
    path = killed / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:5]))
    only(killed, "warn", "metrics", "5 lines to step 5", "those from step 6 on are lost", "put a copy back")
    path.write_text("".join([*lines[:3], *lines[:-1]]))
    only(killed, "warn", "metrics", "line 4 is of an earlier step")
    path.unlink()
    only(killed, "warn", "metrics", "no metrics.jsonl beside a checkpoint of step 12")


def test_a_line_without_end_takes_no_memory(killed):
    with (killed / "metrics.jsonl").open("ab") as file:
        file.truncate(2**31)  # sparse: 2 GiB of zeros
    found = next(finding for finding in examine(killed) if finding.name == "metrics")
    assert found.status == "fail" and "which no record has" in found.detail and "mv " in found.remedy


def test_missing_and_damaged_samples_of_the_trace_are_told(killed):
    path = killed / "trace" / "rank-00000.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    assert "steps 1 to 12: 16 samples each" in of(killed, "trace").detail
    path.write_text("".join([*lines[:20], *lines[21:]]))
    only(killed, "warn", "trace", "step 2 has 15 of 16 samples")
    path.write_text("".join([*lines[:20], "{}\n", *lines[20:]]))
    only(killed, "fail", "trace", "line 21 is no record", "sed -i '21d'")


def test_updates_left_out_and_divergence_are_explained(killed):
    (killed / "skipped.jsonl").write_text('{"step": 3, "reason": "the loss is not finite", "clips": ["a"]}\n')
    only(killed, "warn", "skipped", "1 of at most 0 updates left out", "steps 3", "skipped.jsonl")
    (killed / "skipped.jsonl").unlink()
    report = killed / "diverged.json"
    report.write_text(json.dumps({"step": 13, "lr": 0.01, "reason": "a gradient is not finite", "clips": ["k1", "k2"]}))
    finding = only(killed, "fail", "diverged", "step 13", "a gradient is not finite", "clips k1, k2", str(report))
    assert "optim.clip_norm" in finding.remedy
    assert "once what is marked fail is mended" in of(killed, "next").detail
    started = (killed / "environment.json").stat().st_mtime
    os.utime(report, (started - 10, started - 10))
    assert "started again since" in of(killed, "diverged").detail and not_ok(killed) == []


def test_a_rank_that_stood_still_is_told_of(killed):
    (killed / "hang").mkdir()
    (killed / "hang" / "rank-00000.txt").touch()
    assert not_ok(killed) == [], "every start makes these"
    report = killed / "hang" / "report.txt"
    report.write_text("rank 1 on n2 stood still for 30 s\nin the read of step 13\n")
    only(killed, "warn", "hang", "rank 1 on n2 stood still for 30 s in the read of step 13", "rank-*.txt")
    started = (killed / "environment.json").stat().st_mtime
    os.utime(report, (started - 10, started - 10))
    assert "started again since" in of(killed, "hang").detail and not_ok(killed) == []


def test_a_missing_or_other_corpus_fails_an_unfinished_run_only(killed, runs, tmp_path):
    config = killed / "config.yaml"
    text = config.read_text()
    config.write_text(text.replace(str(runs.train), str(runs.valid)))
    only(killed, "fail", "corpus", "this run began with index_digest")
    shards = Path(shutil.copytree(runs.train, tmp_path / "shards"))
    config.write_text(text.replace(str(runs.train), str(shards)))
    assert not_ok(killed) == []
    (shards / "clips-000001.tar").unlink()
    finding = only(killed, "fail", "corpus", "clips-000001.tar: missing")
    assert "allow_missing_shards" in finding.detail
    shutil.rmtree(shards)
    only(killed, "fail", "corpus", "no index.json there")


def test_shards_that_changed_under_the_run_are_compared(killed, runs, tmp_path):
    shards = Path(shutil.copytree(runs.train, tmp_path / "shards"))
    config = killed / "config.yaml"
    config.write_text(config.read_text().replace(str(runs.train), str(shards)))
    shard = load_index(str(shards)).shards[1]
    path = killed / CHANGED_FILE
    path.write_text(json.dumps([{"name": shard.name, "location": shard.location, "sha256": shard.sha256}]))
    assert not_ok(killed) == []
    assert f"{shard.name}; they are what they were again" in of(killed, "changed").detail
    flip(shard.path)
    only(
        killed, "fail", "changed", "they are not what they were", f"{shard.location}: sha256", "copy those shards back"
    )
    only(killed, "note", "changed", "without --quick", quick=True)
    path.write_text("[1]")
    only(killed, "fail", "changed", "not a list of shards", f"rm {path}", "data.verify=digest")


def test_a_finished_run_needs_its_corpus_no_more(finished, runs):
    config = finished / "config.yaml"
    config.write_text(config.read_text().replace(str(runs.train), "gone/train"))
    only(finished, "warn", "corpus", "gone/train", "relative folders are those of where the run is started")


def test_shell_commands_of_a_run_are_not_run(killed, runs, tmp_path):
    config = killed / "config.yaml"
    text = config.read_text().replace("allow_pipe: false", "allow_pipe: true")
    config.write_text(text.replace(f"shards: {runs.train}\n", f"shards: pipe:touch {tmp_path}/EVIL; cat {{}}\n", 1))
    assert "allow_pipe: true" in config.read_text() and "EVIL" in config.read_text()
    found = not_ok(killed)
    assert [(finding.status, finding.name) for finding in found] == [("note", "corpus")]
    assert "is not run" in found[0].detail
    assert not (tmp_path / "EVIL").exists()


@pytest.mark.parametrize(("factor", "status"), [(0.5, "fail"), (1.5, "warn")])
def test_room_for_the_next_checkpoint_is_told_from_the_last_one(killed, monkeypatch, factor, status):
    size = sum(path.stat().st_size for path in (killed / "checkpoints" / BEFORE).iterdir())
    monkeypatch.setattr(doctor_run.shutil, "disk_usage", lambda path: Usage(2**41, 0, int(factor * size)))
    only(killed, status, "disk", f"a checkpoint takes {size / 1e6:,.1f}", "checkpoint.keep=1")


def test_damaged_weights_of_a_finished_run_are_exported_again(finished):
    weights = finished / "export" / "model.safetensors"
    whole = weights.read_bytes()
    os.truncate(weights, len(whole) // 2)
    finding = only(finished, "fail", "export", "not readable weights")
    assert finding.remedy.startswith("start the run again") and f"rm -r {weights.parent}" in finding.remedy
    state = load_file(save_whole(weights, whole))
    name = next(iter(state))
    state[name].view(torch.int32)[(0,) * state[name].ndim] ^= 1  # one bit
    save_file(state, weights)
    only(finished, "fail", "export", f"{name} is not as in {NEWEST}")
    assert not_ok(finished, quick=True) == []
    save_whole(weights, whole)
    (finished / "export" / "config.json").write_text("{}")
    only(finished, "fail", "export", "not the configuration of saved weights")
    shutil.rmtree(finished / "export")
    only(finished, "fail", "export", "no weights are exported", "start the run again")


def save_whole(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def test_a_run_that_is_asked_for_fewer_steps_than_it_has_fails(killed):
    config = killed / "config.yaml"
    config.write_text(config.read_text().replace(f"steps: {STEPS}\n", "steps: 10\n"))
    only(killed, "fail", "next", "10 steps long, its checkpoint is at step 12", "train.steps=12")


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"world_size": 1, "local_size": 1}, "msm-dist pretrain {config} {dir}"),
        (
            {"world_size": 4, "local_size": 4},
            "torchrun --nproc-per-node 4 --module msm_dist.pretrain {config} {dir}",
        ),
        (
            {"world_size": 16, "local_size": 8},
            "torchrun --nnodes 2 --rdzv-backend c10d --rdzv-endpoint HOST:29500 --nproc-per-node 8 "
            "--module msm_dist.pretrain {config} {dir}",
        ),
        (
            {"world_size": 16, "local_size": 8, "job": "7"},
            "sbatch --nodes=2 --ntasks-per-node=8 slurm/pretrain.sh {config} {dir}",
        ),
        ({"world_size": "; rm -rf /", "local_size": -1}, "msm-dist pretrain {config} {dir}"),
    ],
)
def test_the_command_has_as_many_processes_as_the_run_had(killed, environment, expected):
    path = killed / "environment.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | environment))
    told = of(killed, "next").remedy
    assert told == expected.format(config=killed / "config.yaml", dir=f"run.dir={killed.parent}")


def test_a_run_with_a_model_of_its_own_is_continued_by_its_program(killed):
    (killed / "model.json").write_text('{"build_model": "mine.py:build"}')
    assert "your program with the model of its own" in of(killed, "next").remedy


def test_the_command_line_gives_exit_codes_and_keeps_text_of_strangers_from_the_terminal(killed, capfd):
    assert doctor_where.examine(str(killed), fix=False, quick=True) == 0
    owner = write_lock(killed, host="\x1b[2Jelsewhere")
    assert doctor_where.examine(str(killed), fix=False, quick=True) == 0
    owner.write_text("\x1b[2J")
    assert doctor_where.examine(str(killed), fix=False, quick=True) == 2
    assert "\x1b" not in capfd.readouterr().out
