"""The online probe: scores that are what they say, and a training that does not notice them."""

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from msm_dist.config import Features, Model, Probe, parse_config
from msm_dist.errors import ConfigError, DataError
from msm_dist.evaluate import online
from msm_dist.evaluate.encoder import Encoder
from msm_dist.evaluate.online import (
    PENALTIES,
    OnlineProbe,
    Part,
    read_part,
    ridge,
    score,
)
from msm_dist.evaluate.tasks import Fold, Task, TaskClip
from msm_dist.model.mae import MaskedSpectrogramModel
from msm_dist.model.weights import WeightsInfo
from msm_dist.monitor import Monitor, read_metrics
from tests.audio_files import write_audio
from tests.test_pretrain import Runs

RATE = 16_000
KINDS = ("", "_random_weights", "_logmel")
SMALL = Model(
    embed_dim=32, depth=1, num_heads=2, decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2, patch_size="16x16"
)
INFO = WeightsInfo(SMALL, Features(mean=-7.0, std=4.0), 96)


@dataclass
class Rank:
    """One of `size` ranks that run as threads, one at a time, and meet in `gather`."""

    rank: int = 0
    size: int = 1
    barrier: threading.Barrier = field(default_factory=lambda: threading.Barrier(1))
    table: dict = field(default_factory=dict)
    turn: threading.Lock = field(default_factory=threading.Lock)
    device: torch.device = torch.device("cpu")

    @property
    def is_main(self):
        return self.rank == 0

    def gather(self, value):
        self.table[self.rank] = value
        self.turn.release()
        self.barrier.wait(600)
        self.turn.acquire()
        return [self.table[rank] for rank in range(self.size)]

    def run(self, action):
        # Mel filters are made by way of torch's default dtype, which threads share and ranks don't.
        with self.turn:
            return action()


