"""Verifying a corpus: what is compared, and that names are found however a tar writes them."""

import tarfile
from dataclasses import replace

import numpy as np
import pytest

from msm_dist.config import Features
from msm_dist.data.index import file_sha256, load_index, member_table, members, write_index, write_members
from msm_dist.data.pack import PackSettings, pack
from msm_dist.data.shards import index_shards
from msm_dist.data.verify import num_processes, verify_shards
from msm_dist.errors import DataError
from tests.audio_files import encode, noise, write_audio
from tests.http_server import serving
from tests.shards import damage_clip
from tests.test_data_commands import run
from tests.test_shards import write_tar


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
@pytest.mark.parametrize("twice", [False, True])
def test_names_short_long_and_foreign_agree_with_the_sidecar(tmp_path, form, twice):
    files = {"plain.flac": encode(noise(4000)), "00/in.folder.wav": encode(noise(5000), "wav")}
    if form != tarfile.USTAR_FORMAT:
        files |= {
            "long" * 40 + ".flac": encode(noise(6000)),
            "chouette-hulotte-\u00e9t\u00e9.ogg": encode(noise(7000), "ogg"),
        }
    tars = [
        write_tar(tmp_path / f"{name}.tar", files | {"README": name.encode()}, format=form)
        for name in ("a", "b")[: 1 + twice]
    ]
    index = index_shards(tars, Features())
    assert index.num_clips == len(files) * (1 + twice)
    assert verify_shards(index, decode_clips=True) == []


def test_a_sidecar_that_points_at_another_clip_is_found(tmp_path):
    files = {f"clip{i}.flac": encode(noise(4000, i)) for i in range(4)}
    index = index_shards([write_tar(tmp_path / "a.tar", files)], Features())
    table = members(index.shards[0]).copy()
    for name in ("offset", "size"):
        table[name][[1, 2]] = table[name][[2, 1]]
    digest = write_members(index.shards[0].members_path, member_table(table.tolist()))
    write_index(replace(index, shards=(replace(index.shards[0], members_sha256=digest),)))
    faults = verify_shards(load_index(str(tmp_path)), decode_clips=False)
    assert [fault.split(": ")[1] for fault in faults] == ["clip1", "clip2"]
    assert all("which its tar does not" in fault for fault in faults)


def with_rows(index, change):
    """The index, of one shard, with a sidecar whose rows (offset, size, samples, rate, format, key) are changed."""
    rows = change([list(row) for row in members(index.shards[0]).tolist()])
    digest = write_members(index.shards[0].members_path, member_table(map(tuple, rows)))
    return replace(index, shards=(replace(index.shards[0], members_sha256=digest),))


def test_a_header_of_another_size_or_name_is_found(tmp_path):
    tar = write_tar(tmp_path / "a.tar", {"here.flac": encode(noise(4000)), "one.flac": encode(noise(4000, 1))})
    index = index_shards([tar], Features())
    offset, size, *rest = members(index.shards[0]).tolist()[1]
    index = with_rows(index, lambda rows: [rows[0], [offset, size - 1, *rest]])
    (fault,) = verify_shards(index, decode_clips=False)
    assert fault.startswith(f"{tar}: one: its sidecar says")
    for key, faults in ((b"one", 0), (b"a/one", 0), (b"phone", 1), (b"ne", 1), (b"one/other", 1)):
        index = with_rows(index, lambda rows, key=key: [rows[0], [offset, size, *rest[:-1], key]])
        assert len(verify_shards(index, decode_clips=False)) == faults, key


def test_stored_log_mels_of_another_length_than_their_clips_are_found(tmp_path):
    for number in range(2):
        write_audio(tmp_path / "files" / f"{number}.flac", noise(16000, number))
    index = pack(tmp_path / "files", tmp_path / "mels", PackSettings(kind="logmel"))
    assert verify_shards(index, decode_clips=True) == []
    key = members(index.shards[0])[1]["key"].decode()
    longer = with_rows(index, lambda rows: [rows[0], [*rows[1][:2], 16160, *rows[1][3:]]])
    (fault,) = verify_shards(longer, decode_clips=False)
    assert f"{key}: its stored log-mel has" in fault and "102 frames of 80 bands need" in fault


