"""What index.json, sidecars and stored log-mels claim is compared with what is there before memory is taken for it.

Every call runs in a child whose address space is limited and whose peak is compared with the bound.
"""

import hashlib
import io
import json
import pickle
import struct
import zipfile
from pathlib import Path

import pytest

from msm_dist.config import Features
from msm_dist.data.index import Index, Shard, file_sha256, load_index, member_table, members, write_index, write_members
from msm_dist.data.logmel import encode_clip
from msm_dist.data.verify import verify_shards
from msm_dist.errors import DataError
from msm_dist.features import LogMel
from tests.audio_files import noise
from tests.hostile import FEW, MIB, inspect_first, open_run
from tests.hostile_files import END, Payload, member
from tests.shards import noise_clips, write_corpus


@pytest.fixture
def corpus(tmp_path) -> Index:
    return write_corpus(tmp_path / "corpus", noise_clips(4), 4)


def write_entry(index: Index, **values) -> None:
    """Claim something else of the first shard, or with a key of index.json of the corpus."""
    path = index.root / "index.json"
    content = json.loads(path.read_text())
    for name, value in values.items():
        where = content["shards"][0] if name in content["shards"][0] else content
        where[name] = value
    content["clips"] = sum(shard["clips"] for shard in content["shards"])
    path.write_text(json.dumps(content))


def claim_rows(index: Index, change) -> None:
    """Give the first shard the sidecar that `change` makes of its own, with a true digest."""
    table = members(index.shards[0]).copy()
    change(table)
    write_entry(index, members_sha256=write_members(index.shards[0].members_path, table))


CLAIMS = {
    "10_to_the_12_clips_in_a_shard": {"clips": 10**12},
    "2_to_the_39_clips_in_a_shard": {"clips": 2**39},
    "a_shard_of_2_to_the_59_bytes": {"bytes": 2**59},
    "10_to_the_5000_clips": {"clips": 10**4000},
}


@pytest.mark.parametrize("case", CLAIMS)
def test_index_that_claims_too_much_is_refused(bounded, corpus, case):
    write_entry(corpus, **CLAIMS[case])
    bounded.refused(open_run, corpus.location, extra=FEW)


def test_index_of_a_gigabyte_is_not_read(bounded, corpus):
    with open(corpus.root / "index.json", "wb") as file:
        file.truncate(2**30)
    assert "1073741824 bytes" in bounded.refused(load_index, corpus.location, extra=FEW)


def test_index_of_many_faults_takes_the_memory_of_its_text(bounded, corpus):
    entry = json.dumps({"name": "x" * 20})
    (corpus.root / "index.json").write_text('{"version": 1, "shards": [' + ", ".join([entry] * 20_000) + "]}")
    assert "shards.0" in bounded.refused(load_index, corpus.location, extra=FEW)  # all faults together took 200 MiB


def test_shards_that_are_listed_twice_are_found_in_one_pass(bounded, corpus):
    """Counted one by one, 20,000 of them took seconds, and ten times as many a hundred times as long."""
    content = json.loads((corpus.root / "index.json").read_text())
    entry = content["shards"][0]
    content["shards"] = [entry | {"name": f"{number}.tar"} for number in range(19_999)] + [entry | {"name": "0.tar"}]
    content["clips"] = 20_000 * entry["clips"]
    (corpus.root / "index.json").write_text(json.dumps(content))
    assert "0.tar is listed twice" in bounded.refused(load_index, corpus.location, extra=2 * FEW)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "[" * 900 + "]" * 900, "9" * 100_000, "", "nul"])
def test_index_that_is_no_index_is_refused(bounded, corpus, text):
    (corpus.root / "index.json").write_text(text)
    bounded.refused(load_index, corpus.location, extra=FEW)


@pytest.mark.parametrize(
    "name", ["../a.tar", "a\\b.tar", "/a.tar", "a\nb.tar", "\x1b[2Ja.tar", "\x9b.tar", "a\0.tar", ".a.tar"]
)
def test_shard_is_a_plain_name_in_the_folder(corpus, name):
    write_entry(corpus, name=name)
    with pytest.raises(DataError, match="a .tar file in the folder"):
        load_index(corpus.location)


