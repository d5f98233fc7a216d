"""Weights from a Hub: a made-up one on loopback, its cache, and what is said where there are none."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from hashlib import sha1
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from msm_dist.config import Features, Model
from msm_dist.errors import CheckpointError, ConfigError
from msm_dist.evaluate.encoder import Encoder
from msm_dist.evaluate.hub import download
from msm_dist.model.mae import MaskedSpectrogramModel
from msm_dist.model.weights import WeightsInfo, save

INFO = WeightsInfo(
    Model(embed_dim=32, depth=1, num_heads=1, decoder_embed_dim=32, decoder_depth=1, decoder_num_heads=1),
    Features(mean=-6.5, std=3.5),
    208,
)
COMMIT = "0123456789" * 4
LOAD = """
import sys
from msm_dist.errors import reporting
from msm_dist.evaluate.encoder import Encoder
for reference in sys.argv[1:]:
    if code := reporting(lambda: print(Encoder.load(reference).digest())):
        print(code)
"""


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder(MaskedSpectrogramModel(INFO.model, 80, 208, seed=3), INFO)


class Hub:
    """Repositories by name, each {revision: commit} and {file: content}; the paths that were asked for."""

    def __init__(self) -> None:
        self.repositories: dict[str, tuple[dict[str, str], dict[str, bytes]]] = {}
        self.asked: list[str] = []


@pytest.fixture
def hub(tmp_path) -> Iterator[tuple[Hub, dict[str, str]]]:
    """A Hub with weights in it, and the environment of a process that uses it."""
    pytest.importorskip("huggingface_hub")
    folder = save(tmp_path / "export", MaskedSpectrogramModel(INFO.model, 80, 208, seed=3).state_dict(), INFO)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    made = Hub()
    made.repositories["lab/msm"] = {"main": COMMIT, "v1": COMMIT}, files | {"huge.bin": b"x", "README.md": b"# Card\n"}
    made.repositories["lab/other"] = {"main": COMMIT}, {"pytorch_model.bin": b"x"}

    class Answers(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            answer(self, made)

        do_HEAD = do_GET

        def log_message(self, *words: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    plain = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()}
    home = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    yield made, plain | home | {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}"}
    server.shutdown()
    server.server_close()


def answer(request: BaseHTTPRequestHandler, hub: Hub) -> None:
    """What the Hub's interface says to a path."""
    path = urlsplit(request.path).path
    hub.asked.append(path)
    parts = path.strip("/").split("/")
    api = parts[:2] == ["api", "models"]
    owner, name, kind, *rest = parts[2:] if api else parts
    known = hub.repositories.get(f"{owner}/{name}")
    headers: dict[str, str] = {}
    status, content = 404, b"{}"
    if known is None:
        headers["X-Error-Code"] = "RepoNotFound"
    elif (revision := rest[0]) not in (*known[0], *known[0].values()):
        headers["X-Error-Code"] = "RevisionNotFound"
    elif kind == "revision":
        entries = [{"rfilename": file} for file in known[1]]
        status, content = 200, json.dumps({"id": f"{owner}/{name}", "sha": COMMIT, "siblings": entries}).encode()
    elif kind == "tree":
        entries = [
            {"type": "file", "path": file, "size": len(body), "oid": sha1(body).hexdigest()}
            for file, body in known[1].items()
        ]
        status, content = 200, json.dumps(entries).encode()
    elif kind == "resolve" and rest[1] in known[1]:
        status, content = 200, known[1][rest[1]]
        headers |= {"ETag": f'"{sha1(content).hexdigest()}"', "X-Repo-Commit": known[0].get(revision, revision)}
    request.send_response(status)
    for header, value in (headers | {"Content-Length": str(len(content))}).items():
        request.send_header(header, value)
    request.end_headers()
    if request.command == "GET":
        request.wfile.write(content)


def load(environment: dict[str, str], *references: str) -> tuple[list[str], list[str]]:
    """The digests of the encoders, or the exit codes, and the messages.

    In a process of its own: huggingface_hub reads its environment when it is imported.
    """
    ended = subprocess.run([sys.executable, "-c", LOAD, *references], env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert "Traceback" not in ended.stderr
    return ended.stdout.split(), [line for line in ended.stderr.splitlines() if line.startswith("msm-dist: ")]


def test_weights_come_from_a_hub_and_then_from_its_cache(hub, encoder):
    made, environment = hub
    found, _ = load(environment, "hf://lab/msm@v1", "hf://lab/msm@v1")
    assert found == [encoder.digest()] * 2
    fetched = [path.rpartition("/")[2] for path in made.asked if "/resolve/" in path]
    assert set(fetched) == {"model.safetensors", "config.json"}
    asked = len(made.asked)
    found, messages = load(environment | {"HF_HUB_OFFLINE": "1"}, "hf://lab/msm@v1", "hf://lab/elsewhere")
    assert found == [encoder.digest(), "2"]
    assert "hf://lab/elsewhere: can't be fetched" in messages[0]
    assert len(made.asked) == asked


def test_what_a_hub_has_not_is_named(hub):
    found, messages = load(hub[1], "hf://lab/absent", "hf://lab/msm@v9", "hf://lab/other")
    assert found == ["2"] * 3
    assert [message.partition(" (")[0] for message in messages[:2]] == [
        "msm-dist: hf://lab/absent: can't be fetched",
        "msm-dist: hf://lab/msm@v9: can't be fetched",
    ]
    assert "hf://lab/other: has no model.safetensors and no config.json" in messages[2]


@pytest.mark.parametrize("reference", ["hf://msm", "hf://a/b/c", "hf://a/b@", "hf://", "hf://a/../b"])
def test_a_reference_that_names_no_repository_is_an_error(reference):
    with pytest.raises(CheckpointError, match="must be hf://owner/name"):
        download(reference)


def test_the_extra_is_named_where_the_package_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ConfigError, match=r"pip install 'msm-dist\[eval\]'"):
        Encoder.load(Path("hf://lab/msm"))
