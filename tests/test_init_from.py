"""Starting from trained weights: what is taken, what is said of the rest, and that all ranks start alike."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from msm_dist.config import Features, batch_layout, load_config, parse_config
from msm_dist.corpus import open_corpus
from msm_dist.data.stream import make_loader
from msm_dist.engine.runfolder import compare_config
from msm_dist.engine.world import World
from msm_dist.errors import CheckpointError, ConfigError
from msm_dist.features import LogMel, normalize
from msm_dist.initial import load_initial
from msm_dist.model.mae import MaskedSpectrogramModel
from msm_dist.model.weights import WeightsInfo, load, save, to_published
from tests.corpus import write_corpus
from tests.processes import HERE, free_port, rank_environment

TINY = {"embed_dim": 32, "depth": 1, "num_heads": 2, "decoder_embed_dim": 16, "decoder_depth": 1}
TINY |= {"decoder_num_heads": 2}
STATISTICS = Features(mean=-7.0, std=4.0)
SETTINGS = [
    "train.global_batch=16",
    "train.micro_batch=4",
    "train.precision=fp32",
    "train.steps=3",
    "train.log_every=1",
    "train.pictures_every=0",
    "data.num_workers=0",
    "data.block=4",
    "model.size=null",
    *(f"model.{name}={value}" for name, value in TINY.items()),
    "optim.lr=1e-2",
    "optim.warmup_steps=0",
]


def config(folder=None, model=None, **sections):
    values = {"model": TINY | (model or {}), "data": {"crop_frames": 96, "block": 2}}
    train = {"steps": 1, "micro_batch": 2, "global_batch": 2, "init_from": str(folder)}
    return parse_config(values | {"train": train} | sections, "test")


def build(cfg):
    return MaskedSpectrogramModel(cfg.model, cfg.features.n_mels, cfg.data.crop_frames, cfg.seed)


@pytest.fixture(scope="module")
def world():
    """A real group of one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield World(0, 1, 0, 1, torch.device("cpu"), False, dist.group.WORLD)
    dist.destroy_process_group()


@pytest.fixture
def trained(tmp_path):
    """A folder with weights in which no value is a seeded one."""
    cfg = config(model={"decoder_depth": 2})
    state = {name: value + 1 for name, value in build(cfg).state_dict().items()}
    return save(tmp_path / "trained", state, WeightsInfo(cfg.model, STATISTICS, 96, {"run": "first", "step": 5}))


def start(cfg, world, features=STATISTICS):
    """The report, the weights that came out and the seeded ones."""
    seeded = {name: value.detach() for name, value in build(cfg).named_parameters()}
    initial = {name: value.clone() for name, value in seeded.items()}
    return load_initial(cfg, features, initial, world), initial, seeded


def part(names, prefix):
    return {name for name in names if name.startswith(prefix)}


def test_same_model_is_taken_whole_and_bit_for_bit(trained, world):
    cfg = config(trained, model={"decoder_depth": 2})
    report, initial, _ = start(cfg, world)
    expected = load_file(trained / "model.safetensors")
    assert set(report.loaded) == initial.keys() == expected.keys()
    assert all(torch.equal(initial[name], expected[name]) for name in expected)
    assert (report.missing, report.unused, report.resized, report.notes) == ((), (), {}, ())
    assert report.text() == f"weights    {trained}, run 'first', step 5: 51 of 51 parameters loaded"


def test_another_decoder_keeps_its_seeded_values_as_a_whole_and_every_name_is_reported(trained, world):
    cfg = config(trained, model={"decoder_depth": 1})
    report, initial, seeded = start(cfg, world)
    names = load_file(trained / "model.safetensors").keys()
    assert set(report.loaded) == part(initial, "encoder.")
    assert set(report.missing) == part(initial, "decoder.")
    assert set(report.unused) == part(names, "decoder.")
    for name, value in initial.items():
        assert torch.equal(value, seeded[name] + 1 if name.startswith("encoder.") else seeded[name]), name
    assert "model.decoder_depth = 1, the weights' 2" in report.notes
    assert f"missing    {len(report.missing)} keep their seeded values: decoder." in report.text()
    assert f"unused     {len(report.unused)} of the file: decoder." in report.text()
    assert json.loads(report.json())["unused"] == list(report.unused)


