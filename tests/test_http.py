"""Shards over HTTP: the right bytes through every fault that passes, one message for those that don't."""

import contextlib
import logging
import re
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from msm_dist.config import BatchLayout, Data
from msm_dist.data import http_deadline, remote
from msm_dist.data.crops import CropReader, Source
from msm_dist.data.index import check_shards, load_index, members, tables
from msm_dist.data.plan import make_plan
from msm_dist.data.storage import Access, Span, open_store
from msm_dist.data.stores import FolderStores
from msm_dist.data.stream import make_loader
from msm_dist.errors import DataError
from tests.http_server import Server, by_turns, serving
from tests.shards import noise_clips, write_corpus
from tests.test_crops import FEATURES, FRAMES

QUICK = Access(timeout=0.4, retries=3, connections=4)  # for faults that last as long as they are borne with
STALLING = Access(timeout=1.5, retries=0, connections=4)  # where it is told apart what did not come in time
PATIENT = Access(timeout=4.0, retries=3, connections=4)
SLOW = ("stall", "stall-body", "trickle", "slow-headers", "continue", "slow-chunk")
CONTENT = np.random.default_rng(0).bytes(300_000)
PASSING = (
    *("500", "502", "503", "429", "busy", "stall", "stall-body", "trickle"),
    *("reset", "truncate", "short", "long", "range", "unsaid", "chatty"),
    *("slow-headers", "continue", "slow-chunk"),
)


@pytest.fixture
def server(tmp_path):
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "a.bin").write_bytes(CONTENT)
    with serving(tmp_path / "files") as server:
        yield server


@pytest.fixture
def corpus(tmp_path):
    write_corpus(tmp_path / "files" / "corpus", noise_clips(70), clips_per_shard=24)
    with serving(tmp_path / "files") as server:
        yield server


def spans_of(server: Server, *places: tuple[int, int]) -> list[Span]:
    return [Span(f"{server.url}/a.bin", len(CONTENT), start, stop) for start, stop in places]


def fetched(server: Server, *places: tuple[int, int], access: Access = PATIENT) -> list[bytes]:
    return [bytes(content) for content in open_store(server.url, access).fetch(spans_of(server, *places))]


def test_spans_come_in_order_by_ranges_of_just_their_bytes_over_kept_connections(server):
    places = [(5_000, 9_000), (0, 10), (299_000, 300_000), (5_000, 6_000), (10, 30), (7, 7)]
    assert fetched(server, *places) == [CONTENT[start:stop] for start, stop in places]
    # Overlapping and touching spans are one request; an empty one is none.
    assert sorted(server.ranges()) == [("a.bin", 0, 30), ("a.bin", 5_000, 9_000), ("a.bin", 299_000, 300_000)]
    store = open_store(server.url, Access(connections=1))
    for start in range(50):
        store.fetch(spans_of(server, (start * 100, start * 100 + 10)))
    assert len(server.log) == 53
    assert len({request.port for request in server.log[3:]}) == 1


def test_large_neighbours_are_not_merged_into_one_huge_request():
    spans = [Span("u", 2**30, start, start + 2**21) for start in range(0, 2**24, 2**21)]
    requests = remote.merged(spans)
    assert max(request.stop - request.start for request, _ in requests) <= remote.MAX_MERGED_BYTES
    assert sorted(number for _, wanted in requests for number in wanted) == list(range(8))


@pytest.mark.parametrize("fault", PASSING)
def test_a_fault_that_passes_is_tried_again_and_the_bytes_are_right(server, fault):
    server.faults = by_turns(fault, fault)
    places = [(0, 1_000), (50_000, 50_100)]
    access = QUICK._replace(retries=20) if fault in SLOW else PATIENT
    assert fetched(server, *places, access=access) == [CONTENT[start:stop] for start, stop in places]
    assert len(server.log) == 6 or (fault in SLOW and len(server.log) > 6)


