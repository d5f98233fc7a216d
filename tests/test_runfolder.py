"""The run folder: its lock, its recorded settings and plan."""

import json
import subprocess
import sys
import threading

import pytest
import yaml

from msm_dist.config import Config, parse_config
from msm_dist.engine import runfolder
from msm_dist.errors import CheckpointError, ConfigError


def config(**sections):
    return parse_config({"train": {"steps": 10}} | sections, "test")


def test_lock_names_its_owner_and_goes_with_the_block(tmp_path):
    folder = tmp_path / "run"
    with runfolder.locked(folder):
        owner = json.loads((folder / "lock.json").read_text())
        refusal = pytest.raises(ConfigError, match=f"process {owner['pid']} on {owner['host']}.*run.name=")
        with refusal, runfolder.locked(folder, wait_seconds=0.3):
            pass
        assert (folder / "lock.json").exists()
    assert not list(folder.iterdir())
    with runfolder.locked(folder):
        pass


def test_lock_of_a_killed_process_is_taken_over(tmp_path):
    code = (
        "import sys, time, pathlib; from msm_dist.engine.runfolder import locked\n"
        "with locked(pathlib.Path(sys.argv[1])): print('locked', flush=True); time.sleep(60)"
    )
    owner = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE)
    assert owner.stdout.readline() == b"locked\n"
    owner.kill()
    owner.communicate()
    assert (tmp_path / "lock.json").exists()
    with runfolder.locked(tmp_path, wait_seconds=0):
        assert json.loads((tmp_path / "lock.json").read_text())["pid"] != owner.pid


def test_recycled_process_number_is_not_taken_for_the_owner(tmp_path):
    with runfolder.locked(tmp_path):
        lock = json.loads((tmp_path / "lock.json").read_text())
    (tmp_path / "lock.json").write_text(json.dumps(lock | {"started": "1"}))
    with runfolder.locked(tmp_path, wait_seconds=0):
        pass


def test_lock_of_another_host_counts_until_its_heartbeat_stops(tmp_path, monkeypatch):
    lock = tmp_path / "lock.json"
    lock.write_text(json.dumps({"host": "elsewhere", "pid": 1, "started": "1", "job": "7", "restart": None}))
    with pytest.raises(ConfigError, match="on elsewhere, job 7"), runfolder.locked(tmp_path, wait_seconds=0):
        pass
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with runfolder.locked(tmp_path, wait_seconds=0):
        pass
    monkeypatch.delenv("SLURM_JOB_ID")
    lock.write_text(json.dumps({"host": "elsewhere", "pid": 1, "started": "1"}))
    monkeypatch.setattr(runfolder, "DEAD_AFTER_SECONDS", -1.0)
    with runfolder.locked(tmp_path, wait_seconds=0):
        pass


def test_folder_that_cannot_be_made_is_a_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="can't be written"), runfolder.locked(tmp_path / "file" / "run"):
        pass


def test_listed_settings_may_change(tmp_path):
    runfolder.record_start(tmp_path, config(), {})
    later = config(
        train={"steps": 20, "log_every": 1, "micro_batch": 8, "trace": True},
        data={
            "shards": "https://host/elsewhere",
            "valid_shards": "elsewhere",
            "num_workers": 0,
            "read_timeout_seconds": 3,
            "read_retries": 1,
            "connections": 2,
            "allow_pipe": True,
            "max_bad_fraction": 0.5,
            "allow_missing_shards": True,
            "verify": "digest",
        },
        checkpoint={"every": 5},
        engine={"timeout_minutes": 1},
    )
    runfolder.compare_config(tmp_path, later)
    runfolder.record_start(tmp_path, later, {})
    assert "steps: 20" in (tmp_path / "config.yaml").read_text()


def test_another_precision_is_allowed_and_said(tmp_path):
    runfolder.record_start(tmp_path, config(), {})
    assert runfolder.compare_config(tmp_path, config()) == []
    notes = runfolder.compare_config(tmp_path, config(train={"steps": 10, "precision": "fp32"}))
    assert notes == ["train.precision: bf16 until now, fp32 from here on"]


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        ({"seed": 1}, "seed: 0 in .*, 1 now"),
        ({"optim": {"lr": 0.1}}, "optim.lr: None in .*, 0.1 now"),
        ({"data": {"lanes": 4}}, "data.lanes: None in .*, 4 now"),
        ({"train": {"steps": 10, "global_batch": 64}}, "train.global_batch: 512 in .*, 64 now"),
        ({"model": {"size": "tiny"}}, "model.size: None in .*, 'tiny' now"),
    ],
)
def test_any_other_difference_is_refused(tmp_path, sections, says):
    runfolder.record_start(tmp_path, config(), {})
    recorded = (tmp_path / "config.yaml").read_text()
    with pytest.raises(ConfigError, match=says) as caught:
        runfolder.compare_config(tmp_path, config(**sections))
    assert "run.name=NAME" in str(caught.value)
    assert (tmp_path / "config.yaml").read_text() == recorded


