"""The soak: what it sees of processes, and that something which grows is found."""

import json
import subprocess
import sys

import pytest

from benchmarks import soak
from benchmarks.soak import Sample

HOLDER = """
import os, sys, threading, time
held = [os.open("/dev/null", os.O_RDONLY) for _ in range(int(sys.argv[1]))]
block = bytearray(int(sys.argv[2]) * 2**20)
block[::4096] = b"x" * len(block[::4096])
for _ in range(int(sys.argv[3])):
    threading.Thread(target=time.sleep, args=(600,), daemon=True).start()
print("ready", flush=True)
sys.stdin.read()
"""


def holding(files: int, mebibytes: int, threads: int) -> Sample:
    """What is seen of a launcher's child that holds so much."""
    words = [sys.executable, "-c", HOLDER, str(files), str(mebibytes), str(threads)]
    launcher = ["sh", "-c", '"$@"; true', "sh", *words]
    with subprocess.Popen(launcher, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"ready\n"
        return soak.look(process.pid, 7, 0.5)


def test_memory_files_and_threads_of_a_process_are_seen():
    little, much = holding(0, 0, 0), holding(20, 64, 3)
    assert (little.processes, much.processes, much.step, much.seconds) == (1, 1, 7, 0.5)
    assert much.files - little.files == 20
    assert much.threads - little.threads == 3
    assert much.memory_mib - little.memory_mib == pytest.approx(64, abs=2)


def samples(step_mib: float = 0.0, files: int = 0) -> list[Sample]:
    return [
        Sample(step, step / 10, 100 + step_mib * step, 60.0, 1.0, 150 + files * (step > 500), 10, 4)
        for step in range(5, 1000, 10)
    ]


def test_growth_is_from_the_second_tenth_to_the_last():
    tenths = soak.by_tenth(samples(step_mib=0.1, files=7), 1000)
    assert [tenth.step for tenth in tenths] == [50 + 100 * number for number in range(10)]
    assert soak.growth(tenths) == {"memory_mib": 80, "shared_mib": 0, "files": 7, "threads": 0, "processes": 0}
    assert soak.growth(soak.by_tenth(samples(), 1000)) == dict.fromkeys(soak.BOUNDS, 0)


def test_a_run_that_grows_ends_with_1_and_one_that_does_not_with_0(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(soak, "prepare", lambda folder, steps: folder / "soak.yaml")

    def ends(found: list[Sample]) -> tuple[int, dict]:
        monkeypatch.setattr(soak, "watch", lambda config, run, steps: (0, found))
        code = soak.main(["--steps", "1000", "--work", str(tmp_path / "work"), "--out", str(tmp_path / "out")])
        return code, json.loads((tmp_path / "out" / "soak-cpu.json").read_text())

    code, content = ends(samples())
    assert (code, content["flat"], len(content["tenths"])) == (0, True, 10)
    code, content = ends(samples(step_mib=0.02))
    assert (code, content["flat"], content["growth"]["memory_mib"]) == (1, False, 16)
    assert "grows: memory_mib" in capsys.readouterr().out
    assert ends(samples(files=5))[0] == 1


def test_newest_step_skips_a_line_that_is_being_written(tmp_path):
    metrics = tmp_path / "metrics.jsonl"
    assert soak.newest_step(metrics) == 0
    metrics.write_text('{"step": 20, "loss": 1}\n{"step": 40, "loss": 1}\n{"step": 6')
    assert soak.newest_step(metrics) == 40


def test_the_page_has_the_figures_of_the_committed_soak():
    result = json.loads((soak.RESULTS / "soak-cpu.json").read_text())
    assert result["steps"] == soak.STEPS and not result["dirty"]
    tenths = [Sample(**tenth) for tenth in result["tenths"]]
    assert soak.growth(tenths) == result["growth"]
    assert all(grown <= soak.BOUNDS[name] for name, grown in result["growth"].items())
    page = (soak.ROOT / "docs" / "operations.md").read_text()
    assert soak.lines(tenths) in page
    assert f"memory grows by {result['growth']['memory_mib']:.1f} MiB of {tenths[soak.SETTLED].memory_mib:.0f}" in page
