"""The record of a run: lines that survive a kill, a TensorBoard that answers, rates and FLOPs."""

import json
import re
import resource
import signal
import subprocess
import sys
import time
import urllib.parse
import urllib.request

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from msm_dist import monitor
from msm_dist.config import MODEL_SIZES
from msm_dist.errors import CheckpointError, DataError
from msm_dist.monitor import Monitor, Stopwatch, flops_per_clip, matrix_rate, read_metrics, truncate_jsonl
from msm_dist.pictures import Picture

TRAIN = {
    "loss": 0.1 + 0.2,
    "lr": 1e-4 / 3,
    "grad_norm": 1.5,
    "clips_per_second": 1234.5,
    "audio_hours_per_second": 0.71,
    "step_seconds": 2.0,
    "data_wait_share": 0.034,
    "mfu": 0.4,
    "device_memory_gib": 1.0,
    "bad_clips": 0,
}
VALID = {
    "valid_loss": 0.6,
    "reference_mel_mean": 1.1,
    "reference_visible_mean": 0.9,
    "reference_nearest_patch": 0.95,
}


def scalars(folder, tag):
    board = EventAccumulator(str(folder / "tensorboard"))
    board.Reload()
    return [(event.step, event.value) for event in board.Scalars(tag)]


def test_a_line_holds_step_and_unrounded_values(tmp_path):
    watch = Monitor(tmp_path, 0, 100, writes=True)
    watch.train(20, TRAIN)
    watch.valid(20, VALID)
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 20, **TRAIN}, {"step": 20, **VALID}]
    watch.close()


def test_tensorboard_carries_the_same_numbers(tmp_path):
    watch = Monitor(tmp_path, 0, 100, writes=True)
    watch.train(20, TRAIN)
    watch.valid(20, VALID)
    for kind, values in (("train", TRAIN), ("valid", VALID)):
        for name, value in values.items():
            assert scalars(tmp_path, f"{kind}/{name}") == [(20, pytest.approx(value))]
    watch.close()


def test_console_lines_show_rate_wait_eta_and_references(tmp_path, capsys):
    watch = Monitor(tmp_path, 0, 2000, writes=True)
    watch.train(20, TRAIN)
    watch.valid(20, VALID)
    watch.close()
    train, valid = capsys.readouterr().out.splitlines()
    for part in ("20/2000", "loss 0.3000", "lr 3.33e-05", "1,234.5 clips/s", "data wait 3.4%", "ETA 1:06:00"):
        assert part in train
    for part in ("20/2000", "0.6000", "1.1000", "0.9000", "0.9500"):
        assert part in valid


def test_ranks_that_do_not_write_leave_no_trace(tmp_path, capsys):
    watch = Monitor(tmp_path / "run", 0, 100, writes=False)
    watch.train(1, TRAIN)
    watch.valid(1, VALID)
    assert watch.pictures(1, [picture()]) is None
    watch.close()
    assert not (tmp_path / "run").exists()
    assert capsys.readouterr().out == ""


def test_lines_survive_a_kill_right_after_the_call(tmp_path):
    program = (
        "import os, signal, sys; from pathlib import Path; from msm_dist.monitor import Monitor\n"
        "watch = Monitor(Path(sys.argv[1]), 0, 9, writes=True)\n"
        "watch.train(1, {'loss': 0.1, 'lr': 0.2})\n"
        "watch.valid(1, {'valid_loss': 0.5, **{f'other_{n}': n for n in range(300)}})\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    killed = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    train, valid = read_metrics(tmp_path / "metrics.jsonl")
    assert train == {"step": 1, "loss": 0.1, "lr": 0.2}
    assert valid["other_299"] == 299
    assert scalars(tmp_path, "valid/other_299") == [(1, 299)]


def test_resuming_removes_what_lies_past_the_step(tmp_path):
    watch = Monitor(tmp_path, 0, 10, writes=True)
    for step in range(1, 7):
        watch.train(step, {"loss": float(step), "lr": 0.1})
    watch.close()
    resumed = Monitor(tmp_path, 4, 10, writes=True)
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]
    assert [step for step, _ in scalars(tmp_path, "train/loss")] == [1, 2, 3, 4]
    resumed.train(5, {"loss": 50.0, "lr": 0.1})
    resumed.close()
    assert scalars(tmp_path, "train/loss") == [(1, 1), (2, 2), (3, 3), (4, 4), (5, 50)]
    assert read_metrics(tmp_path / "metrics.jsonl")[-1] == {"step": 5, "loss": 50.0, "lr": 0.1}


