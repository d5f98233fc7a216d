"""The `msm-dist` command. A command's module is imported when it is called: `--help` stays quick."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer

from msm_dist.errors import ConfigError, reporting

app = typer.Typer(
    help="Pre-train general-purpose audio encoders by masked spectrogram modeling.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
study_app = typer.Typer(no_args_is_help=True)

Config = Annotated[str, typer.Argument(help="A YAML file, such as configs/base_audioset.yaml.")]
Cluster = Literal["slurm", "local", "debug"]
Overrides = Annotated[list[str] | None, typer.Argument(help="Settings as section.key=value.")]


@app.command()
def pretrain(config: Config, overrides: Overrides = None) -> None:
    """Pre-train, or continue the run of that name, in this process."""
    from msm_dist.pretrain import main as run

    raise typer.Exit(run([config, *(overrides or [])]))


@app.command()
def submit(
    config: Config,
    overrides: Overrides = None,
    nodes: Annotated[int, typer.Option(help="Number of nodes.", min=1)] = 1,
    gpus_per_node: Annotated[int, typer.Option(help="GPUs of a node; one task each.", min=0)] = 0,
    tasks_per_node: Annotated[int | None, typer.Option(help="Tasks of a node without GPUs.", min=1)] = None,
    cpus_per_task: Annotated[int | None, typer.Option(help="CPUs of a task.", min=1)] = None,
    partition: Annotated[str | None, typer.Option(help="Partition; else the profile's, or the site's own.")] = None,
    time: Annotated[str, typer.Option(help="Limit of a start, such as 90 (minutes), 12:00:00 or 2-12.")] = "24:00:00",
    cluster: Annotated[Cluster, typer.Option(help="Where: Slurm, this machine, or this very process.")] = "slurm",
    profile: Annotated[Path | None, typer.Option(help="A cluster profile, as slurm/cluster.example.yaml.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what sbatch would get; write nothing.")] = False,
    max_timeouts: Annotated[int, typer.Option(help="Time-outs after which a job is not requeued.", min=0)] = 30,
    sweep: Annotated[
        list[str] | None,
        typer.Option(help="Settings to vary, A=1,2 B=3,4, or files of configs/sweeps/; all words to the next option."),
    ] = None,
    max_parallel: Annotated[int | None, typer.Option(help="Jobs of a sweep at a time.", min=1)] = None,
) -> None:
    """Run on a Slurm cluster, requeued and continued after preemptions and time-outs; or a sweep, one job each."""
    from msm_dist.admission import Request
    from msm_dist.submission import submit as run

    request = Request(
        config,
        tuple(overrides or ()),
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        tasks_per_node=tasks_per_node,
        cpus_per_task=cpus_per_task,
        partition=partition,
        time=time,
        cluster=cluster,
        profile=profile,
        dry_run=dry_run,
        max_timeouts=max_timeouts,
        sweep=tuple(sweep or ()),
        max_parallel=max_parallel,
    )
    raise typer.Exit(run(request))


@app.command()
def plan(
    config: Config,
    overrides: Overrides = None,
    world: Annotated[int, typer.Option(help="Number of processes.", min=1)] = 1,
    device: Annotated[str, typer.Option(help="What to plan for: h200, h100 or a100.")] = "h200",
) -> None:
    """Check a run without starting it: layout, rates, and predicted memory, communication and time by ZeRO stage."""
    from msm_dist.planning import describe

    print(describe(config, overrides or [], world, device))


@app.command()
def finetune(
    run: Annotated[str, typer.Argument(help="A run folder, or exported weights.")],
    data: Annotated[str, typer.Argument(help="A HEAR task folder, a CSV of file,label,split, RECIPE:FOLDER, shards.")],
    settings: Annotated[
        list[str] | None, typer.Argument(help="A YAML file, and settings as section.key=value.")
    ] = None,
) -> None:
    """Fine-tune an encoder with a linear head on labelled clips, or continue the run of that name."""
    from msm_dist.evaluate.finetune import main as run_finetuning

    raise typer.Exit(run_finetuning([run, data, *(settings or [])]))


@app.command()
def runs(
    folder: Annotated[Path, typer.Argument(help="The folder of run folders, or one above it.")] = Path("runs"),
    as_json: Annotated[bool, typer.Option("--json", help="A JSON object for each run, on a line.")] = False,
) -> None:
    """List the runs below a folder: state, job, step, losses, speed."""
    from msm_dist.runs import show_runs

    show_runs(folder, as_json)


@app.command()
def compare(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    reference: Annotated[Path, typer.Argument(help="A reference run, such as docs/reference/quickstart.")],
) -> None:
    """Compare a run's settings, losses and speed with a reference run's."""
    from msm_dist.compare import compare as compare_runs

    print(compare_runs(run, reference))


@app.command()
def embed(
    inputs: Annotated[list[str], typer.Argument(help="Audio files, folders of them, indexed shards, URLs of shards.")],
    model: Annotated[str, typer.Option(help="A run folder, a folder with weights, or hf://owner/name.")],
    out: Annotated[Path, typer.Option(help="The .npz file to write.")],
    frames: Annotated[bool, typer.Option("--frames", help="Keep every time step; else the mean of each clip.")] = False,
    layer: Annotated[str | None, typer.Option(help="A layer by number, or all; else the encoder's result.")] = None,
    normalization: Annotated[
        Literal["checkpoint", "dataset", "batch"], typer.Option(help="Whose mean and deviation.")
    ] = "checkpoint",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    batch_size: Annotated[int, typer.Option(help="Most clips that are encoded together.", min=1)] = 16,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file that is there.")] = False,
) -> None:
    """Write the embeddings of audio of any length to an .npz file."""
    from msm_dist.data.commands import show_progress
    from msm_dist.evaluate.embed import Embed
    from msm_dist.evaluate.embed import embed as run

    request = Embed(tuple(inputs), model, out, frames, layer, normalization, device, batch_size, overwrite)
    with show_progress() as progress:
        report = run(request, progress)
    print(report)


@app.command()
def probe(
    run: Annotated[str, typer.Argument(help="A run folder, a folder with weights, or hf://owner/name.")],
    data: Annotated[list[str], typer.Argument(help="HEAR task folders, CSVs, RECIPE:FOLDER, or a folder of shards.")],
    protocol: Annotated[Literal["linear", "hear", "knn"], typer.Option(help="The classifier.")] = "linear",
    seeds: Annotated[int, typer.Option(help="Times that it is fitted.", min=1)] = 3,
    labels_per_class: Annotated[int | None, typer.Option(help="Training clips of each class; else all.", min=1)] = None,
    test: Annotated[str | None, typer.Option(help="Shards to be judged on, where DATA is shards.")] = None,
    valid: Annotated[str | None, typer.Option(help="Shards to choose by; else a tenth of DATA.")] = None,
    audio: Annotated[Path | None, typer.Option(help="The folder that a CSV's files are relative to.")] = None,
    recipe: Annotated[str | None, typer.Option(help="What DATA is: esc50, us8k, spcv2 or gtzan.")] = None,
    normalization: Annotated[
        Literal["checkpoint", "dataset", "batch"], typer.Option(help="Whose mean and deviation.")
    ] = "checkpoint",
    shuffle_labels: Annotated[bool, typer.Option("--shuffle-labels", help="Negative control: chance.")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    cache: Annotated[Path | None, typer.Option(help="Folder of the vectors; else probe/ beside the weights.")] = None,
    out: Annotated[Path | None, typer.Option(help="A file for everything, such as report.json.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file that is there.")] = False,
) -> None:
    """Measure what a classifier reads off the encoder's vectors, beside two baselines."""
    from msm_dist.data.commands import show_progress
    from msm_dist.evaluate.probe import Settings, report

    settings = Settings(protocol, seeds, labels_per_class, shuffle_labels)
    options = {"test": test, "valid": valid, "audio": audio, "cache": cache, "normalization": normalization}
    with show_progress() as progress:
        found = report(run, data, settings, out, recipe, overwrite, device=device, progress=progress, **options)
    print(found)


