"""Settings that blow up as they are read, and files that endless others extend, are refused at once.

Every call runs in a child whose address space is limited and whose peak is compared with the bound.
"""

import pytest

from msm_dist.config import load_config
from tests.hostile import FEW, MIB


def laughs(levels: int) -> str:
    """The billion laughs: each level names the one before nine times."""
    lines = ["a0: &a0 [" + "lol, " * 9 + "]"]
    lines += [f"a{n}: &a{n} [" + f"*a{n - 1}, " * 9 + "]" for n in range(1, levels)]
    return "\n".join(lines) + f"\ntrain: {{steps: *a{levels - 1}}}\n"


def merges(levels: int) -> str:
    """The same by merged mappings, which are written out as they are read."""
    return "\n".join(
        ["a0: &a0 {x: 1}"] + [f"a{n}: &a{n} {{<<: [" + f"*a{n - 1}, " * 9 + "]}" for n in range(1, levels)]
    )


YAMLS = {
    "billion_laughs": lambda: laughs(12),
    "million_laughs": lambda: laughs(7),
    "laughs_by_merging": lambda: merges(12),
    "long_text_named_often": lambda: "a: &a " + "x" * 10_000 + "\ntrain: {steps: [" + "*a, " * 1000 + "]}",
    "alias_of_itself": lambda: "train: &a {steps: *a}",
    "list_in_itself": lambda: "train: &a [*a]",
    "deep_lists": lambda: "train: " + "[" * 2000,
    "deep_sections": lambda: "".join(" " * n + f"a{n}:\n" for n in range(500)),
    "100_mb": lambda: "# " + "x" * 100 * MIB,
    "hexadecimal_of_10000_digits": lambda: "train: {steps: 0x" + "f" * 10_000 + "}",
    "decimal_of_10000_digits": lambda: "train: {steps: " + "9" * 10_000 + "}",
    "embed_dim_of_10_to_the_15": lambda: (
        "model: {embed_dim: 1000000000000000, depth: 1, num_heads: 7}\ntrain: {steps: 1}"
    ),
    "crop_of_10_to_the_15_frames": lambda: "data: {crop_frames: 1000000000000000}\ntrain: {steps: 1}",
    "filters_of_10_to_the_12": lambda: "features: {n_fft: 1000000000000, n_mels: 1000000000000}\ntrain: {steps: 1}",
    "steps_beyond_count": lambda: "train: {steps: 1" + "0" * 4000 + "}",
    "patch_of_5000_digits": lambda: "model: {patch_size: " + "9" * 5000 + "x" + "9" * 5000 + "}\ntrain: {steps: 1}",
    "python_object": lambda: "train: !!python/object/apply:os.system ['true']",
    "python_name": lambda: "train: !!python/name:os.system",
    "bad_date": lambda: "train: 2001-99-99",
    "bad_offset": lambda: "train: 2001-01-01T00:00:00+99:99",
    "unhashable_key": lambda: "? [a]\n: b",
    "two_documents": lambda: "a: 1\n---\nb: 2",
    "control_characters": lambda: "train: \x00",
}


@pytest.mark.parametrize("case", YAMLS)
def test_configuration_that_is_a_bomb_is_refused(bounded, tmp_path, case):
    path = tmp_path / "x.yaml"
    path.write_text(YAMLS[case]())
    text = bounded.refused(load_config, path, extra=FEW)
    assert str(path) in text and len(text) < 20_000


def test_settings_shared_by_an_alias_are_read(tmp_path):
    (tmp_path / "x.yaml").write_text("data: {block: &n 8}\ntrain: {steps: 1, micro_batch: *n}")
    assert load_config(tmp_path / "x.yaml").train.micro_batch == 8


@pytest.mark.parametrize("value", ["[" * 2000, "&a [*a]", "0x" + "f" * 10_000, "!!python/name:os.system", "{", "\x00"])
def test_override_that_is_a_bomb_is_refused(bounded, tmp_path, value):
    (tmp_path / "x.yaml").write_text("train: {steps: 1}")
    bounded.refused(load_config, tmp_path / "x.yaml", [f"train.log_every={value}"], extra=FEW)


@pytest.mark.parametrize("place", ["/dev/zero", "/dev/urandom", "\\0", "x" * 5000, "."])
def test_file_to_extend_that_is_none_is_refused(bounded, tmp_path, place):
    (tmp_path / "x.yaml").write_text(f'extends: "{place}"')
    bounded.refused(load_config, tmp_path / "x.yaml", extra=FEW)


def test_long_chain_of_files_is_refused(bounded, tmp_path):
    for number in range(100):
        (tmp_path / f"{number}.yaml").write_text(f"extends: {number + 1}.yaml")
    assert "extend one another" in bounded.refused(load_config, tmp_path / "0.yaml", extra=FEW)
