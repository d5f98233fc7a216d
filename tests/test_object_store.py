"""Shards in an object store: an S3 emulator on loopback, in a process of its own."""

import asyncio
import json
import re
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

import numpy as np
import pytest

from msm_dist.config import BatchLayout, Data
from msm_dist.data import fsspec_transport, stream
from msm_dist.data.index import check_shards, load_index
from msm_dist.data.plan import make_plan
from msm_dist.data.storage import Access, Span, open_store
from msm_dist.errors import DataError
from tests.http_server import by_turns, serving
from tests.s3_server import put, s3_serving
from tests.shards import noise_clips, write_corpus
from tests.test_crops import FEATURES, FRAMES

fsspec = pytest.importorskip("fsspec")
pytest.importorskip("s3fs")
pytest.importorskip("moto")
AsyncFileSystem = pytest.importorskip("fsspec.asyn").AsyncFileSystem

PATIENT = Access(timeout=60.0, retries=2, connections=4)
CONTENT = bytes(range(256)) * 40


@pytest.fixture(scope="module")
def emulator():
    """The environment that leads to an S3 emulator."""
    with s3_serving() as environment:
        yield environment


@pytest.fixture
def s3(emulator, monkeypatch):
    """Puts a folder's files into the bucket `corpora` of the store that the environment names."""
    for name, value in emulator.items():
        monkeypatch.setenv(name, value)
    return partial(put, emulator)


@pytest.fixture
def corpus(tmp_path, s3):
    index = write_corpus(tmp_path / "corpus", noise_clips(70), clips_per_shard=24)
    s3(index.root, "corpora", "noise")
    return index


def test_index_tars_and_brace_patterns_are_found_and_checked(corpus):
    index = load_index("s3://corpora/noise", PATIENT)
    assert (index.digest, index.num_clips) == (corpus.digest, corpus.num_clips)
    assert check_shards(index, "digest", access=PATIENT) == set()
    some = load_index("s3://corpora/noise/noise-{000000..000001}.tar", PATIENT)
    assert [shard.location for shard in some.shards] == [f"s3://corpora/noise/noise-00000{i}.tar" for i in range(2)]
    with pytest.raises(DataError, match="s3://corpora/nowhere: no index.json there"):
        load_index("s3://corpora/nowhere", PATIENT)


def test_missing_and_cut_off_objects_are_told_apart(corpus, tmp_path, s3):
    index = load_index("s3://corpora/noise", PATIENT)
    import boto3

    boto3.client("s3").delete_object(Bucket="corpora", Key="noise/noise-000001.tar")
    assert check_shards(index, "size", allow_missing=True, access=PATIENT) == {1}
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "noise-000001.tar").write_bytes(b"short")
    s3(tmp_path / "cut", "corpora", "noise")
    with pytest.raises(DataError, match="noise-000001.tar: 5 bytes, index.json says"):
        check_shards(index, "size", access=PATIENT)
    store = open_store(index.location, PATIENT)
    for shard, start in ((index.shards[1], 0), (index.shards[0], 100)):
        span = Span(shard.location, index.shards[1].bytes + 1, start, start + 10)
        with pytest.raises(DataError, match=r"\d+ bytes, its index says"):
            store.fetch([span])


@pytest.mark.parametrize("workers", [0, 2])
def test_forked_workers_read_what_local_files_give_though_the_parent_has_read_before(corpus, workers):
    far = load_index("s3://corpora/noise", PATIENT)
    check_shards(far, "digest", access=PATIENT)
    open_store(far.location, PATIENT).fetch([Span(far.shards[0].location, far.shards[0].bytes, 0, 10)])
    plan = make_plan([shard.clips for shard in far.shards], 7, None, 4, 16, 1)
    data = Data(num_workers=workers, crop_frames=FRAMES, block=4, read_timeout_seconds=60.0)
    layout = BatchLayout(world_size=1, micro_batch=4, accumulation=2, blocks_per_step=2, blocks_per_micro_batch=1)
    batches = []
    for index in (far, corpus):
        loader = stream.make_loader(plan, index, FEATURES, data, layout, rank=0)
        batches.append([next(loader) for _ in range(20)])
        loader.close()
    for mine, theirs in zip(*batches, strict=True):
        assert mine.keys == theirs.keys
        np.testing.assert_array_equal(mine.crops, theirs.crops)


def test_faults_of_the_store_are_tried_again_and_told(tmp_path, s3, monkeypatch):
    """A plain server in the store's place: S3's requests for an object are those of HTTP."""
    (tmp_path / "corpora").mkdir()
    (tmp_path / "corpora" / "a.bin").write_bytes(CONTENT)
    # In a second a busy machine does not come from the store's library to its first request.
    quick = Access(timeout=3.0, retries=3, connections=4)
    span = Span("s3://corpora/a.bin", len(CONTENT), 100, 400)
    with serving(tmp_path) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        for fault in ("500", "503", "stall", "stall-body", "truncate", "reset", "short"):
            server.faults = by_turns(fault)
            assert bytes(open_store("s3://corpora", quick).fetch([span])[0]) == CONTENT[100:400], fault
        server.faults = lambda request: "stall" if request.start >= 0 else None
        with pytest.raises(DataError, match=r"a.bin: can't be read \(.+\); tried 4 times over .* start again") as error:
            open_store("s3://corpora", quick).fetch([span])
        assert "HIDDEN" not in str(error.value)
        server.faults = lambda request: "forbidden"
        with pytest.raises(DataError, match="no access"):
            open_store("s3://corpora", quick).fetch([span])


