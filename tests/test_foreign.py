"""Tars made elsewhere beside AudioSet's tables: what their keys may be."""

import io
import tarfile

from msm_dist.config import Features
from msm_dist.data.foreign import index_in_place
from tests.audio_files import encode, noise


def test_tar_with_names_beyond_ascii_is_matched_with_tables(tmp_path):
    content = encode(noise(16000))
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name in ("é/abcdefghijk", "caf\udce9"):
            member = tarfile.TarInfo(f"{name}.flac")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    (tmp_path / "balanced_train_segments.csv").write_text('abcdefghijk, 0, 10, "/m/1"\n')
    made = index_in_place([tmp_path / "x.tar"], Features(), [tmp_path / "balanced_train_segments.csv"])
    assert (made.index.num_clips, made.index.official.found, made.num_unlisted) == (2, 1, 1)
