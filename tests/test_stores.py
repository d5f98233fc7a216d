"""Files of several folders through one store: each from its own, in the order asked for."""

import numpy as np
import pytest

from msm_dist.config import batch_layout, parse_config
from msm_dist.corpus import open_corpus
from msm_dist.data import stores as stores_module
from msm_dist.data.crops import CropReader, Source
from msm_dist.data.storage import Access, Span
from msm_dist.data.stores import FolderStores
from tests.http_server import serving
from tests.shards import noise_clips, write_corpus
from tests.test_crops import FRAMES


@pytest.fixture
def files(tmp_path):
    found = {}
    for number in range(6):
        path = tmp_path / f"folder-{number % 3}" / f"file-{number}.tar"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(bytes([number]) * (number + 1))
        found[str(path)] = path.read_bytes()
    return found


def test_every_file_comes_from_its_folder_in_the_order_asked_for(files, monkeypatch):
    opened = []
    open_store = stores_module.open_store
    monkeypatch.setattr(
        stores_module, "open_store", lambda folder, *rest: opened.append(folder) or open_store(folder, *rest)
    )
    store, names = FolderStores(Access()), [*files, *reversed(files)]
    spans = [Span(name, len(files[name]), 0, len(files[name])) for name in names]
    assert [bytes(content) for content in store.fetch(spans)] == [files[name] for name in names]
    assert store.read(names) == [files[name] for name in names]
    assert sorted(opened) == sorted({name.rpartition("/")[0] for name in names})


def test_nothing_asked_for_is_nothing_opened():
    store = FolderStores(Access())
    assert store.fetch([]) == [] and store.read([]) == []


def test_a_mix_of_a_disk_and_a_web_server_gives_the_crops_of_two_folders(tmp_path):
    write_corpus(tmp_path / "near", noise_clips(70), clips_per_shard=24)
    write_corpus(tmp_path / "files" / "far", noise_clips(90)[70:], clips_per_shard=10)
    with serving(tmp_path / "files") as server:
        mixed = blocks_of(str(tmp_path / "near"), f"{server.url}/far")
        asked = {name for name, start, _ in server.ranges() if start >= 0}
    assert asked == {"far/noise-000000.tar", "far/noise-000001.tar"}
    local = blocks_of(str(tmp_path / "near"), str(tmp_path / "files" / "far"))
    for one, other in zip(mixed, local, strict=True):
        np.testing.assert_array_equal(one.sample_ids, other.sample_ids)
        np.testing.assert_array_equal(one.values, other.values)
    assert {clip >= 70 for block in mixed for clip in block.sample_ids[:, 1]} == {False, True}


def blocks_of(*folders):
    """Blocks of a mix as a run reads them."""
    data = {"mix": dict.fromkeys(folders, 1), "block": 4, "crop_frames": FRAMES, "num_workers": 0}
    sizes = {"steps": 1, "global_batch": 8, "micro_batch": 8}
    cfg = parse_config({"data": data, "train": sizes, "features": {"mean": 0, "std": 1}}, "test")
    corpus = open_corpus(cfg, batch_layout(cfg, 1))
    reader = CropReader(Source(corpus.plan, corpus.index, corpus.features, FRAMES))
    return [reader.blocks([n]) for n in range(60)]
