"""What exports leave alone, take along and say: other people's files, heads, flaws, and where weights come from."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import soundfile
import torch

from msm_dist.config import Model, dump_config
from msm_dist.errors import CheckpointError, ConfigError
from msm_dist.evaluate import classifier
from msm_dist.evaluate.classifier import Tagger
from msm_dist.evaluate.encoder import Encoder
from msm_dist.evaluate.finetune_config import read_config
from msm_dist.evaluate.weights_export import export
from msm_dist.evaluate.weights_import import import_published
from msm_dist.evaluate.weights_inspect import inspect
from msm_dist.model.mae import MaskedSpectrogramModel
from msm_dist.model.origin import LONGEST_CHAIN, chain, is_trained, published_ancestor, told
from msm_dist.model.published import read_file
from msm_dist.model.weights import WeightsInfo, load, save
from tests.labelled import INFO, RATE, new_model
from tests.published import PAPER, RERUN
from tests.test_classifier import HEAD, trained_classifier
from tests.test_weights_commands import assert_holds, published, run, unwrapped, write_checkpoint  # noqa: F401 - a fixture

PUBLISHED = {"published_file": "p.pth", "sha256": "77", "untrained": ["decoder"], "notes": []}
TUNED = {"run": "ft", "step": 10, "task": "birds", "untrained": ["decoder"]}


def write_tuned(folder, before=PUBLISHED, **head):
    """A finished fine-tuned run."""
    folder.mkdir()
    (folder / "config.yaml").write_text(dump_config(read_config("w", "birds.csv", ["train.steps=10", "run.name=ft"])))
    (folder / "results.json").write_text('{"step": 10, "test_mAP": 0.5, "task": "birds"}')
    (folder / "metrics.jsonl").write_text('{"step": 10, "loss": 0.25}\n')
    head = replace(HEAD, **head)
    decoder = {name: value for name, value in new_model().state_dict().items() if name.startswith("decoder.")}
    origin = TUNED | {"finetuned_from": before, "positions": head.positions}
    state = trained_classifier(head).state_dict()
    classifier.save(folder / "export", state, decoder, replace(INFO, origin=origin), head)
    return folder


def predicted(path):
    waveform = 0.1 * torch.randn(1, 16000, generator=torch.Generator().manual_seed(3))
    return Tagger.load(path).predict(waveform, RATE)


@pytest.mark.parametrize("path", ["ft", "ft/export"])
def test_export_of_a_finetuned_run_takes_its_head_along(tmp_path, path):
    write_tuned(tmp_path / "ft")
    report = export(tmp_path / path, out=tmp_path / "copy")
    assert f"head         {tmp_path / 'copy' / 'head.safetensors'}" in report
    assert torch.equal(predicted(tmp_path / "copy"), predicted(tmp_path / "ft"))
    assert Encoder.load(tmp_path / "copy").embedding_size == 160
    card = (tmp_path / "copy" / "README.md").read_text()
    assert "fine-tuned to label birds" in card
    assert "1. run ft, step 10, fine-tuned on birds\n2. file p.pth\n" in card
    assert "descend from p.pth: the licence of the published checkpoint holds" in card
    assert "not trained with this encoder" in card
    assert ("training loss at step 10 | 0.2500" in card) == (path == "ft")
    assert ("test: mAP at step 10 | 0.5000" in card) == (path == "ft")
    assert "crops" not in card


def test_card_of_a_finetuned_run_is_written_beside_its_export_and_its_code_runs(tmp_path, monkeypatch):
    write_tuned(tmp_path / "ft")
    export(tmp_path / "ft")
    (tmp_path / "ft" / "export").rename(tmp_path / "FOLDER")
    soundfile.write(tmp_path / "sound.wav", np.zeros((8000, 2), np.float32), RATE)
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (tmp_path / "FOLDER" / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 2
    for code in blocks:
        names: dict = {}
        exec(compile(code, "README.md", "exec"), names)
    assert names["probabilities"].shape == (1, 3)


def test_finetuned_run_without_its_export_is_one_clear_error(tmp_path):
    folder = write_tuned(tmp_path / "ft")
    with pytest.raises(CheckpointError, match="--step 5: .* the export alone, of step 10"):
        export(folder, step=5)
    assert "task birds" in inspect(folder)
    checkpoint = write_checkpoint(folder, 5)
    with pytest.raises(CheckpointError, match="checkpoints lack its labels; take its export"):
        export(checkpoint)
    (folder / "export").rename(tmp_path / "away")
    with pytest.raises(CheckpointError, match="start it again to finish it"):
        export(folder)


def test_stretched_positions_are_exported_for_the_tagger_alone(tmp_path):
    folder = write_tuned(tmp_path / "ft", positions="interpolated", num_samples=32000)
    export(folder, out=tmp_path / "copy")
    assert torch.equal(predicted(tmp_path / "copy"), predicted(folder))
    for path in (folder, tmp_path / "copy"):
        with pytest.raises(CheckpointError, match="model.positions=interpolated"):
            Encoder.load(path)
    with pytest.raises(CheckpointError, match="model.positions=interpolated"):
        export(folder, published=tmp_path / "p.pth")
    assert not (tmp_path / "p.pth").exists()
    card = (tmp_path / "copy" / "README.md").read_text()
    assert "Tagger.load" in card and "Encoder.load" not in card


def test_card_is_replaced_while_it_is_as_it_was_written(run):  # noqa: F811
    export(run)
    card = run / "export" / "README.md"
    write_checkpoint(run, 8)
    export(run)
    assert "| steps | 8 |" in card.read_text()
    mine = card.read_text().replace("Not stated", "MIT")
    for content in (mine.encode(), b"my project", b"\xff\xfe", b""):
        card.write_bytes(content)
        assert "README.md is left as it is" in export(run)
        assert card.read_bytes() == content


def test_folder_with_anything_in_it_is_not_written_to_unless_asked(run, tmp_path):  # noqa: F811
    project, state = tmp_path / "project", published(tmp_path / "p.pth")
    assert state
    project.mkdir()
    (project / "README.md").write_text("my project")
    for call in (export, import_published):
        source = run if call is export else tmp_path / "p.pth"
        with pytest.raises(ConfigError, match="project: holds README.md; .*--overwrite"):
            call(source, out=project)
        assert [path.name for path in project.iterdir()] == ["README.md"]
    export(run, step=4, out=project, overwrite=True)
    assert_holds(project, 4)
    import_published(tmp_path / "p.pth", project, overwrite=True)
    assert load(project)[1].crop_frames == 208
    assert (project / "README.md").read_text() == "my project"


def test_head_of_other_weights_does_not_stay_beside_new_ones(run, tmp_path):  # noqa: F811
    folder = write_tuned(tmp_path / "ft") / "export"
    before = (folder / "model.safetensors").read_bytes()
    with pytest.raises(ConfigError, match="holds the head of a classifier"):
        export(run, out=folder, overwrite=True)
    assert (folder / "model.safetensors").read_bytes() == before


def test_published_file_alone_is_written_where_it_alone_is_asked_for(run, tmp_path):  # noqa: F811
    export(run, published=tmp_path / "a.pth")
    assert not (run / "export").exists()
    export(run)
    (run / "export" / "README.md").write_text("mine, MIT")
    before = {path.name: path.read_bytes() for path in (run / "export").iterdir()}
    report = export(run / "export", published=tmp_path / "b.pth")
    assert "model card" not in report
    assert {path.name: path.read_bytes() for path in (run / "export").iterdir()} == before
    content = (tmp_path / "b.pth").read_bytes()
    with pytest.raises(ConfigError, match="b.pth: is there; .*--overwrite"):
        export(run, step=4, published=tmp_path / "b.pth")
    assert (tmp_path / "b.pth").read_bytes() == content
    export(run, step=4, published=tmp_path / "b.pth", overwrite=True)
    assert (tmp_path / "b.pth").read_bytes() != content


def test_decoder_that_is_not_trained_is_not_written_to_a_published_file(tmp_path):
    state = published(tmp_path / "p.pth")
    import_published(tmp_path / "p.pth", tmp_path / "encoder", encoder_only=True)
    report = export(tmp_path / "encoder", published=tmp_path / "back.pth")
    assert "the decoder is left out" in report
    back = read_file(tmp_path / "back.pth").state
    assert all(torch.equal(back[name], state[name]) for name in back if name != "norm_stats")
    assert not [name for name in back if name.startswith(("decoder_", "mask_token"))]
    with pytest.raises(CheckpointError, match="--encoder-only"):
        import_published(tmp_path / "back.pth", tmp_path / "again")
    import_published(tmp_path / "back.pth", tmp_path / "again", encoder_only=True)
    assert load(tmp_path / "again")[1].origin["untrained"] == ["decoder"]


def ours(folder, origin, **settings):
    """Weights of a named size, so that their number of heads is known."""
    config = Model.model_validate({"size": "tiny", **settings})
    model = MaskedSpectrogramModel(config, 80, 208)
    return save(folder, model.state_dict(), WeightsInfo(config, INFO.features, 208, origin))


def test_weights_of_ours_without_cls_are_not_said_to_have_learnt_from_misplaced_tokens(tmp_path):
    ours(tmp_path / "mine", {"run": "mine", "step": 3}, cls_token=False)
    report = export(tmp_path / "mine", published=tmp_path / "mine.pth")
    assert "the published code reconstructs wrongly with them" in report
    said = import_published(tmp_path / "mine.pth", tmp_path / "again")
    assert "misplaced" not in said
    assert "written by   msm-dist, from run mine, step 3" in said
    assert "licence      see" not in said
    assert "misplaced" not in inspect(tmp_path / "mine.pth")
    assert "written by msm-dist, run mine, step 3" in inspect(tmp_path / "mine.pth")
    card = (tmp_path / "again" / "README.md").read_text()
    assert "file that msm-dist wrote in the published layout" in card
    assert "Not stated: whoever publishes" in card
    assert "note" not in export(ours(tmp_path / "cls", {"run": "mine"}), published=tmp_path / "cls.pth")


def test_published_weights_without_cls_keep_their_note_through_a_file_of_ours(tmp_path):
    published(tmp_path / "p.pth", PAPER, cls_token=False)
    import_published(tmp_path / "p.pth", tmp_path / "a")
    report = export(tmp_path / "a", published=tmp_path / "b.pth")
    assert "note" not in report  # the published decoder arranges them as it did in their training
    said = import_published(tmp_path / "b.pth", tmp_path / "c")
    assert "learnt from misplaced tokens" in said and "licence      see the terms" in said
    assert "descend from p.pth" in (tmp_path / "c" / "README.md").read_text()


def test_statistics_that_are_replaced_are_listed_with_their_values(tmp_path):
    state = published(tmp_path / "p.pth", RERUN)
    report = import_published(tmp_path / "p.pth", tmp_path / "out", (-6.5, 3.0))
    assert "norm_stats (-7.1, 4.2: --mean and --std were given)" in unwrapped(report)
    assert "unused       4: norm_stats" in report
    assert f"{len(state) - 1} of {len(state)} tensors" in report
    assert "norm_stats (" not in import_published(tmp_path / "p.pth", tmp_path / "file")


@pytest.mark.parametrize("path", ["", "checkpoints/step-00000006"])
def test_weights_that_started_from_others_say_from_which(run, tmp_path, path):  # noqa: F811
    report = {"sha256": "ab", "origin": PUBLISHED, "loaded": []}
    (run / "init_from.json").write_text(json.dumps(report))
    export(run / path, out=tmp_path / "out")
    assert load(tmp_path / "out")[1].origin["init_from"] == {"sha256": "ab", "origin": PUBLISHED}
    card = (tmp_path / "out" / "README.md").read_text()
    assert "1. run mine, step 6\n2. file p.pth\n" in card
    assert "descend from p.pth: the licence of the published checkpoint holds" in card
    assert "made from file p.pth" in inspect(tmp_path / "out")


def test_file_in_half_precision_comes_back_as_float32_of_the_same_values(tmp_path):
    state = {name: value.half() for name, value in published(tmp_path / "p.pth", RERUN).items()}
    torch.save({"model": state}, tmp_path / "half.pth")
    import_published(tmp_path / "half.pth", tmp_path / "out")
    export(tmp_path / "out", published=tmp_path / "back.pth")
    back = torch.load(tmp_path / "back.pth", weights_only=True)["model"]
    assert {value.dtype for value in back.values()} == {torch.float32}
    for name in state:  # the tables are computed, not read
        assert torch.equal(back[name], state[name].float()) or name.endswith("pos_embed"), name


def test_decoder_of_a_finetuned_run_counts_as_untrained_though_its_export_does_not_say_so():
    assert is_trained({"run": "r"}, "decoder") and not is_trained({"untrained": ["decoder"]}, "decoder")
    assert not is_trained({"run": "r", "task": "t", "finetuned_from": {}}, "decoder")


def test_chain_of_origins_ends_whatever_it_holds():
    endless: dict = {"run": "r"}
    endless["finetuned_from"] = endless
    assert len(list(chain(endless))) == LONGEST_CHAIN
    for broken in ({"init_from": 3}, {"init_from": {"origin": [1]}}, {"finetuned_from": "x"}, {"exported_from": None}):
        assert list(chain(broken)) == [broken]
        assert told(broken) == "not told"
    first = {"published_file": "p"}
    deep = {"exported_from": {"init_from": {"origin": {"finetuned_from": first}}}, "published_file": "q"}
    assert published_ancestor(deep) is first
