"""`msm-dist data ...` as a user types it."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from typer.testing import CliRunner

from msm_dist.data import containers
from msm_dist.data.commands import app
from msm_dist.data.index import load_index
from msm_dist.errors import ConfigError, DataError
from tests.audio_files import bad_files, encode, noise, write_audio
from tests.chaos.faulty import RENAME, Faulty, Where
from tests.shards import damage_clip
from tests.test_shards import write_tar


def run(*arguments: object) -> str:
    """What the command prints; its error, if it has one, is raised."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception:
        raise result.exception
    return result.output


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    out = tmp_path_factory.mktemp("corpus")
    run("synth", out / "audio", "--clips", 12, "--valid-clips", 3, "--seed", 5)
    return out


def test_embedded_corpus_is_packed_verified_and_measured(corpus):
    for split, count in (("train", 12), ("valid", 3)):
        audio, shards = corpus / "audio", corpus / "shards" / split
        csv = ["--csv", audio / f"{split}_segments.csv", "--labels", audio / "class_labels_indices.csv"]
        output = run("pack", audio / split, shards, *csv, "--shard-clips", 8, "--workers", 1)
        assert f"{count} clips" in output
        assert "left out" not in output
        assert "every clip decodes" in run("verify", shards, "--decode", "--workers", 1)
        index = load_index(str(shards))
        assert (index.num_clips, index.sample_rate) == (count, 16000)
        assert -16 < index.mean < 0 < index.std < 10
        assert f"mean {index.mean:.4f}, std {index.std:.4f}" in run("stats", shards, "--workers", 1)


@pytest.fixture
def official(tmp_path):
    """Three files named as AudioSet's, the tables that list two of them, and an evaluation table."""
    names = ("--PJHxphWEs", "YZY-SXAuDSo", "0xyz0xyz0xy")
    for number, name in enumerate(names):
        write_audio(tmp_path / "audio" / f"Y{name}_0_10000.flac", noise(16000, seed=number))
    (tmp_path / "balanced_train_segments.csv").write_text(f'{names[0]}, 0, 10, "/m/1"\n')
    (tmp_path / "unbalanced_train_segments.csv").write_text(f'{names[1]}, 0, 10, "/m/1"\nzzzzzzzzzzz, 0, 10, "/m/1"\n')
    (tmp_path / "eval_segments.csv").write_text(f'{names[2]}, 0, 10, "/m/1"\n')
    return tmp_path


def test_official_clips_are_counted_and_survive_index_and_stats(official):
    csv = [f"--csv={official / name}_train_segments.csv" for name in ("balanced", "unbalanced")]
    output = run("pack", official / "audio", official / "out", *csv, "--workers", 1)
    counted = "2 of 3 official clips of balanced_train_segments.csv, unbalanced_train_segments.csv (manifest "
    assert counted in output
    assert "left out: 1 evaluation" in output
    assert "AudioSet's are about -7.1 and 4.2" in output
    (tar,) = (official / "out").glob("*.tar")
    before = load_index(str(official / "out")).official
    for command in (["stats", official / "out"], ["index", tar]):
        assert counted in run(*command, "--workers", 1)
        assert load_index(str(official / "out")).official == before


def test_without_a_table_the_evaluation_can_not_be_told_apart_and_that_is_said(official):
    output = run("pack", official / "audio", official / "out", "--workers", 1)
    assert "3 clips" in output and "evaluation segments can't be told apart: all are packed" in output.replace(
        "\n", " "
    )
    table = ["--eval-csv", official / "eval_segments.csv"]
    output = run("pack", official / "audio", official / "other", *table, "--workers", 1)
    assert "2 clips" in output and "told apart" not in output


def test_foreign_tars_are_compared_with_the_tables(official):
    audio = {f"x/{path.name}": path.read_bytes() for path in (official / "audio").iterdir()}
    tar = write_tar(official / "tars" / "a.tar", audio)
    csv = ["--csv", official / "balanced_train_segments.csv"]
    output = run("index", tar, *csv, "--workers", 1)
    assert "1 of 1 official clips" in output
    assert "not in the CSV: 2 clips" in output
    assert "warning: AudioSet's evaluation segments are among the clips (1 clip)" in output
    assert load_index(str(official / "tars")).official.found == 1
    write_tar(tar, audio | {"x/new.flac": encode(noise(8000))})
    run("index", tar, "--workers", 1)
    assert load_index(str(official / "tars")).official is None