@pytest.mark.parametrize(("name", "value"), [("decoder_num_heads", 4), ("decoder_positions", "2d")])
def test_decoder_that_differs_in_what_no_shape_shows_is_another_one(trained, world, name, value):
    report, _, _ = start(config(trained, model={"decoder_depth": 2, name: value}), world)
    assert not part(report.loaded, "decoder.")
    assert part(report.missing, "decoder.") == part(report.unused, "decoder.") != set()


def test_other_parts_of_a_model_stay_seeded_where_the_file_lacks_them(trained, world):
    cfg = config(trained, model={"decoder_depth": 2})
    seeded = {name: value.detach().clone() for name, value in build(cfg).named_parameters()} | {
        "projector.weight": torch.ones(3, 3)
    }
    report = load_initial(cfg, STATISTICS, seeded, world)
    assert report.missing == ("projector.weight",)
    assert torch.equal(seeded["projector.weight"], torch.ones(3, 3))


@pytest.mark.parametrize(("positions", "decoder_moves"), [("1d", True), ("2d", False)])
def test_tables_of_another_duration_are_reported_as_what_they_are(tmp_path, world, positions, decoder_moves):
    cfg = config(model={"decoder_positions": positions})
    model = build(cfg)
    save(tmp_path / "trained", model.state_dict(), WeightsInfo(cfg.model, STATISTICS, 96))
    longer = config(tmp_path / "trained", model={"decoder_positions": positions}, data={"crop_frames": 160, "block": 2})
    report, initial, _ = start(longer, world)
    assert set(report.loaded) == initial.keys()
    assert set(report.resized) == {"encoder.positions", "decoder.positions"}
    assert all("5x6 -> 5x10 patches" in how for how in report.resized.values())
    assert "keeps its code" in report.resized["encoder.positions"]
    assert ("have other codes" in report.resized["decoder.positions"]) == decoder_moves
    # What the report says of codes is what the tables do.
    tables = {
        part: [getattr(m, part).positions()[1:].unflatten(0, (5, -1))[:, :6] for m in (model, build(longer))]
        for part in ("encoder", "decoder")
    }
    assert torch.equal(*tables["encoder"])
    assert torch.equal(*tables["decoder"]) != decoder_moves
    assert torch.equal(*(table[0] for table in tables["decoder"]))


def test_more_bands_are_taken_with_a_note(trained, world):
    features = {"n_mels": 96}
    cfg = config(trained, model={"decoder_depth": 2}, features=features)
    report, _, _ = start(cfg, world, STATISTICS.model_copy(update=features))
    assert "5x6 -> 6x6" in report.resized["encoder.positions"]
    assert any("features.n_mels = 96" in note for note in report.notes)


def test_other_statistics_and_tasks_are_noted_with_the_settings_that_keep_the_weights(trained, world):
    cfg = config(trained, model={"decoder_depth": 2, "normalize_targets": True, "mask_ratio": 0.5})
    report, _, _ = start(cfg, world, STATISTICS.model_copy(update={"mean": -6.0}))
    notes = "\n".join(report.notes)
    assert "features.mean=-7.0 features.std=4.0" in notes
    assert "model.normalize_targets = True, the weights' False" in notes
    assert "model.mask_ratio = 0.5, the weights' 0.75" in notes
    assert all(note in report.text() for note in report.notes)


def test_all_settings_that_do_not_fit_are_one_error(trained, world):
    other = {"embed_dim": 64, "depth": 2, "num_heads": 4, "patch_size": "16x8", "cls_token": False, "key_bias": True}
    features = STATISTICS.model_copy(update={"fmin": 20.0, "hop": 100})
    with pytest.raises(ConfigError, match="train.init_from") as raised:
        start(config(trained, model=other), world, features)
    message = str(raised.value)
    for fault in (
        "model.embed_dim = 64: the weights' is 32",
        "model.depth = 2: the weights' is 1",
        "model.num_heads = 4: the weights' is 2",
        "model.patch_size = 16x8: the weights' is 16x16",
        "model.cls_token = False: the weights' is True",
        "model.key_bias = True: the weights' is False",
        "features.fmin = 20.0: the weights' log-mels were made with 50.0",
        "features.hop = 100: the weights' log-mels were made with 160",
    ):
        assert fault in message
    assert raised.value.on_all_ranks


