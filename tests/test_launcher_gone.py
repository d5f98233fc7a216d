"""When who started a run is gone: ranks stop, saved, and no start that waits for a host stays behind."""

import errno
import io
import os
import re
import signal
import subprocess
import sys
import threading
import weakref
from pathlib import Path

import pytest

from msm_dist.engine.checkpoint import is_complete
from msm_dist.engine.console import Outliving, outliving_readers
from tests.processes import HERE, free_port, rank_environment
from tests.test_pretrain import Runs, wait_for


def test_what_nobody_reads_is_dropped_and_the_end_told_once():
    reader, writer = os.pipe()
    told = []
    with open(writer, "w", buffering=1) as pipe:
        stream = Outliving(pipe, lambda: told.append(1))
        print("read", file=stream, flush=True)
        assert os.read(reader, 100) == b"read\n" and not told
        os.close(reader)
        for _ in range(3):
            print("unread", file=stream, flush=True)
    assert told == [1]


class Full(io.StringIO):
    """A stream to a disk without room."""

    def flush(self) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_other_faults_of_a_stream_stay_faults():
    with pytest.raises(OSError, match="No space left"):
        print("text", file=Outliving(Full(), pytest.fail), flush=True)


def test_streams_are_given_back():
    before = sys.stdout, sys.stderr
    with outliving_readers(pytest.fail):
        assert isinstance(sys.stdout, Outliving) and isinstance(sys.stderr, Outliving)
    assert (sys.stdout, sys.stderr) == before


def test_threads_that_outlive_the_block_hold_nothing_of_a_run():
    class Told:
        def __call__(self) -> None:
            pytest.fail()

    told, done = Told(), threading.Event()
    ends = weakref.ref(told)
    with outliving_readers(told):
        thread = threading.Thread(target=done.wait)  # keeps the sys.stderr that it finds
        thread.start()
    try:
        del told
        assert ends() is None
    finally:
        done.set()
        thread.join()


@pytest.mark.distributed
def test_run_whose_reader_is_gone_stops_saved(tmp_path: Path):
    runs = Runs(tmp_path)
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "msm_dist.pretrain", *runs.command("unread", "train.steps=100000")],
        env=rank_environment(0, 1, free_port()),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=HERE.parent,
    )
    seen = []
    for line in process.stdout:
        seen.append(line)
        if re.match(r"step +3/", line):
            break
    else:
        pytest.fail("".join(seen))
    process.stdout.close()
    assert process.wait(600) == 128 + signal.SIGTERM
    newest = runs.checkpoints("unread")[-1]
    assert is_complete(runs.folder / "unread" / "checkpoints" / newest)
    assert int(newest.removeprefix("step-")) == runs.metrics("unread")[-1]["step"]


@pytest.mark.distributed
def test_start_that_a_host_is_missing_from_ends_with_its_command(tmp_path: Path):
    runs, port = Runs(tmp_path), free_port()
    hosts, log = tmp_path / "hostfile", tmp_path / "log"
    hosts.write_text("here slots=1\nnowhere slots=1\n")
    words = ["--hostfile", str(hosts), "--no_ssh", "--node_rank", "0", "--master_addr", "127.0.0.1"]
    words += ["--master_port", str(port), "--module", "msm_dist.pretrain", *runs.command("missing")]
    with log.open("w") as output:
        command = subprocess.Popen(
            [sys.executable, "-m", "deepspeed.launcher.runner", *words],
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=HERE.parent,
        )
    spawned = re.compile(r"process (\d+) spawned")
    wait_for(lambda: _is_listening(port) and spawned.search(log.read_text()), [command])
    started = spawned.search(log.read_text())[1]
    command.kill()
    command.wait()
    wait_for(lambda: _has_ended(started), [])


def _is_listening(port: int) -> bool:
    """Whether the ranks' meeting point is open on this machine."""
    lines = [line for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]]
    return any(line.split()[1].endswith(f":{port:04X}") and line.split()[3] == "0A" for line in lines)


def _has_ended(pid: str) -> bool:
    """Also of an orphan that its new parent has not yet taken notice of."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True