def test_log_mels_come_from_a_folder_of_audio_or_from_audio_shards(official):
    run("pack", official / "audio", official / "audio_shards", "--workers", 1)
    run("pack", official / "audio", official / "logmel", "--features", "logmel", "--workers", 1)
    run("pack", official / "audio_shards", official / "repacked", "--features", "logmel", "--workers", 1)
    packed, repacked = (load_index(str(official / name)) for name in ("logmel", "repacked"))
    assert (packed.kind, repacked.kind, packed.num_clips, repacked.num_clips) == ("logmel", "logmel", 3, 3)
    assert (packed.mean, packed.std) == pytest.approx((repacked.mean, repacked.std))
    with pytest.raises(ConfigError, match="shards keep their clips"):
        run("pack", official / "audio_shards", official / "x", "--features", "logmel", "--name", "y", "--workers", 1)


@pytest.mark.parametrize("command", ["stats", "index"])
def test_naming_some_shards_does_not_drop_the_others_from_the_index(tmp_path, command):
    for name in ("a", "b"):
        write_tar(tmp_path / f"{name}.tar", {f"{name}.flac": encode(noise(8000))})
    run("index", tmp_path / "a.tar", tmp_path / "b.tar", "--workers", 1)
    with pytest.raises(DataError, match="name (the folder|every tar)"):
        run(command, tmp_path / "a.tar", "--workers", 1)
    assert load_index(str(tmp_path)).num_clips == 2


def test_what_is_left_out_is_shown(tmp_path):
    write_audio(tmp_path / "audio" / "good.ogg", noise(16000), "ogg")
    for name, (content, _) in bad_files().items():
        (tmp_path / "audio" / name).write_bytes(content)
    output = run("pack", tmp_path / "audio", tmp_path / "out", "--name", "mine", "--workers", 1)
    assert "1 clip," in output
    assert "truncated.flac at 0 s: undecodable" in output or "many_channels.wav at 0 s: undecodable" in output
    assert str(tmp_path / "out" / "report.json") in output
    assert (tmp_path / "out" / "mine-000000.tar").exists()


def test_faults_are_shown_before_evaluation_clips_which_are_only_counted(official):
    lines = []
    for number in range(12):
        write_audio(official / "audio" / f"aaaaaaaaa{number:02d}.flac", noise(16000, seed=number))
        lines.append(f'aaaaaaaaa{number:02d}, 0, 10, "/m/1"\n')
    (official / "eval_segments.csv").write_text("".join(lines))
    write_audio(official / "audio" / "Z" / "--PJHxphWEs.flac", noise(16000))
    for number in range(12):
        (official / "audio" / f"zero{number:02d}.flac").write_bytes(b"")
    output = run("pack", official / "audio", official / "out", "--eval-csv", official / "eval_segments.csv")
    assert "left out: 12 empty, 12 evaluation (all in" in output or "left out: 12 undecodable, 12 evaluation" in output
    shown = [line for line in output.splitlines() if line.startswith("  ")]
    assert len(shown) == 11 and shown[-1] == "  and 2 more" and all("zero" in line for line in shown[:-1])
    report = json.loads((official / "out" / "report.json").read_text())
    assert sum(entry["reason"] == "evaluation" for entry in report["left_out"]) == 12