@app.command()
def reconstruct(
    run: Annotated[Path, typer.Argument(help="A run folder, or a folder with weights.")],
    files: Annotated[list[Path], typer.Argument(help="Audio files of any length.")],
    out: Annotated[Path, typer.Option(help="Folder for pictures and sounds.")],
    start: Annotated[float, typer.Option(help="Where in the recording to begin, in seconds.", min=0)] = 0.0,
    crops: Annotated[int, typer.Option(help="Consecutive crops, as far as the recording goes.", min=1)] = 1,
    mask_ratio: Annotated[float | None, typer.Option(help="Share of hidden patches.", show_default="the run's")] = None,
    seed: Annotated[int, typer.Option(help="Key of the masks.", min=0)] = 0,
) -> None:
    """Hide parts of recordings and show, and sound, what the model makes of them."""
    from msm_dist.evaluate.reconstruction import reconstruct_files

    for report in reconstruct_files(run, files, out, start, crops, mask_ratio, seed):
        print(report, flush=True)


@app.command()
def attention(
    run: Annotated[Path, typer.Argument(help="A run folder, or a folder with weights.")],
    files: Annotated[list[Path], typer.Argument(help="Audio files of any length.")],
    out: Annotated[Path, typer.Option(help="Folder for the pictures.")],
    layer: Annotated[str, typer.Option(help="A layer from 1 on, last, or all.")] = "last",
    head: Annotated[int | None, typer.Option(help="A head from 1 on.", min=1, show_default="all")] = None,
    query: Annotated[
        str | None, typer.Option(help="Who looks: cls, mean, or a patch as ROW,COLUMN.", show_default="cls, or mean")
    ] = None,
    start: Annotated[float, typer.Option(help="Where in the recording to begin, in seconds.", min=0)] = 0.0,
) -> None:
    """Draw the encoder's self-attention over the spectrograms of recordings."""
    from msm_dist.evaluate.attention_maps import attention_files

    for report in attention_files(run, files, out, layer, head, query, start):
        print(report, flush=True)


