"""`msm-dist data`: make, index, verify and measure shards.

In: the command line. Out: a short summary on the terminal. Faults are MsmErrors, shown by the top level.
"""

import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from msm_dist.config import Features, load_config
from msm_dist.errors import ConfigError, DataError

if TYPE_CHECKING:
    from msm_dist.data.clips import Progress
    from msm_dist.data.index import Index

CONTINUES, STARTS_AGAIN = "stopped; the same command continues", "stopped; the same command starts again"
SHOWN = 10
ONLY_COUNTED = ("evaluation", "no_torchcodec")  # of what is left out

app = typer.Typer(help="Make, index, verify and measure shards.", no_args_is_help=True)


class Stored(StrEnum):
    """What `msm-dist data pack` writes."""

    audio = "audio"
    logmel = "logmel"


Csv = Annotated[
    list[Path] | None,
    typer.Option(help="AudioSet segments CSV, may be repeated: which clips are official, and their labels."),
]
Workers = Annotated[int, typer.Option(min=1, help="Processes.", show_default="all CPU cores")]
RunConfig = Annotated[
    Path | None, typer.Option("--config", help="Run configuration whose `features` hold; none: the recipe's.")
]
ALL_CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@app.command()
def synth(
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
    clips: Annotated[int, typer.Option(min=1, help="Training clips.")] = 1000,
    valid_clips: Annotated[int, typer.Option(min=1, help="Held-out clips.")] = 100,
    seed: Annotated[int, typer.Option(min=0, help="Same seed, same bytes.")] = 0,
) -> None:
    """Write the embedded corpus: labelled synthetic sounds laid out like AudioSet."""
    from msm_dist.data.synthetic import write_corpus

    with show_progress() as progress:
        write_corpus(out, clips, valid_clips, seed, progress)
    typer.echo(f"{out}: {clips} clips in train, {valid_clips} in valid, with train_segments.csv, valid_segments.csv")


@app.command()
def tasks(
    out: Annotated[Path, typer.Argument(help="Folder for the tasks, one folder each.")],
    task: Annotated[list[str] | None, typer.Option(help="Name of a task, may be repeated; none: all.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Same seed, same bytes.")] = 0,
    clips: Annotated[
        tuple[int, int, int] | None,
        typer.Option(help="Clips per class of train, valid and test.", show_default="50 20, of test 40 to 100"),
    ] = None,
) -> None:
    """Write synthetic probe tasks as the HEAR kit reads them. Killed, it continues when called again."""
    from msm_dist.data.probe_tasks import write_tasks

    with show_progress(CONTINUES) as progress:
        counts = write_tasks(out, task or (), seed, clips, progress)
    for name, count in counts.items():
        typer.echo(f"{out / name}: {_counted(count, 'clip')}")


@app.command()
def pack(
    source: Annotated[Path, typer.Argument(help="Folder of audio, video or Parquet files, nested as you like.")],
    out: Annotated[Path, typer.Argument(help="Folder for the shards.")],
    csv: Csv = None,
    labels: Annotated[Path | None, typer.Option(help="AudioSet class_labels_indices.csv.")] = None,
    eval_csv: Annotated[
        Path | None,
        typer.Option(help="AudioSet eval_segments.csv: leaves its clips out.", show_default="the one beside --csv"),
    ] = None,
    keep_evaluation: Annotated[bool, typer.Option("--keep-evaluation", help="Pack evaluation clips too.")] = False,
    name: Annotated[str | None, typer.Option(help="Prefix of the shards.", show_default="source folder")] = None,
    features: Annotated[Stored, typer.Option(help="Store FLAC or log-mels; SOURCE may then be audio shards.")] = (
        Stored.audio
    ),
    shard_clips: Annotated[int, typer.Option(help="Most clips in a shard.")] = 512,
    segment_seconds: Annotated[float, typer.Option(help="Longer recordings are cut into such pieces.")] = 10.0,
    seed: Annotated[int, typer.Option(help="Of the order of the clips.")] = 0,
    workers: Workers = ALL_CORES,
    config: RunConfig = None,
) -> None:
    """Pack a folder of audio into shards. Killed, it continues when called again."""
    from msm_dist.data.index import INDEX_NAME

    if features is Stored.logmel and (source / INDEX_NAME).exists():
        from msm_dist.data.repack import repack

        if csv or labels or eval_csv or keep_evaluation or name:
            raise ConfigError(f"{source}: shards keep their clips, labels and names; leave --csv and the like out")
        with show_progress(CONTINUES) as progress:
            _show(repack(source, out, _features(config), workers, progress))
        return
    from msm_dist.data.pack import PackSettings
    from msm_dist.data.pack import pack as pack_folder

    settings = PackSettings(
        csv=tuple(csv or ()),
        labels=labels,
        name=name,
        shard_clips=shard_clips,
        segment_seconds=segment_seconds,
        seed=seed,
        features=_features(config),
        kind=features.value,
        eval_csv=eval_csv,
        keep_evaluation=keep_evaluation,
    )
    with show_progress(CONTINUES) as progress:
        packed = pack_folder(source, out, settings, workers, progress)
    _show(packed)
    _show_left_out(packed)
    _warn(packed)