def edited(folder, change):
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors")


def spoil(folder, fault):
    """Break a folder of weights in one way; what the message must say of it."""
    file, settings = folder / "model.safetensors", folder / "config.json"
    name = "encoder.norm.weight"
    if fault == "torn":
        file.write_bytes(file.read_bytes()[:-100])
        return "not readable weights"
    if fault == "no tensors":
        file.unlink()
        return "not readable weights"
    if fault == "other format":
        settings.write_text(json.dumps(json.loads(settings.read_text()) | {"format": "something"}))
        return "format 'something'"
    if fault == "nested":
        settings.write_text("[" * 100_000)
        return "not the configuration of saved weights"
    if fault == "missing":
        edited(folder, lambda state: state.pop(name))
        return rf"its encoder is not the model's; missing: {name}"
    if fault == "shape":
        edited(folder, lambda state: state.update({name: torch.ones(7)}))
        return rf"wrong shape: {name} \[7\] \(expected \[32\]\)"
    if fault == "whole numbers":
        edited(folder, lambda state: state.update({name: torch.ones(32, dtype=torch.int64)}))
        return f"not finite floating-point numbers: {name}"
    if fault == "not finite":
        edited(folder, lambda state: state[name].fill_(float("nan")))
        return f"not finite floating-point numbers: {name}"
    shutil.rmtree(folder)
    if fault == "unfinished run":
        folder.mkdir()
        (folder / "config.yaml").write_text("")
        return "a run without exported weights"
    return "no such file; weights are a folder"


FAULTS = ("torn", "no tensors", "other format", "nested", "missing", "shape", "whole numbers", "not finite")


@pytest.mark.parametrize("fault", [*FAULTS, "unfinished run", "no folder"])
def test_weights_that_cannot_be_used_are_one_error_and_change_nothing(trained, world, fault):
    message = spoil(trained, fault)
    cfg = config(trained, model={"decoder_depth": 2})
    seeded = {name: value.detach() for name, value in build(cfg).named_parameters()}
    initial = {name: value.clone() for name, value in seeded.items()}
    with pytest.raises(CheckpointError, match=f"train.init_from = {trained}: .*{message}"):
        load_initial(cfg, STATISTICS, initial, world)
    assert all(torch.equal(initial[name], seeded[name]) for name in seeded)


def test_published_checkpoint_is_converted_as_the_page_says(tmp_path, world, monkeypatch):
    page = (HERE.parent / "docs" / "extend.md").read_text(encoding="utf-8")
    (lines,) = [block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "from_published" in block]
    cfg = config("published", dict.fromkeys(TINY) | {"size": "tiny"})
    model = MaskedSpectrogramModel(cfg.model, 80, 96, seed=5)
    torch.save(to_published(model), tmp_path / "published.pth")
    monkeypatch.chdir(tmp_path)
    exec(compile(lines, "docs/extend.md", "exec"), {})
    report, initial, _ = start(cfg, world, Features(mean=-7.1, std=4.2))
    assert (report.missing, report.unused, report.notes) == ((), (), ())
    expected = dict(model.named_parameters())
    assert all(torch.equal(initial[name], expected[name]) for name in expected)


class Runs:
    """Runs on one corpus, as ranks in real processes; each rank may stand in a folder of its own."""

    def __init__(self, folder: Path):
        self.folder = folder
        (folder / "empty.yaml").write_text("")
        self.shards = write_corpus(folder / "train", count=128, num_shards=2)

    def words(self, name: str, *settings: str) -> list[str]:
        places = [f"run.dir={self.folder}", f"run.name={name}", f"data.shards={self.shards}"]
        return [str(self.folder / "empty.yaml"), *places, *SETTINGS, *settings]

    def run(self, name: str, *settings: str, folders: list[Path]) -> tuple[list[int], str]:
        port = free_port()
        processes = [
            subprocess.Popen(
                [sys.executable, "-m", "msm_dist.pretrain", *self.words(name, *settings)],
                env=rank_environment(rank, len(folders), port) | {"PYTHONPATH": os.pathsep.join(sys.path)},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                cwd=place,
            )
            for rank, place in enumerate(folders)
        ]
        try:
            outputs = [process.communicate(timeout=600)[0] for process in processes]
        finally:
            for process in processes:
                process.kill()
        return [process.returncode for process in processes], "\n".join(outputs)

    def losses(self, name: str) -> list[float]:
        return [json.loads(line)["loss"] for line in (self.folder / name / "metrics.jsonl").read_text().splitlines()]