def test_a_line_torn_by_a_kill_is_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "lo')
    assert read_metrics(path) == [{"step": 1, "loss": 1.0}]
    Monitor(tmp_path, 5, 10, writes=True).close()
    assert path.read_text() == '{"step": 1, "loss": 1.0}\n'


def test_truncation_keeps_lines_byte_for_byte_and_leaves_no_other_file(tmp_path):
    path = tmp_path / "rank-0.jsonl"
    lines = [
        '{"step":  1, "key": "a"}\n',
        '{"step": 2, "key": "\\u00e9"}\n',
        '{"step": 3}\n',
        '{"step": 2}\n',
    ]
    path.write_text("".join(lines))
    truncate_jsonl(path, 2)
    assert path.read_text() == lines[0] + lines[1] + lines[3]
    assert list(tmp_path.iterdir()) == [path]


def test_truncating_a_missing_file_is_no_fault(tmp_path):
    truncate_jsonl(tmp_path / "rank-0.jsonl", 0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("line", ["not json", "[1, 2]", '{"loss": 1.0}'])
def test_a_damaged_line_is_named(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    content = f'{{"step": 1}}\n{line}\n{{"step": 2}}\n'
    path.write_text(content)
    with pytest.raises(DataError, match="metrics.jsonl: line 2 .* delete"):
        truncate_jsonl(path, 1)
    assert path.read_text() == content


def test_reading_metrics_that_are_not_there_names_the_file(tmp_path):
    with pytest.raises(DataError, match="metrics.jsonl"):
        read_metrics(tmp_path / "metrics.jsonl")


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "run").write_text("a file where the folder should be")
    with pytest.raises(CheckpointError, match="metrics.jsonl: can't be written"):
        Monitor(tmp_path / "run", 0, 10, writes=True)


def test_a_line_that_does_not_fit_is_an_error_and_leaves_the_record_readable(tmp_path):
    watch = Monitor(tmp_path, 0, 10, writes=True)
    watch.train(1, TRAIN)
    size = (tmp_path / "metrics.jsonl").stat().st_size
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, limits[1]))
    try:
        with pytest.raises(CheckpointError, match="metrics.jsonl: can't be written"):
            watch.train(2, TRAIN)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, **TRAIN}]


def test_pictures_become_a_png_an_image_and_two_sounds(tmp_path):
    watch = Monitor(tmp_path, 0, 10, writes=True)
    path = watch.pictures(200, [picture(), picture()])
    assert path == tmp_path / "pictures" / "step-00000200.png"
    assert path.read_bytes().startswith(b"\x89PNG")
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    tags = board.Tags()
    assert set(tags["images"]) == {f"reconstruction/{n}/input_masked_reconstruction" for n in (0, 1)}
    assert set(tags["audio"]) == {f"reconstruction/{n}/{s}" for n in (0, 1) for s in ("input", "reconstruction")}
    assert board.Audio("reconstruction/0/input")[0].sample_rate == 16000
    watch.close()


def test_a_tensorboard_server_answers_with_the_tags_of_a_resumed_run(tmp_path):
    folder, run = tmp_path / "runs" / "mine", "mine/tensorboard"
    first = Monitor(folder, 0, 10, writes=True)
    for step in range(1, 7):
        first.train(step, {"loss": float(step), "lr": 0.1})
    first.close()
    second = Monitor(folder, 4, 10, writes=True)
    second.train(5, {"loss": 50.0, "lr": 0.1})
    second.valid(5, VALID)
    second.pictures(5, [picture()])
    with TensorBoardServer(tmp_path / "runs") as server:
        tags = server.wait_for("scalars/tags", lambda tags: len(tags.get(run, ())) == 6)[run]
        assert set(tags) == {"train/loss", "train/lr", *(f"valid/{name}" for name in VALID)}
        query = urllib.parse.urlencode({"run": run, "tag": "train/loss"})
        # It shows what it has read so far, of one tag more than of another.
        wanted = [(1, 1), (2, 2), (3, 3), (4, 4), (5, 50)]
        server.wait_for(
            f"scalars/scalars?{query}", lambda points: [(step, value) for _, step, value in points] == wanted
        )
        images = server.wait_for("images/tags", lambda tags: tags.get(run))[run]
        assert set(images) == {"reconstruction/0/input_masked_reconstruction"}
        sounds = server.wait_for("audio/tags", lambda tags: len(tags.get(run, ())) == 2)[run]
        assert set(sounds) == {"reconstruction/0/input", "reconstruction/0/reconstruction"}
    second.close()


