"""Sweeps: the grid that words span, the names of its runs, the files of configs/sweeps/."""

import re
from pathlib import Path

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from msm_dist.config import Run, batch_layout, load_config
from msm_dist.errors import ConfigError
from msm_dist.sweep import LONGEST_NAME, expand

ROOT = Path(__file__).resolve().parent.parent
BASE = ROOT / "configs" / "base_audioset.yaml"
STUDIES = sorted((ROOT / "configs" / "sweeps").glob("*.yaml"))
SETTINGS_OF_STUDIES = {
    "duration": ("data.crop_frames", {96, 208, 304, 512, 608}),
    "patch_shape": ("model.patch_size", {"16x16", "16x8", "16x4", "8x16", "8x8", "80x4", "80x2", "80x1"}),
    "mask_ratio": ("model.mask_ratio", {0.6, 0.7, 0.75, 0.8, 0.85}),
}


def sweep_file(folder: Path, text: str) -> str:
    path = folder / "sweep.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_the_last_word_varies_fastest() -> None:
    variants = expand(["data.crop_frames=96,208", "model.patch_size=16x16,16x8"])
    assert [(variant.name, variant.overrides) for variant in variants] == [
        ("crop_frames-96_patch_size-16x16", ("data.crop_frames=96", "model.patch_size=16x16")),
        ("crop_frames-96_patch_size-16x8", ("data.crop_frames=96", "model.patch_size=16x8")),
        ("crop_frames-208_patch_size-16x16", ("data.crop_frames=208", "model.patch_size=16x16")),
        ("crop_frames-208_patch_size-16x8", ("data.crop_frames=208", "model.patch_size=16x8")),
    ]


@pytest.mark.parametrize(
    ("word", "values"),
    [
        ("optim.betas=[0.9,0.95],[0.9,0.99]", ["[0.9,0.95]", "[0.9,0.99]"]),
        ("data.shards=a-{000..001,007}.tar,b.tar", ["a-{000..001,007}.tar", "b.tar"]),
        ("data.shards='a,b','it''s,c'", ["'a,b'", "'it''s,c'"]),
        (r'data.shards="a\",b",c', [r'"a\",b"', "c"]),
        ("data.shards=it's,o'clock", ["it's", "o'clock"]),
        ("seed=1, 2", ["1", "2"]),
        ("optim.clip_norm=null,3.0", ["null", "3.0"]),
    ],
)
def test_commas_inside_brackets_and_quotes_belong_to_the_value(word: str, values: list[str]) -> None:
    key = word.partition("=")[0]
    assert [variant.overrides for variant in expand([word])] == [(f"{key}={value}",) for value in values]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "needs settings to vary"),
        (["seed="], "value 1 is empty"),
        (["seed=1,,2"], "value 2 is empty"),
        (["seed=1,2,"], "value 3 is empty"),
        (["seed=1,2,1"], "1 is given twice"),
        (["model.mask_ratio=0.7,0.70"], "0.7 is given twice"),
        (["seed=1,1.0"], "1.0 is given twice"),
        (["optim.betas=[0,0.9],[0.0, 0.9]"], "is given twice"),
        (["seed=1,2", "seed=3,4"], "seed: is swept twice"),
        (["seed=[1,2"], "] is missing"),
        (["data.shards='a,b"], "' is missing"),
        (["seed=&,2"], "not valid YAML"),
        (["seed=!!python/object/apply:os.getcwd []"], "not valid YAML"),
        (["no_such_file"], "neither a setting to vary"),
        ([f"{STUDIES[0].parent}/durations.yaml"], "duration.yaml"),
        (["a b=1,2"], "is written section.key=VALUE,VALUE"),
        (["run.name=a,b"], "run.name: a sweep names its run folders itself"),
        (["seed=" + ",".join(map(str, range(501))), "model.cls_token=true,false"], "1002 runs (501 x 2): at most 1000"),
    ],
)
def test_wrong_words_are_refused_with_the_reason(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        expand(words)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must hold `description:`, `grid:`, `runs:`"),
        ("- seed", "must hold `description:`, `grid:`, `runs:`"),
        ("description: nothing to vary", "give either grid: (settings with lists of values) or runs:"),
        ("grid: {seed: [1]}\nruns: [{seed: 1}]", "give either grid: (settings with lists of values) or runs:"),
        ("grids: {seed: [1]}", "grids: unknown key"),
        ("grid: {seed: [1]}\ndescription: 3", "description = 3: must be a text"),
        ("grid: {}", "grid = {}: must hold lines"),
        ("grid: [seed]", "must hold lines"),
        ("grid: {seed: 1}", "seed = 1: must be a list of values"),
        ("grid: {seed: []}", "seed = []: must be a list of values"),
        ("grid: {seed: [1, 1]}", "1 is given twice"),
        ("grid: {seed: [1], seed: [2]}", "seed: is given twice"),
        ("grid: {model: [{size: base}]}", "name settings as section.key"),
        ("grid: {3: [1]}", "3: a setting is named section.key"),
        ("grid: {run.dir: [a, b]}", "run.dir: a sweep names its run folders itself"),
        ("runs: {seed: 1}", "must hold lines"),
        ("runs: [seed]", "entry 1: 'seed': must hold settings"),
        ("runs: [{seed: 1}, {data: {block: 8}}]", "entry 2: data = {'block': 8}: must be a value"),
        ("runs: [{seed: 1, data.block: 8}, {data.block: 8, seed: 1}]", "is given twice"),
        ("grid: {seed: [1]", "not valid YAML"),
        ("grid: {seed: [!!python/name:os.system ]}", "not valid YAML"),
    ],
)
def test_wrong_files_are_refused_with_their_name(tmp_path: Path, text: str, message: str) -> None:
    path = sweep_file(tmp_path, text)
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        expand([path])
    assert "swe" in str(caught.value)


