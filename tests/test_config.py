"""The configuration: defaults, files, overrides, and every fault reported at once."""

import math
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from msm_dist.config import Config, batch_layout, dump_config, load_config, parse_config
from msm_dist.errors import ConfigError

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


def faults(**sections) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse_config({"train": {"steps": 10}} | sections, "run.yaml")
    head, *lines = str(caught.value).splitlines()
    assert head.startswith("run.yaml: ")
    return [line.strip() for line in lines]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["engine.zero_stage=3", "engine.offload=parameters"],
        ["engine.deepspeed=own.json"],
        ["data.shards=null", "data.mix={a: 1, b/c: 0.5}"],
    ],
)
def test_shipped_configuration_is_valid_and_survives_a_dump(path, overrides, tmp_path):
    cfg = load_config(path, overrides)
    again = load_config(write(tmp_path / "dumped.yaml", dump_config(cfg)))
    assert again == cfg
    assert dump_config(again) == dump_config(cfg)


def test_stage_and_offload_beside_a_deepspeed_file_are_refused_but_where_an_earlier_version_recorded_them(tmp_path):
    sections = {"engine": {"deepspeed": "own.json"}}
    recorded = parse_config({"train": {"steps": 3}} | sections, "test").model_dump(mode="json")
    path = write(tmp_path / "config.yaml", yaml.safe_dump(recorded))
    cfg = load_config(path)
    assert cfg.engine.deepspeed == "own.json"
    assert set(yaml.safe_load(dump_config(cfg))["engine"]) == {"compile", "deepspeed", "timeout_minutes"}
    with pytest.raises(ConfigError, match=r"engine.zero_stage = 2: give one of them"):
        load_config(path, ["engine.zero_stage=2"])


def test_recipes_are_those_of_the_paper():
    paper = load_config(ROOT / "configs/base_audioset.yaml")
    assert (paper.num_patches, paper.num_keep) == (65, 16)
    assert paper.peak_lr == pytest.approx(6e-4)
    assert (paper.train.epochs, paper.optim.warmup_epochs, paper.optim.clip_norm) == (100, 10, None)
    assert (paper.model.key_bias, paper.model.decoder_positions, paper.model.cls_token) == (False, "1d", True)
    assert (paper.features.mean, paper.features.std) == (-7.1, 4.2)
    rerun = load_config(ROOT / "configs/base_80x608.yaml")
    assert rerun.peak_lr == pytest.approx(2.4e-3)
    assert (rerun.num_patches, rerun.num_keep) == (190, 47)
    assert (rerun.train.epochs, rerun.optim.warmup_epochs, rerun.optim.clip_norm) == (300, 20, 3.0)
    assert (rerun.model.key_bias, rerun.model.decoder_positions) == (True, "2d")
    fine = load_config(ROOT / "configs/base_80x208_p16x4.yaml")
    assert (fine.num_patches, fine.model.patch) == (260, (16, 4))