@app.command()
def index(
    shards: Annotated[list[Path], typer.Argument(help="Tar shards of one folder, or that folder.")],
    csv: Csv = None,
    workers: Workers = ALL_CORES,
    config: RunConfig = None,
) -> None:
    """Index webdataset tars made elsewhere, in place: sidecars, index.json with statistics."""
    from msm_dist.data.foreign import index_in_place

    with show_progress() as progress:
        made = index_in_place(_tars(shards), _features(config), csv or (), workers, progress)
    _show(made.index)
    if made.num_unlisted:
        typer.echo(f"not in the CSV: {_counted(made.num_unlisted, 'clip')}; they stay in the index")
    if made.num_evaluation:
        clips = _counted(made.num_evaluation, "clip")
        typer.echo(f"warning: AudioSet's evaluation segments are among the clips ({clips})", err=True)
    _show_left_out(made.index)
    _warn(made.index)


@app.command()
def verify(
    folder: Annotated[str, typer.Argument(help="Folder with index.json, or its URL.")],
    decode: Annotated[bool, typer.Option("--decode", help="Decode every clip too.")] = False,
    workers: Workers = ALL_CORES,
) -> None:
    """Compare shards with their index: sizes, digests, sidecars, headers. Exit code 2 if anything is damaged."""
    from msm_dist.data.index import listed
    from msm_dist.data.storage import is_remote
    from msm_dist.data.verify import num_processes, verify_shards

    found = _packed(folder)
    start = time.perf_counter()
    with show_progress() as progress:
        faults = verify_shards(found, decode, workers, progress)
    seconds = time.perf_counter() - start
    if faults:
        raise DataError(
            f"{folder}: {_counted(len(faults), 'fault')}; copy or pack these shards again:\n{listed(faults)}"
        )
    _show(found)
    checked = ["sizes", "digests", "tables of clips"] + ([] if is_remote(folder) else ["the header of every clip"])
    typer.echo(f"all shards are as indexed ({', '.join(checked)})" + (", every clip decodes" if decode else ""))
    size, used = sum(shard.bytes for shard in found.shards) / 1e6, num_processes(found, decode, workers)
    speed = f"{size / seconds:.0f} MB/s" + (
        f", {size / seconds / used:.0f} in each of {used} processes" if used > 1 else ""
    )
    typer.echo(f"{size:.1f} MB in {seconds:.2f} s: {speed}")


@app.command()
def stats(
    folder: Annotated[Path, typer.Argument(help="Folder with index.json.")],
    workers: Workers = ALL_CORES,
    config: RunConfig = None,
) -> None:
    """Measure mean and standard deviation of the log-mel and write them into index.json."""
    from msm_dist.data.shards import measure_shards

    found = _packed(folder)
    with show_progress() as progress:
        measured = measure_shards(found, _features(config), workers, progress)
    _show(measured)


@app.command(context_settings={"ignore_unknown_options": True})  # one in 64 YTIDs begins with "-"
def inspect(
    where: Annotated[
        str, typer.Argument(metavar="FOLDER|SHARD", help="Folder with index.json or a tar in it; or URL.")
    ],
    key: Annotated[str | None, typer.Argument(help="Key of a clip, or how the only such key begins.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the clip's picture and sound.")] = Path(),
    original: Annotated[bool, typer.Option("--original", help="Write the clip as it is stored too.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files of the same names.")] = False,
) -> None:
    """Show what is in a corpus, in a shard, or in a clip: with a spectrogram picture and the sound."""
    from msm_dist.data.index import is_tar
    from msm_dist.data.inspect import find_clip, inspect_clip, list_clips, summarize

    found = _packed(where)
    if key is not None:
        lines = inspect_clip(found, find_clip(found, key), out, original, overwrite)
    elif is_tar(where):
        lines = list_clips(found.shards[0])
    else:
        typer.echo(_size(found))
        lines = summarize(found)
    for line in lines:
        typer.echo(line)


