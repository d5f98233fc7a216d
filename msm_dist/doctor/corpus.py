"""The corpus of a run as `msm-dist doctor RUN` sees it: reachable, and the one that the run began with.

In: the run's settings and folder. Out: findings. Corpora are opened by their index as a start opens them, but a shell
command is not run, and an absent server is not waited for.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from msm_dist.config import Config, batch_layout
from msm_dist.corpus import open_corpus, plan_identity
from msm_dist.data.index import Index, check_shards, load_index
from msm_dist.data.storage import access_of, is_remote
from msm_dist.doctor.files import is_there, read_plain, read_record
from msm_dist.doctor.findings import Finding, some, word
from msm_dist.engine.runfolder import compare_plan
from msm_dist.errors import DataError, MsmError
from msm_dist.plain import parse_json

TIMEOUT_SECONDS, RETRIES = 10.0, 1
CHANGED_FILE = "changed_shards.json"


def corpus_findings(
    folder: Path, cfg: Config, environment: dict[str, Any], is_needed: bool, quick: bool
) -> Iterator[Finding]:
    """Whether the next start of the run in `folder` finds its corpus, if it `is_needed`."""
    commands = [name for name in (*_locations(cfg), *_names(cfg.data.valid_shards)) if name.startswith("pipe:")]
    if commands:
        yield Finding("corpus", "note", f"{commands[0]}: a shell command, which is not run to look at it")
        return
    try:
        yield from _compared(folder, _patient(cfg), environment)
        yield from _changed(folder, _patient(cfg), quick)
    except MsmError as error:
        remedy = "bring back the corpus that the run began with; to look closer: msm-dist doctor SHARDS"
        if any(not is_remote(name) and not Path(name).is_absolute() for name in _locations(cfg)):
            remedy += f"\ncalled from {Path.cwd()}: relative folders are those of where the run is started"
        yield Finding("corpus", "fail" if is_needed else "warn", str(error), remedy)


def _compared(folder: Path, cfg: Config, environment: dict[str, Any]) -> Iterator[Finding]:
    """Raises MsmError where a start would refuse the corpus."""
    world = environment.get("world_size")
    world = world if type(world) is int and 0 < world < 2**20 else 1
    corpus = open_corpus(cfg, batch_layout(cfg, world))
    plan = folder / "plan.json"
    if is_there(plan):
        read_record(plan)
        compare_plan(folder, plan_identity(corpus))
        told = f"the one the run began with (digest {corpus.index.digest[:12]})"
    else:
        told = "no plan.json: whether it is the one the run began with can't be found out"
    absent = f", {len(corpus.missing)} of its shards missing, as is allowed" if corpus.missing else ""
    status = "ok" if is_there(plan) else "note"
    yield Finding("corpus", status, f"{corpus.index.location}: {told}, all sizes as indexed{absent}")
    if cfg.data.valid_shards is not None:
        valid = load_index(cfg.data.valid_shards, access_of(cfg.data))
        check_shards(valid, "size", access=access_of(cfg.data))
        yield Finding("corpus", "ok", f"{valid.location}: held-out clips, all sizes as indexed")


def _changed(folder: Path, cfg: Config, quick: bool) -> Iterator[Finding]:
    """Shards that were changed under the run, which stopped for it: whether they are what they were again."""
    path = folder / CHANGED_FILE
    if not is_there(path):
        return
    try:
        listed = parse_json(read_plain(path))
        digests = {str(entry["sha256"]) for entry in listed}
    except (DataError, ValueError, KeyError, TypeError) as error:
        detail = f"{path}: not a list of shards ({error}): a start refuses it"
        yield Finding("changed", "fail", detail, f"rm {word(path)}, and the next start with data.verify=digest")
        return
    access = access_of(cfg.data)
    sources = [load_index(name, access) for name in _locations(cfg)] if cfg.data.mix else [_index(cfg)]
    shards = [shard for source in sources for shard in source.shards if shard.sha256 in digests]
    told = f"shards changed under the run, which stopped for it: {some(shard.name for shard in shards)}"
    if quick:
        yield Finding(
            "changed", "note", f"{told}; whether they are what they were takes their digests, without --quick"
        )
        return
    faults = []
    for source in sources:
        mine = tuple(shard for shard in source.shards if shard.sha256 in digests)
        try:
            check_shards(replace(source, shards=mine), "digest", access=access)
        except DataError as error:
            faults.append(str(error))
    if faults:
        remedy = "copy those shards back as they were, then start again; they are in changed_shards.json"
        yield Finding("changed", "fail", "\n".join([f"{told}; they are not what they were:", *faults]), remedy)
    else:
        yield Finding("changed", "ok", f"{told}; they are what they were again, the next start deletes the list")


def _index(cfg: Config) -> Index:
    return load_index(cfg.data.shards or "", access_of(cfg.data))


def _patient(cfg: Config) -> Config:
    """The same settings, for one who looks: no command is run, and an absent server is not waited for."""
    data = cfg.data.model_copy(
        update={
            "allow_pipe": False,
            "read_timeout_seconds": min(cfg.data.read_timeout_seconds, TIMEOUT_SECONDS),
            "read_retries": min(cfg.data.read_retries, RETRIES),
        }
    )
    return cfg.model_copy(update={"data": data})


def _locations(cfg: Config) -> list[str]:
    return list(cfg.data.mix or _names(cfg.data.shards))


def _names(shards: str | list[str] | None) -> list[str]:
    return [shards] if isinstance(shards, str) else list(shards or ())
