"""Where weights come from: the `origin` in their config.json, a chain of origins, each of which holds the one before.

    run, step, index_digest, corpus     trained by a run; init_from {sha256, origin}: the weights that it started from
    run, step, task, finetuned_from     fine-tuned on labels; finetuned_from: the origin of the weights before
    published_file, sha256, notes, ...  converted; exported_from: what a file of our own says of its weights
    untrained, positions                parts without trained values; a position table that is stretched

In: such values, which may be anybody's. Out: what they tell. Nothing fails: what is not there is not told.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

INITIAL_FILE = "init_from.json"
"""In a run folder: what became of the weights that the run started from."""
LONGEST_CHAIN = 100


def of_run(folder: Path, name: str, step: int, index_digest: Any, corpus: Any = None) -> dict[str, Any]:
    """The origin of weights that the run in `folder` has trained for `step` steps."""
    origin = {"run": name, "step": step, "index_digest": index_digest}
    origin |= {} if corpus is None else {"corpus": corpus}
    try:
        report = json.loads((folder / INITIAL_FILE).read_text(encoding="utf-8"))
        return origin | {"init_from": {"sha256": report["sha256"], "origin": dict(report["origin"])}}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return origin


def chain(origin: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """This origin, then that of the weights before, back to the first."""
    for _ in range(LONGEST_CHAIN):
        yield origin
        initial = origin.get("init_from")
        before = (
            origin.get("finetuned_from")
            or origin.get("exported_from")
            or (initial.get("origin") if isinstance(initial, Mapping) else None)
        )
        if not isinstance(before, Mapping):
            return
        origin = before


def published_ancestor(origin: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The published checkpoint, not of our own making, that the weights descend from."""
    return next((one for one in chain(origin) if "published_file" in one and "exported_from" not in one), None)


def is_trained(origin: Mapping[str, Any], part: str) -> bool:
    """Whether a part of the model, such as the decoder, has trained values that fit the others."""
    if part == "decoder" and "finetuned_from" in origin:
        return False  # also where older exports don't say so
    untrained = origin.get("untrained")
    return not (isinstance(untrained, list) and part in untrained)


def is_published(origin: Mapping[str, Any]) -> bool:
    """Whether the weights are a published checkpoint's, only converted since, not trained."""
    while "exported_from" in origin and isinstance(origin["exported_from"], Mapping):
        origin = origin["exported_from"]
    return "published_file" in origin


def told(origin: Mapping[str, Any]) -> str:
    """What made the weights, in a few words."""
    step = f", step {origin['step']}" if isinstance(origin.get("step"), int) else ""
    if "task" in origin:
        return f"run {origin.get('run')}{step}, fine-tuned on {origin['task']}"
    if "run" in origin:
        return f"run {origin['run']}{step}"
    return f"file {origin['published_file']}" if "published_file" in origin else "not told"
