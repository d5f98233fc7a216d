"""Gathering a study: what differs, what was reached, and what may be compared."""

import csv
import json
from pathlib import Path

import pytest
from PIL import Image

from msm_dist.config import dump_config, load_config
from msm_dist.errors import ConfigError, DataError
from msm_dist.evaluate.finetune_config import read_config
from msm_dist.study import lines_of, read_runs, rows_of, swept_settings
from msm_dist.study_results import TARGET_SETTINGS, gather, markdown, plot, table_csv
from msm_dist.sweep import expand
from tests.processes import HERE

ROOT = HERE.parent
STEPS = 100
REFERENCES = {"reference_mel_mean": 2.0, "reference_visible_mean": 0.8, "reference_nearest_patch": 1.0}


def write_run(root: Path, name: str, *settings: str, step=STEPS, loss=0.6, score=0.5, probed=True) -> Path:
    """A run folder as a run of `STEPS` steps leaves it at `step`."""
    folder = root / name
    config = root / "empty.yaml"
    folder.mkdir(parents=True)
    config.write_text("")
    cfg = load_config(config, [f"train.steps={STEPS}", f"run.dir={root}", f"run.name={name}", *settings])
    config.unlink()
    (folder / "config.yaml").write_text(dump_config(cfg))
    lines = [
        {"step": s, "loss": 1.0, "step_seconds": 0.5 + s / 100, "clips_per_second": 100.0 + s}
        for s in range(20, step + 1, 20)
    ]
    lines.append({"step": step, "valid_loss": loss, **REFERENCES})
    if probed:
        for at in (step // 2, step):
            value = score if at == step else 0.0
            scores = {"accuracy/order": value, "accuracy/pitch": value + 0.2}
            scores |= {"accuracy_random_weights/order": 0.3, "accuracy_random_weights/pitch": 0.4}
            scores |= {"accuracy_logmel/order": 0.45, "accuracy_logmel/pitch": 0.95}
            lines.append({"step": at} | {f"probe/{name}": value for name, value in scores.items()})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if step == STEPS:
        (folder / "export").mkdir()
        (folder / "export" / "config.json").touch()
        (folder / "export" / "model.safetensors").touch()
    return folder


@pytest.fixture
def runs(tmp_path):
    root = tmp_path / "runs"
    write_run(root, "seed-0", score=0.5)
    write_run(root, "seed-1", "seed=1", score=0.6, loss=0.62)
    write_run(root, "frames-96", "data.crop_frames=96", score=0.4, loss=0.5)
    write_run(root, "patch-8x16", "model.patch_size=8x16", step=60, score=0.3)
    return root


def rows_in(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]


def test_command_writes_tables_and_a_plot_of_what_differs(runs, tmp_path, capsys):
    gather(runs, [], tmp_path / "out")
    out = tmp_path / "out"
    assert {path.name for path in out.iterdir()} == {"results.md", "results.csv", "results.png"}
    text = (out / "results.md").read_text()
    assert text in capsys.readouterr().out
    headings, _, *rows = rows_in(text.split("Downstream scores")[0])
    assert headings[:3] == ["crop_frames", "patch_size", "runs"]
    table = {(row[0], row[1]): dict(zip(headings, row, strict=True)) for row in rows}
    assert list(table) == [("96", "16x16"), ("208", "8x16"), ("208", "16x16")]
    middle = table["208", "16x16"]
    assert middle["runs"] == "2"
    assert middle["patches (visible)"] == "65 (16)"
    assert middle["crops"] == f"{STEPS * 512:,}"
    assert middle["held-out loss"] == "0.6100 ± 0.0141"
    assert middle["/ corpus mean"] == "0.305 ± 0.007"
    assert middle["/ best reference"] == "0.762 ± 0.018"
    assert middle["score"] == "0.650 ± 0.071"
    assert (middle["random weights"], middle["log-mel"]) == ("0.350 ± 0.000", "0.700 ± 0.000")
    assert middle["clips/s"] == "160.0 ± 0.0"
    assert middle["minutes"] == "1.8 ± 0.0"  # 20 steps each of 0.7, 0.9, 1.1, 1.3 and 1.5 s
    assert table["96", "16x16"]["score"] == "0.500"
    with Image.open(out / "results.png") as image:
        assert image.size == (960, 768)


def test_unfinished_runs_are_marked(runs):
    found = read_runs(runs)
    text = markdown(runs, rows_of(found, swept_settings(found)), swept_settings(found), "any")
    assert "4 runs below runs, **1 of them unfinished**" in text
    assert "1 (unfinished at 60 of 100)" in text
    assert [run.is_finished for run in found] == [True, False, True, True]
    (runs / "patch-8x16" / "diverged.json").write_text('{"step": 61}')
    assert "diverged at 60 of 100" in "".join(run.state + f" at {run.step} of 100" for run in read_runs(runs))


def test_losses_over_other_targets_are_not_called_comparable(runs, tmp_path):
    found = read_runs(runs)
    swept = swept_settings(found)
    text = markdown(runs, rows_of(found, swept), swept, "any")
    assert "not comparable with each other**: crop_frames or patch_size decides" in text
    for name in ("data.shards", "data.valid_shards", "train.valid_clips"):
        assert name.startswith(TARGET_SETTINGS)
        corpora = tmp_path / name
        for number in (1, 2):
            write_run(corpora, f"run-{number}", f"{name}={number}" if "clips" in name else f"{name}=shards-{number}")
        found = read_runs(corpora)
        assert "are **not comparable" in markdown(corpora, rows_of(found, [name]), swept_settings(found), "any")
    rates = tmp_path / "rates"
    for number, rate in enumerate(("1e-3", "2e-3")):
        write_run(rates, f"lr-{number}", f"optim.lr={rate}")
    found = read_runs(rates)
    assert swept_settings(found) == ["optim.lr"]
    text = markdown(rates, rows_of(found, ["optim.lr"]), ["optim.lr"], "any")
    assert "not comparable" not in text
    assert "comparable" in text


def test_every_run_is_a_line_of_the_csv_with_numbers_unrounded(runs):
    found = read_runs(runs)
    records = list(csv.DictReader(table_csv(found, swept_settings(found)).splitlines()))
    assert [record["run"] for record in records] == ["frames-96", "patch-8x16", "seed-0", "seed-1"]
    first = records[0]
    assert (first["data.crop_frames"], first["model.patch_size"], first["seed"]) == ("96", "16x16", "0")
    assert float(first["loss_to_mel_mean"]) == 0.5 / 2.0
    assert float(first["loss_to_best_reference"]) == 0.5 / 0.8
    assert float(first["audio_hours"]) == pytest.approx(STEPS * 512 * 0.96 / 3600)
    assert int(first["visible_patches_seen"]) == STEPS * 512 * 7
    assert float(first["accuracy/pitch"]) == 0.4 + 0.2
    assert float(first["accuracy/pitch logmel"]) == 0.95
    assert (records[1]["state"], records[1]["step"], records[1]["total_steps"]) == ("unfinished", "60", "100")


def test_lines_join_rows_that_differ_in_one_setting_alone(tmp_path):
    root = tmp_path / "grid"
    for frames in (96, 208):
        for patch in ("8x16", "16x16"):
            write_run(root, f"{frames}-{patch}", f"data.crop_frames={frames}", f"model.patch_size={patch}")
    write_run(root, "alone", "data.crop_frames=304", "model.patch_size=80x4")
    found = read_runs(root)
    rows = rows_of(found, swept_settings(found))
    lines = lines_of(rows, 0)
    assert [(line.label, [row.values[0] for row in line.points]) for line in lines] == [
        ("8x16", ["96", "208"]),
        ("16x16", ["96", "208"]),
    ]
    gather(root, [], tmp_path / "out")


def test_runs_that_differ_everywhere_or_have_no_probe_are_drawn_too(tmp_path):
    root = tmp_path / "runs"
    write_run(root, "a", probed=False)
    write_run(root, "b", "data.crop_frames=96", "model.mask_ratio=0.5", probed=False)
    gather(root, [], tmp_path / "out")
    text = (tmp_path / "out" / "results.md").read_text()
    assert "Downstream scores" not in text
    assert dict(zip(*[rows_in(text)[n] for n in (0, 2)], strict=True))["score"] == "-"


def test_a_run_that_has_logged_nothing_yet_has_a_row(runs, tmp_path):
    (write_run(runs, "new", "data.crop_frames=304", step=0) / "metrics.jsonl").unlink()
    gather(runs, [], tmp_path / "out")
    assert "| 304 | 16x16 | 1 (unfinished at 0 of 100) |" in (tmp_path / "out" / "results.md").read_text()


def report_of(run: Path, value: float, task="order") -> dict:
    kinds = {"trained": value, "random_weights": value - 0.1, "logmel": value - 0.2}
    scored = {kind: {"mean": mean, "deviation": 0.01} for kind, mean in kinds.items()}
    tasks = [{"task": task, "score": "top1_acc", "scored": scored}]
    return {"run": str(run), "settings": {"protocol": "linear"}, "tasks": tasks}


def test_reports_of_the_probe_command_take_the_place_of_online_scores(runs, tmp_path):
    reports = [
        report_of(runs / "seed-0", 0.7, "order"),
        report_of(runs / "seed-1" / "export", 0.8, "order"),
        report_of(runs / "seed-1" / "export" / "model.safetensors", 0.9, "rhythm"),
        report_of(runs / "seed-0", 0.1, "rhythm"),
        report_of(runs / "seed-0", 0.0, "vowels"),
    ]
    paths = [tmp_path / f"{number}.json" for number in range(5)]
    for path, report in zip(paths, reports, strict=True):
        path.write_text(json.dumps(report))
    gather(runs, paths, tmp_path / "out")
    text = (tmp_path / "out" / "results.md").read_text()
    assert "by `msm-dist probe`, protocol linear (its random weights: those of seed 0)" in text
    assert "their mean over 2 tasks, of 3 those that all have." in text
    records = list(csv.DictReader((tmp_path / "out" / "results.csv").read_text().splitlines()))
    by_run = {record["run"]: record for record in records}
    assert float(by_run["seed-0"]["score"]) == pytest.approx((0.7 + 0.1) / 2)
    assert float(by_run["seed-0"]["score_random_weights"]) == pytest.approx((0.6 + 0.0) / 2)
    assert float(by_run["seed-1"]["score"]) == pytest.approx((0.8 + 0.9) / 2)
    assert float(by_run["seed-1"]["score_logmel"]) == pytest.approx((0.6 + 0.7) / 2)
    assert by_run["frames-96"]["score"] == ""


def test_reports_that_are_none_or_of_other_runs_are_refused_and_nothing_is_written(runs, tmp_path):
    report = tmp_path / "report.json"
    for content, kind, said in (
        ("{", DataError, "is no report of msm-dist probe"),
        ('{"run": 3}', DataError, "is no report of msm-dist probe"),
        (json.dumps(report_of(tmp_path / "elsewhere", 0.5)), ConfigError, "which is no run below"),
    ):
        report.write_text(content)
        with pytest.raises(kind, match=said):
            gather(runs, [report], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("second", "said"),
    [
        ({"settings": {"protocol": "linear", "shuffle_labels": True}}, "is of shuffled labels"),
        ({"settings": {"protocol": "knn"}}, "was made with protocol knn, but .* with linear"),
        ({"settings": {"protocol": "linear", "labels_per_class": 10}}, "labels_per_class 10, but .* with None"),
        ({"normalization": "batch"}, "normalization batch, but .* with None"),
        ({}, r"1\.json: has top1_acc/order of the run seed-0, as has .*0\.json"),
    ],
)
def test_reports_of_unlike_things_are_refused(runs, tmp_path, second, said):
    paths = [tmp_path / f"{number}.json" for number in range(2)]
    report = report_of(runs / "seed-0", 0.5)
    for path, content in zip(paths, (report, report | second), strict=True):
        path.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=said):
        gather(runs, paths, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_runs_without_a_task_in_common_have_no_mean(runs, tmp_path):
    paths = [tmp_path / f"{number}.json" for number in range(2)]
    for path, (run, task) in zip(paths, (("seed-0", "order"), ("seed-1", "rhythm")), strict=True):
        path.write_text(json.dumps(report_of(runs / run, 0.5, task)))
    gather(runs, paths, tmp_path / "out")
    assert "above stands no mean of them" in (tmp_path / "out" / "results.md").read_text()
    records = list(csv.DictReader((tmp_path / "out" / "results.csv").read_text().splitlines()))
    assert {record["score"] for record in records} == {""}


def test_every_panel_has_a_legend(runs):
    from matplotlib.figure import Figure

    drawn = []

    class Kept(Figure):
        def savefig(self, *given, **settings):
            drawn.append(self)
            super().savefig(*given, **settings)

    found = read_runs(runs)
    plot(Kept, rows_of(found, swept_settings(found)), swept_settings(found))
    assert len(drawn[0].axes) == 4
    assert all(axis.get_legend() is not None for axis in drawn[0].axes)


def test_what_can_not_be_compared_is_refused(runs, tmp_path):
    with pytest.raises(ConfigError, match="no such folder"):
        gather(tmp_path / "none", [], tmp_path / "out")
    with pytest.raises(ConfigError, match="has 1 runs that have begun"):
        gather(runs / "seed-0", [], tmp_path / "out")
    seeds = tmp_path / "seeds"
    write_run(seeds, "a")
    write_run(seeds, "b", "seed=1")
    with pytest.raises(ConfigError, match="differ in no setting but the seed"):
        gather(seeds, [], tmp_path / "out")
    with (runs / "seed-0" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 100, "valid_loss": "low"}\n')
    with pytest.raises(DataError, match="step 100 holds something that is no number"):
        gather(runs, [], tmp_path / "out")


def test_every_run_of_the_scaled_down_study_is_valid_and_sees_as_many_crops():
    variants = expand([str(ROOT / "configs/study/sweep.yaml")])
    configs = [load_config(ROOT / "configs/study/base.yaml", variant.overrides) for variant in variants]
    assert len({cfg.train.steps * cfg.train.global_batch for cfg in configs}) == 1
    assert len({cfg.model_dump_json(exclude={"run"}) for cfg in configs}) == len(variants)
    assert {cfg.probe.every for cfg in configs} == {configs[0].train.steps}


def test_finetuned_runs_are_left_out_by_name(runs, caplog):
    before = read_runs(runs)
    tuned = write_run(runs, "tuned")
    (tuned / "config.yaml").write_text(dump_config(read_config("weights", "birds.csv", ["train.steps=3"])))
    assert read_runs(runs) == before
    assert "tuned: a fine-tuned run, left out" in caplog.text