def test_a_file_may_set_several_settings_together(tmp_path: Path) -> None:
    text = (
        "description: longer inputs\nruns:\n- {data.crop_frames: 208}\n- {data.crop_frames: 608, optim.lr: 1.0e-05}\n"
    )
    variants = expand([sweep_file(tmp_path, text), "seed=0,1"])
    assert [variant.name for variant in variants] == [
        "crop_frames-208_seed-0",
        "crop_frames-208_seed-1",
        "crop_frames-608_lr-1.0e-05_seed-0",
        "crop_frames-608_lr-1.0e-05_seed-1",
    ]
    cfg = load_config(BASE, ["optim.base_lr=null", *variants[-1].overrides])
    assert (cfg.data.crop_frames, cfg.optim.lr, cfg.seed) == (608, 1e-5, 1)


@example("\x85")
@example(["é", "\u2028"])
@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(), st.lists, max_leaves=1))
def test_a_files_value_reaches_the_configuration_unchanged(tmp_path_factory: pytest.TempPathFactory, value) -> None:
    path = tmp_path_factory.mktemp("sweep") / "sweep.yaml"
    path.write_text(yaml.safe_dump({"grid": {"seed": [value]}}), encoding="utf-8")
    (variant,) = expand([str(path)])
    text = variant.overrides[0].removeprefix("seed=")
    read = yaml.safe_load(text) if text else None
    assert repr(read) == repr(value)


def test_names_tell_settings_of_one_last_part_apart() -> None:
    (variant,) = expand(["train.every=1", "checkpoint.every=2", "seed=3"])
    assert variant.name == "train.every-1_checkpoint.every-2_seed-3"


@given(
    st.lists(
        st.text(st.characters(blacklist_categories=("Cs", "Cc")), min_size=1, max_size=300),
        min_size=1,
        max_size=8,
        unique=True,
    )
)
def test_names_are_valid_and_unique_whatever_the_values(tmp_path_factory: pytest.TempPathFactory, values) -> None:
    path = tmp_path_factory.mktemp("sweep") / "sweep.yaml"
    path.write_text(yaml.safe_dump({"grid": {"data.shards": values}}), encoding="utf-8")
    names = [variant.name for variant in expand([str(path)])]
    assert len(set(names)) == len(values)
    for name in names:
        assert Run(name=name).name == name and len(name) <= LONGEST_NAME


def test_a_value_added_to_a_sweep_leaves_the_other_names() -> None:
    before, after = (expand([f"data.shards={shards}", "seed=1,2"]) for shards in ("/a/b", "/c/d,/a/b,/e"))
    assert {variant.name for variant in before} < {variant.name for variant in after}


def test_a_misspelt_setting_is_the_configurations_to_name() -> None:
    (variant, _) = expand(["data.crop_framez=96,208"])
    with pytest.raises(ConfigError, match=r"data\.crop_framez: unknown key; did you mean data\.crop_frames\?"):
        load_config(BASE, variant.overrides)


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_every_run_of_a_study_is_valid_on_eight_gpus(path: Path) -> None:
    variants = expand([str(path)])
    setting, values = SETTINGS_OF_STUDIES[path.stem]
    section, key = setting.split(".")
    configs = [load_config(BASE, variant.overrides) for variant in variants]
    assert {getattr(getattr(cfg, section), key) for cfg in configs} == values
    assert len(configs) == len(values)
    for cfg in configs:
        assert batch_layout(cfg, 8).accumulation == 1
        assert cfg.peak_lr == pytest.approx(6e-4)


def test_every_study_is_tested() -> None:
    assert {path.stem for path in STUDIES} == set(SETTINGS_OF_STUDIES)
