"""plaingpt/training/metrics.py: a record that outlives a full disk, a kill and a lost folder."""
import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT

from plaingpt.training import metrics
from plaingpt.training.metrics import Metrics


def test_lines_that_the_disk_refuses_are_written_when_there_is_room(tmp_path, monkeypatch, capsys):
    record = Metrics(str(tmp_path))
    path = tmp_path / 'metrics.jsonl'
    record.write({'step': 1})
    with monkeypatch.context() as patch:
        patch.setattr(metrics, 'open', open_full_disk, raising=False)
        record.write({'step': 2})
        record.write({'step': 3})
    assert path.read_text(encoding='utf-8') == '{"step": 1}\n'
    assert len(record.unwritten) == 2
    warning = 'cannot be written (No space left on device)'
    assert capsys.readouterr().err.count(warning) == 1
    record.write({'step': 4})
    lines = [f'{{"step": {step}}}\n' for step in (1, 2, 3, 4)]
    assert path.read_text(encoding='utf-8') == ''.join(lines)
    assert not record.unwritten


def open_full_disk(path, mode, buffering):
    return open('/dev/full', mode, buffering=buffering)


# Files may not grow beyond 30 bytes: two lines and a half.
WRITE_FOUR_LINES = """
import resource, signal, sys
from plaingpt.training.metrics import Metrics
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (30, 30))
metrics = Metrics(sys.argv[1])
for step in range(4):
    metrics.write({'step': step})
print(len(metrics.unwritten))
"""


@pytest.mark.skipif(os.name != 'posix', reason='limits the size of files as POSIX systems do')
def test_half_a_line_is_taken_back(tmp_path):
    ended = subprocess.run([sys.executable, '-c', WRITE_FOUR_LINES, tmp_path], cwd=ROOT,
                           capture_output=True, text=True)
    assert ended.stdout == '2\n'
    assert 'No space left' in ended.stderr
    record = (tmp_path / 'metrics.jsonl').read_text(encoding='utf-8')
    assert record == '{"step": 0}\n{"step": 1}\n'


def test_the_record_follows_a_folder_that_is_removed_and_comes_back(tmp_path):
    record = Metrics(str(tmp_path / 'out'))
    record.write({'step': 1})
    (tmp_path / 'out').mkdir()
    record.write({'step': 2})
    content = (tmp_path / 'out' / 'metrics.jsonl').read_text(encoding='utf-8')
    assert content == '{"step": 1}\n{"step": 2}\n'


def test_numbers_that_json_does_not_have_are_not_written(tmp_path):
    with pytest.raises(ValueError):
        Metrics(str(tmp_path)).write({'loss': float('nan')})
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize('rest', ['', '{"step": 2', '{"step": 5, "loss": 0.', '\0\0\0\n', '[1]\n',
                                  '{"loss": 1}\n', '{"step": 2.0}\n', '{"step": "2"}\n'])
def test_the_record_is_cut_back_to_the_lines_before_a_step(tmp_path, rest):
    path = tmp_path / 'metrics.jsonl'
    lines = [json.dumps({'step': step, 'loss': 0.5}) + '\n' for step in (0, 1, 3, 4, 10)]
    path.write_text(''.join(lines) + rest, encoding='utf-8')
    metrics.cut(str(tmp_path), 4)
    assert path.read_text(encoding='utf-8') == ''.join(lines[:3])
    assert os.listdir(tmp_path) == ['metrics.jsonl']


def test_a_folder_without_a_record_needs_no_cut(tmp_path):
    metrics.cut(str(tmp_path), 4)
    assert os.listdir(tmp_path) == []