@pytest.mark.parametrize("fault", PASSING)
def test_a_fault_that_stays_is_one_message_with_what_how_often_and_how_to_go_on(server, fault):
    server.faults = lambda request: fault
    with pytest.raises(DataError) as error:
        fetched(server, (0, 1_000), access=QUICK if fault in SLOW else PATIENT)
    assert re.match(
        rf"{server.url}/a.bin: can't be read \(.+\); tried 4 times over \d+\.\d s; start again once that is mended, "
        r"by the same command \(a training run continues from its last checkpoint\)$",
        str(error.value),
    )
    # The server may come to a request only when its client has given it up.
    deadline = time.monotonic() + 60
    while len(server.log) < 4:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert len(server.log) == 4


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("500", "status 500"),
        ("stall", "no byte for 1.5 s"),
        ("stall-body", "no byte for 1.5 s"),
        ("trickle", r"only \d+ of 1000 bytes in 3.02 s"),
        ("slow-headers", "no whole answer in 3 s"),
        ("continue", "no whole answer in 3 s"),
        ("slow-chunk", "no whole answer in 3.02 s"),
        ("truncate", "the connection ended 500 bytes early"),
        ("short", "500 bytes are announced, 1000 were asked for"),
        ("long", "1001 bytes are announced, 1000 were asked for"),
        ("range", "bytes 1-1000 came, 0-999 were asked for"),
        ("unsaid", "asked for a range, its Content-Range is ''"),
    ],
)
def test_the_message_says_what_was_wrong(server, fault, said):
    server.faults = lambda request: fault
    with pytest.raises(DataError, match=said):
        fetched(server, (0, 1_000), access=STALLING if fault in SLOW else PATIENT._replace(retries=0))


def test_a_body_that_trickles_is_told_of_also_where_its_read_is_cut_off(server, monkeypatch):
    monkeypatch.setattr(http_deadline, "CHECKS_PER_TIMEOUT", 1000)  # before the next byte
    server.faults = lambda request: "trickle"
    with pytest.raises(DataError, match=r"only \d+ of 1000 bytes in 3.02 s"):
        fetched(server, (0, 1_000), access=STALLING)


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("gone", "is no longer there"),
        ("forbidden", "no access .status 403.*netrc"),
        ("login", "no access .status 401"),
        ("teapot", "status 418"),
        ("whole", "use a server with byte ranges"),
        ("total", "300001 bytes, its index says 300000"),
        ("encoded", r"compresses it \(gzip\)"),
        ("loop", "more than 5 redirects"),
    ],
)
def test_a_fault_that_no_retry_mends_ends_the_read_at_once(server, fault, said):
    server.faults = lambda request: fault
    with pytest.raises(DataError, match=said):
        fetched(server, (0, 1_000))
    assert len(server.log) == (6 if fault == "loop" else 1)


def test_a_file_that_shrank_is_of_another_size(server, tmp_path):
    (tmp_path / "files" / "a.bin").write_bytes(CONTENT[:200])
    with pytest.raises(DataError, match="200 bytes, its index says 300000"):
        fetched(server, (1_000, 2_000))


def test_a_redirect_is_followed_and_its_signature_shown_nowhere(server, caplog):
    caplog.set_level(logging.DEBUG, "msm_dist")
    server.faults = lambda request: "redirect"
    assert fetched(server, (10, 20)) == [CONTENT[10:20]]
    server.faults = lambda request: "500" if request.name.startswith("again/") else "redirect"
    with pytest.raises(DataError, match="status 500") as error:
        fetched(server, (10, 20))
    assert "SECRET" not in str(error.value) + caplog.text


def test_a_redirect_is_followed_though_its_body_has_no_end(server):
    server.faults = lambda request: "redirect-body"
    assert fetched(server, (10, 20)) == [CONTENT[10:20]]


def test_a_server_that_asks_to_wait_is_waited_for_within_reason(monkeypatch):
    assert 7 <= remote.pause_before(1, 7.0, 30.0) <= 8
    assert remote.pause_before(1, 3600.0, 30.0) <= 61
    pauses = [[remote.pause_before(retry, 0.0, 30.0) for _ in range(300)] for retry in (1, 3, 50)]
    for found, bound in zip(pauses, (1, 4, 30), strict=True):
        assert max(found) <= bound
        # Full jitter: anything from none to the bound.
        assert min(found) < bound / 4 and max(found) > bound * 3 / 4


def test_retries_leave_the_runs_own_random_numbers_alone(server):
    import random

    import torch

    server.faults = by_turns("500")
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    fetched(server, (0, 10))
    assert states == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())


def test_no_server_at_all_is_one_message(server):
    url = server.url
    spans = spans_of(server, (0, 10))
    with serving(".") as other:
        nowhere = other.url
    spans = [span._replace(location=span.location.replace(url, nowhere)) for span in spans]
    with pytest.raises(DataError, match=r"Connection refused.*tried 4 times"):
        open_store(nowhere, PATIENT).fetch(spans)


def until_reads_have_ended():
    for thread in threading.enumerate():
        if thread.name == remote.THREAD_NAME:
            thread.join(600)
            assert not thread.is_alive()