class GoogleStorage(BaseHTTPRequestHandler):
    """The two requests of Google's JSON interface that reads are made of: an object's data sheet and its bytes."""

    protocol_version = "HTTP/1.1"
    faults = 0

    def do_GET(self):
        path, range_ = unquote(self.path), self.headers.get("Range")
        status, body = 404, b"{}"
        if type(self).faults:
            type(self).faults -= 1
            status = 503
        elif path.startswith("/storage/v1/b/bucket/o?"):
            status = 200
        elif path.endswith("/o/x/a.bin"):
            status, body = 200, json.dumps({"name": "x/a.bin", "bucket": "bucket", "size": str(len(CONTENT))}).encode()
        elif path.startswith("/download/") and range_:
            start, _, last = range_.removeprefix("bytes=").partition("-")
            status, body = 206, CONTENT[int(start) : int(last) + 1]
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        """Nothing."""


def test_google_storage_is_read_by_its_own_interface(monkeypatch):
    pytest.importorskip("gcsfs")
    server = ThreadingHTTPServer(("127.0.0.1", 0), GoogleStorage)
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{server.server_address[1]}")
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        store = open_store("gs://bucket/x", PATIENT)
        GoogleStorage.faults = 1
        assert store.sizes(["gs://bucket/x/a.bin", "gs://bucket/x/none.bin"]) == [len(CONTENT), None]
        assert store.read(["gs://bucket/x/a.bin"]) == [CONTENT]
        span = Span("gs://bucket/x/a.bin", len(CONTENT), 10, 300)
        GoogleStorage.faults = 1
        assert bytes(store.fetch([span])[0]) == CONTENT[10:300]
        with pytest.raises(DataError, match="its index says"):
            store.fetch([span._replace(size=len(CONTENT) + 1)])
    finally:
        server.shutdown()
        server.server_close()


def test_no_credentials_are_one_message(s3, monkeypatch, tmp_path):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    with pytest.raises(DataError, match=r"s3://corpora/noise/index.json: no access \(NoCredentialsError"):
        load_index("s3://corpora/noise", PATIENT)


def test_a_name_that_no_bucket_can_have_is_told_at_once(s3):
    with pytest.raises(DataError, match=r"s3://No_Bucket!/noise/index.json: no access .*check the URL"):
        load_index("s3://No_Bucket!/noise", PATIENT)


@pytest.mark.parametrize(("scheme", "extra"), [("s3", "s3"), ("gs", "gcs")])
def test_a_missing_package_is_named(monkeypatch, scheme, extra):
    import fsspec

    def absent(protocol):
        raise ImportError("Install it")

    monkeypatch.setattr(fsspec, "get_filesystem_class", absent)
    remedy = re.escape(f"pip install 'msm-dist[{extra}]'")
    with pytest.raises(DataError, match=f"no package for {scheme}:// is installed; {remedy}"):
        load_index(f"{scheme}://bucket/corpus", PATIENT)


def test_signatures_in_errors_of_a_library_are_left_out():
    shown = fsspec_transport._shown(ValueError("GET https://host/a?X-Amz-Signature=HIDDEN failed\nmore"))
    assert shown == "ValueError: GET https://host/a?... failed"


class Objects(AsyncFileSystem):
    """A store of one object, which keeps how many requests were under way at once before its first answer."""

    protocol = "objects"
    cachable = False
    content = CONTENT
    under_way = most_before_first = answered = asked_sizes = 0

    async def _answer(self, answer):
        kind = type(self)
        kind.under_way += 1
        if not kind.answered:
            kind.most_before_first = max(kind.most_before_first, kind.under_way)
        # Time for others to come: those that wait for the first answer don't.
        await asyncio.sleep(0.2)
        kind.answered += 1
        kind.under_way -= 1
        return answer

    async def _info(self, path, **options):
        type(self).asked_sizes += 1
        return await self._answer({"name": path, "type": "file", "size": len(self.content)})

    async def _cat_file(self, path, start=None, end=None, **options):
        return await self._answer(self.content[start:end])


@pytest.fixture
def objects():
    kind = type("Store", (Objects,), {})
    fsspec.register_implementation("objects", kind, clobber=True)
    return kind


def test_the_first_request_connects_alone(objects):
    store = open_store("objects://bucket", PATIENT)
    spans = [Span(f"objects://bucket/{name}.bin", len(CONTENT), 0, 100) for name in "abcd"]
    assert [bytes(content) for content in store.fetch(spans)] == [CONTENT[:100]] * 4
    assert (objects.most_before_first, objects.answered) == (1, 8)


def test_an_object_that_was_replaced_is_of_another_size(objects):
    store = open_store("objects://bucket", PATIENT)
    span = Span("objects://bucket/a.bin", len(CONTENT), 1000, 1100)
    assert [bytes(store.fetch([span])[0]) for _ in range(2)] == [CONTENT[1000:1100]] * 2
    assert objects.asked_sizes == 1
    objects.content = CONTENT[:500]
    with pytest.raises(DataError, match="500 bytes, its index says"):
        store.fetch([span])
    assert objects.asked_sizes == 2
