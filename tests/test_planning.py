"""`msm-dist plan`: the named configurations, the recommendation, and what it says when something can't be."""

import dataclasses
import json

import pytest
import torch

from msm_dist import costs
from msm_dist.config import MODEL_SIZES, batch_layout, load_config, parse_config
from msm_dist.errors import ConfigError
from msm_dist.model.mae import Decoder, Encoder
from msm_dist.model.patches import PatchGrid
from msm_dist.planning import WORTH, candidates, configured, describe, fits, parameter_shapes, predicted, recommended
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


@pytest.mark.parametrize("size", ["base", *RECIPE])
def test_named_configurations_follow_their_plan_for_eight_h200(size):
    assert "recommended  as configured" in describe(str(CONFIGS / f"{size}_audioset.yaml"), [], 8)


@pytest.mark.parametrize("size", RECIPE)
def test_large_configurations_run_on_64_ranks_as_their_comment_says(size):
    comment = (CONFIGS / f"{size}_audioset.yaml").read_text()
    assert "train.micro_batch=8" in comment or "See large_audioset.yaml" in comment
    assert "64 processes x micro-batch 8 x 1" in describe(
        str(CONFIGS / f"{size}_audioset.yaml"), ["train.micro_batch=8"], 64
    )


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


@pytest.mark.parametrize("device", ["h200", "toy"])
@pytest.mark.parametrize(
    "overrides",
    [
        ["engine.zero_stage=2"],
        ["engine.zero_stage=3", "engine.offload=optimizer", "model.activation_checkpointing=true"],
        ["engine.zero_stage=3", "engine.offload=parameters", "train.micro_batch=16"],
        ["own file"],
    ],
)
def test_the_advice_applied_gives_what_it_promises(overrides, device, tmp_path, toy):
    path = str(CONFIGS / "giant_audioset.yaml")
    if overrides == ["own file"]:
        own = tmp_path / "own.json"
        own.write_text(json.dumps({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}}))
        overrides = [f"engine.deepspeed={own}"]
    advice, promise = advised(describe(path, overrides, 8, device))
    assert advice
    before = load_config(path, overrides)
    cfg = load_config(path, [*overrides, *advice])
    assert cfg != before
    mine = configured(cfg, predicted(cfg, batch_layout(cfg, 8), costs.DEVICES[device]))
    assert fits(mine, costs.DEVICES[device])
    assert promise.startswith(
        f"peak {mine.memory.peak / 2**30:.1f} GiB, {mine.sent / 2**30:.2f} GiB sent and {mine.seconds.step:.3f} s"
    )
    again, _ = advised(describe(path, [*overrides, *advice], 8, device))
    assert again == ["as", "configured"]


@pytest.mark.parametrize("gib", [0.5, 2.0, 4.0, 6.0, 8.0, 139.0])
@pytest.mark.parametrize("global_batch", [512, 8192])
def test_nothing_that_fits_is_much_faster_than_what_is_recommended(gib, global_batch, monkeypatch):
    device = dataclasses.replace(costs.DEVICES["h200"], memory=gib * 2**30)
    monkeypatch.setitem(costs.DEVICES, "sized", device)
    cfg = config(model={"size": "giant"}, global_batch=global_batch)
    smaller = [config(model={"size": "giant"}, global_batch=global_batch, micro_batch=m) for m in (8, 16, 32, 64)]
    fitting = [option for each in smaller for option in options(each) if fits(option, device)]
    choice = choose(cfg, device)
    assert (choice is None) == (not fitting)
    if choice:
        assert fits(choice, device)
        assert min(option.seconds.step for option in fitting) >= (1 - WORTH) * choice.seconds.step
        alike = [option for option in fitting if option.stage == choice.stage]
        assert choice.seconds.step == min(option.seconds.step for option in alike)


def test_a_higher_stage_must_save_much_or_be_needed():
    cfg = config(model={"size": "large"})
    ways = {(o.stage, o.offload, o.checkpointing): o for o in options(cfg)}
    roomy = costs.DEVICES["h200"]
    assert ways[3, "none", False].seconds.step < ways[1, "none", False].seconds.step
    assert choose(cfg, roomy).stage == 1
    # Where only sending takes time, it saves more than its share.
    slow = dataclasses.replace(roomy, link_rate=1e9)
    assert choose(cfg, slow).stage == 3
    tight = dataclasses.replace(roomy, memory=(ways[2, "none", False].memory.peak + 1) / costs.USABLE_MEMORY)
    assert choose(cfg, tight).stage == 2