def test_every_flipped_byte_of_a_shard_is_found(tmp_path):
    index = index_shards([write_tar(tmp_path / "a.tar", {"a.wav": encode(noise(4000), "wav")})], Features())
    shard = index.shards[0]
    content = shard.path.read_bytes()
    for place in np.linspace(0, len(content) - 1, 40).astype(int).tolist():
        shard.path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        (fault,) = verify_shards(index, decode_clips=False)
        assert "sha256" in fault
    shard.path.write_bytes(content)
    assert file_sha256(shard.path) == shard.sha256 and verify_shards(index, decode_clips=False) == []


def test_decoding_names_the_clips_behind_a_digest(tmp_path):
    tars = []
    for name in ("a", "b", "c"):
        tars.append(write_tar(tmp_path / f"{name}.tar", {f"{name}{i}.flac": encode(noise(8000, i)) for i in range(3)}))
    index = index_shards(tars, Features())
    damage_clip(index, 1)
    damage_clip(index, 2)
    tars[2].write_bytes(tars[2].read_bytes()[:3000])
    found = [fault.split(": ")[1:] for fault in verify_shards(index, decode_clips=True)]
    assert [parts[0].split()[0] for parts in found] == ["sha256", "a1", "a2", "3000"]
    assert found[1][1].startswith("undecodable") and found[2][1].startswith("undecodable")
    (digest, size) = verify_shards(index, decode_clips=False)
    assert "sha256" in digest and "3000 bytes" in size


def test_a_server_without_ranges_is_told_once_and_is_no_fault_of_the_shards(tmp_path):
    folder = tmp_path / "files"
    tars = [write_tar(folder / f"{name}.tar", {f"{name}.flac": encode(noise(8000))}) for name in ("a", "b", "c")]
    index_shards(tars, Features())
    tars[0].unlink()
    with serving(folder) as server:
        with pytest.raises(DataError, match="1 fault;(.|\n)*a.tar: missing"):
            run("verify", server.url, "--workers", 1)
        server.faults = lambda request: "whole" if request.start >= 0 else None
        with pytest.raises(DataError) as error:
            run("verify", server.url, "--workers", 1)
    message = str(error.value)
    assert message.count("\n") == 0 and message.count("with the whole file") == 1
    assert "b.tar" in message and "byte ranges" in message and "fault" not in message and "pack" not in message


def test_the_command_says_what_it_compared_and_how_fast(tmp_path):
    for name in ("a", "b"):
        write_tar(tmp_path / f"{name}.tar", {f"{name}.flac": encode(noise(8000))})
    index_shards(sorted(tmp_path.glob("*.tar")), Features())
    output = run("verify", tmp_path, "--workers", 1)
    assert "sizes, digests, tables of clips, the header of every clip" in output and "MB/s" in output
    (tmp_path / "b.tar").unlink()
    with pytest.raises(DataError, match="1 fault;(.|\n)*b.tar: missing"):
        run("verify", tmp_path, "--workers", 1)


def test_a_corpus_behind_a_url_is_verified_and_looked_into(tmp_path):
    folder = tmp_path / "files"
    tars = [write_tar(folder / f"{name}.tar", {f"{name}.flac": encode(noise(8000))}) for name in ("a", "b")]
    index_shards(tars, Features())
    with serving(folder) as server:
        output = run("verify", server.url, "--workers", 1)
        assert "(sizes, digests, tables of clips)" in output
        with pytest.raises(DataError, match="--decode is for shards on this machine"):
            run("verify", server.url, "--decode", "--workers", 1)
        assert "2 clips" in run("inspect", server.url)
        assert "looked up in shards on this machine only" in run("inspect", server.url, "b", "--out", tmp_path / "out")
        assert {path.name for path in (tmp_path / "out").iterdir()} == {"b.wav", "b.png"}
        content = bytearray(tars[1].read_bytes())
        content[2000] ^= 1
        tars[1].write_bytes(content)
        with pytest.raises(DataError, match="b.tar: sha256"):
            run("verify", server.url, "--workers", 1)


def test_processes_are_started_where_they_are_worth_it(tmp_path):
    tars = [write_tar(tmp_path / f"{name}.tar", {f"{name}.flac": encode(noise(8000))}) for name in ("a", "b", "c")]
    index = index_shards(tars, Features())
    assert num_processes(index, decode_clips=False, workers=8) == 1
    assert num_processes(index, decode_clips=True, workers=8) == 3
    large = replace(index, shards=tuple(replace(shard, bytes=3 * 2**30) for shard in index.shards))
    assert num_processes(large, decode_clips=False, workers=8) == 3
    assert num_processes(large, decode_clips=False, workers=2) == 2