@pytest.mark.parametrize(("frames", "ratio", "keep"), [(208, 0.8, 12), (608, 0.7, 57), (208, 0.75, 16)])
def test_visible_patches_are_rounded_down(frames, ratio, keep):
    cfg = parse_config({"train": {"steps": 1}, "data": {"crop_frames": frames}, "model": {"mask_ratio": ratio}}, "t")
    assert cfg.num_keep == keep


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        ({"train": {"step": 3}}, "train.step: unknown key; did you mean train.steps?"),
        ({"dta": {}}, "dta: unknown key; did you mean data?"),
        ({"lr": 0.1}, "lr: unknown key; did you mean optim.lr?"),
        ({"model": {"patch_size": "16"}}, "model.patch_size = '16': a patch is bands x frames"),
        ({"model": {"patch_size": "12x16"}}, "its height must divide features.n_mels = 80"),
        ({"data": {"crop_frames": 200}}, "multiple of the patch width 16 (model.patch_size = 16x16); choose 192"),
        ({"model": {"mask_ratio": 0.999}}, "of 65 patches 0 stay visible"),
        ({"model": {"size": "base", "depth": 3}}, "give a size, or all of embed_dim"),
        ({"model": {"depth": 3}}, "model.embed_dim is missing"),
        ({"model": {"embed_dim": 30, "depth": 1, "num_heads": 4}}, "must divide model.embed_dim = 30"),
        ({"data": {"block": 6, "crops_per_clip": 4}}, "data.block = 6: must be a multiple of data.crops_per_clip"),
        ({"train": {"steps": 1, "micro_batch": 12}}, "multiple of data.block = 8; choose 8 or 16"),
        ({"train": {"steps": 1, "global_batch": 100}}, "multiple of train.micro_batch = 64; choose 64 or 128"),
        ({"train": {}}, "train.steps is missing: give train.steps or train.epochs"),
        ({"train": {"steps": 1, "epochs": 1}}, "give one of them, not both"),
        ({"optim": {"lr": 1, "base_lr": 1}}, "optim.base_lr = 1.0 and optim.lr = 1.0"),
        ({"optim": {"warmup_steps": 10}}, "optim.warmup_steps = 10: must be below train.steps = 10"),
        ({"features": {"fmax": 9000}}, "at or below half of features.sample_rate = 16000"),
        ({"features": {"mean": -7.1}}, "go together"),
        ({"engine": {"zero_stage": 1, "deepspeed": "x.json"}}, "give one of them"),
        ({"engine": {"offload": "optimizer", "deepspeed": "x.json"}}, "engine.offload = optimizer: give one of them"),
        ({"engine": {"zero_stage": 0}}, "engine.zero_stage = 0: with train.precision = bf16"),
        (
            {"engine": {"zero_stage": 0, "offload": "optimizer"}},
            "offload = optimizer: needs engine.zero_stage 1, 2 or 3",
        ),
        ({"engine": {"zero_stage": 2, "offload": "parameters"}}, "offload = parameters: needs engine.zero_stage 3"),
        ({"engine": {"zero_stage": 4}}, "engine.zero_stage = 4"),
        ({"train": {"steps": 5000, "profile": "20:2000"}}, "train.profile = 20:2000: at most 100 steps"),
        (
            {"engine": {"zero_stage": 2, "offload": "optimizer"}, "train": {"steps": 1, "precision": "fp16"}},
            "fp16 at stage 2 DeepSpeed never gets over the first overflow",
        ),
        ({"run": {"name": "a/b"}}, "run.name = 'a/b'"),
        ({"optim": {"betas": [0.9, 1.5]}}, "optim.betas.1 = 1.5: input should be less than 1"),
        ({"optim": {"lr": float("inf")}}, "optim.lr = inf: input should be a finite number"),
        ({"features": {"mean": 0, "std": 1e-300}}, "features.std = 1e-300"),
        ({"engine": {"timeout_minutes": 1e308}}, "engine.timeout_minutes"),
        ({"data": 5}, "data = 5: must be a section, with its settings below it"),
        ({"train": {"steps": 0}}, "train.steps = 0: input should be greater than or equal to 1"),
    ],
)
def test_fault_names_field_value_rule_and_remedy(sections, says):
    assert any(says in line for line in faults(**sections)), faults(**sections)


def test_all_faults_are_reported_at_once():
    assert len(faults(data={"crop_frames": 100, "block": 3}, optim={"lr": 1, "base_lr": 1})) >= 3


def test_override_that_is_no_yaml_comes_with_the_reason(tmp_path):
    (tmp_path / "x.yaml").write_text("train: {steps: 1}")
    with pytest.raises(ConfigError, match="'train.steps=2001-99-99': the value is not valid YAML .month must be in"):
        load_config(tmp_path / "x.yaml", ["train.steps=2001-99-99"])


def test_overrides_win_over_the_file_and_are_yaml(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("train: {steps: 5}\noptim: {lr: 0.1}\n")
    cfg = load_config(path, ["train.steps=7", "optim.lr=1e-4", "data.shards=[a.tar, b.tar]", "run.name=x"])
    assert (cfg.train.steps, cfg.optim.lr, cfg.data.shards, cfg.run.name) == (7, 1e-4, ["a.tar", "b.tar"], "x")
    assert load_config(path, ["run.name=2024"]).run.name == "2024"
    for wrong in ("train.steps", "=3", "train.steps=[", "optim.lr.x=1", "run.name=2024-13-40"):
        with pytest.raises(ConfigError):
            load_config(path, [wrong])
    assert load_config(path, ["train.steps=1", "train.steps=2"]).train.steps == 2
    with pytest.raises(ConfigError, match="data.shards is given 2 times; quote its pattern"):
        load_config(path, ["data.shards=a-000.tar", "data.shards=a-001.tar"])


def test_a_file_holds_only_what_differs_from_the_one_it_extends(tmp_path):
    (tmp_path / "base.yaml").write_text("train: {steps: 5, log_every: 3}\n")
    child = tmp_path / "child.yaml"
    child.write_text("extends: base.yaml\ntrain: {steps: 6}\n")
    cfg = load_config(child)
    assert (cfg.train.steps, cfg.train.log_every) == (6, 3)
    (tmp_path / "base.yaml").write_text("extends: child.yaml\n")
    with pytest.raises(ConfigError, match="circle"):
        load_config(child)


@pytest.mark.parametrize(
    "text", ["a: [", "- 1", "!!python/object/apply:os.system [x]", "1: 2", "\x00", "seed: 2023-99-99"]
)
def test_a_file_that_is_no_configuration_is_a_clear_error(tmp_path, text):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match="bad.yaml"):
        load_config(path)


