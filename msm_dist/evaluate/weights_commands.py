"""`msm-dist weights`: export, convert and look at trained weights.

In: the command line. Out: folders of weights, a report on the terminal. Faults are MsmErrors, shown by the top level.
"""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Export, convert and inspect trained weights.", no_args_is_help=True)


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="A run folder, one of its checkpoints, or a folder with weights.")],
    step: Annotated[int | None, typer.Option(min=0, help="The checkpoint to take.", show_default="the latest")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write.", show_default="RUN/export")] = None,
    published: Annotated[
        Path | None, typer.Option(help="A .pth to write in the published layout; with --out a folder too.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace weights that are there.")] = False,
) -> None:
    """Write weights as safetensors with config.json and a model card; from a checkpoint too, without DeepSpeed."""
    from msm_dist.evaluate.weights_export import export as run_export

    typer.echo(run_export(run, step, out, published, overwrite))


@app.command("import")
def import_file(
    file: Annotated[Path, typer.Argument(help="A published MSM-MAE checkpoint (.pth).")],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    mean: Annotated[float | None, typer.Option(help="Mean of the log-mel.", show_default="the file's")] = None,
    std: Annotated[float | None, typer.Option(help="Its deviation.", show_default="the file's")] = None,
    encoder_only: Annotated[bool, typer.Option("--encoder-only", help="Leave the decoder out.")] = False,
    strict: Annotated[bool, typer.Option("--strict/--no-strict", help="Every tensor must have its place.")] = True,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace weights that are there.")] = False,
) -> None:
    """Convert a published checkpoint; its geometry is read from the tensors, and none of its code runs."""
    from msm_dist.evaluate.weights_import import import_published

    typer.echo(import_published(file, out, (mean, std), encoder_only, strict, overwrite))


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="A run, a checkpoint, a folder with weights, or a published .pth.")],
) -> None:
    """Say what weights are: origin, geometry, parameters, statistics, digest, tensors."""
    from msm_dist.evaluate.weights_inspect import inspect as run_inspect

    typer.echo(run_inspect(path))
