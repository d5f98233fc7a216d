"""Shards behind shell commands: the bytes of local files where it is permitted, an end and a message where it fails."""

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from msm_dist.config import Data, Features
from msm_dist.data import pipe_store
from msm_dist.data.crops import CropReader, Source
from msm_dist.data.index import Index, check_shards, load_index, members
from msm_dist.data.plan import make_plan
from msm_dist.data.storage import Access, Span, access_of, open_store
from msm_dist.errors import DataError
from tests.processes import HERE, is_alive
from tests.shards import noise_clips, write_corpus
from tests.test_pretrain import Runs

ACCESS = Access(timeout=20.0, retries=0, connections=4, allow_pipe=True)
STALLING = ACCESS._replace(timeout=3.0)  # so much longer than a shell takes to start, also on a busy machine
FRAMES = 32


@pytest.fixture
def corpus(tmp_path):
    return write_corpus(tmp_path / "my corpus", noise_clips(70), clips_per_shard=24)


def piped(index: Index) -> Index:
    return load_index(f"pipe:cat '{index.location}'/", ACCESS)


def span_of(folder: str, size: int = 10, stop: int = 10) -> Span:
    return Span(f"{folder}/a.tar", size, 0, stop)


def script(folder: Path, text: str) -> str:
    """A folder behind a command of these lines, which gets a file's path in $1."""
    (folder / "script.sh").write_text(text)
    return f"pipe:exec sh {folder}/script.sh {folder}"


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_command_runs_only_where_the_configuration_permits_it(tmp_path):
    marker = tmp_path / "ran"
    given = f"pipe:touch {marker}; cat {tmp_path}/a.tar"
    for access in (Access(), access_of(Data())):
        for opened in (lambda a=access: load_index(given, a), lambda a=access: open_store(given, a)):
            with pytest.raises(DataError, match=r"shell command.*data.allow_pipe=true.*http, s3 and gs") as error:
                opened()
            assert given in str(error.value)
    assert not marker.exists()
    assert access_of(Data(allow_pipe=True)).allow_pipe


@pytest.mark.parametrize("command", ["verify", "inspect", "stats"])
def test_commands_on_a_corpus_never_run_one(tmp_path, command):
    marker = tmp_path / "ran"
    given = f"pipe:touch {marker}; cat {tmp_path}/"
    child = subprocess.run(
        [sys.executable, "-m", "msm_dist", "data", command, given], capture_output=True, text=True, cwd=HERE.parent
    )
    assert child.returncode == 2
    assert "Traceback" not in child.stderr
    assert not marker.exists()


@pytest.mark.parametrize(
    "form", ["'{root}'", "'{root}'/", "'{root}'/index.json", "'{root}'/noise-{{000000..000002}}.tar"]
)
def test_a_corpus_is_found_by_every_form_of_its_command(corpus, form):
    index = load_index("pipe:cat " + form.format(root=corpus.location), ACCESS)
    local = load_index(corpus.location)
    assert (index.digest, index.num_clips) == (local.digest, local.num_clips)
    assert [shard.location for shard in index.shards] == [
        f"pipe:cat '{corpus.location}'/{shard.name}" for shard in local.shards
    ]
    # A command does not tell a size; with its digest all is read.
    assert check_shards(index, "size", access=ACCESS) == set()
    assert check_shards(index, "digest", access=ACCESS) == set()


def test_what_must_follow_the_path_is_wrapped(corpus):
    index = load_index(f"pipe:sh -c 'cat \"$0\" | cat -' '{corpus.location}'/", ACCESS)
    assert check_shards(index, "digest", access=ACCESS) == set()


def test_blocks_are_those_of_local_files(corpus):
    plan = make_plan([shard.clips for shard in corpus.shards], 7, None, 4, 16, 1)
    found = []
    for index in (corpus, piped(corpus)):
        reader = CropReader(Source(plan, index, Features(), FRAMES, access=ACCESS))
        found.append([reader.blocks([number, number + 1]) for number in range(0, 20, 2)])
    for mine, theirs in zip(*found, strict=True):
        assert mine.keys == theirs.keys
        np.testing.assert_array_equal(mine.values, theirs.values)