@pytest.mark.parametrize("place", [0, 7])
def test_the_first_fault_of_many_ends_the_retries_of_the_others(server, place):
    server.faults = lambda request: "gone" if request.start == place * 1000 else "500"
    store = open_store(server.url, PATIENT._replace(retries=100, connections=8))
    with pytest.raises(DataError, match="no longer there"):
        store.fetch(spans_of(server, *((start * 1000, start * 1000 + 10) for start in range(8))))
    until_reads_have_ended()
    assert len(server.log) < 80


def test_reads_that_had_not_begun_at_a_fault_never_do(server):
    second, told = threading.Event(), threading.Event()

    def faults(request):
        if request.start == 0:
            assert second.wait(600)
            return "gone"
        second.set()
        # Its thread is free for more only when the fault is out.
        told.wait(600)
        return None

    server.faults = faults
    store = open_store(server.url, PATIENT._replace(timeout=600.0, connections=2))
    with pytest.raises(DataError, match="no longer there"):
        store.fetch(spans_of(server, *((start * 1000, start * 1000 + 10) for start in range(100))))
    told.set()
    until_reads_have_ended()
    assert len(server.log) == 2


def test_a_server_that_stays_away_is_told_once_while_it_is_waited_for(server, caplog, monkeypatch):
    monkeypatch.setattr(remote, "FIRST_PAUSE", 1e-3)
    server.faults = by_turns("500")
    fetched(server, (0, 10), (1_000, 1_010))
    assert not caplog.messages
    server.faults = by_turns(*["503"] * remote.TOLD_AFTER)
    # One at a time, lest two tell it at the same moment.
    fetched(server, (0, 10), (1_000, 1_010), access=PATIENT._replace(timeout=30.0, retries=9, connections=1))
    assert caplog.messages == [f"{server.url}/a.bin: status 503; trying again, 4 of 9 times by now"]


