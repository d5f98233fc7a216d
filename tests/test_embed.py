"""`msm-dist embed`: the same vectors from files and shards, what is left out, and a file that is whole or not there."""

import json
import shutil
import sys
import tracemalloc
import zipfile
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from msm_dist.cli import main
from msm_dist.config import Features, Model
from msm_dist.data.audio import BadClip
from msm_dist.data.index import load_index, members
from msm_dist.data.pack import PackSettings, pack
from msm_dist.data.repack import repack
from msm_dist.errors import CheckpointError, ConfigError, DataError
from msm_dist.evaluate import embed as module
from msm_dist.evaluate import inputs
from msm_dist.evaluate.embed import Embed, embed
from msm_dist.evaluate.embedding_file import EmbeddingFile
from msm_dist.evaluate.encoder import Encoder
from msm_dist.evaluate.recordings import read_audio
from msm_dist.model.mae import MaskedSpectrogramModel
from msm_dist.model.weights import WeightsInfo, save
from tests.audio_files import encode, noise, write_audio
from tests.bad_clips import break_clip

RATE = 16000
SMALL = Model(embed_dim=32, depth=2, num_heads=1, decoder_embed_dim=32, decoder_depth=1, decoder_num_heads=1)
INFO = WeightsInfo(SMALL, Features(mean=-6.5, std=3.5), 208, {"run": "small", "step": 3})
LENGTHS = {"a.wav": 20000, "b.flac": 33280, "deep/c.ogg": 70000, "deep/d.wav": 9000}


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    model = MaskedSpectrogramModel(SMALL, 80, 208, seed=3)
    return save(tmp_path_factory.mktemp("weights") / "export", model.state_dict(), INFO).parent