def test_a_smaller_micro_batch_comes_before_recomputing_where_it_is_free():
    cfg = config(model={"size": "base"}, global_batch=4096, micro_batch=512)
    least = min(o.memory.peak for o in options(cfg) if (o.stage, o.offload, o.checkpointing) == (1, "none", False))
    choice = choose(cfg, dataclasses.replace(costs.DEVICES["h200"], memory=0.9 * least / costs.USABLE_MEMORY))
    assert (choice.offload, choice.checkpointing) == ("none", False) and choice.micro_batch < 512


def test_the_configured_row_is_marked():
    def marked(*overrides):
        text = describe(str(CONFIGS / "base_audioset.yaml"), overrides, 8)
        return [line.split()[1:3] for line in text.splitlines() if line.startswith("* ")]

    assert marked() == [["1", "none"]]
    assert marked("engine.zero_stage=3", "engine.offload=parameters") == [["3", "parameters"]]


def test_plan_of_a_large_configuration_is_whole_and_says_what_it_assumes(monkeypatch):
    monkeypatch.chdir(HERE.parent)
    text = describe("configs/giant_audioset.yaml", [], 8)
    for expected in ("1159.73 M", "H200", "assumes MFU 0.5", "recommended", "139 GiB"):
        assert expected in text
    assert sum(line[1:].startswith(" 3    ") for line in text.splitlines()) == 3


def test_plan_says_that_nothing_fits_and_what_comes_closest(monkeypatch):
    monkeypatch.setitem(costs.DEVICES, "tiny", costs.Device("tiny", 1e12, 1e11, 1e11, 1e9, 1e9, 1e8, "made up"))
    text = describe(str(CONFIGS / "giant_audioset.yaml"), [], 8, "tiny")
    # Whatever is divided and moved later, a rank starts with the whole model in fp32.
    start = 4 * by_hand(1536, 40, 512, 8, 256) / 2**30
    assert f"nothing fits 0.1 GiB: the least is {start:.1f} GiB with engine.zero_stage=" in text


def test_an_unknown_device_is_answered_with_the_known_ones():
    with pytest.raises(ConfigError, match="no such profile; choose from h200, h100, a100"):
        describe(str(CONFIGS / "quickstart.yaml"), [], 1, "b100")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('{"zero_optimization": {"stage": 2}, "optimizer": {}}', "optimizer: not ours"),
        ('{"zero_optimization": {"stage": 2}, "gradient_clipping": 9}', "gradient_clipping = 9 contradicts"),
        ('{"zero_optimization": 5}', "stage = None"),
        ("{", "not valid JSON"),
    ],
)
def test_own_deepspeed_file_that_a_run_refuses_is_refused_by_its_plan(tmp_path, content, says):
    own = tmp_path / "own.json"
    own.write_text(content)
    with pytest.raises(ConfigError, match=says):
        describe(str(CONFIGS / "quickstart.yaml"), [f"engine.deepspeed={own}"], 1)


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
    own.write_text(json.dumps({"zero_optimization": {"stage": 0}}))
    with pytest.raises(ConfigError, match="no fp32 masters at stage 0"):
        options(config(engine={"deepspeed": str(own)}))


def config(model=None, engine=None, **train):
    train = {"steps": 10, "global_batch": 512, "micro_batch": 64} | train
    return parse_config({"train": train, "model": model or {"size": "tiny"}, "engine": engine or {}}, "test")


def options(cfg):
    return list(predicted(cfg, batch_layout(cfg, 8), costs.DEVICES["h200"]))


def choose(cfg, device):
    return recommended(candidates(cfg, 8, device), device)


def advised(text):
    """The overrides that a plan recommends, and what it promises of them."""
    line, promise = text.splitlines()[-2:]
    return line.removeprefix("recommended").split(), promise.strip()


@pytest.fixture
def toy(monkeypatch):
    """A device that giant fits only with little."""
    monkeypatch.setitem(costs.DEVICES, "toy", dataclasses.replace(costs.DEVICES["h200"], memory=5 * 2**30))