# So small a decoder that ZeRO gives rank 1 a part of the encoder.
OTHER = ("data.crop_frames=160", "model.decoder_embed_dim=8", "seed=3", "train.init_from=first")


def first_loss(runs: Runs, name: str, settings: tuple[str, ...]) -> float:
    """The loss of a run's first step on two ranks, with weights laid in by hand."""
    words = runs.words(name, *settings)
    cfg = load_config(words[0], words[1:])
    corpus = open_corpus(cfg, batch_layout(cfg, 2))
    model = build(cfg)
    trained, _ = load(runs.folder / "first")
    model.encoder.load_state_dict(trained.encoder.state_dict())
    front_end, totals = LogMel(corpus.features), []
    for rank in range(2):
        total = torch.zeros(())
        batches = make_loader(corpus.plan, corpus.index, corpus.features, cfg.data, batch_layout(cfg, 2), rank)
        for _ in range(2):
            batch = next(batches)
            spectrogram = normalize(front_end(batch.crops), corpus.features.mean, corpus.features.std)
            total += model(spectrogram, sample_ids=batch.sample_ids).loss.detach() / 2
        batches.close()
        totals.append(total.item())
    return sum(totals) / 2


@pytest.mark.distributed
def test_run_starts_from_anothers_weights_on_all_ranks_and_needs_them_no_more_once_it_continues(tmp_path):
    runs = Runs(tmp_path)
    codes, output = runs.run("first", "data.crop_frames=96", folders=[tmp_path])
    assert codes == [0], output
    elsewhere = tmp_path / "elsewhere"  # where rank 1 looks, there is no folder `first`
    elsewhere.mkdir()
    folders = [tmp_path, elsewhere]

    codes, output = runs.run("second", *OTHER, "train.init_from=nowhere", folders=folders)
    assert codes == [2, 2], output
    assert output.count("train.init_from = nowhere: ") == 1
    assert "no such file" in output
    assert "Traceback" not in output
    assert not list((tmp_path / "second").iterdir())

    codes, output = runs.run("second", *OTHER, folders=folders)
    assert codes == [0, 0], output
    assert "run 'first', step 3: " in output
    report = json.loads((tmp_path / "second" / "init_from.json").read_text())
    assert report["source"] == "first/export"
    assert report["resized"].keys() == {"encoder.positions"}
    assert {name.partition(".")[0] for name in report["missing"]} == {"decoder"}
    origin = json.loads((tmp_path / "second" / "export" / "config.json").read_text())["origin"]
    assert origin["init_from"] == {"sha256": report["sha256"], "origin": report["origin"]}
    card = (tmp_path / "second" / "export" / "README.md").read_text()
    assert "1. run second, step 3\n2. run first, step 3\n" in card
    assert "training loss at step 3" in card
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert runs.losses("second")[0] == first_loss(runs, "second", OTHER)
    torch.set_num_threads(threads)

    shutil.rmtree(tmp_path / "first")
    codes, output = runs.run("second", *OTHER, "train.steps=4", folders=[tmp_path])
    assert codes == [0], output
    assert "continued from" in output
    assert "weights  " not in output.partition("step 4/4")[0]
    assert len(runs.losses("second")) == 4
    assert json.loads((tmp_path / "second" / "init_from.json").read_text()) == report
    words = runs.words("second", *OTHER, "train.init_from=other")
    with pytest.raises(ConfigError, match="train.init_from: 'first'"):
        compare_config(tmp_path / "second", load_config(words[0], words[1:]))
