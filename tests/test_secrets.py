"""Secrets in URLs, commands and files of passwords reach no log, no TensorBoard file and no saved setting."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from msm_dist.config import load_config, parse_config
from msm_dist.data.http_transport import HttpTransport
from msm_dist.data.index import load_index
from msm_dist.data.pipe_store import PipeFiles
from msm_dist.data.storage import Access
from msm_dist.errors import ConfigError, DataError, MsmError
from msm_dist.evaluate import hub
from msm_dist.redact import holds_secret, redacted
from tests.http_server import serving
from tests.test_pretrain import Runs

SECRET = "pl4nted-S3cret"
HELD = [
    f"https://me:{SECRET}@example.org/shards",
    f"https://{SECRET}@example.org/shards",
    f"s3://me:{SECRET}@bucket/shards",
    f"hf://me:{SECRET}@owner/name",
    f"https:/me:{SECRET}@example.org/shards",  # as a Path keeps it
    f"s3://AKIA:a/b{SECRET}@bucket/shards",
    f"https://me:a@{SECRET}@example.org/shards",
    f"https://me:a#{SECRET}@example.org/shards",
    f"https://me:a?{SECRET}@example.org/shards",
    f"https://storage.example.org/shards?key={SECRET}",
    f"https://storage.example.org/shards?{SECRET}",
    f"pipe:curl 'https://example.org/get?auth={SECRET}&file=/shards/'",
    f"https://example.org/shards?X-Amz-Signature={SECRET}",
    f"https://example.org/shards?sig={SECRET}&a=b",
    f"https://example.org/shards?a=b&access_token={SECRET}",
    f"pipe:curl -H 'Authorization: Bearer {SECRET}' https://example.org/shards/",
    f"pipe:curl -H 'authorization:{SECRET}' https://example.org/shards/",
    f"pipe:curl -H 'X-Auth-Token: {SECRET}' https://example.org/shards/",
    f"pipe:curl -u me:{SECRET} https://example.org/shards/",
    f"pipe:curl --user 'me:{SECRET}' https://example.org/shards/",
    f"pipe:tool --password={SECRET} /shards/",
    f"pipe:tool --api-key {SECRET} /shards/",
    f"pipe:AWS_SECRET_ACCESS_KEY={SECRET} aws s3 cp /shards/",
]
OPEN = [
    "data/audioset",
    "https://example.org/shards/{000..009}.tar",
    "hf://owner/name@main",
    "pipe:ssh me@host cat /data/audioset/",
    'pipe:curl -H "Authorization: Bearer $TOKEN" https://example.org/shards/',
    'pipe:curl -u "$ME:$PASSWORD" https://example.org/shards/',
    "pipe:curl -u me:$PASSWORD https://example.org/shards/",
    "pipe:curl --token ${TOKEN} https://example.org/shards/",
    "pipe:curl --netrc https://example.org/shards/",
    "pipe:tar -u -f x /shards/",
    "pipe:curl 'https://example.org/get?file=/shards/'",
    "https://example.org:8443/shards@v2/train",
    "https://[::1]:8443/shards@v2/train",
    "my token=5/shards",
]


@pytest.mark.parametrize("text", HELD)
@pytest.mark.parametrize(
    "setting", ["data.shards", "data.valid_shards", "train.init_from", "probe.data", "engine.deepspeed"]
)
def test_setting_with_a_secret_is_refused_without_showing_it(tmp_path, text, setting):
    (tmp_path / "x.yaml").write_text("train: {steps: 1}")
    with pytest.raises(ConfigError) as refused:
        load_config(tmp_path / "x.yaml", [f"{setting}={json.dumps(text)}"])
    assert SECRET not in str(refused.value)
    assert f"{setting}: holds a password" in str(refused.value)


@pytest.mark.parametrize("text", HELD)
def test_mix_and_list_with_a_secret_are_refused_without_showing_it(text):
    for data in ({"mix": {text: 1.0}}, {"shards": ["a.tar", text]}, {"shards": [[text]]}, {"shardz": text}, text):
        with pytest.raises(ConfigError) as refused:
            parse_config({"train": {"steps": 1}, "data": data}, "x.yaml")
        assert SECRET not in str(refused.value)


@pytest.mark.parametrize("text", OPEN)
def test_location_without_a_secret_is_taken(text):
    assert not holds_secret(text)
    assert parse_config({"train": {"steps": 1}, "data": {"shards": text}}, "x.yaml").data.shards == text


@pytest.mark.parametrize("text", HELD)
def test_no_message_of_ours_holds_a_secret(text):
    for kind in (MsmError, DataError):
        assert SECRET not in str(kind(f"{text}: can't be read"))
    with pytest.raises(MsmError) as refused:
        load_index(text, Access(0.1, 0, 1))
    assert SECRET not in str(refused.value)


def test_control_characters_do_not_reach_the_terminal():
    assert str(DataError("a\x1b[2J\x07\x9b\nb\tc")) == "a\\x1b[2J\\x07\\x9b\nb\tc"


@pytest.mark.parametrize(
    "text",
    [
        f"HTTPSConnectionPool(host='a.org', port=443): Max retries exceeded with url: /a?X-Amz-Signature={SECRET}",
        f"403, message='Forbidden', url='https://cdn.example.org/a?Expires=1&Signature={SECRET}&Key-Pair-Id=K'",
        f'Failed to connect to proxy URL: "http://me:{SECRET}@proxy:3128"',
        f'Could not connect to the endpoint URL: "https://b.s3.amazonaws.com/a?X-Amz-Security-Token={SECRET}"',
    ],
)
def test_words_of_libraries_lose_their_signatures(monkeypatch, text):
    assert SECRET not in redacted(text)
    hugging = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hugging, "snapshot_download", lambda *_, **__: (_ for _ in ()).throw(OSError(text)))
    with pytest.raises(MsmError) as refused:
        hub.download("hf://owner/name")
    assert SECRET not in str(refused.value)


@pytest.mark.parametrize(
    "proxy", [f"http://me:{SECRET}@host:port", f"http://me:{SECRET}@[::1", f"ftp://me:{SECRET}@host"]
)
def test_proxy_that_is_none_is_not_shown(monkeypatch, proxy):
    monkeypatch.setenv("http_proxy", proxy)
    monkeypatch.setenv("no_proxy", "")
    with pytest.raises(DataError) as refused:
        HttpTransport("http://example.org/a", Access(0.1, 0, 1)).size("http://example.org/a/index.json")
    assert SECRET not in str(refused.value) and "http_proxy" in str(refused.value)


@pytest.mark.parametrize("text", [f"machine x login me {SECRET}", f"{SECRET}", f"machine x login me passwd {SECRET}"])
def test_file_of_passwords_that_is_damaged_is_not_quoted(monkeypatch, tmp_path, text):
    (tmp_path / "netrc").write_text(text)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with pytest.raises(DataError) as refused:
        HttpTransport("http://example.org/a", Access(0.1, 0, 1))
    assert SECRET not in str(refused.value) and "line 1" in str(refused.value)


def test_what_a_command_says_loses_the_values_of_its_variables(monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("TOKEN", SECRET)
    location = f'pipe:sh -c \'echo "> Authorization: $TOKEN" >&2; exit 1; cat "$0"\' {tmp_path}/index.json'
    with caplog.at_level(logging.WARNING), pytest.raises(DataError) as refused:
        PipeFiles(location, Access(5, 0, 1, True)).read([location])
    assert SECRET not in str(refused.value) + caplog.text
    assert "Authorization: $TOKEN" in caplog.text


# ---- real commands


class Planted:
    """Runs commands with a secret in every place where one may be, and looks for it in all that they leave."""

    def __init__(self, folder: Path, url: str):
        self.folder, self.url = folder, url
        host = url.removeprefix("http://").partition(":")[0]
        (folder / "netrc").write_text(f"machine {host} login me password {SECRET}\n")
        (folder / "netrc").chmod(0o600)
        names = ("TOKEN", "AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "WANDB_API_KEY")
        self.environment = os.environ | dict.fromkeys(names, SECRET) | {"NETRC": str(folder / "netrc")}
        self.environment |= {"https_proxy": f"http://me:{SECRET}@127.0.0.1:9"}

    def run(self, *words: str) -> tuple[int, str]:
        command = [sys.executable, "-m", "msm_dist", *words]
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=600)
        output = done.stdout + done.stderr
        assert SECRET not in output
        assert "Traceback" not in output, output
        return done.returncode, output

    def leaks(self) -> list[Path]:
        """Files that hold the secret, other than where it was put."""
        files = [path for path in self.folder.rglob("*") if path.is_file() and path.name != "netrc"]
        return [path for path in files if SECRET.encode() in path.read_bytes()]


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    runs = Runs(tmp_path_factory.mktemp("runs"))
    with serving(runs.folder) as server:
        server.faults = lambda request: "redirect" if request.number % 2 else None
        yield runs, server, Planted(runs.folder, server.url)


@pytest.mark.distributed
def test_run_behind_a_password_leaves_no_trace_of_it(planted):
    runs, server, commands = planted
    settings = [f"data.shards={server.url}/train", f"data.valid_shards={server.url}/valid", "train.steps=4"]
    settings += ["train.pictures_every=2", "optim.warmup_steps=1", "data.read_timeout_seconds=5"]
    code, output = commands.run("pretrain", *runs.command("net", *settings))
    assert code == 0, output
    assert any("authorization" in request.headers for request in server.log), "the password is used"
    assert any(request.name.startswith("again/") for request in server.log), "a signed redirect was followed"
    assert list((runs.folder / "net" / "tensorboard").iterdir())

    # Through a command that takes its token from the environment.
    command = 'pipe:sh -c \'test "$TOKEN" && cat "$0"\' ' + f"{runs.train}"
    settings = ["data.allow_pipe=true", f"data.shards={json.dumps(command)}", "train.steps=2", "optim.warmup_steps=1"]
    code, output = commands.run("pretrain", *runs.command("pipe", *settings))
    assert code == 0, output
    assert "$TOKEN" in (runs.folder / "pipe" / "config.yaml").read_text()
    assert commands.leaks() == []


@pytest.mark.distributed
def test_commands_that_fail_leave_no_trace_of_a_secret(planted):
    runs, server, commands = planted
    host = server.url.removeprefix("http://")
    before = len(list(runs.folder.iterdir()))
    login, signed = f"http://me:{SECRET}@{host}/train", f"{server.url}/train?X-Amz-Signature={SECRET}"
    header = f"pipe:curl -H 'Authorization: Bearer {SECRET}' {server.url}/train/"
    for words in (
        ["data", "inspect", login],
        ["data", "verify", signed],
        ["pretrain", *runs.command("bad", f"data.shards={login}")],
        ["plan", *runs.command("bad", "data.allow_pipe=true", f"data.shards={json.dumps(header)}")],
        ["embed", str(runs.train), "--model", f"hf://me:{SECRET}@owner/name", "--out", str(runs.folder / "x.npz")],
    ):
        code, output = commands.run(*words)
        assert code == 2 and "msm-dist: " in output, output
    assert commands.leaks() == []
    assert len(list(runs.folder.iterdir())) == before, "nothing of a run that is refused is written"
