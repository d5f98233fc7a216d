"""The official folds of well-known collections, read from the folders as they are published.

In: a folder. Out: rows of file, labels and split or fold, in the collection's own order; nothing is reshuffled, and no
audio is read. Fails with DataError that names the table or file that is missing. A new collection is one function and
its entry in RECIPES.
"""

import csv
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple

from msm_dist.errors import ConfigError, DataError

SPCV2_WORDS = (
    *("backward", "bed", "bird", "cat", "dog", "down", "eight", "five", "follow", "forward", "four", "go", "happy"),
    *("house", "learn", "left", "marvin", "nine", "no", "off", "on", "one", "right", "seven", "sheila", "six", "stop"),
    *("three", "tree", "two", "up", "visual", "wow", "yes", "zero"),
)
GTZAN_GENRES = ("blues", "classical", "country", "disco", "hiphop", "jazz", "metal", "pop", "reggae", "rock")
GTZAN_LISTS = {"train": "train_filtered.txt", "valid": "valid_filtered.txt", "test": "test_filtered.txt"}


class Row(NamedTuple):
    """A clip of a table: its file as the table says it, its labels, the split or fold it is in."""

    file: str
    labels: tuple[str, ...]
    split: str


def recipe_rows(name: str, folder: str | Path) -> list[Row]:
    """The rows of the collection `name` (one of RECIPES) in `folder`. Raises ConfigError, DataError."""
    check_recipe(name)
    if not Path(folder).is_dir():
        raise DataError(f"{folder}: no such folder; the recipe {name} needs the collection as it is published")
    return RECIPES[name].rows(Path(folder))


def check_recipe(name: str) -> None:
    """Raise ConfigError for a name that is not in RECIPES."""
    if name not in RECIPES:
        raise ConfigError(f"recipe {name!r} is unknown: must be one of {', '.join(RECIPES)}")


