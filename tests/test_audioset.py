"""AudioSet's tables and the names that its files go by."""

import pytest

from msm_dist.data.audioset import check_labels, match_files, read_class_names, read_segments
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