@app.command("map")
def embedding_map(
    run: Annotated[Path, typer.Argument(help="A run folder, a folder with weights, or hf://owner/name.")],
    data: Annotated[
        str,
        typer.Argument(help="A folder with a subfolder per label, a CSV, a HEAR task folder, RECIPE:FOLDER, shards."),
    ],
    out: Annotated[Path, typer.Option(help="The .png file to write; a .csv goes beside it.")],
    audio: Annotated[Path | None, typer.Option(help="The folder that a CSV's files are relative to.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
) -> None:
    """Draw the embeddings of labelled recordings on their principal components."""
    from msm_dist.evaluate.embedding_map import draw_map

    print(draw_map(run, data, out, device, audio))


@study_app.command()
def gather(
    folder: Annotated[Path, typer.Argument(help="The folder of the runs, such as a sweep's.")],
    out: Annotated[Path, typer.Option(help="Folder for results.md, results.csv and results.png.")],
    probe: Annotated[
        list[Path] | None,
        typer.Option(help="A report of msm-dist probe, may be repeated; none: the online probe's scores."),
    ] = None,
) -> None:
    """Tabulate and draw what the runs of a sweep reached, over what was varied."""
    from msm_dist.study_results import gather as gather_results

    gather_results(folder, probe or (), out)


@app.command()
def doctor(
    where: Annotated[
        str, typer.Argument(metavar="[RUN|SHARDS|ENV]", help="A run folder, shards (also a pattern, a URL), or env.")
    ] = "env",
    fix: Annotated[bool, typer.Option("--fix", help="Repair what can be repaired of the installation.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Compare sizes, no digests.")] = False,
) -> None:
    """Check a run folder, a data set or this machine, and say what to do. Exit code 2 if something must be done."""
    from msm_dist.doctor.where import examine

    raise typer.Exit(examine(where, fix, quick))


def spread_sweep(words: Sequence[str]) -> list[str]:
    """The command line with `--sweep A B C` as `--sweep A --sweep B --sweep C`, up to the next option.

    Raises ConfigError for a sweep of nothing.
    """
    spread: list[str] = []
    in_sweep = False
    for word, following in zip(words, [*words[1:], "-"], strict=True):
        if word.startswith("-"):
            in_sweep = word == "--sweep"
            if in_sweep and following.startswith("-"):
                raise ConfigError("--sweep: names nothing to vary; write --sweep data.crop_frames=96,208 or a file")
            spread += [] if in_sweep else [word]
        else:
            spread += ["--sweep", word] if in_sweep else [word]
    return spread


def main() -> None:
    """Entry point: user errors become one message and exit code 2."""
    # The group is imported here, for its commands to appear in the help; its heavy imports wait as the others do.
    from msm_dist.data.commands import app as data_app
    from msm_dist.evaluate.weights_commands import app as weights_app

    app.add_typer(study_app, name="study", help="Gather the results of a sweep.")
    app.add_typer(data_app, name="data", help="Make, check and measure shards.")
    app.add_typer(weights_app, name="weights", help="Export, convert and inspect trained weights.")
    sys.exit(reporting(lambda: app(spread_sweep(sys.argv[1:]), standalone_mode=True)))
