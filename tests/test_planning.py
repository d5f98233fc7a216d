"""`msm-dist plan`: the named configurations, the recommendation, and what it says when something can't be."""

import json

import pytest
import torch

from msm_dist import costs
from msm_dist.config import MODEL_SIZES, batch_layout, load_config, parse_config
from msm_dist.errors import ConfigError
from msm_dist.model.mae import Decoder, Encoder
from msm_dist.model.patches import PatchGrid
from msm_dist.planning import describe, parameter_shapes, predicted, recommended
from tests.processes import HERE

CONFIGS = HERE.parent / "configs"
# The geometries of the method's recipe, and the millions of parameters that follow from them.
RECIPE = {
    "large": ((1024, 24, 16, 512, 8, 16), 328),
    "huge": ((1280, 32, 16, 512, 8, 16), 656),
    "giant": ((1536, 40, 24, 512, 8, 16), 1160),
}


def by_hand(embed_dim, depth, decoder_embed_dim, decoder_depth, pixels):
    """Parameters of the paper's model with CLS and without a key bias."""

    def blocks(width, count):
        # qkv, projection and MLP x4; biases of query, value, projection, MLP; two norms.
        return count * ((3 + 1 + 4 + 4) * width**2 + (1 + 1 + 1 + 4 + 1) * width + 4 * width)

    encoder = embed_dim + (pixels + 1) * embed_dim + blocks(embed_dim, depth) + 2 * embed_dim
    into = (embed_dim + 1) * decoder_embed_dim + decoder_embed_dim
    out = 2 * decoder_embed_dim + (decoder_embed_dim + 1) * pixels
    return encoder + into + blocks(decoder_embed_dim, decoder_depth) + out


@pytest.mark.parametrize("size", RECIPE)
def test_large_models_build_on_the_meta_device_with_the_recipe_s_parameters(size):
    cfg = load_config(CONFIGS / f"{size}_audioset.yaml")
    geometry, millions = RECIPE[size]
    assert cfg.model.geometry == geometry
    assert (cfg.optim, cfg.train.epochs) == ((base := load_config(CONFIGS / "base_audioset.yaml")).optim, 100)
    assert (cfg.data, cfg.features, cfg.train.global_batch) == (base.data, base.features, base.train.global_batch)
    with torch.device("meta"):
        grid = PatchGrid(cfg.features.n_mels, cfg.data.crop_frames, cfg.model.patch)
        parts = Encoder(cfg.model, grid), Decoder(cfg.model, grid)
    count = sum(parameter.numel() for part in parts for parameter in part.parameters())
    assert count == by_hand(geometry[0], geometry[1], geometry[3], geometry[4], 256)
    assert round(count / 1e6) == millions


@pytest.mark.parametrize("size", RECIPE)
def test_large_configurations_follow_their_plan_for_eight_h200(size):
    cfg = load_config(CONFIGS / f"{size}_audioset.yaml")
    layout, device = batch_layout(cfg, 8), costs.DEVICES["h200"]
    choice = recommended(cfg, layout, device, list(predicted(cfg, layout, device)))
    assert (choice.stage, choice.offload) == (cfg.engine.zero_stage, cfg.engine.offload)
    assert choice.checkpointing == cfg.model.activation_checkpointing
    assert choice.micro_batch == cfg.train.micro_batch


def test_every_parameter_belongs_to_one_part():
    cfg = config(model={"size": "tiny"})
    shapes = parameter_shapes(cfg)
    parts = costs.parts(cfg, shapes, gpu=True)
    assert sorted(shape for part in parts for shape in part.shapes) == sorted(shapes.values())
    assert len(parts) == MODEL_SIZES["tiny"].depth + MODEL_SIZES["tiny"].decoder_depth + 3
    assert all(part.shapes and part.kept <= part.saved for part in parts)


def test_every_valid_way_is_listed_once():
    ways = [(option.stage, option.offload) for option in options(config())[::2]]
    assert ways == [
        (1, "none"),
        (1, "optimizer"),
        (2, "none"),
        (2, "optimizer"),
        (3, "none"),
        (3, "optimizer"),
        (3, "parameters"),
    ]
    in_fp32 = [(option.stage, option.offload) for option in options(config(precision="fp32"))[::2]]
    assert in_fp32 == [(0, "none"), *ways]
    in_fp16 = [(option.stage, option.offload) for option in options(config(precision="fp16"))[::2]]
    assert (2, "optimizer") not in in_fp16 and (3, "optimizer") in in_fp16


