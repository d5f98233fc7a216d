"""AudioSet's tables and the names that its files go by."""

import hashlib

import pytest

from msm_dist.config import Features
from msm_dist.data.audioset import (
    check_labels,
    look_official,
    match_files,
    official,
    read_class_names,
    read_segments,
    read_tables,
    unusual,
)
from msm_dist.data.index import Index
from msm_dist.errors import DataError

SEGMENTS = """\
# Segments csv created Sun Mar  5 10:54:31 2017
# num_ytids=4, num_segs=4, num_unique_labels=3, num_positive_labels=5
# YTID, start_seconds, end_seconds, positive_labels
--PJHxphWEs, 30.000, 40.000, "/m/09x0r,/t/dd00088"
YZY-SXAuDSo, 0.000, 10.000, "/m/09x0r"
abcdefg_123, 5.500, 15.500, "/m/068hy"
0xyz0xyz0xy, 7.000, 17.000, "/m/068hy,/m/09x0r"
"""
CLASSES = 'index,mid,display_name\n0,/m/09x0r,"Speech"\n1,/t/dd00088,"Gush"\n2,/m/068hy,"Domestic animals, pets"\n'


@pytest.fixture
def segments(tmp_path):
    path = tmp_path / "eval_segments.csv"
    path.write_text(SEGMENTS)
    return read_segments(path)


def test_rows_are_read_as_published(segments):
    assert [segment.ytid for segment in segments] == [
        "--PJHxphWEs",
        "YZY-SXAuDSo",
        "abcdefg_123",
        "0xyz0xyz0xy",
    ]
    assert (segments[0].start_seconds, segments[0].end_seconds) == (30.0, 40.0)
    assert segments[0].labels == ("/m/09x0r", "/t/dd00088")


def test_class_names_may_hold_commas(tmp_path):
    path = tmp_path / "class_labels_indices.csv"
    path.write_text(CLASSES)
    assert read_class_names(path)["/m/068hy"] == "Domestic animals, pets"


@pytest.mark.parametrize(
    ("file", "ytid"),
    [
        ("--PJHxphWEs.wav", "--PJHxphWEs"),
        ("balanced/Y--PJHxphWEs.flac", "--PJHxphWEs"),
        ("--PJHxphWEs_30.000.wav", "--PJHxphWEs"),
        ("--PJHxphWEs_30000_40000.ogg", "--PJHxphWEs"),
        ("YZY-SXAuDSo.wav", "YZY-SXAuDSo"),
        ("YYZY-SXAuDSo.wav", "YZY-SXAuDSo"),
        ("abcdefg_123.wav", "abcdefg_123"),
        ("abcdefg_123_5.500_15.500.mp3", "abcdefg_123"),
    ],
)
def test_files_go_by_many_names(segments, file, ytid):
    matches = match_files([file], segments)
    assert matches.segments[file].ytid == ytid
    assert (matches.num_unlisted, matches.num_absent, matches.duplicates) == (0, 3, ())


def test_unlisted_and_doubled_files_are_set_apart(segments):
    files = ["b/--PJHxphWEs.wav", "a/--PJHxphWEs.flac", "stranger.wav", "--PJHxphWEs_extra.wav"]
    matches = match_files(files, segments)
    assert list(matches.segments) == ["a/--PJHxphWEs.flac"]
    assert matches.duplicates == ("b/--PJHxphWEs.wav",)
    assert (matches.num_unlisted, matches.num_absent) == (2, 3)


@pytest.mark.parametrize(
    "name", ["--PJHxphWEs_0_10000", "--PJHxphWEs_0", "Y--PJHxphWEs_120.000_130.000", "--PJHxphWEs_40000_50000"]
)
def test_another_part_of_a_listed_video_is_not_its_clip(segments, name):
    matches = match_files([f"{name}.wav"], segments)
    assert (matches.segments, matches.other_segments) == ({}, (f"{name}.wav",))
    assert matches.num_absent == 4


@pytest.mark.parametrize("name", ["--PJHxphWEs_000030", "--PJHxphWEs_30_40", "--PJHxphWEs_29.97_39.97"])
def test_start_in_a_name_may_be_rounded_and_padded(segments, name):
    assert list(match_files([f"{name}.wav"], segments).segments) == [f"{name}.wav"]


def write_tables(folder, **rows):
    paths = []
    for name, lines in rows.items():
        paths.append(folder / f"{name}_segments.csv")
        paths[-1].write_text("\n".join(f'{line}, 0, 10, "/m/1"' for line in lines))
    return paths


def test_tables_add_up_and_the_evaluation_beside_them_is_held_back(tmp_path):
    balanced, unbalanced, _ = write_tables(tmp_path, balanced_train=["a", "b"], unbalanced_train=["b", "c"], eval=["d"])
    tables = read_tables((balanced, unbalanced), None, False)
    assert (set(tables.segments), tables.evaluation) == ({"a", "b", "c"}, {"d"})
    assert tables.names == ("balanced_train_segments.csv", "unbalanced_train_segments.csv")
    matches = match_files(["a.wav", "d.wav", "Yd_0.wav", "e.wav"], tables.segments.values(), tables.evaluation)
    assert (list(matches.segments), matches.evaluation) == (["a.wav"], ("Yd_0.wav", "d.wav"))
    assert (matches.num_unlisted, matches.num_absent) == (1, 2)


