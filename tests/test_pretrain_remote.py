"""Whole runs on shards behind an HTTP server that fails: the same losses and samples as on local files."""

import itertools
import shutil
import signal
import threading

import pytest

from msm_dist.data.index import load_index, members
from tests.http_server import serving
from tests.s3_server import put, s3_serving
from tests.test_pretrain import Runs, finish, wait_for

pytestmark = pytest.mark.distributed

SHORT = ("train.steps=8", "checkpoint.every=2", "data.num_workers=2", "data.read_timeout_seconds=1")
MIXTURE = (
    "500",
    "busy",
    "truncate",
    "reset",
    "short",
    "range",
    "stall-body",
    "unsaid",
    "502",
    "long",
    "trickle",
    "stall",
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    runs = Runs(tmp_path_factory.mktemp("runs"))
    codes, output = runs.run("local", *SHORT, ranks=1)
    assert codes == [0], output
    return runs


@pytest.fixture
def server(runs):
    with serving(runs.folder) as server:
        yield server


def remote(server, *settings: str) -> tuple[str, ...]:
    return (*SHORT, f"data.shards={server.url}/train", f"data.valid_shards={server.url}/valid", *settings)


def same_as_local(runs: Runs, name: str) -> bool:
    return (
        runs.losses(name) == runs.losses("local")
        and runs.trace(name) == runs.trace("local")
        and runs.weights(name) == runs.weights("local")
    )


def places(runs: Runs, first: int, last: int) -> set[tuple[str, int, int]]:
    """Where the clips of steps first..last of the local run lie: tar, first byte, end."""
    keys = {record["key"].encode() for record in runs.trace("local") if first <= record["step"] <= last}
    return {
        (f"train/{shard.name}", int(row["offset"]), int(row["offset"] + row["size"]))
        for shard in load_index(str(runs.train)).shards
        for row in members(shard)
        if row["key"] in keys
    }


def late(runs: Runs):
    """Whether a request is for a clip of the last steps: a server that fails those fails in the midst of the run."""
    wanted = places(runs, 6, 8)
    return lambda request: any(
        request.name == name and request.start < stop and start < request.stop for name, start, stop in wanted
    )


def test_run_through_a_mixture_of_faults_equals_one_on_local_files(runs, server):
    turns, given = itertools.cycle(MIXTURE), set()

    def faults(request):
        if request.number % 3:
            return None
        fault = next(turns)
        given.add(fault)
        return fault

    server.faults = faults
    codes, output = runs.run("faulty", *remote(server, "data.read_retries=20"), ranks=1)
    assert codes == [0], output
    assert same_as_local(runs, "faulty")
    assert given == set(MIXTURE)


def test_killed_run_continues_bit_equal_and_asks_only_for_clips_that_are_owed(runs, server):
    settings = remote(server, "data.verify=digest")
    codes, output = runs.run("killed", *settings, ranks=1, KILL="step:7")
    assert codes == [-signal.SIGKILL], output
    before = len(server.log)
    codes, output = runs.run("killed", *remote(server), ranks=1)
    assert codes == [0], output
    assert "continued from" in output
    assert same_as_local(runs, "killed")
    step = int(output.partition("step-")[2][:8])
    assert step in (4, 6)
    asked = {(r.name, r.start, r.stop) for r in server.log[before:] if r.start >= 0 and r.name.startswith("train/")}
    assert asked >= places(runs, step + 1, 8)
    assert not asked & places(runs, 1, step)


def test_server_that_stays_down_stops_the_run_saved_and_the_same_command_continues(runs, server):
    is_late, is_up = late(runs), False
    server.faults = lambda request: "503" if is_late(request) and not is_up else None
    settings = remote(server, "data.read_retries=2", "data.read_timeout_seconds=30")
    codes, output = finish(runs.start("down", *settings, ranks=2), end_peers=False)
    assert codes == [2, 2], output
    assert "can't be read (status 503); tried 3 times over" in output
    assert "stopped and saved at step" in output
    assert "Traceback" not in output
    is_up = True
    codes, output = runs.run("down", *settings, ranks=1)
    assert codes == [0], output
    assert "continued from" in output
    assert runs.trace("down") == runs.trace("local")


def test_signal_during_a_stalled_read_stops_the_run_in_time(runs, server):
    is_late, is_up, stalls = late(runs), False, threading.Event()

    def faults(request):
        if not is_late(request) or is_up:
            return None
        stalls.set()
        return "stall"

    server.faults = faults
    # The stall would outlast the test.
    settings = remote(server, "data.read_timeout_seconds=600", "data.read_retries=100", "data.num_workers=1")
    processes = runs.start("stalled", *settings, ranks=1)
    metrics = runs.folder / "stalled" / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") >= 2 and stalls.is_set(), processes)
    processes[0].send_signal(signal.SIGUSR1)
    codes, output = finish(processes)
    assert codes == [75], output
    assert "stopped and saved at step" in output
    is_up = True
    codes, output = runs.run("stalled", *settings, ranks=1)
    assert codes == [0], output
    assert same_as_local(runs, "stalled")


def test_missing_and_damaged_shards_are_told_before_the_run_begins(runs, server):
    shutil.copytree(runs.train, runs.folder / "holed")
    (runs.folder / "holed" / "clips-000001.tar").unlink()
    where = f"data.shards={server.url}/holed"
    codes, output = runs.run("holed-run", *remote(server, where), ranks=1)
    assert codes == [2], output
    assert f"{server.url}/holed/clips-000001.tar: missing" in output
    content = bytearray((runs.train / "clips-000001.tar").read_bytes())
    content[1000] ^= 1
    (runs.folder / "holed" / "clips-000001.tar").write_bytes(content)
    codes, output = runs.run("holed-run", *remote(server, where, "data.verify=digest"), ranks=1)
    assert codes == [2], output
    assert f"{server.url}/holed/clips-000001.tar: sha256" in output
    assert "Traceback" not in output


def test_run_on_an_object_store_equals_one_on_local_files(runs):
    pytest.importorskip("s3fs")
    pytest.importorskip("moto")
    with s3_serving() as environment:
        put(environment, runs.train, "corpora", "train")
        put(environment, runs.valid, "corpora", "valid")
        where = ("data.shards=s3://corpora/train", "data.valid_shards=s3://corpora/valid/")
        settings = (*SHORT, *where, "data.read_timeout_seconds=20", "data.verify=digest")
        codes, output = runs.run("object-store", *settings, ranks=1, KILL="step:5", **environment)
        assert codes == [-signal.SIGKILL], output
        codes, output = runs.run("object-store", *settings, ranks=1, **environment)
    assert codes == [0], output
    assert "continued from" in output
    assert same_as_local(runs, "object-store")
    assert "HIDDEN" not in output + (runs.folder / "object-store" / "config.yaml").read_text()
