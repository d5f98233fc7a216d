"""Weights and checkpoints that claim a giant, or carry code, are refused before either is made or run.

Every call runs in a child whose address space is limited and whose peak is compared with the bound.
"""

import io
import json
import pickle
import struct
import zipfile
from pathlib import Path

import pytest
import torch

from msm_dist.config import Features, Model
from msm_dist.model import weights
from msm_dist.model.mae import MaskedSpectrogramModel
from msm_dist.model.published import read_file
from tests.hostile import FEW, load_encoder
from tests.hostile_files import END, Payload, member

TB = 10**12


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    model = Model(embed_dim=32, depth=2, num_heads=2, decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2)
    info = weights.WeightsInfo(model, Features(mean=-7.0, std=4.0), 208, {"run": "r", "step": 1})
    return weights.save(tmp_path_factory.mktemp("weights"), MaskedSpectrogramModel(model, 80, 208).state_dict(), info)


def claiming(exported: Path, folder: Path, **values) -> Path:
    """The same weights beside another config.json."""
    config = json.loads((exported / "config.json").read_text())
    for name, value in values.items():
        section, _, key = name.rpartition("__")
        (config[section] if section else config)[key] = value
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes((exported / "model.safetensors").read_bytes())
    return folder


def nested(depth: int) -> dict:
    value: dict = {}
    for _ in range(depth):
        value = {"init_from": value}
    return value


CONFIGS = {
    "embed_dim": {"model__embed_dim": 10**9},
    "large_embed_dim": {"model__embed_dim": 2**16, "model__num_heads": 1},
    "depth": {"model__depth": 10**9},
    "large_depth": {"model__depth": 256},
    "heads": {"model__num_heads": 31},
    "patch": {"model__patch_size": "1x1"},
    "n_fft": {"features__n_fft": 10**12},
    "n_mels": {"features__n_mels": 10**12},
    "crop": {"crop_frames": 10**15},
    "long_crop": {"crop_frames": 2**20, "features__n_mels": 2**12},
    "no_crop": {"crop_frames": 0},
    "endless_crop": {"crop_frames": float("inf")},
    "digits": {"crop_frames": 10**4000},
    "deep_origin": {"origin": nested(500)},
    "no_section": {"model": []},
}


@pytest.mark.parametrize("case", CONFIGS)
def test_weights_that_ask_for_a_giant_are_refused(bounded, exported, tmp_path, case):
    folder = claiming(exported, tmp_path, **CONFIGS[case])
    assert str(folder) in bounded.refused(weights.load, folder, extra=2 * FEW)


def test_weights_that_are_whole_are_read(bounded, exported):
    bounded.done(load_encoder, exported, extra=4 * FEW)


def tensors_claiming(**entry) -> bytes:
    header = json.dumps({"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} | entry}).encode()
    return struct.pack("<Q", len(header)) + header + bytes(4)


SAFETENSORS = {
    "header_of_2_to_the_60_bytes": struct.pack("<Q", 2**60) + b"{}",
    "header_of_2_to_the_64_bytes": struct.pack("<Q", 2**64 - 1) + b"{}",
    "header_of_90_mb": struct.pack("<Q", 90 * 10**6) + b"{}",
    "deep_header": struct.pack("<Q", 50_000) + b'{"a":' * 10_000,
    "shape_of_2_to_the_62": tensors_claiming(shape=[2**62]),
    "shape_that_overflows": tensors_claiming(shape=[2**33, 2**33]),
    "offsets_of_a_tb": tensors_claiming(data_offsets=[0, TB]),
    "offsets_backwards": tensors_claiming(data_offsets=[4, 0]),
    "unknown_dtype": tensors_claiming(dtype="O"),
    "dtype_that_torch_has_not": tensors_claiming(dtype="F4", shape=[8]),
    "e8m0": tensors_claiming(dtype="F8_E8M0", shape=[4]),
    "complex": tensors_claiming(dtype="C64", shape=[1], data_offsets=[0, 8]),
    "pickle": pickle.dumps(Payload()),
    "empty": b"",
}


@pytest.mark.parametrize("case", SAFETENSORS)
def test_tensors_that_claim_too_much_are_refused(bounded, exported, tmp_path, case):
    (tmp_path / "config.json").write_bytes((exported / "config.json").read_bytes())
    (tmp_path / "model.safetensors").write_bytes(SAFETENSORS[case])
    assert "model.safetensors" in bounded.refused(weights.load, tmp_path, extra=2 * FEW)


def saved(content: object, **options) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


def deflated(content: bytes) -> bytes:
    """The same archive with its parts compressed."""
    file = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(content)) as source,
        zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as target,
    ):
        for name in source.namelist():
            target.writestr(name, source.read(name))
    return file.getvalue()


PUBLISHED = {
    "repeated_value": lambda: saved({"model": {"pos_embed": torch.zeros(1).expand(1, 2**40, 768)}}),
    "tensor_without_values": lambda: saved({"model": {"pos_embed": torch.empty(2**40, device="meta")}}),
    "sparse_tensor": lambda: saved({"model": {"pos_embed": torch.zeros(3, 3).to_sparse()}}),
    "zip_bomb": lambda: deflated(saved({"model": {"pos_embed": torch.zeros(2**26)}})),
    "code": lambda: saved({"model": {"x": Payload()}}),
    "code_of_old": lambda: saved({"model": {"x": Payload()}}, _use_new_zipfile_serialization=False),
    "bare_pickle": lambda: pickle.dumps(Payload()),
    "deep_pickle": lambda: b"\x80\x02" + b"(" * 100_000 + b".",
    "deep_list": lambda: b"\x80\x02" + b"]" * 50_000 + b"a" * 49_999 + b".",
    "text_of_4_gb": lambda: b"\x80\x02" + b"X" + struct.pack("<I", 2**32 - 1) + b"abc.",
    "memo_of_4_billion": lambda: b"\x80\x02]r\xff\xff\xff\xff.",
    "tar_of_old": lambda: member("pickle", pickle.dumps(Payload())) + member("storages", b"") + END,
    "empty": lambda: b"",
}


@pytest.mark.parametrize("case", PUBLISHED)
def test_published_checkpoint_that_claims_too_much_is_refused(bounded, tmp_path, case):
    path = tmp_path / "x.pth"
    path.write_bytes(PUBLISHED[case]())
    assert str(path) in bounded.refused(read_file, path, extra=2 * FEW, limit=2**31)


def test_published_checkpoint_that_repeats_statistics_is_refused(bounded, tmp_path):
    path = tmp_path / "x.pth"
    path.write_bytes(saved({"model": {"x": torch.zeros(3)}, "norm_stats": torch.zeros(1).expand(2**40)}))
    assert str(path) in bounded.refused(read_file, path, extra=2 * FEW)