def test_a_missing_file_names_those_that_are_there(tmp_path):
    (tmp_path / "good.yaml").write_text("")
    with pytest.raises(ConfigError, match=r"no such configuration file; .* has good.yaml"):
        load_config(tmp_path / "goood.yaml")


@given(
    world=st.integers(1, 64),
    accumulation=st.integers(1, 4),
    blocks=st.integers(1, 8),
    block=st.sampled_from([1, 2, 8]),
)
def test_layout_spreads_the_whole_batch(world, accumulation, blocks, block):
    micro = blocks * block
    cfg = parse_config(
        {
            "train": {"steps": 1, "global_batch": world * accumulation * micro, "micro_batch": micro},
            "data": {"block": block},
        },
        "t",
    )
    layout = batch_layout(cfg, world)
    assert layout.accumulation == accumulation
    assert layout.blocks_per_step == world * accumulation * layout.blocks_per_micro_batch
    assert layout.blocks_per_micro_batch * block == micro


@given(world=st.integers(1, 40))
def test_a_layout_that_does_not_fit_lists_micro_batches_that_do(world):
    cfg = parse_config({"train": {"steps": 1, "global_batch": 960, "micro_batch": 960}, "data": {"block": 4}}, "t")
    try:
        batch_layout(cfg, world)
    except ConfigError as error:
        if "choose train.micro_batch from " in str(error):
            choice = int(str(error).partition("train.micro_batch from ")[2].split(",")[0])
            assert 960 % (world * choice) == 0
            assert choice % 4 == 0
        else:
            assert 960 % (world * 4)
    else:
        assert world == 1


def test_configuration_is_frozen():
    with pytest.raises(ValueError, match="frozen"):
        Config(train={"steps": 1}).train.steps = 3


def test_crop_reads_hop_times_frames_less_one_plus_a_window():
    features = Config().features
    assert features.crop_samples(208) == 33520
    assert features.num_frames(160000) == 1001
    assert math.isclose(features.num_frames(33280), 209)


def write(path, text):
    path.write_text(text)
    return path


def test_a_mix_is_one_value_in_a_file_that_extends_another_and_in_an_override(tmp_path):
    write(tmp_path / "base.yaml", "train: {steps: 3}\ndata: {mix: {/data/a: 3, other.b: 0.5}}\n")
    path = write(tmp_path / "run.yaml", "extends: base.yaml\ndata: {mix: {/data/c: 1}}\n")
    base = load_config(tmp_path / "base.yaml")
    assert list(base.data.mix.items()) == [("/data/a", 3.0), ("other.b", 0.5)]
    assert base.data.shards is None
    assert load_config(path).data.mix == {"/data/c": 1.0}
    given = load_config(path, ["data.mix={/x/y.z: 1, https://host/a: 2.5}"])
    assert list(given.data.mix.items()) == [("/x/y.z", 1.0), ("https://host/a", 2.5)]
    assert load_config(write(tmp_path / "again.yaml", dump_config(base))) == base


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("{shards: x, mix: {a: 1}}", "data.shards = x and data.mix: give one of them, the other is to be null"),
        ("{shards: null}", "data.shards is missing: give data.shards, or data.mix"),
        ("{mix: {a: 0, b: -1}}", r"data.mix.a = 0: .*greater than 0\n  data.mix.b = -1: .*greater than 0"),
        ("{mix: {a: .inf}}", "data.mix.a = inf: input should be a finite number"),
        ("{mix: {a: .nan}}", "data.mix.a = nan: input should be"),
        ("{mix: {}}", "data.mix = {}: .*at least 1"),
        ("{mix: [a, b]}", "data.mix = .*: input should be a valid dictionary"),
    ],
)
def test_a_mix_that_can_not_be_is_refused(tmp_path, data, message):
    with pytest.raises(ConfigError, match=message):
        load_config(write(tmp_path / "run.yaml", f"train: {{steps: 3}}\ndata: {data}\n"))
