"""Official folds of published collections, on tiny copies of their layouts."""

from pathlib import Path

import pytest

from msm_dist.errors import ConfigError, DataError
from msm_dist.evaluate.recipes import GTZAN_GENRES, SPCV2_WORDS, as_csv, recipe_rows
from msm_dist.evaluate.tasks import Fold, read_task
from tests.audio_files import noise, write_audio

CLIP = noise(800)


def write_esc50(folder: Path) -> Path:
    names = [f"{fold}-{number}-A-{number}.wav" for fold in range(1, 6) for number in range(2)]
    rows = [f"{name},{name[0]},{name[-5]},{('dog', 'rooster')[int(name[-5])]},True,0,A" for name in names]
    for name in names:
        write_audio(folder / "audio" / name, CLIP, "wav", 44100)
    (folder / "meta").mkdir()
    header = "filename,fold,target,category,esc10,src_file,take"
    (folder / "meta" / "esc50.csv").write_text("\n".join([header, *rows]) + "\n")
    return folder


def write_us8k(folder: Path) -> Path:
    rows = []
    for fold in range(1, 11):
        name = f"100{fold}-1-0-0.wav"
        write_audio(folder / "audio" / f"fold{fold}" / name, CLIP, "wav", 48000)
        rows.append(f"{name},100{fold},0.0,0.5,1,{fold},1,{('car_horn', 'siren')[fold % 2]}")
    (folder / "metadata").mkdir()
    header = "slice_file_name,fsID,start,end,salience,fold,classID,class"
    (folder / "metadata" / "UrbanSound8K.csv").write_text("\n".join([header, *rows]) + "\n")
    return folder


def write_spcv2(folder: Path) -> Path:
    for word in SPCV2_WORDS:
        for speaker in range(3):
            write_audio(folder / word / f"s{speaker}_nohash_0.wav", CLIP, "wav")
    write_audio(folder / "_background_noise_" / "pink_noise.wav", CLIP, "wav")
    for name, speaker in (("validation_list.txt", 1), ("testing_list.txt", 2)):
        (folder / name).write_text("".join(f"{word}/s{speaker}_nohash_0.wav\n" for word in SPCV2_WORDS))
    return folder


def write_gtzan(folder: Path, root: str = "genres") -> Path:
    for genre in GTZAN_GENRES:
        for number in range(3):
            write_audio(folder / root / genre / f"{genre}.0000{number}.wav", CLIP, "wav", 22050)
    for number, split in enumerate(("train", "valid", "test")):
        lines = "".join(f"{genre}/{genre}.0000{number}.wav\n" for genre in GTZAN_GENRES)
        (folder / f"{split}_filtered.txt").write_text(lines)
    return folder


def test_esc50_keeps_the_folds_of_its_table(tmp_path):
    task = read_task(f"esc50:{write_esc50(tmp_path)}")
    assert (task.name, task.labels) == ("esc50", ("dog", "rooster"))
    assert [fold.test for fold in task.folds] == ["1", "2", "3", "4", "5"]
    assert task.folds[4] == Fold(("2", "3", "4"), "1", "5")
    assert all(clip.path.name.startswith(clip.split) for clip in task.clips)
    assert [clip.labels for clip in task.clips[:2]] == [(0,), (1,)]


def test_us8k_keeps_its_ten_folds(tmp_path):
    task = read_task(f"us8k:{write_us8k(tmp_path)}")
    assert len(task.folds) == 10
    assert all(clip.path.parent.name == f"fold{clip.split}" for clip in task.clips)
    assert task.folds[9].valid == "1"
    assert len(task.folds[0].train) == 8


def test_speech_commands_are_split_by_the_lists_in_the_archive(tmp_path):
    task = read_task(f"spcv2:{write_spcv2(tmp_path)}")
    assert len(task.labels) == 35
    assert task.folds == (Fold(("train",), "valid", "test"),)
    for split, speaker in (("train", 0), ("valid", 1), ("test", 2)):
        files = [clip.path.name for clip in task.clips if clip.split == split]
        assert files == [f"s{speaker}_nohash_0.wav"] * 35


