"""The unfinished token files: in one or in shards, continued at any point."""
import os

import numpy as np
import pytest

from plaingpt.corpus.part_files import PartFiles


def content(folder):
    return {name: (folder / name).read_bytes() for name in sorted(os.listdir(folder))}


@pytest.mark.parametrize('shard_tokens, names', [
    (0, ['train.bin.part']),
    (4, ['train_000.bin.part', 'train_001.bin.part', 'train_002.bin.part']),
    (6, ['train_000.bin.part', 'train_001.bin.part']),  # the last one is full
])
def test_files_that_are_continued_hold_the_same(tmp_path, shard_tokens, names):
    values = np.arange(12, dtype=np.uint16)
    whole = tmp_path / 'whole'
    whole.mkdir()
    files = PartFiles(str(whole / 'train.bin.part'), np.uint16, shard_tokens)
    files.begin(0)
    files.write(values)
    files.close()
    assert sorted(os.listdir(whole)) == names
    assert b''.join(content(whole).values()) == values.tobytes()

    for known in range(13):
        for written in range(known, 13):
            folder = tmp_path / f'{known}-{written}'
            folder.mkdir()
            killed = PartFiles(str(folder / 'train.bin.part'), np.uint16, shard_tokens)
            killed.begin(0)
            killed.write(values[:written])
            killed.close()
            assert killed.holds(known)
            assert not killed.holds(13)
            files = PartFiles(str(folder / 'train.bin.part'), np.uint16, shard_tokens)
            files.begin(known)
            files.write(values[known:])
            files.close()
            assert content(folder) == content(whole)


def test_only_its_own_files_are_removed(tmp_path):
    others = ['train_mask.bin.part', 'train_mask_001.bin.part', 'val.bin.part', 'train.bin']
    for name in [*others, 'train.bin.part', 'train_007.bin.part']:
        (tmp_path / name).touch()
    PartFiles(str(tmp_path / 'train.bin.part'), np.uint16, 4).begin(0)
    assert sorted(os.listdir(tmp_path)) == sorted(others)