@pytest.fixture(scope="module")
def encoder(weights) -> Encoder:
    return Encoder.load(weights)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Clips of several lengths, codecs and rates."""
    root = tmp_path_factory.mktemp("audio")
    for number, (name, length) in enumerate(LENGTHS.items()):
        rate = 22050 if name == "deep/d.wav" else RATE
        write_audio(root / name, noise(length, number), name.rpartition(".")[2], rate)
    return root


@pytest.fixture(scope="module")
def shards(tmp_path_factory, folder) -> Path:
    root = tmp_path_factory.mktemp("packed") / "shards"
    pack(folder, root, PackSettings(shard_clips=3))
    return root


def run(weights: Path, out: Path, *named: Path, **settings: object) -> dict[str, np.ndarray]:
    """What the file of a call holds; its report under "report"."""
    report = embed(Embed(tuple(map(str, named)), str(weights), out, **{"device": "cpu"} | settings))
    with np.load(out, allow_pickle=False) as file:
        return {name: file[name] for name in file.files} | {"report": report}


def about(found: dict[str, np.ndarray]) -> dict:
    return json.loads(found["metadata"].item())


def test_a_folder_of_audio_becomes_one_vector_a_file(tmp_path, weights, encoder, folder):
    found = run(weights, tmp_path / "x.npz", folder)
    assert found["keys"].tolist() == [str(folder / name) for name in LENGTHS]
    assert found["embeddings"].shape == (4, encoder.embedding_size)
    assert found["embeddings"].dtype == np.float32
    for name, vector, steps in zip(LENGTHS, found["embeddings"], found["num_steps"], strict=True):
        waveform = torch.from_numpy(read_audio(folder / name, RATE)[0])[None]
        frames = encoder.encode(waveform, RATE)[0]
        assert steps == len(frames)
        np.testing.assert_allclose(vector, frames.mean(dim=0), atol=2e-5)


def test_every_time_step_is_kept_where_it_is_asked_for(tmp_path, weights, encoder, folder):
    found = run(weights, tmp_path / "x.npz", folder, frames=True)
    offsets = found["offsets"].tolist()
    assert offsets[0] == 0
    assert len(found["frames"]) == len(found["timestamps_ms"]) == offsets[-1]
    for name, begin, end in zip(LENGTHS, offsets, offsets[1:], strict=False):
        waveform = torch.from_numpy(read_audio(folder / name, RATE)[0])[None]
        np.testing.assert_allclose(found["frames"][begin:end], encoder.encode(waveform, RATE)[0], atol=2e-5)
        np.testing.assert_array_equal(found["timestamps_ms"][begin:end], 75 + 160 * np.arange(end - begin))


@pytest.mark.parametrize("frames", [False, True])
def test_all_layers_are_kept_where_they_are_asked_for(tmp_path, weights, encoder, folder, frames):
    everything = run(weights, tmp_path / "x.npz", folder / "b.flac", layer="all", frames=frames)
    second = run(weights, tmp_path / "y.npz", folder / "b.flac", layer="1", frames=frames)
    name = "frames" if frames else "embeddings"
    assert everything[name].shape == (13 if frames else 1, 3, encoder.embedding_size)
    np.testing.assert_allclose(everything[name][:, 1], second[name], atol=1e-5)
    assert (about(everything)["layer"], about(second)["layer"]) == ("all", 1)


def test_shards_give_what_their_files_give(tmp_path, weights, folder, shards):
    files = run(weights, tmp_path / "x.npz", folder)
    packed = run(weights, tmp_path / "y.npz", shards)
    rows = dict(zip(packed["keys"].tolist(), packed["embeddings"], strict=True))
    assert len(rows) == 4
    for name, vector in zip(LENGTHS, files["embeddings"], strict=True):
        key = name.rpartition(".")[0].replace("/", "_") + "_0"
        # Packing rounds to 16 bits, and once more what it resamples.
        assert np.linalg.norm(rows[key] - vector) < 0.01 * np.linalg.norm(vector)


def test_tars_of_a_folder_are_one_input_in_the_order_of_their_index(tmp_path, weights, shards):
    whole = run(weights, tmp_path / "x.npz", shards)
    tars = sorted(shards.glob("*.tar"), reverse=True)
    assert len(tars) == 2
    for number, named in enumerate((tars, [shards / "index.json"])):
        found = run(weights, tmp_path / f"{number}.npz", *named)
        assert found["keys"].tolist() == whole["keys"].tolist()
        np.testing.assert_allclose(found["embeddings"], whole["embeddings"], atol=1e-5)
    one = run(weights, tmp_path / "one.npz", tars[0])
    assert one["keys"].tolist() == whole["keys"].tolist()[2:]


@pytest.mark.parametrize("normalization", ["checkpoint", "dataset", "batch"])
def test_stored_log_mels_give_what_their_audio_gives(tmp_path, monkeypatch, weights, shards, normalization):
    stored = tmp_path / "logmel"
    repack(shards, stored, Features())
    audio = run(weights, tmp_path / "x.npz", shards, normalization=normalization)
    logmel = run(weights, tmp_path / "y.npz", stored, normalization=normalization)
    assert logmel["keys"].tolist() == audio["keys"].tolist()
    np.testing.assert_array_equal(logmel["num_steps"], audio["num_steps"])
    error = np.linalg.norm(logmel["embeddings"] - audio["embeddings"]) / np.linalg.norm(audio["embeddings"])
    assert error < 0.02  # 0.09 nat are a step of what is stored
    if normalization == "checkpoint":
        monkeypatch.setattr(module, "LONG_SECONDS", 1)
        long = run(weights, tmp_path / "z.npz", stored, frames=True)
        short = np.split(long["frames"], long["offsets"][1:-1])
        np.testing.assert_allclose([frames.mean(0) for frames in short], logmel["embeddings"], atol=1e-5)


@pytest.mark.parametrize("normalization", ["checkpoint", "dataset"])
def test_long_recordings_come_in_blocks_and_give_the_same(
    tmp_path, monkeypatch, weights, folder, shards, normalization
):
    for number, source in enumerate((folder, shards)):
        whole = run(weights, tmp_path / f"{number}x.npz", source, normalization=normalization, frames=True)
        with monkeypatch.context() as patch:
            for part in (module, inputs):
                patch.setattr(part, "LONG_SECONDS", 1)
            patch.setattr("msm_dist.data.audio.CHUNK_VALUES", 16000)
            patch.setattr(module, "EmbeddingFile", blocks_counted := counting(EmbeddingFile))
            blocks = run(weights, tmp_path / f"{number}y.npz", source, normalization=normalization, frames=True)
        assert blocks_counted.pieces > 4
        assert blocks["keys"].tolist() == whole["keys"].tolist()
        np.testing.assert_array_equal(blocks["offsets"], whole["offsets"])
        # The ends of the blocks that statistics are measured on count as those of packed segments do.
        error = np.linalg.norm(blocks["frames"] - whole["frames"]) / np.linalg.norm(whole["frames"])
        assert error < (0.02 if normalization == "dataset" else 1e-5)


@pytest.mark.parametrize("seconds", [60, 61])
def test_a_clip_of_just_a_minute_is_encoded_whatever_the_hop(tmp_path, seconds):
    """960,000 samples / 156 * 156 / 16000 is more than 60 in floating point."""
    info = replace(INFO, features=Features(hop=156, mean=-6.5, std=3.5))
    model = MaskedSpectrogramModel(SMALL, 80, 208, seed=3)
    weights = save(tmp_path / "export", model.state_dict(), info).parent
    samples = noise(seconds * RATE)
    write_audio(tmp_path / "in/x.wav", samples, "wav")
    found = run(weights, tmp_path / "x.npz", tmp_path / "in")
    expected = Encoder(model, info).embed(samples[None] / np.float32(32768), RATE)
    assert about(found)["left_out"] == []
    np.testing.assert_allclose(found["embeddings"], expected, atol=2e-5)


def counting(file: type[EmbeddingFile]) -> type[EmbeddingFile]:
    """A kind of file that counts the pieces it is given, in `pieces`."""

    class Counting(file):
        pieces = 0

        def add(self, key, pieces):
            def counted():
                for piece in pieces:
                    Counting.pieces += 1
                    yield piece

            super().add(key, counted())

    return Counting


def test_statistics_are_the_data_set_s_and_named(tmp_path, weights, encoder, folder):
    clips = [torch.from_numpy(read_audio(folder / name, RATE)[0]) for name in LENGTHS]
    mine = encoder.for_dataset(clips, RATE)
    found = run(weights, tmp_path / "x.npz", folder, normalization="dataset")
    np.testing.assert_allclose([about(found)["mean"], about(found)["std"]], mine.statistics, rtol=1e-9)
    np.testing.assert_allclose(found["embeddings"][0], mine.embed(clips[0][None], RATE)[0], atol=2e-5)
    assert "normalization  dataset, mean" in found["report"]
    batch = run(weights, tmp_path / "y.npz", folder, normalization="batch")
    assert (about(batch)["normalization"], about(batch)["mean"]) == ("batch", None)
    assert "normalization  batch, of each batch of up to 16 clips or 240 s" in batch["report"]
    np.testing.assert_allclose(batch["embeddings"], found["embeddings"], atol=2e-5)  # one batch holds the data set
    single = run(weights, tmp_path / "z.npz", folder, normalization="batch", batch_size=1)
    assert not np.allclose(single["embeddings"], batch["embeddings"], atol=1e-3)


def test_the_batch_size_changes_nothing_beyond_rounding(tmp_path, weights, folder):
    one, many = (run(weights, tmp_path / f"{n}.npz", folder, batch_size=n)["embeddings"] for n in (1, 3))
    np.testing.assert_allclose(one, many, atol=2e-5)


def test_a_file_tells_what_it_was_made_with(tmp_path, weights, encoder, folder):
    told = about(run(weights, tmp_path / "x.npz", folder / "a.wav", folder / "deep"))
    assert told["encoder_sha256"] == encoder.digest()
    assert (told["normalization"], told["mean"], told["std"]) == ("checkpoint", -6.5, 3.5)
    assert (told["embedding_size"], told["sample_rate"], told["crop_frames"]) == (160, RATE, 208)
    assert told["model"]["embed_dim"] == 32
    assert told["origin"] == {"run": "small", "step": 3}
    assert told["program"].startswith("msm_dist ")
    assert (told["clips"], told["left_out"]) == (3, [])
    named = [str(folder / "a.wav"), str(folder / "deep")]
    assert told["sources"] == [{"inputs": [named[0]], "clips": 1}, {"inputs": [named[1]], "clips": 2}]
    assert (told["time_step_ms"], told["batch_size"], told["batch_seconds"]) == (160, 16, 240)


def test_a_file_tells_which_inputs_gave_how_many_clips(tmp_path, weights, folder, shards):
    first, second = sorted(map(str, shards.glob("*.tar")))
    found = run(weights, tmp_path / "x.npz", second, folder / "a.wav", first, shards / "index.json", batch_size=3)
    assert about(found)["sources"] == [
        {"inputs": [second, first], "clips": 4},
        {"inputs": [str(folder / "a.wav")], "clips": 1},
        {"inputs": [str(shards / "index.json")], "clips": 4},
    ]
    assert about(found)["batch_size"] == 3
    assert found["keys"][4] == str(folder / "a.wav")


def test_a_name_that_holds_a_brace_is_a_name_where_it_is_there(tmp_path, weights, shards):
    files = [tmp_path / "{a}.wav", tmp_path / "in{1..2}" / "b.wav", tmp_path / "{c,d}.tar" / "e.wav"]
    for number, path in enumerate(files):
        write_audio(path, noise(4000, number), "wav")
    found = run(weights, tmp_path / "x.npz", files[0], files[1], files[1].parent, files[2].parent)
    assert found["keys"].tolist() == list(map(str, [files[0], files[1], files[1], files[2]]))
    first, second = sorted(shards.glob("*.tar"))
    pattern = shards / first.name.replace("0.tar", "{0..1}.tar")
    assert second.name in pattern.name.replace("{0..1}", "1")
    assert len(run(weights, tmp_path / "y.npz", pattern)["keys"]) == 4
    with pytest.raises(DataError):
        run(weights, tmp_path / "z.npz", tmp_path / "x{1..2}.wav")


@pytest.mark.parametrize("long_seconds", [60, 0])
def test_bad_files_are_left_out_counted_and_named(tmp_path, monkeypatch, weights, long_seconds):
    for part in (module, inputs):
        monkeypatch.setattr(part, "LONG_SECONDS", long_seconds)
    whole = write_audio(tmp_path / "in/a.flac", noise(RATE * 3)).read_bytes()
    (tmp_path / "in/cut.flac").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "in/nothing.wav").write_bytes(b"")
    (tmp_path / "in/text.mp3").write_text("no audio" * 100)
    write_audio(tmp_path / "in/z.wav", noise(RATE), "wav")
    for frames, rows in ((False, 2), (True, 19 + 7)):
        found = run(weights, tmp_path / f"{frames}.npz", tmp_path / "in", frames=frames)
        assert found["keys"].tolist() == [str(tmp_path / "in" / name) for name in ("a.flac", "z.wav")]
        assert len(found["frames" if frames else "embeddings"]) == rows
        reasons = {Path(entry["key"]).name: entry["reason"] for entry in about(found)["left_out"]}
        assert reasons.keys() == {"cut.flac", "nothing.wav", "text.mp3"}
        assert reasons["nothing.wav"].startswith("empty")
        assert "left out       3 of 5 clips" in found["report"]
        assert "cut.flac: undecodable" in found["report"]


def test_a_damaged_clip_of_a_shard_is_left_out(tmp_path, weights, shards):
    copy = shutil.copytree(shards, tmp_path / "shards")
    whole = run(weights, tmp_path / "x.npz", copy)
    damaged = break_clip(load_index(copy), 1, "truncated")
    found = run(weights, tmp_path / "y.npz", copy)
    assert [entry["key"] for entry in about(found)["left_out"]] == [damaged]
    assert found["keys"].tolist() == [key for key in whole["keys"].tolist() if key != damaged]


def test_a_clip_that_is_no_longer_the_one_that_was_indexed_is_left_out(tmp_path, weights, shards):
    copy = shutil.copytree(shards, tmp_path / "shards")
    shard = load_index(copy).shards[0]
    row = members(shard)[0]
    with shard.path.open("r+b") as file:
        file.seek(int(row["offset"]))
        file.write(encode(noise(4000)).ljust(int(row["size"]), b"\0"))
    left_out = about(run(weights, tmp_path / "x.npz", copy))["left_out"]
    assert [entry["key"] for entry in left_out] == [row["key"].decode()]
    assert left_out[0]["reason"].startswith("changed (4000 samples")


def test_a_long_recording_is_a_batch_by_itself(tmp_path, monkeypatch, weights, folder):
    alone = run(weights, tmp_path / "x.npz", folder, normalization="batch", batch_size=1)["embeddings"]
    for part in (module, inputs):
        monkeypatch.setattr(part, "LONG_SECONDS", 1)
    found = run(weights, tmp_path / "y.npz", folder, normalization="batch")["embeddings"]
    np.testing.assert_allclose(found, alone, atol=1e-4)


def test_a_clip_that_fails_on_its_way_leaves_nothing_in_the_file(tmp_path):
    def pieces(key, fails):
        yield np.full((2, 3), ord(key), np.float32)
        if fails:
            raise BadClip("truncated", "in the middle")

    with EmbeddingFile(tmp_path / "x.npz", (3,), per_frame=True) as file:
        for key, fails in (("a", False), ("b", True), ("c", False)):
            with pytest.raises(BadClip) if fails else nullcontext():
                file.add(key, pieces(key, fails))
        file.finish({}, np.arange(2.0))
    with np.load(tmp_path / "x.npz", allow_pickle=False) as found:
        assert found["keys"].tolist() == ["a", "c"]
        assert found["frames"][:, 0].tolist() == [97, 97, 99, 99]


def test_where_nothing_can_be_embedded_nothing_is_written(tmp_path, weights):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/text.wav").write_text("no audio" * 100)
    with pytest.raises(DataError, match=r"none of 1 clips could be embedded:\n.*text\.wav: undecodable"):
        run(weights, tmp_path / "out" / "x.npz", tmp_path / "in")
    assert not (tmp_path / "out").exists()


def test_a_failure_on_the_way_leaves_no_file_and_keeps_the_old_one(tmp_path, monkeypatch, weights, folder):
    out = tmp_path / "out" / "x.npz"
    run(weights, out, folder / "a.wav")
    before = out.read_bytes()

    def fails(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(EmbeddingFile, "_write_keys", fails)
    with pytest.raises(OSError, match="No space"):
        run(weights, out, folder, overwrite=True)
    assert [path.name for path in out.parent.iterdir()] == ["x.npz"]
    assert out.read_bytes() == before


def test_the_same_clips_give_the_same_bytes(tmp_path, weights, folder):
    for name in ("x.npz", "y.npz"):
        run(weights, tmp_path / name, folder)
    assert (tmp_path / "x.npz").read_bytes() == (tmp_path / "y.npz").read_bytes()


def test_a_file_that_is_there_is_replaced_only_when_told(tmp_path, weights, folder):
    (tmp_path / "x.npz").write_text("mine")
    with pytest.raises(ConfigError, match="--overwrite"):
        run(weights, tmp_path / "x.npz", folder / "a.wav")
    assert (tmp_path / "x.npz").read_text() == "mine"
    assert len(run(weights, tmp_path / "x.npz", folder / "a.wav", overwrite=True)["keys"]) == 1


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"out": "x.npy"}, ConfigError, "must end in .npz"),
        ({"layer": "3"}, ConfigError, "layers 0 to 2"),
        ({"layer": "last"}, ConfigError, "layers 0 to 2"),
        ({"inputs": ()}, ConfigError, "nothing to embed"),
        ({"inputs": ("absent.wav",)}, DataError, "absent.wav: no such file"),
        ({"model": "absent"}, CheckpointError, "no such file"),
        ({"device": "cuda:99"}, ConfigError, "torch sees"),
    ],
)
def test_a_call_that_can_not_be_is_an_error(tmp_path, weights, folder, settings, error, message):
    given = {"inputs": (str(folder),), "model": str(weights), "out": tmp_path / "x.npz", "device": "cpu"} | settings
    with pytest.raises(error, match=message):
        embed(Embed(**given | {"out": Path(given["out"])}))


def test_log_mels_of_another_front_end_are_an_error(tmp_path, weights, shards):
    repack(shards, tmp_path / "logmel", Features(fmin=20.0))
    with pytest.raises(DataError, match=r"fmin = 20\.0"):
        run(weights, tmp_path / "x.npz", tmp_path / "logmel")


def test_missing_shards_are_an_error(tmp_path, weights, shards):
    copy = shutil.copytree(shards, tmp_path / "shards")
    next(copy.glob("*.tar")).unlink()
    with pytest.raises(DataError, match="missing"):
        run(weights, tmp_path / "x.npz", copy)


def test_keys_of_any_length_and_script_come_back(tmp_path):
    keys = ["ä/\u2603", "x" * 300, "\udcff"]
    with EmbeddingFile(tmp_path / "x.npz", (2,), per_frame=False) as file:
        for number, key in enumerate(keys):
            file.add(key, [np.full((3, 2), number, np.float32)])
        file.finish({"a": 1}, np.arange(3.0))
    with np.load(tmp_path / "x.npz", allow_pickle=False) as found:
        assert found["keys"].tolist() == keys
        assert found["embeddings"].tolist() == [[0, 0], [1, 1], [2, 2]]


def test_the_file_s_memory_does_not_grow_with_its_rows(tmp_path):
    """100 MB of frames, a piece of 1 MB at a time."""
    tracemalloc.start()
    with EmbeddingFile(tmp_path / "x.npz", (1000,), per_frame=True) as file:
        for number in range(100):
            file.add(str(number), (np.full((125, 1000), number, np.float32) for _ in range(2)))
        file.finish({}, np.arange(250.0))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10 * 2**20
    with zipfile.ZipFile(tmp_path / "x.npz") as archive:
        assert archive.testzip() is None
        assert archive.getinfo("frames.npy").file_size == 100 * 250 * 4000 + 128


def test_the_command_prints_a_report_and_names_a_fault(tmp_path, monkeypatch, capsys, weights, folder):
    out = tmp_path / "x.npz"
    monkeypatch.setattr(sys, "argv", ["msm-dist", "embed", str(folder), "--model", str(weights), "--out", str(out)])
    for code in (0, 2):
        with pytest.raises(SystemExit) as end:
            main()
        assert (end.value.code or 0) == code
    shown = capsys.readouterr()
    assert f"{out}: 4 clips" in shown.out
    assert shown.err.startswith(f"msm-dist: --out {out}: is there already")