def tones(folder: Path, counts: dict[str, int], num_labels: int = 2) -> list[TaskClip]:
    """Noisy tones, low or high by their label, of two lengths."""
    rng = np.random.default_rng(0)
    clips = []
    for split, count in counts.items():
        for number in range(count):
            label = number % num_labels
            time = np.arange(RATE if number % 3 else RATE // 2) / RATE
            wave = np.sin(2 * np.pi * 300 * 2**label * time) + 0.3 * rng.standard_normal(len(time))
            path = write_audio(folder / f"{split}-{number}.wav", (6000 * wave).astype(np.int16), "wav", RATE)
            clips.append(TaskClip(path, (label,), split))
    return clips


def make_task(clips, valid="valid", multilabel=False, labels=("low", "high")):
    return Task("pitch", labels, multilabel, tuple(clips), (Fold(("train",), valid, "test"),))


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    return make_task(tones(tmp_path_factory.mktemp("task"), {"train": 20, "valid": 9, "test": 4}))


def weights_of(seed):
    model = MaskedSpectrogramModel(SMALL, 80, 96, seed)
    return [(name, value.detach()) for name, value in model.named_parameters()]


def scores_of(parts, seed, *weight_seeds):
    """Of one probe, for one set of weights after the other."""
    rank = Rank()
    probe = OnlineProbe(parts, INFO, seed, rank)
    found = [rank.run(lambda seed=seed: probe.scores(weights_of(seed))) for seed in weight_seeds]
    return found[0] if len(found) == 1 else found


def test_ridge_is_that_of_the_penalty_with_the_least_leave_one_out_error():
    """Of many small sets: for most of them alone the choice would survive a slip in the error."""
    chosen = set()
    for seed in range(200):
        rng = np.random.default_rng(seed)
        fit = rng.standard_normal((7, 4)) * rng.uniform(0.1, 9, 4) + 5
        judged = rng.standard_normal((3, 4)) + 5
        labels = np.eye(2, dtype=bool)[(fit[:, 0] + 3 * rng.standard_normal(7) > 5).astype(int)]
        mean, deviation = fit.mean(0), fit.std(0)
        x, z = (np.column_stack([(rows - mean) / deviation, np.ones(len(rows))]) for rows in (fit, judged))
        candidates = PENALTIES * np.linalg.eigvalsh(x[:, :4] @ x[:, :4].T)[-1]
        without = [np.delete(np.arange(7), i) for i in range(7)]
        errors = [
            np.square(
                [x[i] @ solved(x[rest], labels[rest], penalty) - labels[i] for i, rest in enumerate(without)]
            ).mean()
            for penalty in candidates
        ]
        best = int(np.argmin(errors))
        chosen.add(best)
        np.testing.assert_allclose(ridge(fit, labels, judged), z @ solved(x, labels, candidates[best]), atol=1e-8)
    assert len(chosen) > 3


def solved(rows, labels, penalty):
    """Coefficients of a ridge regression, the last of them the intercept, which is not penalised."""
    return np.linalg.solve(rows.T @ rows + np.diag([penalty] * (rows.shape[1] - 1) + [0]), rows.T @ labels)


def test_ridge_lives_with_constant_numbers_and_more_numbers_than_clips():
    rng = np.random.default_rng(1)
    vectors = np.column_stack([rng.standard_normal((8, 40)), np.full(8, 3.0)]).astype(np.float32)
    scores = ridge(vectors, np.eye(2, dtype=bool)[[0, 1] * 4], vectors[:3] + 1)
    assert scores.shape == (3, 2)
    assert np.isfinite(scores).all()


def test_mean_average_precision_is_the_mean_over_labels_that_occur_and_takes_ties_as_one_step(monkeypatch):
    scores = np.array([[0.9, 0.5, 0.1], [0.8, 0.5, 0.2], [0.7, 0.1, 0.3], [0.6, 0.0, 0.4]])
    labels = np.array([[1, 1, 0], [0, 0, 0], [1, 1, 0], [0, 0, 0]], bool)
    first, second = (1 / 1 + 2 / 3) / 2, (1 / 2 + 2 / 3) / 2
    monkeypatch.setattr(online, "ridge", lambda *given: scores)
    assert score(Part("t", labels, 0, True, []), np.empty((4, 1))) == pytest.approx((first + second) / 2, abs=1e-12)


def test_score_is_accuracy_or_map_on_the_clips_to_judge():
    vectors = np.array([[0.0], [0.1], [1.0], [1.1], [0.0], [0.05], [1.2], [0.9]], np.float32)
    labels = np.eye(2, dtype=bool)[[0, 0, 1, 1, 0, 1, 1, 1]]
    assert score(Part("t", labels, 4, False, []), vectors) == 0.75
    precisions = [1.0, (1 + 1 + 3 / 3) / 3]  # of label 0: found first; of label 1: the clip at 0.05 comes third
    assert score(Part("t", labels, 4, True, []), vectors) == pytest.approx(np.mean([1 / 1, np.mean(precisions[1])]))


def test_validation_split_is_judged_and_the_test_split_only_where_there_is_none(task):
    part = read_part(task, 1000, RATE, 0, 1)
    assert (part.num_fit, len(part.labels), len(part.waveforms)) == (20, 29, 29)
    np.testing.assert_array_equal(part.labels.argmax(1), [n % 2 for n in (*range(20), *range(9))])
    without = read_part(make_task(task.clips, valid=None), 1000, RATE, 0, 1)
    assert (without.num_fit, len(without.labels)) == (20, 24)


def test_of_too_many_clips_the_same_share_of_both_splits_is_used(task):
    part, again = (read_part(task, 15, RATE, 0, 1) for _ in range(2))
    assert (part.num_fit, len(part.labels)) == (10, 15)
    assert all(map(np.array_equal, part.waveforms, again.waveforms))
    shares = [read_part(task, 15, RATE, rank, 2).waveforms for rank in range(2)]
    assert all(map(np.array_equal, part.waveforms[1::2], shares[1]))
    assert [len(share) for share in shares] == [8, 7]


def test_clips_are_resampled_and_cut_after_ten_seconds(tmp_path):
    path = write_audio(tmp_path / "long.wav", np.full(8000 * 11, 16384, np.int16), "wav", 8000)
    clips = [TaskClip(path, (0,), split) for split in ("train", "valid")]
    waveforms = read_part(make_task(clips), 1000, RATE, 0, 1).waveforms
    assert [waveform.shape for waveform in waveforms] == [(160_000,), (160_000,)]
    assert abs(int(waveforms[0][80_000]) - 16384) <= 2


def test_task_without_clips_to_judge_is_refused(task):
    clips = [clip for clip in task.clips if clip.split == "train"]
    with pytest.raises(DataError, match=r"pitch has 20 clips to fit \(of train\) and 0 to judge \(of valid\)"):
        read_part(make_task(clips), 1000, RATE, 0, 1)
    bare = [replace(clip, labels=clip.labels if clip.split == "train" else ()) for clip in task.clips]
    with pytest.raises(DataError, match="none of the 9 clips of valid that are judged has a label"):
        read_part(make_task(bare, multilabel=True), 1000, RATE, 0, 1)


@pytest.mark.parametrize("size", [2, 31])
def test_ranks_share_the_clips_and_one_of_them_has_the_scores(task, size):
    part = read_part(task, 1000, RATE, 0, 1)
    alone = scores_of([part], 0, 5)
    barrier, table, turn = threading.Barrier(size), {}, threading.Lock()
    ranks = [Rank(rank, size, barrier, table, turn) for rank in range(size)]
    probes = [OnlineProbe([read_part(task, 1000, RATE, r.rank, size)], INFO, 0, r) for r in ranks]
    with ThreadPoolExecutor(size) as pool:
        results = list(pool.map(lambda rank, probe: rank.run(lambda: probe.scores(weights_of(5))), ranks, probes))
    assert results == [alone, *[{}] * (size - 1)]


def test_scores_are_those_of_an_encoder_with_the_weights(task):
    """Beside those of the seeded weights, and of log-mel statistics, which don't change."""
    part = read_part(task, 1000, RATE, 0, 1)
    first, second, third = scores_of([part], 7, 7, 8, 7)
    assert first == third
    assert first["accuracy/pitch"] == first["accuracy_random_weights/pitch"]
    baselines = {"accuracy_random_weights/pitch", "accuracy_logmel/pitch"}
    assert {name: first[name] for name in baselines} == {name: second[name] for name in baselines}
    assert first.keys() == baselines | {"accuracy/pitch"}
    assert first["accuracy_logmel/pitch"] == 1.0

    def vectors_of(seed):
        encoder = Encoder(MaskedSpectrogramModel(SMALL, 80, 96, seed), INFO)
        waves = [torch.from_numpy(waveform.astype(np.float32) / 32768) for waveform in part.waveforms]
        return np.concatenate([encoder.embed(wave[None], RATE).numpy() for wave in waves])

    # One by one where the probe has batches: the score does not see the rounding.
    assert first["accuracy/pitch"] == score(part, vectors_of(7))
    assert second["accuracy/pitch"] == score(part, vectors_of(8))

    rank = Rank()
    probe = OnlineProbe([part], INFO, 7, rank)
    blank = rank.run(lambda: probe.scores([(name, torch.zeros_like(value)) for name, value in weights_of(7)]))
    assert blank["accuracy/pitch"] < 0.7 < blank["accuracy_random_weights/pitch"]


def test_shuffled_labels_score_like_chance(tmp_path):
    clips = tones(tmp_path, {"train": 40, "valid": 40})
    rng = np.random.default_rng(2)
    shuffled = [TaskClip(clip.path, (int(rng.integers(2)),), clip.split) for clip in clips]
    found = {}
    for name, kept in (("true", clips), ("shuffled", shuffled)):
        found[name] = scores_of([read_part(make_task(kept), 1000, RATE, 0, 1)], 0, 1)
    assert found["true"]["accuracy/pitch"] > 0.9
    assert 0.25 < found["shuffled"]["accuracy/pitch"] < 0.75


def test_probe_without_data_is_refused_and_nothing_is_read_where_it_is_off(tmp_path):
    with pytest.raises(ConfigError, match="probe.every = 5: needs labelled clips, probe.data=FOLDER"):
        parse_config({"train": {"steps": 1}, "probe": {"every": 5}}, "test")
    assert OnlineProbe.open(Probe(every=0, data=str(tmp_path / "none")), INFO, 0, Rank()) is None
    with pytest.raises(DataError, match="probe.data = .*none"):
        OnlineProbe.open(Probe(every=1, data=str(tmp_path / "none")), INFO, 0, Rank())
    (tmp_path / "index.json").touch()
    with pytest.raises(DataError, match="probe.data = .* holds shards, .* give a HEAR task folder or a table"):
        OnlineProbe.open(Probe(every=1, data=str(tmp_path)), INFO, 0, Rank())


def test_monitor_writes_scores_beside_their_baselines(tmp_path, capsys):
    watch = Monitor(tmp_path, 0, 100, writes=True)
    values = {"map/birds": 0.5, "map_random_weights/birds": 0.25, "map_logmel/birds": 0.125}
    watch.probe(20, values)
    watch.close()
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 20} | {f"probe/{k}": v for k, v in values.items()}]
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert {tag: board.Scalars(f"probe/{tag}")[0].value for tag in values} == values
    assert (
        "probe birds: map 0.500  (against: random weights 0.250, log-mel statistics 0.125)" in capsys.readouterr().out
    )