def test_each_shard_is_streamed_once_and_again_only_after_it_was_dropped(tmp_path, monkeypatch, caplog):
    for name in "abc":
        (tmp_path / f"{name}.tar").write_bytes(name.encode() * 1000)
    folder = script(tmp_path, f'echo "$1" >> {tmp_path}/log; cat "$1"')
    spans = [Span(f"{folder}/{name}.tar", 1000, start, start + 5) for name in "abc" for start in (0, 990)]
    store = open_store(folder, ACCESS)

    def streamed() -> list[str]:
        names = [Path(line).stem for line in (tmp_path / "log").read_text().split()]
        (tmp_path / "log").write_text("")
        return sorted(names)

    expected = [name.encode() * 5 for name in "abc" for _ in range(2)]
    views = store.fetch(spans)
    assert [bytes(view) for view in views] == expected
    assert streamed() == ["a", "b", "c"]
    store.fetch(spans)
    assert streamed() == []
    monkeypatch.setattr(pipe_store, "KEPT_BYTES", 2000)
    store.fetch(spans[2:])
    store.fetch(spans[2:4])
    assert streamed() == []
    assert not caplog.text
    store.fetch(spans[:1])  # drops c, which was not used for longest
    assert "is streamed again" in caplog.text
    store.fetch(spans[:4])
    assert streamed() == ["a"]
    assert len(store._kept) == 2
    # What was dropped is still there for those who hold a view of it.
    assert [bytes(view) for view in views] == expected


def test_a_failing_command_is_tried_again_and_then_told_with_its_exit_code(tmp_path):
    folder = script(tmp_path, f"echo x >> {tmp_path}/log; printf 12345; echo 'disk on fire' >&2; exit 7")
    store = open_store(folder, STALLING._replace(retries=2))
    with pytest.raises(DataError, match=r"a.tar: can't be read \(exit code 7: disk on fire\); tried 3 times"):
        store.fetch([span_of(folder)])
    with pytest.raises(DataError, match="exit code 7: disk on fire"):
        store.read([f"{folder}/index.json"])
    assert (tmp_path / "log").read_text().count("x") == 6


def test_a_command_that_fails_once_gives_the_right_bytes(tmp_path):
    folder = script(
        tmp_path, f"printf 01234; [ -e {tmp_path}/log ] || {{ touch {tmp_path}/log; exit 1; }}; printf 56789"
    )
    assert bytes(open_store(folder, STALLING._replace(retries=2)).fetch([span_of(folder)])[0]) == b"0123456789"


def test_a_command_that_is_not_there_is_told_at_once():
    store = open_store("pipe:no-such-command-here /data", ACCESS._replace(retries=100))
    with pytest.raises(DataError, match="its command can't be run .exit code 127: .*not found"):
        store.read(["pipe:no-such-command-here /data/index.json"])


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ("printf 123; sleep 600", "no byte for 3 s"),
        ("printf 0123456789; exec >&-; sleep 600", "its output ended, but the command did not for 3 s"),
        ("while sleep 0.1; do printf 1; done", r"only \d+ bytes in [6-8]\.\d+ s"),
    ],
)
def test_a_command_that_stalls_or_trickles_ends_with_all_it_started(tmp_path, lines, said):
    folder = script(tmp_path, f"sleep 600 >/dev/null & echo $$ $! > {tmp_path}/pids; {lines}")
    with pytest.raises(DataError, match=rf"can't be read \({said}\)"):
        open_store(folder, STALLING).fetch([span_of(folder, 100)])
    pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    wait_for(lambda: not any(map(is_alive, pids)))


