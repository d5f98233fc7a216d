"""A trained encoder on every probe task, with 10 and 50 labels per class: `python -m benchmarks.probes RUN`.

In: a run folder or exported weights. Makes the tasks of `msm-dist data tasks` (seed 0) where they are not there yet and
probes each of them with the protocols linear and hear beside both baselines, which are judged by the same protocol.
Out: every task, won or not, as a table, and benchmarks/results/probes-<name>-<device>.json and .md. A task counts as
won where it is not saturated and the paired intervals of the difference to both baselines are above zero.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import torch

from benchmarks.measure import RESULTS, environment, slug
from msm_dist.data.probe_tasks import TASKS, VERSION, default_clips, write_tasks
from msm_dist.errors import reporting
from msm_dist.evaluate.probe import Settings, probe
from msm_dist.evaluate.probe_report import Outcome, as_json, table
from msm_dist.evaluate.protocols import Protocol
from msm_dist.files import write_atomically
from msm_dist.model.weights import weights_folder

PROTOCOLS: tuple[Protocol, ...] = ("linear", "hear")
LABELS = (10, 50)
SEEDS = 3
TASKS_SEED = 0
WANTED = 3
"""Tasks that a checkpoint of up to 40 CPU minutes is to win."""

Found = Mapping[tuple[Protocol, int], tuple[dict[str, Any], Sequence[Outcome]]]
"""By protocol and labels per class: what all outcomes share, and an outcome a task."""


def main(arguments: Sequence[str]) -> int:
    """The exit code: 0, also where no task is won."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.probes", description=__doc__.partition("\n")[0])
    parser.add_argument("run", help="run folder or exported weights")
    parser.add_argument("--tasks", type=Path, default=Path("data/benchmark-tasks"), help="folder of the tasks")
    parser.add_argument("--task", action="append", choices=list(TASKS), help="may be repeated; none: all")
    parser.add_argument("--protocol", choices=get_args(Protocol), nargs="+", default=PROTOCOLS)
    parser.add_argument("--labels", type=int, nargs="+", default=LABELS, help="per class")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="of the classifier")
    parser.add_argument("--clips", type=int, nargs=3, metavar=("TRAIN", "VALID", "TEST"), help="per class, to rehearse")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--name", help="of the results; none: the run's")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results")
    options = parser.parse_args(arguments)
    name, names = options.name or _name(options.run), options.task or list(TASKS)
    write_tasks(options.tasks, names, TASKS_SEED, options.clips and tuple(options.clips))
    found = {
        (protocol, labels): probe(
            options.run,
            [str(options.tasks / name) for name in names],
            Settings(protocol=protocol, seeds=options.seeds, labels_per_class=labels),
            device=options.device,
        )
        for protocol in options.protocol
        for labels in options.labels
    }
    clips = {task: tuple(options.clips or default_clips(task)) for task in names}
    made = {"generator_version": VERSION, "seed": TASKS_SEED, "clips_per_class": clips}
    subject, device = f"probes-{slug(name)}", _device(options.device)
    content = {"subject": subject, **environment(), "device": device, "threads": torch.get_num_threads()}
    content |= {"tasks": made, "probes": contents(found)}
    text = report(name, found)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"{subject}-{slug(device)}.json"
    write_atomically(path, json.dumps(content, indent=1) + "\n")
    write_atomically(path.with_suffix(".md"), text)
    print(f"{text}\nwritten: {path}, {path.with_suffix('.md')}")
    return 0


def contents(found: Found) -> list[dict[str, Any]]:
    """The whole outcome of each protocol and number of labels, and which tasks count as won."""
    return [
        {"protocol": protocol, "labels_per_class": labels}
        | as_json(about, outcomes)
        | {"won": [outcome.task for outcome in outcomes if won(outcome)]}
        for (protocol, labels), (about, outcomes) in found.items()
    ]


def report(name: str, found: Found) -> str:
    """Markdown: for each protocol and number of labels a table with every task, and a sentence on how many are won."""
    parts = [f"# Probes of {name}"]
    for (protocol, labels), (about, outcomes) in found.items():
        heading = f"## Protocol {protocol}, {labels} labels per class"
        parts.append(f"{heading}\n\n{table(outcomes, about)}\n\n{verdict(outcomes)}")
    return "\n\n".join(parts) + "\n"


def verdict(outcomes: Sequence[Outcome]) -> str:
    """Which tasks are won, which are saturated, which neither."""
    kinds = {
        "Both baselines beaten, paired intervals above zero": [one.task for one in outcomes if won(one)],
        "saturated": [one.task for one in outcomes if one.saturated],
        "not won": [one.task for one in outcomes if not one.saturated and not won(one)],
    }
    listed = "; ".join(f"{kind}: {len(tasks)} ({', '.join(tasks) or 'none'})" for kind, tasks in kinds.items())
    met = "met" if len(kinds["Both baselines beaten, paired intervals above zero"]) >= WANTED else "not met"
    return f"{listed}. Wanted: {WANTED} won; {met}."


def won(outcome: Outcome) -> bool:
    """Whether the task tells something, and the encoder more than both baselines."""
    return outcome.beats_baselines and not outcome.saturated


def _device(used: str) -> str:
    """The name of the device that was used: the machine may have others."""
    return torch.cuda.get_device_name(used) if torch.device(used).type == "cuda" else "CPU"


def _name(run: str) -> str:
    folder = weights_folder(run)
    return folder.parent.name if folder.name == "export" else folder.name


if __name__ == "__main__":
    sys.exit(reporting(lambda: main(sys.argv[1:])))