@app.command()
def split(
    folder: Annotated[str, typer.Argument(help="Folder with index.json, of audio or of log-mels.")],
    out: Annotated[Path, typer.Argument(help="Folder for the shards of the subset.")],
    csv: Annotated[Path, typer.Option(help="Segments CSV: the clips and their labels.")],
    labels: Annotated[Path | None, typer.Option(help="AudioSet class_labels_indices.csv.")] = None,
    name: Annotated[str | None, typer.Option(help="Prefix of the shards.", show_default="the CSV's name")] = None,
    shard_clips: Annotated[int, typer.Option(help="Most clips in a shard.")] = 512,
    workers: Workers = ALL_CORES,
) -> None:
    """Copy the clips that a CSV lists into shards of their own, with its labels."""
    from msm_dist.data.split import SplitSettings
    from msm_dist.data.split import split as split_shards

    with show_progress() as progress:
        made = split_shards(folder, out, SplitSettings(csv, labels, name, shard_clips), workers, progress)
    _show(made)
    _show_left_out(made)


def _packed(folder: str | Path) -> "Index":
    from msm_dist.data.index import load_index
    from msm_dist.data.storage import is_remote

    if not is_remote(str(folder)) and not Path(folder).exists():
        raise DataError(f"{folder}: not there; name a folder that `msm-dist data pack` or `data index` has made")
    return load_index(str(folder))


def _features(config: Path | None) -> Features:
    return load_config(config).features if config else Features()


@contextmanager
def show_progress(stopped: str = STARTS_AGAIN) -> Iterator["Progress"]:
    """A bar per stage with the time left, on stderr; nothing where that is no terminal. Ctrl-C ends with `stopped`."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()]
    columns += [TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn()]
    try:
        with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
            tasks = {}

            def show(stage: str, done: int, total: int) -> None:
                if stage not in tasks:
                    tasks[stage] = bar.add_task(stage, total=total)
                bar.update(tasks[stage], completed=done)

            yield show
    except KeyboardInterrupt:
        typer.echo(f"msm-dist: {stopped}", err=True)
        raise typer.Exit(128 + signal.SIGINT) from None


def _tars(paths: list[Path]) -> list[Path]:
    """The tars that are named; those in a folder where it is one. Raises DataError."""
    if len(paths) != 1 or not paths[0].is_dir():
        return paths
    tars = sorted(path for path in paths[0].glob("*.tar") if path.is_file())
    if not tars:
        raise DataError(f"{paths[0]}: holds no .tar files; name the folder that they lie in, not one above it")
    return tars


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _size(index: "Index") -> str:
    size = sum(shard.bytes for shard in index.shards)
    return (
        f"{index.location}: {_counted(index.num_clips, 'clip')}, {index.seconds / 3600:.2f} h, "
        f"{_counted(len(index.shards), 'shard')}, {size / 1e6:.1f} MB"
    )


def _show(index: "Index") -> None:
    typer.echo(_size(index))
    if index.mean is not None:
        typer.echo(f"log-mel mean {index.mean:.4f}, std {index.std:.4f}")
    if index.official:
        official = index.official
        typer.echo(
            f"{official.found} of {official.clips} official clips of {', '.join(official.tables)} "
            f"(manifest {official.manifest[:12]})"
        )


def _warn(index: "Index") -> None:
    """What a user of AudioSet should know before training on it."""
    from msm_dist.data.audioset import unusual
    from msm_dist.data.index import REPORT_NAME

    if sentence := unusual(index, Features().front_end()):
        typer.echo(f"warning: {sentence}", err=True)
    if json.loads((index.root / REPORT_NAME).read_text()).get("evaluation_told_apart") is False:
        typer.echo(
            "warning: the files look like AudioSet's, but without --csv or --eval-csv its evaluation segments can't be "
            "told apart: all are packed",
            err=True,
        )


def _show_left_out(index: "Index") -> None:
    """What report.json lists, the first of it by name; what is as it should be, or told already, only as a number."""
    from msm_dist.data.index import REPORT_NAME

    path = index.root / REPORT_NAME
    report = json.loads(path.read_text())
    if absent := report.get("csv_clips_without_file"):
        typer.echo(f"clips of the CSV without a file: {absent}")
    if reasons := report["reasons"]:
        faults_first = sorted(reasons, key=lambda reason: (reason in ONLY_COUNTED, reason))
        counts = ", ".join(f"{reasons[reason]} {reason}" for reason in faults_first)
        typer.echo(f"left out: {counts} (all in {path})")
    faults = [entry for entry in report["left_out"] if entry["reason"] not in ONLY_COUNTED]
    for entry in faults[:SHOWN]:
        typer.echo(f"  {entry['file']} at {entry['start_seconds']:g} s: {entry['reason']} ({entry['detail']})")
    if len(faults) > SHOWN:
        typer.echo(f"  and {len(faults) - SHOWN} more")