def test_a_command_dies_with_a_reader_that_is_killed(tmp_path):
    folder = script(tmp_path, f"sleep 600 & echo $$ $! > {tmp_path}/new; mv {tmp_path}/new {tmp_path}/pids; wait")
    source = f"""
from msm_dist.data.storage import Access, open_store
open_store({folder!r}, Access(allow_pipe=True)).read([{folder + "/a.json"!r}])
"""
    reader = subprocess.Popen([sys.executable, "-c", source], cwd=HERE.parent)
    try:
        wait_for((tmp_path / "pids").exists)
        pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
        assert all(map(is_alive, pids))
    finally:
        reader.send_signal(signal.SIGKILL)
        reader.wait()
    wait_for(lambda: not any(map(is_alive, pids)))


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ("true", "0 bytes, its index says 10"),
        ("printf 12345", "5 bytes, its index says 10"),
        ("printf 0123456789x", "gave more bytes than the 10"),
    ],
)
def test_output_of_another_length_is_told_at_once(tmp_path, lines, said):
    folder = script(tmp_path, lines)
    with pytest.raises(DataError, match=rf"{re.escape(folder)}/a.tar: .*{said}"):
        open_store(folder, ACCESS._replace(retries=100)).fetch([span_of(folder)])


def test_endless_output_in_place_of_a_small_file_is_told(monkeypatch):
    monkeypatch.setattr(pipe_store, "MAX_SMALL_FILE", 2**20)
    with pytest.raises(DataError, match="more than 1048576 bytes"):
        open_store("pipe:yes /tmp", ACCESS).read(["pipe:yes /tmp/index.json"])


def test_no_room_for_temporary_files_is_one_message(tmp_path):
    folder = script(tmp_path, "printf 0123456789")
    source = f"""
import resource
from msm_dist.data.storage import Access, Span, open_store
from msm_dist.errors import reporting
store = open_store({folder!r}, Access(allow_pipe=True))
resource.setrlimit(resource.RLIMIT_FSIZE, (5, 5))
raise SystemExit(reporting(lambda: store.fetch([Span({folder + "/a.tar"!r}, 10, 0, 10)])))
"""
    child = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, cwd=HERE.parent)
    assert child.returncode == 2, child.stderr
    assert re.search(r"does not take its 10 bytes \(File too large\); make room.*TMPDIR", child.stderr)


@pytest.mark.parametrize("name", ["$(touch ran).tar", "a;b.tar", "a b.tar", "`x`.tar", "a'b.tar", "é.tar"])
def test_names_that_a_shell_could_take_for_more_are_refused(corpus, monkeypatch, name):
    path = corpus.root / "index.json"
    content = json.loads(path.read_text())
    content["shards"][0]["name"] = name
    path.write_text(json.dumps(content))
    monkeypatch.chdir(corpus.root)
    index = piped(corpus)
    for use in (
        lambda: check_shards(index, "size", access=ACCESS),
        lambda: members(index.shards[0], open_store(index.location, ACCESS)),
        lambda: open_store(index.location, ACCESS).fetch([Span(index.shards[0].location, 10, 0, 10)]),
    ):
        with pytest.raises(DataError, match="letters, digits"):
            use()
    assert not (corpus.root / "ran").exists()


@pytest.mark.parametrize(
    "command",
    [
        "",
        "cat x.tar",
        "cat '/data/x.tar'",
        "cat /data/x.tar | pv",
        "aws s3 cp s3://b/x.tar -",
        "cat '/data",
        "cat /a >/b",
    ],
)
def test_commands_that_do_not_end_in_a_path_are_refused(command):
    with pytest.raises(DataError, match="must end in a path"):
        load_index(f"pipe:{command}", ACCESS)


@pytest.mark.distributed
def test_a_run_through_commands_equals_one_on_local_files(tmp_path):
    runs = Runs(tmp_path)
    short = ("train.steps=6", "train.valid_every=2", "checkpoint.every=2")
    codes, output = runs.run("local", *short, ranks=1)
    assert codes == [0], output
    where = (f"data.shards=pipe:cat {runs.train}/", f"data.valid_shards=pipe:cat {runs.valid}/")
    codes, output = runs.run("refused", *short, *where, ranks=1)
    assert codes == [2], output
    assert "data.allow_pipe=true" in output and "Traceback" not in output
    # A run continues wherever its shards lie.
    # The save of step 4 has waited for the write of that of step 2.
    codes, output = runs.run("piped", *short, ranks=1, KILL="step:5")
    assert codes == [-signal.SIGKILL], output
    codes, output = runs.run("piped", *short, *where, "data.allow_pipe=true", ranks=1)
    assert codes == [0], output
    assert "continued from" in output
    for found in (runs.losses, runs.trace, runs.weights):
        assert found("piped") == found("local")
