"""The data part of `msm-dist plan`: figures that agree with the corpus, and choices that a run accepts."""

import re

import pytest

from msm_dist.config import batch_layout, parse_config
from msm_dist.corpus import open_corpus
from msm_dist.corpus_report import corpus_rows
from msm_dist.planning import describe
from tests.corpus import write_corpus


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    root = tmp_path_factory.mktemp("corpora")
    return write_corpus(root / "one", count=190, num_shards=4), write_corpus(root / "two", 50, 2, seed=3)


def settings(data, workers=2):
    data = {"num_workers": workers, "crop_frames": 96, "block": 4} | data
    return {"train": {"steps": 10, "global_batch": 64, "micro_batch": 8}, "data": data}


def report(data, world=1, workers=2):
    cfg = parse_config(settings(data, workers), "test")
    layout = batch_layout(cfg, world)
    corpus = open_corpus(cfg, layout)
    return corpus, "\n".join(f"{name:<12} {text}" for name, text in corpus_rows(cfg, layout, corpus))


def numbers(text, line):
    found = re.search(rf"^{line} .*: ([\d, ]+)$", text, re.MULTILINE)
    return [int(number) for number in found[1].split(", ")]


def test_figures_are_those_of_the_corpus(corpora):
    corpus, text = report({"shards": str(corpora[0])}, world=2)
    sizes = sorted(shard.bytes for shard in corpus.index.shards)
    assert "190 clips in 4 shards of audio" in text
    assert "clips 47 / 47.5 / 48 (least, median, most)" in text
    assert f"MB    {sizes[0] / 1e6:.6g} / {(sizes[1] + sizes[2]) / 2e6:.6g} / {sizes[3] / 1e6:.6g}" in text
    assert "8 of 23 clips; 6 clips sit out an epoch" in text
    assert "184 clips = 2.88 steps" in text
    held = 184 * sum(sizes) / 190 / 1e9
    assert f"{held:.2f} GB, {held / 2:.2f} GB a process" in text


def test_every_choice_it_names_is_one_that_a_run_accepts_and_no_other_is(corpora):
    data = {"shards": str(corpora[0])}
    _, text = report(data)
    worlds, workers = numbers(text, "processes"), numbers(text, "workers")
    assert worlds == [1, 2, 4] and workers == [1, 2, 4, 8]
    for world in worlds:
        report(data, world)
    for count in workers:
        report(data, workers=count)
    for wrong in ({"world": 8}, {"workers": 3}, {"workers": 16}):
        with pytest.raises(Exception, match="must be a multiple of"):
            report(data, **wrong)


def test_sources_of_a_mix_have_a_line_each(corpora):
    corpus, text = report({"mix": {str(corpora[0]): 3, str(corpora[1]): 1}})
    assert "240 clips in 6 shards" in text
    assert f"75.0% from {corpora[0]}: 190 clips, each served once in 3.92 steps" in text
    assert f"25.0% from {corpora[1]}: 50 clips, each served once in 3.00 steps" in text
    assert "4 of 47 + 12 clips; 2 + 2 clips sit out" in text
    assert corpus.plan.lanes == 4


def test_plan_of_a_mix_and_of_a_corpus_that_is_not_here(corpora, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("train: {steps: 10, global_batch: 64, micro_batch: 8}\n")
    mix = f"data.mix={{{corpora[0]}: 3, {corpora[1]}: 1}}"
    text = describe(str(path), [mix, "data.num_workers=1"], 2)
    assert f"25.0% from {corpora[1]}" in text and "h an epoch as configured" in text
    text = describe(str(path), [f"data.mix={{{corpora[0]}: 3, {tmp_path / 'absent'}: 1}}"], 2)
    assert f"corpus       can't be opened: {tmp_path / 'absent'}: no index.json there" in text
    # Shards of the same names hold the same clips, for all that names say.
    text = describe(str(path), [mix, "data.num_workers=1"], 2)
    assert f"note         {corpora[0]} and {corpora[1]} both have 2 shards of the same names" in text