def test_stopwatch_divides_time_into_steps_and_waiting():
    times = iter([0.0, 10.0, 13.0, 20.0, 26.0, 30.0, 40.0])
    watch = Stopwatch(clock=lambda: next(times))
    with watch.waiting():
        pass
    with watch.paused():
        pass
    assert watch.lap(steps=4, clips=96, clip_seconds=2.5) == {
        "step_seconds": 6.0,
        "clips_per_second": 4.0,
        "audio_hours_per_second": 96 * 2.5 / 3600 / 24.0,
        "data_wait_share": 3.0 / 24.0,
    }
    lap = watch.lap(steps=1, clips=20, clip_seconds=1.0)
    assert (lap["clips_per_second"], lap["data_wait_share"]) == (2.0, 0.0)


def test_flops_of_the_base_model_are_those_of_the_published_figure():
    base = flops_per_clip(MODEL_SIZES["base"], 65, 16, 49, 256, cls_token=True)
    assert base == pytest.approx(11.7e9, rel=0.01)
    long = flops_per_clip(MODEL_SIZES["base"], 190, 57, 133, 256, cls_token=True)
    assert long == pytest.approx(34e9, rel=0.15)


def test_flops_count_what_a_counter_of_torch_counts():
    from torch.utils.flop_counter import FlopCounterMode

    from msm_dist.config import Model
    from msm_dist.model.mae import MaskedSpectrogramModel

    model = MaskedSpectrogramModel(Model(size="tiny"), n_mels=80, crop_frames=208)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(2, 1, 80, 208), sample_ids=torch.zeros(2, 3, dtype=torch.int64))
    ours = flops_per_clip(MODEL_SIZES["tiny"], 65, 16, 49, 256, cls_token=True)
    assert 3 * counter.get_total_flops() / 2 == pytest.approx(ours, rel=1e-6)


def test_matrix_rate_is_work_over_the_fastest_time(monkeypatch):
    ticks = iter([0.0, 9.0, 10.0, 10.15, 20.0, 20.1, 30.0, 99.0])
    monkeypatch.setattr(monitor.time, "perf_counter", lambda: next(ticks))
    assert matrix_rate(torch.device("cpu"), torch.float32) == pytest.approx(2 * 1024**3 / 0.1)


def picture():
    image = torch.zeros(3, 8, 12, dtype=torch.uint8)
    return Picture(image, {"input": torch.zeros(1600), "reconstruction": torch.zeros(1600)}, 16000)


class TensorBoardServer:
    """A real server on a free port of the loopback interface."""

    def __init__(self, logdir):
        self.logdir = logdir
        self.log = logdir.parent / "tensorboard.log"

    def __enter__(self):
        command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(self.logdir)]
        command += ["--host", "127.0.0.1", "--port", "0", "--reload_interval", "1"]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)
        self.url = self._until(lambda: re.search(r"http://127\.0\.0\.1:\d+", self.log.read_text()))[0]
        return self

    def __exit__(self, *error):
        self.process.terminate()
        self.process.wait(timeout=300)

    def get(self, page):
        with urllib.request.urlopen(f"{self.url}/data/plugin/{page}", timeout=300) as answer:
            return json.load(answer)

    def wait_for(self, page, wanted):
        return self._until(lambda: (tags := self.get(page)) and wanted(tags) and tags)

    def _until(self, condition):
        deadline = time.monotonic() + 500
        while not (result := condition()):
            assert self.process.poll() is None and time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.2)
        return result
