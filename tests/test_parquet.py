"""Parquet copies of AudioSet: the same clips, labels, reports and promises as a folder of files."""

import builtins
import itertools
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from msm_dist.data.index import load_index, members
from msm_dist.data.pack import PackSettings, pack
from msm_dist.errors import ConfigError, DataError
from tests.audio_files import bad_files, encode, flac_claiming, noise, write_audio
from tests.chaos.faulty import RENAME, Faulty, Where

pyarrow = pytest.importorskip("pyarrow", reason="needs pyarrow: pip install 'msm-dist[parquet]'")
parquet = pytest.importorskip("pyarrow.parquet", reason="needs pyarrow: pip install 'msm-dist[parquet]'")

SETTINGS = PackSettings(shard_clips=8, seed=1)


def ytid(number: int) -> str:
    return f"{'abcdefghij'[number % 10]}-clip_{number:04d}"


def write_table(path: Path, clips: dict[str, bytes | None], group_rows: int = 5, **columns: list) -> Path:
    """A file like those on the Hugging Face hub: video_id, audio {bytes, path}, labels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = {
        "video_id": list(clips),
        "audio": [{"bytes": content, "path": f"{name}.flac"} for name, content in clips.items()],
        "labels": [["/m/a", "/m/b"] for _ in clips],
        "human_labels": [["Cat", "Dog"] for _ in clips],
    } | columns
    table = {name: values for name, values in table.items() if values is not None}
    parquet.write_table(pyarrow.table(table), path, row_group_size=group_rows)
    return path


@pytest.fixture
def source(tmp_path) -> Path:
    """24 clips in two files, in row groups of 5."""
    for part in range(2):
        clips = {ytid(n): encode(noise(2000 + 10 * n, seed=n)) for n in range(12 * part, 12 * part + 12)}
        write_table(tmp_path / "source" / f"{part:02d}.parquet", clips)
    return tmp_path / "source"


def packed(out: Path) -> dict[str, dict]:
    found = {}
    for shard in load_index(str(out)).shards:
        with tarfile.open(shard.path) as tar:
            for row in members(shard):
                key = row["key"].decode()
                info = json.load(tar.extractfile(f"{key}.json"))
                found[key] = info | {"audio": tar.extractfile(f"{key}.flac").read(), "shard": shard.name}
    return found


def report(out: Path) -> dict:
    return json.loads((out / "report.json").read_text())


def test_rows_become_the_clips_that_files_would(source, tmp_path):
    index = pack(source, tmp_path / "out", SETTINGS)
    for number in range(24):
        write_audio(tmp_path / "files" / f"{ytid(number)}.flac", noise(2000 + 10 * number, seed=number))
    of_files = pack(tmp_path / "files", tmp_path / "of_files", SETTINGS)
    found, expected = packed(tmp_path / "out"), packed(tmp_path / "of_files")
    assert found.keys() == expected.keys() == {f"{ytid(n)}_0" for n in range(24)}
    assert all(found[key]["audio"] == expected[key]["audio"] for key in found)
    assert index.mean == pytest.approx(of_files.mean, abs=1e-12)
    assert [shard.clips for shard in index.shards] == [8, 8, 8]
    one = found[f"{ytid(13)}_0"]
    assert (one["labels"], one["names"]) == (["/m/a", "/m/b"], ["Cat", "Dog"])
    assert one["origin"]["file"] == f"01.parquet/{ytid(13)}"


def test_order_is_seeded_and_a_shard_takes_whole_row_groups(source, tmp_path):
    orders = {}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        pack(source, tmp_path / name, replace(SETTINGS, seed=seed))
        orders[name] = list(packed(tmp_path / name))
    assert orders["a"] == orders["b"] != orders["c"]
    assert sorted(orders["a"]) == sorted(orders["c"]) != orders["a"]
    groups = {f"{ytid(n)}_0": (n // 12, n % 12 // 5) for n in range(24)}
    shards = [info["shard"] for info in packed(tmp_path / "a").values()]
    visits = {(shard, groups[key]) for shard, key in zip(shards, orders["a"], strict=True)}
    assert len(visits) <= len(set(groups.values())) + len(set(shards)) - 1


def test_workers_do_not_change_a_byte(source, tmp_path):
    pack(source, tmp_path / "one", SETTINGS, workers=1)
    pack(source, tmp_path / "two", SETTINGS, workers=2)
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes(), path.name


def test_tables_select_label_and_hold_back_the_evaluation(source, tmp_path):
    rows = [f'{ytid(n)}, 0, 10, "/m/x"' for n in (*range(10), 77)]
    (tmp_path / "balanced_train_segments.csv").write_text("\n".join(rows))
    (tmp_path / "eval_segments.csv").write_text(f'{ytid(20)}, 0, 10, "/m/x"\n')
    csv = tmp_path / "balanced_train_segments.csv"
    index = pack(source, tmp_path / "out", replace(SETTINGS, csv=(csv,)))
    assert set(packed(tmp_path / "out")) == {f"{ytid(n)}_0" for n in range(10)}
    assert packed(tmp_path / "out")[f"{ytid(0)}_0"]["labels"] == ["/m/x"]
    assert (index.official.found, index.official.clips) == (10, 11)
    found = report(tmp_path / "out")
    assert (found["files"], found["files_not_in_csv"], found["csv_clips_without_file"]) == (24, 13, 1)
    assert found["reasons"] == {"evaluation": 1}


def test_bad_rows_are_left_out_with_their_reasons(source, tmp_path):
    bad = bad_files()
    audio = {name: content for name, (content, _) in bad.items()}
    audio |= {"null": None, "whole": encode(noise(4000))}
    write_table(source / "02.parquet", audio)
    (source / "03.parquet").write_bytes(b"PAR1 and no more")
    content = (source / "00.parquet").read_bytes()
    (source / "04.parquet").write_bytes(content[: len(content) // 2])
    parquet.write_table(pyarrow.table({"text": ["a"]}), source / "06.parquet")
    index = pack(source, tmp_path / "out", SETTINGS)
    assert index.num_clips == 25
    expected = {f"02.parquet/{name}": reason for name, (content, reason) in bad.items() if content}
    expected |= {"02.parquet/nothing.wav": "empty", "02.parquet/null": "empty"}
    expected |= {f"0{number}.parquet": "unreadable" for number in (3, 4, 6)}
    assert {entry["file"]: entry["reason"] for entry in report(tmp_path / "out")["left_out"]} == expected


def test_damage_inside_a_table_costs_its_row_group(source, tmp_path):
    path = source / "01.parquet"
    group = parquet.ParquetFile(path).metadata.row_group(0)
    columns = [group.column(i) for i in range(group.num_columns)]
    (column,) = [column for column in columns if column.path_in_schema == "audio.bytes"]
    content = bytearray(path.read_bytes())
    content[column.data_page_offset : column.data_page_offset + 64] = bytes(64)
    path.write_bytes(bytes(content))
    index = pack(source, tmp_path / "out", SETTINGS)
    left_out = report(tmp_path / "out")["left_out"]
    assert 24 - index.num_clips == len(left_out) >= 1
    assert all(entry["file"].startswith("01.parquet/") for entry in left_out)
    assert {f"{ytid(n)}_0" for n in [*range(12), *range(17, 24)]} <= packed(tmp_path / "out").keys()


def test_long_rows_are_cut(tmp_path):
    write_table(tmp_path / "source" / "a.parquet", {"long": encode(noise(16000 * 5))})
    pack(tmp_path / "source", tmp_path / "out", replace(SETTINGS, segment_seconds=2.0))
    found = packed(tmp_path / "out")
    assert list(found) == ["long_0", "long_2000", "long_4000"]
    assert [info["origin"]["seconds"] for info in found.values()] == [2, 2, 1]


def test_row_that_claims_hours_is_left_out_as_a_whole(tmp_path):
    claims = flac_claiming(noise(16000 * 5), 2**36 - 1)
    write_table(tmp_path / "source" / "a.parquet", {"long": claims, "good": encode(noise(16000))})
    index = pack(tmp_path / "source", tmp_path / "out", replace(SETTINGS, segment_seconds=2.0))
    assert index.num_clips == 1
    (entry,) = report(tmp_path / "out")["left_out"]
    assert (entry["file"], entry["start_seconds"]) == ("a.parquet/long", 0)


def test_other_layouts_of_the_columns_are_read(tmp_path):
    clips = {"one": encode(noise(4000)), "two": encode(noise(4000), "mp3")}
    layouts = {
        "ids_in_paths": {"video_id": None},
        "plain_bytes": {"audio": list(clips.values())},
        "labels_as_text": {"labels": ["/m/a,/m/b"] * 2},
        "labels_as_numbers": {"labels": [[1, 2], [3]], "human_labels": None},
        "another_id": {"video_id": None, "ytid": list(clips)},
    }
    for name, columns in layouts.items():
        write_table(tmp_path / name / "a.parquet", clips, **columns)
        pack(tmp_path / name, tmp_path / "out" / name, SETTINGS)
        found = packed(tmp_path / "out" / name)
        assert set(found) == {"one_0", "two_0"}, name
        assert found["one_0"]["labels"] == ([] if name == "labels_as_numbers" else ["/m/a", "/m/b"])


def test_rows_without_a_name_are_called_by_their_place(tmp_path):
    audio = pyarrow.array([encode(noise(4000, seed=n)) for n in range(3)], pyarrow.large_binary())
    for folder, columns in (("a", {}), ("b", {"id": [0, 8, None]})):
        (tmp_path / folder).mkdir()
        parquet.write_table(pyarrow.table({"audio": audio, **columns}), tmp_path / folder / "x.parquet")
        pack(tmp_path / folder, tmp_path / "out" / folder, SETTINGS)
    assert set(packed(tmp_path / "out" / "a")) == {"x-0-0_0", "x-0-1_0", "x-0-2_0"}
    assert set(packed(tmp_path / "out" / "b")) == {"0_0", "8_0", "x-0-2_0"}


def test_rows_are_one_clip_only_where_a_table_says_so(tmp_path):
    """Names that begin anew in each file, or are all the same, say nothing."""
    for part in ("train", "test"):
        clips = {str(n): encode(noise(4000 + n, seed=n)) for n in range(3)}
        same = [{"bytes": content, "path": "audio.wav"} for content in clips.values()]
        write_table(tmp_path / "numbers" / part / "0.parquet", clips, video_id=None, id=list(range(3)))
        write_table(tmp_path / "same" / part / "0.parquet", clips, video_id=None, audio=same)
        write_table(tmp_path / "none" / part / "0.parquet", clips, video_id=None, audio=list(clips.values()))
        write_table(tmp_path / "listed" / part / "0.parquet", {ytid(int(n)): clips[n] for n in clips})
    for name in ("numbers", "same", "none"):
        index = pack(tmp_path / name, tmp_path / "out" / name, SETTINGS)
        assert (index.num_clips, report(tmp_path / "out" / name)["left_out"]) == (6, []), name
        assert len(packed(tmp_path / "out" / name)) == 6, name
    (tmp_path / "segments.csv").write_text("".join(f'{ytid(n)}, 0, 10, "/m/x"\n' for n in range(3)))
    index = pack(tmp_path / "listed", tmp_path / "out" / "listed", replace(SETTINGS, csv=(tmp_path / "segments.csv",)))
    assert (index.num_clips, report(tmp_path / "out" / "listed")["reasons"]) == (3, {"duplicate": 3})


def test_columns_that_hold_no_audio_are_named(tmp_path):
    write_table(tmp_path / "source" / "0.parquet", {"good": encode(noise(4000))})
    columns = {"floats": [[0.1, 0.2]], "strings": ["a.wav"], "no_bytes": [{"path": "a.wav"}], "number": [1]}
    for name, audio in columns.items():
        write_table(tmp_path / "source" / f"{name}.parquet", {"x": None}, audio=audio)
    assert pack(tmp_path / "source", tmp_path / "out", SETTINGS).num_clips == 1
    left_out = {entry["file"].removesuffix(".parquet"): entry for entry in report(tmp_path / "out")["left_out"]}
    assert left_out.keys() == columns.keys()
    for name, kind in (("floats", "list"), ("strings", "string"), ("no_bytes", "struct"), ("number", "int64")):
        assert left_out[name]["reason"] == "unreadable"
        assert f"its column 'audio' is {kind}" in left_out[name]["detail"]


def test_rows_of_a_shard_are_permuted(tmp_path):
    """So that a table sorted by class does not give a shard sorted by class, though it is one row group."""
    clips = {f"row-{n:02d}": encode(noise(2000)) for n in range(30)}
    write_table(tmp_path / "source" / "0.parquet", clips, group_rows=30)
    pack(tmp_path / "source", tmp_path / "out", replace(SETTINGS, shard_clips=30))
    order = [int(key[4:6]) for key in packed(tmp_path / "out")]
    assert sorted(order) == list(range(30))
    assert sum(b == a + 1 for a, b in itertools.pairwise(order)) < 8


def test_tables_that_fit_nothing_and_mixed_folders_are_errors(source, tmp_path):
    (tmp_path / "segments.csv").write_text('elsewhere-x, 0, 10, "/m/x"\n')
    with pytest.raises(DataError, match="segments.csv: none of their 1 clips"):
        pack(source, tmp_path / "out", replace(SETTINGS, csv=(tmp_path / "segments.csv",)))
    write_audio(source / "a.wav", noise(4000), "wav")
    with pytest.raises(DataError, match="Parquet tables.*and audio files"):
        pack(source, tmp_path / "out", SETTINGS)


def test_missing_pyarrow_names_the_extra(source, tmp_path, monkeypatch):
    real = builtins.__import__

    def fail(name, *rest):
        if name.startswith("pyarrow"):
            raise ModuleNotFoundError("No module named 'pyarrow'")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", fail)
    with pytest.raises(DataError, match=r"2 Parquet files, such as 00\.parquet.*msm-dist\[parquet\]"):
        pack(source, tmp_path / "out", SETTINGS)


def test_changed_table_is_not_packed_into_the_same_folder(source, tmp_path):
    pack(source, tmp_path / "out", SETTINGS)
    assert pack(source, tmp_path / "out", SETTINGS) == load_index(str(tmp_path / "out"))
    write_table(source / "02.parquet", {"new": encode(noise(4000))})
    with pytest.raises(ConfigError, match="audio files or labels differ"):
        pack(source, tmp_path / "out", SETTINGS)


def test_killed_pack_continues_to_the_same_bytes(tmp_path):
    clips = {ytid(n): encode(noise(16000 * 9, seed=n)) for n in range(60)}
    write_table(tmp_path / "source" / "a.parquet", clips)
    settings = replace(SETTINGS, shard_clips=4)
    pack(tmp_path / "source", tmp_path / "undisturbed", settings)
    out = tmp_path / "out"
    command = [sys.executable, "-m", "msm_dist", "data", "pack", str(tmp_path / "source"), str(out)]
    faulty = Faulty(tmp_path)
    hold = faulty.pause(Where(RENAME, f"{out}/.pack/*.json.*", passed=1))
    process = subprocess.Popen(
        [*command, "--shard-clips", "4", "--seed", "1", "--workers", "1"], env=os.environ | faulty.environment
    )
    try:
        while not hold.is_reached():
            assert process.poll() is None
            time.sleep(0.005)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    finished = {path.stem: os.stat(out / path.stem).st_ino for path in (out / ".pack").glob("*.json")}
    assert 0 < len(finished) < 15
    pack(tmp_path / "source", out, settings)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == {
        path.name: path.read_bytes() for path in (tmp_path / "undisturbed").iterdir()
    }
    assert {name: os.stat(out / name).st_ino for name in finished} == finished


READ_ONE = """
import resource, sys
from pathlib import Path
from msm_dist.data.parquet import Row, read_rows
import pyarrow.parquet
def read(name, last):
    rows = [Row("x", "x", name, 0, last, (), ())]
    for _, content in read_rows(Path(sys.argv[1]), rows):
        assert isinstance(content, bytes)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
small = read("small.parquet", 0)
print(read("large.parquet", 511) - small)
"""


def test_a_large_row_group_is_streamed(tmp_path):
    size = 2**19
    random = np.random.default_rng(0)
    write_table(tmp_path / "small.parquet", {"a": random.bytes(size)})
    write_table(tmp_path / "large.parquet", {str(n): random.bytes(size) for n in range(512)}, group_rows=512)
    child = subprocess.run([sys.executable, "-c", READ_ONE, str(tmp_path)], capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    assert int(child.stdout) < 512 * size / 3
