"""The profile of a cluster: what it may say, and one message for all that is wrong with it."""

from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from msm_dist.errors import ConfigError
from msm_dist.site import Container, Site, load_site
from tests.processes import HERE

EXAMPLE = HERE.parent / "slurm" / "cluster.example.yaml"


def write(folder: Path, text: str) -> Path:
    path = folder / "site.yaml"
    path.write_text(text)
    return path


def test_no_profile_asks_for_nothing():
    assert load_site(None) == Site()


def test_example_is_valid_and_shows_every_field():
    site = load_site(EXAMPLE)
    text = EXAMPLE.read_text().replace("# container:", "container:")
    shown = {line.split(":")[0].lstrip("# ") for line in text.splitlines() if ":" in line}
    assert shown >= set(Site.model_fields) | set(Container.model_fields)
    assert site.gres == "gpu:a100:{gpus}"
    assert site.environment["OMP_NUM_THREADS"] == 4
    assert site.sbatch == {"reservation": "night", "mail-type": "FAIL"}


def test_commented_container_of_the_example_is_valid(tmp_path):
    lines = EXAMPLE.read_text().splitlines()
    start = lines.index("# container:")
    block = "\n".join(line.removeprefix("# ") for line in lines[start : start + 5])
    container = load_site(write(tmp_path, block)).container
    assert container == Container(
        runtime="pyxis", image="/shared/images/msm_dist.sqsh", mounts=("/shared/data", "/scratch:/scratch")
    )


def test_profile_does_not_change():
    with pytest.raises(ValidationError):
        Site().account = "other"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("acount: a", "acount: unknown field; did you mean account?"),
        ("container: {image: a, mount: [/x]}", "container.mount: unknown field; did you mean mounts?"),
        ("container: {}", "container.image = {}: field required"),
        ("container: {image: a, mounts: [x]}", "container.mounts.0 = 'x'"),
        ("gres: gpu:4", "must hold {gpus} where the number of GPUs goes"),
        ("cpus_per_task: 0", "cpus_per_task = 0: input should be greater than or equal to 1"),
        ("signal_seconds: 5", "signal_seconds = 5"),
        ("environment: {A B: 1}", "environment.A B"),
        ("setup: ['#SBATCH --x=1']", "#SBATCH counts only at the top of a script"),
        ("sbatch: {time: 5}", "time has its place elsewhere: --time"),
        ("sbatch: {--output: x}", "output has its place elsewhere"),
        ("sbatch: {account: x}", "account has a field of its own: account:"),
        ("sbatch: {cpus-per-task: 3}", "cpus-per-task has a field of its own: cpus_per_task:"),
        ("sbatch: {exclusive: false}", "exclusive: false says nothing to sbatch"),
        ('account: "a\\nb"', "account = 'a\\nb'"),
        ("sbatch: {parsable: true}", "parsable has its place elsewhere: nothing"),
        ("setup: module load x", "setup = 'module load x': must be a list, such as [module load x]"),
        ("environment: {DEBUG: true}", "environment.DEBUG = True: is no text: quote it, as 'true', or write 1"),
        ("mem: 1G\nmem: 2G", "mem: is given twice; remove one"),
        ("sbatch: {nice: 1, nice: 2}", "nice: is given twice; remove one"),
        ("[1, 2]", "must hold `field: value` lines"),
        ("a: [", "not valid YAML"),
        ("!!python/object/apply:os.system ['true']", "not valid YAML"),
    ],
)
def test_wrong_profile_is_one_message(tmp_path, text, says):
    path = write(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load_site(path)
    assert str(caught.value).startswith(str(path))
    assert says in str(caught.value)


def test_all_faults_are_told_at_once(tmp_path):
    with pytest.raises(ConfigError) as caught:
        load_site(write(tmp_path, yaml.safe_dump({"acount": "a", "cpus_per_task": 0, "gres": "x"})))
    assert len(str(caught.value).splitlines()) == 4


def test_missing_profile_names_the_example(tmp_path):
    with pytest.raises(ConfigError, match="no such cluster profile; slurm/cluster.example.yaml shows one"):
        load_site(tmp_path / "nowhere.yaml")


def test_numbers_stand_for_words(tmp_path):
    path = tmp_path / "site.yaml"
    path.write_text("mem: 0\naccount: 4711\n")
    site = load_site(path)
    assert (site.mem, site.account) == ("0", "4711")


def test_interpreter_in_the_home_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert load_site(write(tmp_path, "python: ~/venv/bin/python")).python == "/home/me/venv/bin/python"
    assert load_site(write(tmp_path, "environment: {DEBUG: 1, RATE: 0.5}")).environment == {"DEBUG": 1, "RATE": 0.5}