def test_no_clip_of_a_strangers_index_is_collected_without_bound(server):
    span = Span(f"{server.url}/a.bin", 2**50, 0, remote.MAX_SPAN + 1)
    with pytest.raises(DataError, match=f"a clip of {remote.MAX_SPAN + 1} bytes"):
        open_store(server.url, PATIENT).fetch([span])
    assert not server.log


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(("command", "stalled"), [("inspect", "GET"), ("verify", "GET"), ("verify", "HEAD")])
def test_a_signal_ends_a_command_whose_read_stalls(corpus, command, number, stalled):
    waiting = threading.Event()

    def faults(request):
        if request.method == stalled:
            waiting.set()
            return "stall"
        return None

    corpus.faults = faults
    command = [sys.executable, "-m", "msm_dist", "data", command, f"{corpus.url}/corpus"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert waiting.wait(600)
        process.send_signal(number)
        # The read would go on for minutes: 30 s, eleven times.
        output = process.communicate(timeout=120)[0]
    assert "Traceback" not in output
    assert process.returncode == (130 if number == signal.SIGINT else -signal.SIGTERM)


@pytest.mark.parametrize("form", ["{url}", "{url}/", "{url}/index.json"])
def test_an_index_is_found_by_every_form_of_its_url(corpus, tmp_path, form):
    local = load_index(str(tmp_path / "files" / "corpus"))
    index = load_index(form.format(url=f"{corpus.url}/corpus"), PATIENT)
    assert (index.digest, index.num_clips, index.seconds) == (local.digest, local.num_clips, local.seconds)
    assert [shard.location for shard in index.shards] == [f"{corpus.url}/corpus/{shard.name}" for shard in local.shards]


@pytest.mark.parametrize(
    "shards",
    ["{url}/corpus/noise-{{000000..000001}}.tar", ["{url}/corpus/noise-000000.tar", "{url}/corpus/noise-000001.tar"]],
)
def test_tars_are_selected_by_url(corpus, tmp_path, shards):
    names = [text.format(url=corpus.url) for text in ([shards] if isinstance(shards, str) else shards)]
    index = load_index(names, PATIENT)
    local = load_index([str(tmp_path / "files" / "corpus" / f"noise-00000{number}.tar") for number in range(2)])
    assert (index.digest, index.seconds) == (local.digest, local.seconds)


def test_names_with_odd_characters_are_found(tmp_path):
    index = write_corpus(tmp_path / "files" / "a b%41#c", noise_clips(2), clips_per_shard=2)
    shard = index.shards[0]
    shard.path.rename(shard.path.with_name("x %20#?é.tar"))
    shard.members_path.rename(shard.path.with_name("x %20#?é.members.npy"))
    path = tmp_path / "files" / "a b%41#c" / "index.json"
    path.write_text(path.read_text().replace(shard.name, "x %20#?é.tar"))
    with serving(tmp_path / "files") as server:
        index = load_index(f"{server.url}/a%20b%2541%23c", PATIENT)
        assert check_shards(index, "digest", access=PATIENT) == set()
        assert len(members(index.shards[0])) == 2
        assert load_index(index.shards[0].location, PATIENT).shards == index.shards


def test_shards_are_checked_over_http(corpus, tmp_path):
    folder = tmp_path / "files" / "corpus"
    index = load_index(f"{corpus.url}/corpus", PATIENT)
    corpus.faults = by_turns("503", "reset")
    assert check_shards(index, "size", access=PATIENT) == set()
    assert check_shards(index, "digest", access=PATIENT) == set()
    content = bytearray((folder / "noise-000001.tar").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "noise-000001.tar").write_bytes(content)
    with pytest.raises(DataError, match=r"1 of 3 shards(.|\n)*noise-000001.tar: sha256"):
        check_shards(index, "digest", access=PATIENT)
    (folder / "noise-000001.tar").write_bytes(content[:-512])
    with pytest.raises(DataError, match=r"noise-000001.tar: \d+ bytes, index.json says"):
        check_shards(index, "size", access=PATIENT)
    (folder / "noise-000001.tar").unlink()
    with pytest.raises(DataError, match=r"noise-000001.tar: missing"):
        check_shards(index, "size", access=PATIENT)
    assert check_shards(index, "size", allow_missing=True, access=PATIENT) == {1}


def test_missing_index_and_damaged_sidecar_are_one_message_each(corpus, tmp_path):
    with pytest.raises(DataError, match=r"nowhere: no index.json there; give the URL"):
        load_index(f"{corpus.url}/nowhere", PATIENT)
    index = load_index(f"{corpus.url}/corpus", PATIENT)
    path = tmp_path / "files" / "corpus" / "noise-000000.members.npy"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(DataError, match=r"noise-000000.members.npy: sha256 .* upload noise-000000.members.npy"):
        members(index.shards[0])
    path.unlink()
    with pytest.raises(DataError, match=r"noise-000000.members.npy: .*can't be read \(status 404\)"):
        members(index.shards[0])


def test_a_mixture_takes_each_file_from_where_it_lies(server, corpus, tmp_path):
    path = tmp_path / "files" / "a.bin"
    places = [(str(path), 0, 10), (f"{server.url}/a.bin", 5, 30), (f"{corpus.url}/a.bin", 90, 99), (str(path), 7, 9)]
    spans = [Span(location, len(CONTENT), start, stop) for location, start, stop in places]
    store = FolderStores(PATIENT)
    assert [bytes(found) for found in store.fetch(spans)] == [CONTENT[start:stop] for _, start, stop in places]
    assert (server.ranges(), corpus.ranges()) == ([("a.bin", 5, 30)], [("a.bin", 90, 99)])


def test_index_and_sidecars_that_come_to_harm_on_the_way_are_read_again(corpus):
    corpus.faults = by_turns("short")
    index = load_index(f"{corpus.url}/corpus", PATIENT)
    assert [len(table) for table in tables(index.shards, open_store(index.location, PATIENT))] == [24, 24, 22]
    assert len(corpus.log) == 8


def test_a_workers_fault_comes_in_its_turn_though_another_worker_is_late(corpus, tmp_path):
    local, far = load_index(str(tmp_path / "files" / "corpus")), load_index(f"{corpus.url}/corpus", PATIENT)
    plan = make_plan([shard.clips for shard in far.shards], 7, None, 4, 16, 1)
    layout = BatchLayout(1, 4, 2, 2, 1)
    batch = next(make_loader(plan, local, FEATURES, Data(num_workers=0, crop_frames=FRAMES, block=4), layout, rank=0))
    rows = [row for table in tables(local.shards) for row in table]
    first = {int(rows[clip]["offset"]) for clip in batch.sample_ids[:, 1].tolist()}
    slow, gone = by_turns("stall"), threading.Event()

    def faults(request):
        if request.start in first:
            # Worker 0 is late until long after the other one has ended.
            return slow(request) if gone.is_set() or request.start < 0 else "stall"
        if request.start >= 0:
            gone.set()
            return "gone"
        return None

    corpus.faults = faults
    data = Data(num_workers=2, crop_frames=FRAMES, block=4, read_timeout_seconds=4, read_retries=9)
    with contextlib.closing(make_loader(plan, far, FEATURES, data, layout, rank=0)) as loader:
        assert next(loader).keys == batch.keys
        with pytest.raises(DataError, match="is no longer there"):
            next(loader)


def test_crops_over_http_are_those_of_local_files_and_take_one_request_per_clip(corpus, tmp_path):
    local, far = load_index(str(tmp_path / "files" / "corpus")), load_index(f"{corpus.url}/corpus", PATIENT)
    plan = make_plan([shard.clips for shard in local.shards], 7, None, 4, 16, 2)
    ids = np.array([(0, clip, crop) for clip in range(70) for crop in range(2)])
    expected = CropReader(Source(plan, local, FEATURES, FRAMES)).read(ids)
    corpus.faults = by_turns("busy", "truncate")
    found = CropReader(Source(plan, far, FEATURES, FRAMES, access=PATIENT)).read(ids)
    for mine, theirs in zip(found, expected, strict=True):
        assert (mine.key, mine.offset) == (theirs.key, theirs.offset)
        np.testing.assert_array_equal(mine.values, theirs.values)
    assert len(set(corpus.ranges())) <= 70


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("http://user:HIDDEN@host/corpus", "holds a user name"),
        ("s3://user:HIDDEN@bucket/corpus", "holds a user name"),
        ("https://host/corpus?signature=HIDDEN", "has a query"),
        ("https://host/corpus-{000..0.tar?signature=HIDDEN", "has a query"),
        ("ftp://host/corpus", "ftp:// can't be read at several places at once"),
        ("memory://corpus", "memory:// can't be read at several places at once"),
        ("file:///corpus", "file:// can't be read at several places at once"),
        ("http://[::1", "http://...: its URL can't be read .Invalid IPv6 URL"),
        ("http://user:HIDDEN@[::1", "http://...: its URL can't be read"),
        ("http://", "http://: names no server or bucket"),
        ("s3:///corpus", "names no server or bucket; write s3://NAME/FOLDER"),
        ("http://host:99999/corpus", "no URL of a file"),
        ("reference://x/y", "reference:// can't be opened .TypeError"),
        ("generic://x/y", "generic:// can't be opened .RecursionError"),
        ("dir://x", "dir:// can't be opened"),
        ("asyncwrapper://x", "asyncwrapper:// can't be opened .TypeError"),
        ("nonsense://corpus", "no package for nonsense:// is installed"),
        ("simplecache::s3://bucket/corpus", "chained URLs"),
        ("pipe:cat shards/a.tar", "pipe:"),
    ],
)
def test_other_urls_are_refused_without_showing_a_secret(url, said):
    with pytest.raises(DataError, match=said) as error:
        load_index(url, PATIENT)
    assert "HIDDEN" not in str(error.value)