def as_csv(rows: list[Row], column: str) -> str:
    """Rows as the CSV that `tasks.read_task` reads, its last column called `column`: split or fold."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["file", "label", column])
    writer.writerows((row.file, "|".join(row.labels), row.split) for row in rows)
    return text.getvalue()


def esc50(folder: Path) -> list[Row]:
    """ESC-50 (Piczak, 2015): 2,000 clips of 50 classes in 5 folds, as meta/esc50.csv has them."""
    table = _table(folder / "meta" / "esc50.csv", ("filename", "fold", "category"))
    return [Row(f"audio/{row['filename']}", (row["category"],), row["fold"]) for row in table]


def us8k(folder: Path) -> list[Row]:
    """UrbanSound8K (Salamon et al., 2014): 8,732 clips of 10 classes in the 10 folds of its table.

    Its makers warn against reshuffling: clips cut from one recording lie in one fold.
    """
    table = _table(folder / "metadata" / "UrbanSound8K.csv", ("slice_file_name", "fold", "class"))
    return [Row(f"audio/fold{row['fold']}/{row['slice_file_name']}", (row["class"],), row["fold"]) for row in table]


def spcv2(folder: Path) -> list[Row]:
    """Speech Commands v0.02 (Warden, 2018): 35 words, valid and test by the lists in the archive, the rest train."""
    splits = {}
    for split, name in (("valid", "validation_list.txt"), ("test", "testing_list.txt")):
        for line in _lines(folder / name):
            if splits.setdefault(line, split) != split:
                raise DataError(f"{folder / name}: {line} is in validation_list.txt already; unpack the archive again")
    if lacking := [word for word in SPCV2_WORDS if not (folder / word).is_dir()]:
        raise DataError(f"{folder}: lacks {len(lacking)} of the 35 words, such as {lacking[0]}/; unpack all of v0.02")
    files = [f"{word}/{path.name}" for word in SPCV2_WORDS for path in sorted((folder / word).glob("*.wav"))]
    if lost := sorted(splits.keys() - set(files)):
        raise DataError(f"{folder}: lacks {len(lost)} files of its lists, such as {lost[0]}; unpack the archive again")
    return [Row(file, (file.partition("/")[0],), splits.get(file, "train")) for file in files]


def gtzan(folder: Path) -> list[Row]:
    """GTZAN (Tzanetakis and Cook, 2002) by the fault-filtered lists of Kereliuk et al. (2015): 443, 197, 290 clips.

    The collection has no split of its own. The lists are those beside the genres' folders (train_filtered.txt,
    valid_filtered.txt, test_filtered.txt; a line is blues/blues.00029.wav or blues.00029), else torchaudio's copy.
    """
    root = next((path for path in (folder, folder / "genres", folder / "genres_original") if _holds_genres(path)), None)
    if root is None:
        raise DataError(f"{folder}: lacks folders of the 10 genres, such as blues/; give the one that holds them")
    rows = []
    for split, names in _gtzan_lists(folder).items():
        for name in names:
            genre = name.partition(".")[0]
            found = [path for suffix in (".wav", ".au") if (path := root / genre / f"{name}{suffix}").is_file()]
            if genre not in GTZAN_GENRES or not found:
                raise DataError(f"{root}: the clip {name} of the split {split} is not there (.wav or .au)")
            rows.append(Row(str(found[0].relative_to(folder)), (genre,), split))
    return rows


class Recipe(NamedTuple):
    """How a collection is read, and what Row.split is in it."""

    rows: Callable[[Path], list[Row]]
    kind: Literal["split", "fold"]


RECIPES = {
    "esc50": Recipe(esc50, "fold"),
    "us8k": Recipe(us8k, "fold"),
    "spcv2": Recipe(spcv2, "split"),
    "gtzan": Recipe(gtzan, "split"),
}


def _holds_genres(folder: Path) -> bool:
    return all((folder / genre).is_dir() for genre in GTZAN_GENRES)


def _gtzan_lists(folder: Path) -> dict[str, list[str]]:
    """{split: names such as blues.00029} by the user's lists, else by torchaudio's."""
    there = [name for name in GTZAN_LISTS.values() if (folder / name).is_file()]
    if there:
        lines = {split: _lines(folder / name) for split, name in GTZAN_LISTS.items()}
        return {split: [_stem(line) for line in found] for split, found in lines.items()}
    try:
        from torchaudio.datasets import gtzan as lists
    except ImportError:
        needed = ", ".join(GTZAN_LISTS.values())
        raise DataError(f"{folder}: lacks {needed}, and this torchaudio has no copy of them; put them there") from None
    return {"train": lists.filtered_train, "valid": lists.filtered_valid, "test": lists.filtered_test}


def _stem(line: str) -> str:
    """blues.00029 of blues/blues.00029.wav."""
    name = line.replace("\\", "/").rpartition("/")[2]
    return name.removesuffix(".wav").removesuffix(".au")


def _table(path: Path, columns: tuple[str, ...]) -> Iterator[dict[str, str]]:
    for line, row in read_csv(path, columns):
        if any(not row[column] for column in columns):
            raise DataError(f"{path}, line {line}: lacks {' or '.join(columns)}; fetch the table again")
        yield row


def read_csv(path: Path, columns: tuple[str, ...] = ()) -> Iterator[tuple[int, dict[str, str]]]:
    """Line number and cells by column of each row; `columns` must be there. Raises DataError."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            header = [cell.strip() for cell in next(reader, [])]
            if lacking := [column for column in columns if column not in header]:
                raise DataError(f"{path}: {_header_fault(header, lacking)}")
            for row in reader:
                if not row:
                    continue
                if len(row) != len(header):
                    raise DataError(f"{path}, line {reader.line_num}: has {len(row)} cells, the header {len(header)}")
                yield reader.line_num, dict(zip(header, (cell.strip() for cell in row), strict=True))
    except OSError as error:
        raise DataError(f"{path}: can't be read ({error.strerror})") from None
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{path}: is not a CSV file ({error})") from None


def _header_fault(header: list[str], lacking: list[str]) -> str:
    if not any(header):
        return f"its first line is empty; it must name the columns, {', '.join(lacking)} among them"
    found = ",".join(header)[:80]
    for name, sign in (("semicolons", ";"), ("tabs", "\t")):
        if len(header) == 1 and sign in found:
            return f"its first line is {found!r}: its cells are separated by {name}; save it with commas"
    return f"its first line is {found!r}, which lacks {', '.join(lacking)}"


def _lines(path: Path) -> list[str]:
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except OSError as error:
        raise DataError(f"{path}: can't be read ({error.strerror}); it is part of the collection") from None
    except UnicodeDecodeError:
        raise DataError(f"{path}: is not a text file in UTF-8; fetch it again") from None