@pytest.mark.parametrize("root", ["genres", "genres_original", "."])
def test_gtzan_is_split_by_the_lists_beside_it(tmp_path, root):
    task = read_task(f"gtzan:{write_gtzan(tmp_path, root)}")
    assert task.labels == GTZAN_GENRES
    assert [clip.split for clip in task.clips] == ["train"] * 10 + ["valid"] * 10 + ["test"] * 10
    assert {clip.path.stem[-1] for clip in task.clips if clip.split == "test"} == {"2"}


def test_gtzan_without_lists_takes_the_443_197_290_that_were_published(tmp_path):
    lists = pytest.importorskip("torchaudio.datasets.gtzan")
    write_gtzan(tmp_path)
    for split in ("train", "valid", "test"):
        (tmp_path / f"{split}_filtered.txt").unlink()
    names = [*lists.filtered_train, *lists.filtered_valid, *lists.filtered_test]
    for name in names:
        path = tmp_path / "genres" / name.partition(".")[0] / f"{name}.au"
        if not path.with_suffix(".wav").exists():
            path.touch()
    splits = [row.split for row in recipe_rows("gtzan", tmp_path)]
    assert [splits.count(split) for split in ("train", "valid", "test")] == [443, 197, 290]


def test_rows_make_a_csv_that_reads_the_same(tmp_path):
    rows = recipe_rows("esc50", write_esc50(tmp_path))
    (tmp_path / "table.csv").write_text(as_csv(rows, "fold"))
    task, same = read_task(f"esc50:{tmp_path}"), read_task(tmp_path / "table.csv")
    assert (same.clips, same.labels, same.folds) == (task.clips, task.labels, task.folds)


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(ConfigError, match="esc50, us8k, spcv2, gtzan"):
        recipe_rows("esc10", tmp_path)
    with pytest.raises(DataError, match="no such folder"):
        recipe_rows("esc50", tmp_path / "absent")
    with pytest.raises(DataError, match=r"meta/esc50\.csv: can't be read"):
        recipe_rows("esc50", tmp_path)
    with pytest.raises(DataError, match=r"UrbanSound8K\.csv: can't be read"):
        recipe_rows("us8k", tmp_path)
    with pytest.raises(DataError, match=r"validation_list\.txt"):
        recipe_rows("spcv2", tmp_path)
    with pytest.raises(DataError, match="10 genres"):
        recipe_rows("gtzan", tmp_path)


def test_part_of_a_collection_is_named(tmp_path):
    folder = write_spcv2(tmp_path / "spcv2")
    (folder / "yes" / "s2_nohash_0.wav").unlink()
    with pytest.raises(DataError, match=r"lacks 1 files of its lists, such as yes/s2_nohash_0\.wav"):
        recipe_rows("spcv2", folder)
    folder = write_gtzan(tmp_path / "gtzan")
    (folder / "genres" / "jazz" / "jazz.00001.wav").unlink()
    with pytest.raises(DataError, match=r"jazz\.00001 of the split valid"):
        recipe_rows("gtzan", folder)
    folder = write_us8k(tmp_path / "us8k")
    (folder / "audio" / "fold3" / "1003-1-0-0.wav").unlink()
    with pytest.raises(DataError, match="1 of 10 audio files are not there"):
        read_task(f"us8k:{folder}")


def test_a_clip_in_two_lists_is_named(tmp_path):
    folder = write_spcv2(tmp_path)
    with open(folder / "testing_list.txt", "a") as file:
        file.write("yes/s1_nohash_0.wav\n")
    with pytest.raises(DataError, match="in validation_list"):
        recipe_rows("spcv2", folder)


def test_a_table_cut_off_is_named(tmp_path):
    folder = write_esc50(tmp_path)
    table = folder / "meta" / "esc50.csv"
    table.write_text(table.read_text() + "5-9-A-1.wav,5\n")
    with pytest.raises(DataError, match="line 12: has 2 cells, the header 7"):
        recipe_rows("esc50", folder)