def test_what_is_recommended_sends_least_of_what_fits():
    cfg = config(model={"size": "giant"})
    everything = {(option.stage, option.offload, option.checkpointing): option for option in options(cfg)}
    choice = choose(cfg, memory=141e9)
    assert (choice.stage, choice.offload, choice.checkpointing) == (3, "none", False)
    assert choice.sent == min(option.sent for option in everything.values())
    # Accumulation makes stages 2 and 3 send more often.
    often = choose(config(model={"size": "giant"}, global_batch=64 * 8 * 16), memory=141e9)
    assert often.stage == 1
    # A device that holds stage 2 with checkpointing, but nothing without.
    tight = everything[2, "none", True].memory.peak / costs.USABLE_MEMORY + 1
    choice = choose(cfg, memory=tight)
    assert choice.checkpointing and choice.offload == "none"
    assert choice.memory.peak <= tight * costs.USABLE_MEMORY


def test_smaller_micro_batches_come_before_offload_and_offload_before_nothing():
    cfg = config(model={"size": "base"}, global_batch=4096, micro_batch=512)
    least = min(option.memory.peak for option in options(cfg) if option.offload == "none")
    choice = choose(cfg, memory=0.9 * least / costs.USABLE_MEMORY)
    assert choice.micro_batch < 512 and choice.offload == "none"
    assert 4096 % (8 * choice.micro_batch) == 0
    small = config(model={"size": "giant"}, global_batch=64, micro_batch=8)
    on_device = min(option.memory.peak for option in options(small) if option.offload == "none")
    assert choose(small, memory=0.95 * on_device / costs.USABLE_MEMORY).offload == "optimizer"
    assert choose(small, memory=1e8) is None


def test_plan_of_a_large_configuration_is_whole_and_says_what_it_assumes(monkeypatch):
    monkeypatch.chdir(HERE.parent)
    text = describe("configs/giant_audioset.yaml", [], 8)
    for expected in ("1159.73 M", "H200", "assumes MFU 0.5", "recommended  engine.zero_stage=3", "predicted"):
        assert expected in text
    assert sum(line.startswith("  3    ") for line in text.splitlines()) == 3


def test_plan_says_that_nothing_fits_and_what_comes_closest(monkeypatch):
    monkeypatch.setitem(costs.DEVICES, "toy", costs.Device("toy", 1e12, 1e11, 1e11, 1e9, 1e9, 1e8, "made up"))
    text = describe(str(CONFIGS / "giant_audioset.yaml"), [], 8, "toy")
    assert "nothing fits 0.1 GB: the least is" in text
    assert "engine.offload=parameters model.activation_checkpointing=true" in text


def test_an_unknown_device_is_answered_with_the_known_ones():
    with pytest.raises(ConfigError, match="no such profile; choose from h200, h100, a100"):
        describe(str(CONFIGS / "quickstart.yaml"), [], 1, "b100")


def test_own_deepspeed_file_changes_the_plan_of_its_stage(tmp_path):
    own = tmp_path / "own.json"
    own.write_text(json.dumps({"zero_optimization": {"stage": 2, "reduce_bucket_size": 1000}}))
    shipped, changed = (options(config(**more)) for more in ({}, {"engine": {"deepspeed": str(own)}}))
    peaks = {
        name: [option.memory.peak for option in listed if (option.stage, option.offload) == name]
        for name in ((2, "none"), (3, "none"))
        for listed in [changed]
    }
    before = [option.memory.peak for option in shipped if (option.stage, option.offload) == (2, "none")]
    assert max(peaks[2, "none"]) < min(before)
    assert peaks[3, "none"] == [o.memory.peak for o in shipped if (o.stage, o.offload) == (3, "none")]
    own.write_text("[]")
    with pytest.raises(ConfigError, match="own.json: can't be planned"):
        options(config(engine={"deepspeed": str(own)}))


def config(model=None, engine=None, **train):
    train = {"steps": 10, "global_batch": 512, "micro_batch": 64} | train
    return parse_config({"train": train, "model": model or {"size": "tiny"}, "engine": engine or {}}, "test")


def options(cfg):
    return list(predicted(cfg, batch_layout(cfg, 8), costs.DEVICES["h200"]))


def choose(cfg, memory):
    device = costs.Device("made up", 8e14, 5e13, 4e12, 4e11, 4e10, memory, "")
    return recommended(cfg, batch_layout(cfg, 8), device, options(cfg))
