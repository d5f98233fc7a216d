"""The `msm-dist` command. A command's module is imported when it is called: `--help` stays quick."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from msm_dist.errors import reporting

app = typer.Typer(
    help="Pre-train general-purpose audio encoders by masked spectrogram modeling.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Config = Annotated[str, typer.Argument(help="A YAML file, such as configs/base_audioset.yaml.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="Settings as section.key=value.")]


@app.command()
def pretrain(config: Config, overrides: Overrides = None) -> None:
    """Pre-train, or continue the run of that name, in this process."""
    from msm_dist.pretrain import main as run

    raise typer.Exit(run([config, *(overrides or [])]))


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
def compare(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    reference: Annotated[Path, typer.Argument(help="A reference run, such as docs/reference/quickstart.")],
) -> None:
    """Compare a run's settings, losses and speed with a reference run's."""
    from msm_dist.compare import compare as compare_runs

    print(compare_runs(run, reference))


@app.command()
def doctor(fix: Annotated[bool, typer.Option("--fix", help="Repair what can be repaired.")] = False) -> None:
    """Check the machine and the installation, and say what to do."""
    from msm_dist.doctor import run_doctor

    raise typer.Exit(run_doctor(fix))


def main() -> None:
    """Entry point: user errors become one message and exit code 2."""
    # The group is imported here, for its commands to appear in the help; its heavy imports wait as the others do.
    from msm_dist.data.commands import app as data_app

    app.add_typer(data_app, name="data", help="Make, check and measure shards.")
    sys.exit(reporting(lambda: app(standalone_mode=True)))