def write_table(folder: Path) -> Path:
    clips = tones(folder, {"train": 12, "valid": 6, "test": 2})
    rows = [f"{clip.path.name},{('low', 'high')[clip.labels[0]]},{clip.split}" for clip in clips]
    (folder / "pitch.csv").write_text("\n".join(["file,label,split", *rows, ""]))
    return folder / "pitch.csv"


def probed_lines(runs: Runs, name: str) -> list[dict]:
    return [line for line in runs.metrics(name) if "probe/accuracy/pitch" in line]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("runs"))


@pytest.mark.distributed
def test_run_with_a_probe_trains_as_one_without(runs):
    """At the stage that spreads weights over ranks."""
    length = ("engine.zero_stage=3", "train.steps=6", "checkpoint.every=2")
    table = write_table(runs.folder / "task")
    codes, output = runs.run("plain", *length)
    assert codes == [0, 0], output
    codes, output = runs.run("probed", *length, "probe.every=2", f"probe.data={table}")
    assert codes == [0, 0], output
    assert "online probe: pitch (12 + 6 clips)" in output
    assert "probe pitch: accuracy" in output
    scores = probed_lines(runs, "probed")
    assert [line["step"] for line in scores] == [2, 4, 6]
    assert all(line.keys() == {"step", *(f"probe/accuracy{kind}/pitch" for kind in KINDS)} for line in scores)
    steps = [line for line in runs.losses("probed") if any(value is not None for value in line[1:])]
    assert steps == runs.losses("plain")
    assert runs.trace("probed") == runs.trace("plain")
    assert runs.weights("probed") == runs.weights("plain")
    assert runs.last_checkpoint("probed") == runs.last_checkpoint("plain")