def without(folder, *names):
    """Take settings out of a recorded configuration, as if recorded before they existed."""
    path = folder / "config.yaml"
    recorded = yaml.safe_load(path.read_text())
    for name in names:
        section, key = name.split(".")
        del recorded[section][key]
    path.write_text(yaml.safe_dump(recorded))


@pytest.mark.parametrize("section", [name for name in Config.model_fields if name != "seed"])
def test_a_run_that_began_before_a_setting_existed_continues_with_its_default(tmp_path, section):
    for key in getattr(Config(), section).model_dump():
        runfolder.record_start(tmp_path, config(), {})
        without(tmp_path, f"{section}.{key}")
        runfolder.compare_config(tmp_path, config())


def test_a_run_of_an_earlier_version_continues_and_not_with_another_value_of_a_new_setting(tmp_path):
    runfolder.record_start(tmp_path, config(), {})
    without(tmp_path, "data.mix", "data.allow_pipe", "data.connections", "data.crops_per_clip")
    runfolder.compare_config(tmp_path, config(data={"connections": 3, "allow_pipe": True}))
    with pytest.raises(ConfigError, match="data.crops_per_clip: 1 in .*, 2 now"):
        runfolder.compare_config(tmp_path, config(data={"crops_per_clip": 2}))
    with pytest.raises(ConfigError, match="data.mix: None in .*, .1.0. now"):
        runfolder.compare_config(tmp_path, config(data={"mix": {"a": 1}}))


def test_weights_of_a_mix_are_compared_by_the_places_that_they_give(tmp_path):
    mix = {"mix": {"a": 3, "b": 1}}
    runfolder.record_start(tmp_path, config(data=mix), {"index_digest": "a", "mix_places": [750, 250]})
    runfolder.compare_config(tmp_path, config(data={"mix": {"a": 0.75, "b": 0.25}}))
    with pytest.raises(ConfigError, match=r"mix of \[750, 250\] blocks in 1000, data.mix now gives \[800, 200\]"):
        runfolder.compare_plan(tmp_path, {"index_digest": "a", "mix_places": [800, 200]})
    with pytest.raises(ConfigError, match=r"data.mix: \[3.0, 1.0\] in .*, None now"):
        runfolder.compare_config(tmp_path, config())


def test_corpus_that_changed_since_the_first_start_is_refused(tmp_path):
    runfolder.compare_plan(tmp_path, {"index_digest": "a", "lanes": 8})
    runfolder.record_start(tmp_path, config(), {"index_digest": "a", "lanes": 8})
    runfolder.compare_plan(tmp_path, {"index_digest": "a", "lanes": 8})
    with pytest.raises(ConfigError, match="began with index_digest = a, the corpus now gives b"):
        runfolder.compare_plan(tmp_path, {"index_digest": "b", "lanes": 8})


@pytest.mark.parametrize("content", ["{", "[1]", "null", ""])
def test_damaged_records_are_clear_errors(tmp_path, content):
    (tmp_path / "plan.json").write_text(content)
    with pytest.raises(ConfigError, match="plan.json: can't be read"):
        runfolder.compare_plan(tmp_path, {})
    (tmp_path / "config.yaml").write_text(content)
    with pytest.raises(ConfigError, match=r"config.yaml: can't be read|other settings"):
        runfolder.compare_config(tmp_path, config())


@pytest.mark.parametrize("content", ["junk", None])
def test_owner_goes_on_when_its_lock_is_unreadable_or_deleted(tmp_path, monkeypatch, content):
    stopped = threading.Event()
    monkeypatch.setattr(runfolder, "HEARTBEAT_SECONDS", 0.01)
    monkeypatch.setattr(runfolder.os, "_exit", lambda code: stopped.set())
    with runfolder.locked(tmp_path):
        (tmp_path / "lock.json").unlink()
        if content:
            (tmp_path / "lock.json").write_text(content)
        assert not stopped.wait(0.3)


def test_owner_that_was_taken_for_dead_leaves_the_new_lock_alone_and_stops(tmp_path, monkeypatch):
    stopped = threading.Event()
    monkeypatch.setattr(runfolder, "HEARTBEAT_SECONDS", 0.01)
    monkeypatch.setattr(runfolder.os, "_exit", lambda code: stopped.set())
    with runfolder.locked(tmp_path):
        (tmp_path / "lock.json").write_text(json.dumps({"host": "elsewhere", "pid": 1}))
        assert stopped.wait(300)
        with pytest.raises(CheckpointError, match="taken over by process 1 on elsewhere"):
            runfolder.refuse_if_taken(tmp_path)
    assert json.loads((tmp_path / "lock.json").read_text())["host"] == "elsewhere"


def test_owner_may_save_also_when_its_lock_can_not_be_read(tmp_path):
    with runfolder.locked(tmp_path):
        runfolder.refuse_if_taken(tmp_path)
        (tmp_path / "lock.json").write_text("")
        runfolder.refuse_if_taken(tmp_path)
        (tmp_path / "lock.json").unlink()
        runfolder.refuse_if_taken(tmp_path)
