"""The stores of a corpus whose files lie in several places: a local disk and a web server, say.

In: locations, each in the folder of one of its sources. Out: what the store of that folder gives; it is opened when
the first file of the folder is asked for. Like any store it belongs to the process that made it. Fails as those do.
"""

from collections.abc import Mapping, Sequence

from msm_dist.data.storage import Access, Span, Stamp, Store, open_store, split


class FolderStores:
    """A store that hands every file to the one of its folder."""

    def __init__(self, access: Access, stamped: Mapping[str, Stamp] | None = None):
        self._access = access
        self._stamped = stamped
        self._stores: dict[str, Store] = {}

    def read(self, locations: Sequence[str]) -> list[bytes]:
        """Whole, small files. Raises FileNotFoundError, OSError."""
        found: list[bytes | None] = [None] * len(locations)
        for store, places in self._grouped(locations):
            for place, content in zip(places, store.read([locations[place] for place in places]), strict=True):
                found[place] = content
        return found

    def fetch(self, spans: Sequence[Span]) -> list[memoryview]:
        """The bytes of spans, in their order. Raises DataError."""
        found: list[memoryview | None] = [None] * len(spans)
        for store, places in self._grouped([span.location for span in spans]):
            for place, content in zip(places, store.fetch([spans[place] for place in places]), strict=True):
                found[place] = content
        return found

    def confirm(self, locations: Sequence[str]) -> dict[str, str]:
        """Which of the files are no longer those they were when they were first seen. Raises DataError."""
        changed: dict[str, str] = {}
        for store, places in self._grouped(locations):
            changed |= store.confirm([locations[place] for place in places])
        return changed

    def _grouped(self, locations: Sequence[str]) -> list[tuple[Store, list[int]]]:
        """Which of the locations each store has, by their places in the list."""
        places: dict[str, list[int]] = {}
        for place, location in enumerate(locations):
            places.setdefault(_folder(location), []).append(place)
        return [(self._of(locations[here[0]]), here) for here in places.values()]

    def _of(self, location: str) -> Store:
        folder = _folder(location)
        if folder not in self._stores:
            self._stores[folder] = open_store(split(location)[0], self._access, self._stamped)
        return self._stores[folder]


def _folder(location: str) -> str:
    """The same for all files of a folder; this is done for every crop."""
    return location.rpartition("/")[0]