def test_evaluation_that_a_merged_table_lists_is_held_back_unless_asked_for(tmp_path):
    merged, evaluation = write_tables(tmp_path, all=["a", "d"], eval=["d"])
    assert read_tables((merged,), None, False).evaluation == {"d"}
    assert read_tables((merged,), None, True).evaluation == set()
    assert read_tables((merged, evaluation), None, False).evaluation == set()
    elsewhere = evaluation.rename(tmp_path / "held_out.csv")
    assert read_tables((merged,), None, False).evaluation == set()
    assert read_tables((merged,), elsewhere, False).evaluation == {"d"}
    assert read_tables((), elsewhere, False).evaluation == {"d"}
    assert read_tables((elsewhere,), elsewhere, False).evaluation == set()


def test_without_any_table_nothing_can_be_told_apart(tmp_path):
    assert not read_tables((), None, False).tells_evaluation
    assert read_tables((), None, True).tells_evaluation
    assert look_official(["x/--PJHxphWEs.wav", "YYZY-SXAuDSo_30000.flac", "notes.wav"])
    assert not look_official(["train000000.wav", "train000001.wav"])
    assert not look_official(["dog.wav", "x/--PJHxphWEs.wav"])


def test_tables_that_disagree_are_refused(tmp_path):
    one, other = write_tables(tmp_path, one=["a"], other=["b"])
    other.write_text('a, 0, 10, "/m/2"')
    with pytest.raises(DataError, match="other_segments.csv: a has another time or other labels"):
        read_tables((one, other), None, False)


def test_official_clips_are_counted_and_their_list_has_a_digest(tmp_path):
    (path,) = write_tables(tmp_path, train=["a", "b", "c"])
    tables = read_tables((path,), None, False)
    some = official(tables, ["b", "a", "z", "a"])
    assert (some.tables, some.clips, some.found) == (("train_segments.csv",), 3, 2)
    assert some.manifest == hashlib.sha256(b"a\nb\n").hexdigest()
    assert official(tables, ["a", "c"]).manifest != some.manifest
    assert official(read_tables((), None, False), ["a"]) is None


@pytest.mark.parametrize(
    ("table", "mean", "std", "warned"),
    [
        ("unbalanced_train", -7.1, 4.2, False),
        ("unbalanced_train", -7.9, 4.6, False),
        ("unbalanced_train", -8.2, 4.2, True),
        ("balanced_train", -7.1, 3.6, True),
        ("mine", -12.0, 2.0, False),
    ],
)
def test_statistics_far_from_audiosets_are_told(tmp_path, table, mean, std, warned):
    (path,) = write_tables(tmp_path, **{table: ["a"]})
    recipe = Features().front_end()
    counted = official(read_tables((path,), None, False), ["a"])
    index = Index("x", "audio", 16000, (), 1.0, mean, std, (0.0,) * 80, recipe, counted)
    assert (unusual(index, recipe) is not None) == warned
    assert unusual(index, Features(n_mels=40).front_end()) is None


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("abc, 1.0, 2.0", "line 8.*YTID, start_seconds"),
        ('abc, x, 2.0, "/m/1"', "line 8"),
        ('abc, 3.0, 2.0, "/m/1"', "line 8"),
        ('abc, nan, 2.0, "/m/1"', "line 8"),
        ('--PJHxphWEs, 1.0, 2.0, "/m/1"', "line 8.*on line 4 already"),
        ('abc, 1.0, 2.0, "/m/1" "', "not a CSV"),
    ],
)
def test_bad_row_is_named_by_line(tmp_path, row, message):
    path = tmp_path / "segments.csv"
    path.write_text(SEGMENTS + row + "\n")
    with pytest.raises(DataError, match=message):
        read_segments(path)


def test_wrong_files_are_refused(tmp_path):
    path = tmp_path / "file.csv"
    for content in ["", "# only a comment\n"]:
        path.write_text(content)
        with pytest.raises(DataError, match="has no clips"):
            read_segments(path)
    path.write_bytes(b"\xff\xfe\x00binary")
    with pytest.raises(DataError, match="not a CSV"):
        read_segments(path)
    with pytest.raises(DataError, match="can't be read"):
        read_segments(tmp_path / "missing.csv")
    path.write_text(SEGMENTS)
    with pytest.raises(DataError, match="index,mid,display_name"):
        read_class_names(path)
    path.write_text("index,mid,display_name\n0,/m/1\n")
    with pytest.raises(DataError, match="line 2.*2 columns"):
        read_class_names(path)


def test_label_outside_the_class_list_is_named(segments, tmp_path):
    with pytest.raises(DataError, match="YZY-SXAuDSo.*'/m/09x0r'.*classes.csv"):
        check_labels(segments[1:2], {"/m/068hy": "Pets"}, tmp_path / "classes.csv")
    check_labels(segments, {"/m/09x0r": "", "/t/dd00088": "", "/m/068hy": ""}, tmp_path)