def test_one_message_says_that_torchcodec_is_missing(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(containers, "unusable", lambda: "install msm-dist[video]")
    (tmp_path / "source").mkdir()
    for number in range(5):
        (tmp_path / "source" / f"{number}.m4a").write_bytes(b"\x00\x00\x00\x1cftypM4A " + bytes(100))
    with pytest.raises(DataError) as error:
        run("pack", tmp_path / "source", tmp_path / "out", "--workers", 1)
    assert "0.m4a and 4 more: no_torchcodec (install msm-dist[video])" in str(error.value)
    assert str(error.value).count("msm-dist[video]") == 1 and not caplog.messages
    write_audio(tmp_path / "source" / "good.wav", noise(16000), "wav")
    output = run("pack", tmp_path / "source", tmp_path / "out", "--workers", 1)
    assert len(caplog.messages) == 1 and "5 files are left out" in caplog.text
    assert "left out: 5 no_torchcodec" in output and "msm-dist[video]" not in output and ".m4a" not in output


def test_a_folder_of_tars_is_indexed_and_one_is_not_called_many(tmp_path):
    write_tar(tmp_path / "tars" / "a.tar", {"a.flac": encode(noise(8000))})
    assert ": 1 clip, 0.00 h, 1 shard, " in run("index", tmp_path / "tars", "--workers", 1)
    write_tar(tmp_path / "tars" / "b.tar", {"b.flac": encode(noise(8000))})
    assert ": 2 clips, 0.00 h, 2 shards, " in run("index", tmp_path / "tars", "--workers", 1)
    with pytest.raises(DataError, match="holds no .tar files"):
        run("index", tmp_path, "--workers", 1)


def test_commands_name_no_setting_of_a_run(corpus, tmp_path):
    audio = corpus / "audio"
    table = ["--csv", audio / "train_segments.csv"]
    run("pack", audio / "train", tmp_path / "shards", *table, "--shard-clips", 6, "--workers", 1)
    load_index(str(tmp_path / "shards")).shards[0].path.unlink()
    for command in (
        ["pack", tmp_path / "shards", tmp_path / "out", "--features", "logmel"],
        ["split", tmp_path / "shards", tmp_path / "subset", *table],
        ["pack", audio / "train", tmp_path / "shards", *table, "--shard-clips", 6],
    ):
        with pytest.raises(DataError, match="1 of 2 shards are not what(.|\n)*missing") as error:
            run(*command, "--workers", 1)
        assert "data.allow_missing_shards" not in str(error.value)


def test_an_interrupted_pack_says_that_the_same_command_continues(tmp_path):
    for number in range(40):
        write_audio(tmp_path / "audio" / f"{number}.flac", noise(160000, seed=number))
    whole = run("pack", tmp_path / "audio", tmp_path / "whole", "--shard-clips", 1, "--workers", 1)
    command = [sys.executable, "-m", "msm_dist", "data", "pack", tmp_path / "audio", tmp_path / "out"]
    command += ["--shard-clips", "1", "--workers", "2"]
    faulty = Faulty(tmp_path)
    # Where both workers wait, neither is in its start any more, where Python would tell of the interrupt.
    hold = faulty.pause(Where(RENAME, f"{tmp_path}/out/.pack/*.json.*", passed=1))
    process = subprocess.Popen(
        command, env=os.environ | faulty.environment, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    while not hold.is_reached(2):
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 130
    assert errors == "msm-dist: stopped; the same command continues\n"
    assert not (tmp_path / "out" / "index.json").exists()
    run("pack", tmp_path / "audio", tmp_path / "out", "--shard-clips", 1, "--workers", 1)
    assert "40 clips" in whole
    assert load_index(str(tmp_path / "out")).digest == load_index(str(tmp_path / "whole")).digest


def test_foreign_tars_are_indexed_with_the_front_end_of_a_configuration(tmp_path):
    path = write_tar(tmp_path / "a.tar", {"x/a.flac": encode(noise(8000)), "x/b.mp3": encode(noise(8000), "mp3")})
    (tmp_path / "run.yaml").write_text("train: {steps: 1}\nfeatures: {n_mels: 48}\n")
    assert "2 clips" in run("index", path, "--config", tmp_path / "run.yaml", "--workers", 1)
    assert load_index(str(tmp_path)).features["n_mels"] == 48
    run("stats", tmp_path, "--workers", 1)
    assert load_index(str(tmp_path)).features["n_mels"] == 80


def test_damage_is_named_by_verify(tmp_path):
    paths = [write_tar(tmp_path / f"{name}.tar", {f"{name}.flac": encode(noise(4000))}) for name in "abc"]
    run("index", *paths, "--workers", 1)
    index = load_index(str(tmp_path))
    assert "as indexed" in run("verify", tmp_path, "--workers", 1)
    damage_clip(index, 0)
    index.shards[2].path.unlink()
    with pytest.raises(DataError) as fault:
        run("verify", tmp_path, "--workers", 1)
    assert "a.tar: sha256" in str(fault.value)
    assert "c.tar: missing" in str(fault.value)
    assert "b.tar" not in str(fault.value)


def test_faults_of_the_user_are_told_apart(corpus, tmp_path):
    for arguments, kind in [
        (["pack", tmp_path / "missing", tmp_path / "out"], DataError),
        (["pack", corpus / "audio", tmp_path / "out", "--seed", "-1"], ConfigError),
        (["verify", tmp_path], DataError),
        (["stats", tmp_path / "missing"], DataError),
        (["index", tmp_path / "missing.tar"], DataError),
        (["synth", corpus / "audio", "--clips", 1], ConfigError),
    ]:
        with pytest.raises(kind):
            run(*arguments, *([] if arguments[0] == "synth" else ["--workers", 1]))


def test_real_process_ends_with_one_message_and_code_2(tmp_path):
    (tmp_path / "empty").mkdir()
    command = [sys.executable, "-m", "msm_dist", "data", "pack", tmp_path / "empty", tmp_path / "out"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert f"{tmp_path / 'empty'}: holds no audio" in result.stderr


def test_help_does_not_wait_for_torch():
    code = "import sys, msm_dist.data.commands; print('torch' in sys.modules, 'soundfile' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["False", "False"]


def test_report_is_json_for_other_tools(corpus):
    assert json.loads((corpus / "shards" / "train" / "report.json").read_text())["clips"] == 12