@pytest.mark.parametrize("name", ["n_fft", "n_mels", "hop", "win", "sample_rate"])
def test_front_end_of_an_index_is_bounded(bounded, corpus, name):
    """`inspect` makes a log-mel with the front end that index.json names."""
    features = Features().front_end() | {name: 10**12}
    bands = 1 if name == "n_mels" else 80
    write_entry(corpus, mean=-7.0, std=4.0, mel_mean=[0.0] * bands, features=features)
    bounded.refused(inspect_first, corpus.location, extra=FEW)


@pytest.mark.parametrize(
    ("field", "value"), [("samples", 2**62), ("samples", 2**40), ("rate", 0), ("size", 2**62), ("offset", -(2**62))]
)
def test_sidecar_that_claims_too_much_is_refused(bounded, corpus, field, value):
    def change(table):
        table[field][0] = value

    claim_rows(corpus, change)
    assert "members.npy" in bounded.refused(inspect_first, corpus.location, extra=FEW)


@pytest.mark.parametrize("codec", [b"/../../x", b"\x80", b"", b"a.b"])
def test_codec_of_a_sidecar_is_a_plain_word(corpus, codec):
    """It ends the name of the file that `inspect --original` writes, which was once outside of its folder."""
    claim_rows(corpus, lambda table: table.__setitem__("format", codec))
    with pytest.raises(DataError, match="codecs"):
        members(load_index(corpus.location).shards[0])


def sidecar(header: str, content: bytes = b"") -> bytes:
    text = header.encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + content


def zip_of_zeros(name: str, size: int) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive, archive.open(name, "w") as part:
        for _ in range(size // MIB):
            part.write(bytes(MIB))
    return file.getvalue()


ARRAYS = {
    "of_2_to_the_50_values": lambda: sidecar(
        "{'descr': '|u1', 'fortran_order': False, 'shape': (1125899906842624, 80), }"
    ),
    "of_objects": lambda: sidecar(
        "{'descr': '|O', 'fortran_order': False, 'shape': (1, 80), }", pickle.dumps([Payload()])
    ),
    "that_is_a_pickle": lambda: pickle.dumps(Payload()),
    "of_large_values": lambda: sidecar("{'descr': '|V2147483647', 'fortran_order': False, 'shape': (1, 80), }"),
    "that_is_a_zip_bomb": lambda: zip_of_zeros("arr_0.npy", 64 * MIB),
    "with_code_in_its_header": lambda: sidecar("__import__('os').abort()"),
    "of_a_deep_header": lambda: sidecar("(" * 20_000),
    "of_negative_rows": lambda: sidecar("{'descr': '|u1', 'fortran_order': False, 'shape': (-1, 80), }"),
    "empty": lambda: b"",
}


@pytest.mark.parametrize("case", ARRAYS)
def test_sidecar_that_is_another_array_is_refused(bounded, corpus, case):
    corpus.shards[0].members_path.write_bytes(ARRAYS[case]())
    write_entry(corpus, members_sha256=hashlib.sha256(ARRAYS[case]()).hexdigest())
    assert "members.npy" in bounded.refused(inspect_first, corpus.location, extra=FEW)


@pytest.mark.parametrize("case", ARRAYS)
def test_stored_log_mel_that_is_another_array_is_refused(bounded, tmp_path, case):
    index = logmel_corpus(tmp_path / "corpus", ARRAYS[case]() or b"x")
    bounded.refused(inspect_first, index.location, extra=FEW)
    assert "2000: " in bounded.done(verify_shards, index, False, extra=FEW)


def test_stored_log_mel_that_is_whole_is_read(bounded, tmp_path):
    content = encode_clip(noise(4000), LogMel(Features()))
    bounded.done(inspect_first, logmel_corpus(tmp_path / "corpus", content).location, extra=4 * FEW)


def logmel_corpus(root: Path, content: bytes) -> Index:
    """One clip of a stored log-mel with these bytes."""
    root.mkdir()
    path = root / "a.tar"
    path.write_bytes(member("2000.logmel.npy", content) + END)
    table = member_table([(512, len(content), 4000, 16000, "logmel", b"2000")])
    digest = write_members(path.with_suffix(".members.npy"), table)
    shard = Shard(path.name, 1, path.stat().st_size, file_sha256(path), digest, str(path))
    statistics = {"mean": -7.0, "std": 4.0, "mel_mean": (0.0,) * 80, "features": Features().front_end()}
    index = Index(str(root), "logmel", 16000, (shard,), 0.25, **statistics)
    write_index(index)
    return index