@pytest.mark.distributed
def test_run_that_was_killed_goes_on_with_the_same_scores(runs):
    table = write_table(runs.folder / "resumed-task")
    settings = ("train.steps=6", "checkpoint.every=2", "probe.every=2", f"probe.data={table}")
    codes, output = runs.run("whole", *settings, ranks=1)
    assert codes == [0], output
    runs.run("resumed", *settings, ranks=1, KILL="step:5")
    codes, output = runs.run("resumed", *settings, ranks=1)
    assert codes == [0], output
    assert "continued from" in output
    assert probed_lines(runs, "resumed") == probed_lines(runs, "whole")
    assert runs.weights("resumed") == runs.weights("whole")


@pytest.mark.distributed
def test_probe_may_change_between_starts_and_a_missing_task_ends_the_start(runs):
    table = write_table(runs.folder / "changing-task")
    codes, output = runs.run("changing", "train.steps=3", ranks=1)
    assert codes == [0], output
    codes, output = runs.run("changing", "train.steps=5", "probe.every=1", f"probe.data={table.parent}/no.csv", ranks=1)
    assert codes == [2], output
    assert "probe.data = " in output
    assert "Traceback" not in output
    codes, output = runs.run("changing", "train.steps=5", "probe.every=1", f"probe.data={table}", ranks=1)
    assert codes == [0], output
    assert [line["step"] for line in probed_lines(runs, "changing")] == [4, 5]
