"""Files of several folders through one store: each from its own, in the order asked for."""

import pytest

from msm_dist.data import stores as stores_module
from msm_dist.data.storage import Access, Span
from msm_dist.data.stores import FolderStores


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
        stores_module, "open_store", lambda folder, access: opened.append(folder) or open_store(folder, access)
    )
    store, names = FolderStores(Access()), [*files, *reversed(files)]
    spans = [Span(name, len(files[name]), 0, len(files[name])) for name in names]
    assert [bytes(content) for content in store.fetch(spans)] == [files[name] for name in names]
    assert store.sizes([*names, names[0] + "x"]) == [*(len(files[name]) for name in names), None]
    assert store.read(names) == [files[name] for name in names]
    assert sorted(opened) == sorted({name.rpartition("/")[0] for name in names})


def test_nothing_asked_for_is_nothing_opened():
    store = FolderStores(Access())
    assert store.fetch([]) == [] and store.sizes([]) == []
