"""The commands that `msm-dist doctor RUN` prints: a folder may be called anything, and they are there to be copied."""

import shlex
from pathlib import Path

import pytest
import yaml

from msm_dist.data.clips import quiet
from msm_dist.doctor.run import examine_run
from msm_dist.doctor.where import kind_of
from msm_dist.errors import ConfigError
from tests.labelled import write_weights
from tests.shards import noise_clips, write_corpus

DAMAGE = {
    "lock.json": "rm ",
    "environment.json": "rm ",
    "diverged.json": "rm ",
    "changed_shards.json": "rm ",
    "metrics.jsonl": "mv ",
    "skipped.jsonl": "sed -i '1d' ",
    "trace": "mv ",
    "hang": "rm -r ",
    "export": "rm -r ",
}


@pytest.fixture
def run(tmp_path) -> Path:
    """The beginning of a run, in a folder that is called as a shell would not like it."""
    corpus = write_corpus(tmp_path / "corpus", noise_clips(64, longest=1200), 64)
    folder = tmp_path / "$(touch EVIL)" / "x; touch EVIL"
    folder.mkdir(parents=True)
    data = {"shards": corpus.location, "num_workers": 0, "lanes": 1}
    cfg = {"run": {"name": "other"}, "data": data, "features": {"mean": -7.0, "std": 4.0}}
    (folder / "config.yaml").write_text(yaml.safe_dump(cfg | {"train": {"steps": 4, "global_batch": 64}}))
    return folder


@pytest.mark.parametrize("name", DAMAGE)
def test_paths_in_commands_are_quoted(run, name):
    (run / name).write_text("no record\n")
    remedies = {finding.remedy for finding in examine_run(run, True, quiet)}
    told = "\n".join(remedies)
    assert f"{DAMAGE[name]}{shlex.quote(str(run / name))}" in told, told
    assert f"mv {shlex.quote(str(run))} {shlex.quote(str(run.with_name('other')))}" in told, "of another name"
    assert f" {run}" not in told, "a path without quotes"


def test_paths_of_checkpoints_in_commands_are_quoted(run):
    root = run / "checkpoints"
    for name in ("step-00000002", "step-00000004.damaged", "step-00000006.partial"):
        (root / name).mkdir(parents=True)
    (root / "step-00000002" / "complete").write_text("no record\n")
    told = "\n".join(finding.remedy for finding in examine_run(run, True, quiet))
    for name in ("step-00000004.damaged", "step-00000006.partial"):
        assert f"rm -r {shlex.quote(str(root / name))}" in told, told
    assert f"mv {shlex.quote(str(root))} {shlex.quote(f'{root}.lost')}" in told, told


def test_path_of_weights_is_quoted_in_the_command_that_looks_at_them(tmp_path):
    folder = write_weights(tmp_path / "x; touch EVIL")
    with pytest.raises(ConfigError, match="weights inspect") as error:
        kind_of(str(folder))
    assert f"msm-dist weights inspect {shlex.quote(str(folder))}`" in str(error.value)
