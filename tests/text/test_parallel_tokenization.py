"""Tokenizing on many cores: the journal, and workers that fail."""
import json
import os

import pytest

from plaingpt.system.messages import UserError
from plaingpt.text.parallel_tokenization import Journal, Position, tokenize_splits

NOTHING = Position(0, 0, 0)


def test_a_journal_counts_only_for_its_inputs_and_an_intact_file(tmp_path):
    folder = str(tmp_path)
    with open(tmp_path / 'train.bin.part', 'wb') as file:
        file.write(b'123456')
        Journal(folder, {'seed': 1}).save('train', file, documents=2, tokens=3)
    position = Journal(folder, {'seed': 1}).position('train')
    assert position == Position(documents=2, bytes=6, tokens=3)
    assert Journal(folder, {'seed': 1}).position('val') == NOTHING
    assert Journal(folder, {'seed': 2}).position('train') == NOTHING
    os.truncate(tmp_path / 'train.bin.part', 5)
    assert Journal(folder, {'seed': 1}).position('train') == NOTHING


def test_progress_json_keeps_its_format(tmp_path):
    with open(tmp_path / 'train.bin.part', 'wb') as file:
        file.write(b'123456')
        Journal(str(tmp_path), 'inputs').save('train', file, documents=2, tokens=3)
    saved = json.loads((tmp_path / 'progress.json').read_text())
    assert saved['train'] == [2, 6, 3]
    assert len(saved['inputs']) == 64


class FailingTokenizer:
    vocab_size = 10
    end_of_text = 0

    def __init__(self, error):
        self.error = error

    def encode_documents(self, texts):
        if self.error:
            raise self.error
        os._exit(1)  # as when the kernel kills a process for its memory


class Slices(dict):
    """As much of a datasets.Dataset as a worker uses."""

    def __getitem__(self, key):
        return {name: values[key] for name, values in self.items()}


@pytest.mark.parametrize('error, kind, message', [
    (ValueError('the document'), ValueError, 'the document'),
    (None, UserError, 'worker process died'),
])
def test_the_failure_of_a_worker_is_reported(tmp_path, error, kind, message):
    splits = {'train': Slices(text=['a'])}
    with pytest.raises(kind, match=message):
        tokenize_splits(str(tmp_path), splits, 'text', FailingTokenizer(error), 'inputs',
                        num_proc=1, documents_per_task=1)