@pytest.mark.parametrize("url", ["http://host/corpus", "https://host/corpus/"])
def test_a_missing_package_is_named(monkeypatch, url):
    monkeypatch.delitem(sys.modules, "msm_dist.data.http_transport", raising=False)
    monkeypatch.setitem(sys.modules, "urllib3", None)
    with pytest.raises(DataError, match=r"needs the package urllib3.*pip install 'msm-dist\[train\]'"):
        load_index(url)


def test_netrc_gives_the_login(server, tmp_path, monkeypatch):
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login someone password HIDDEN\n")
    (tmp_path / "netrc").chmod(0o600)
    fetched(server, (0, 10))
    assert server.log[-1].headers["authorization"].startswith("Basic ")
    (tmp_path / "netrc").write_text("machine elsewhere login someone password HIDDEN\n")
    fetched(server, (0, 10))
    assert "authorization" not in server.log[-1].headers
    (tmp_path / "netrc").write_text("machin HIDDEN\n")
    with pytest.raises(DataError, match="netrc: can't be read"):
        fetched(server, (0, 10))


def test_a_proxy_of_the_environment_is_used(server, monkeypatch):
    monkeypatch.setenv("http_proxy", server.url)
    with serving(".") as other:
        elsewhere = other.url.replace("127.0.0.1", "shards.invalid")
    store = open_store(elsewhere, PATIENT)
    server.faults = lambda request: "teapot"
    with pytest.raises(DataError, match="status 418"):
        store.fetch([Span(f"{elsewhere}/a.bin", 10, 0, 5)])
    monkeypatch.setenv("no_proxy", "shards.invalid")
    with pytest.raises(DataError, match="no such host is known"):
        open_store(elsewhere, PATIENT._replace(retries=0)).fetch([Span(f"{elsewhere}/a.bin", 10, 0, 5)])
