"""The table of the GPU suite."""
import pytest

from plaingpt.benchmarking.table import BEGIN, END, Row, write_table
from plaingpt.system.messages import UserError


def result(*rows, error=None):
    return {'error': error, 'rows': [row._asdict() for row in rows]}


RESULTS = {
    'fast': result(Row('speed', '2 ms'), Row('MFU', '60%', 'at least 55%', True)),
    'slow': result(Row('MFU', '50%', 'at least 55%', False)),
    'broken': result(error='exit status 1: a | b\nc'),
}
LINES = [
    '| fast | speed | 2 ms |  |  |',
    '| fast | MFU | 60% | at least 55% | reached |',
    '| slow | MFU | 50% | at least 55% | **missed** |',
    '| broken | **failed** | exit status 1: a / b c | | |',
]


def test_a_new_file_is_the_table_between_its_marks(tmp_path):
    path = tmp_path / 'table.md'
    write_table(path, 'A card.', RESULTS)
    lines = path.read_text(encoding='utf-8').splitlines()
    assert lines[:3] == [BEGIN, '', 'A card.']
    assert [line for line in lines if line.startswith('|')][2:] == LINES
    assert lines[-1] == END


def test_only_the_text_between_the_marks_of_a_file_changes(tmp_path):
    path = tmp_path / 'guide.md'
    path.write_text(f'# Guide\n{BEGIN}\nold\n{END}\nThe end.\n', encoding='utf-8')
    write_table(path, 'first', RESULTS)
    write_table(path, 'second', RESULTS)
    text = path.read_text(encoding='utf-8')
    assert text.startswith(f'# Guide\n{BEGIN}\n') and text.endswith(f'{END}\nThe end.\n')
    assert 'old' not in text and 'first' not in text and text.count('second') == 1


def test_a_file_without_the_marks_is_left_alone(tmp_path):
    path = tmp_path / 'guide.md'
    path.write_text('# Guide\n', encoding='utf-8')
    with pytest.raises(UserError, match='lacks the lines'):
        write_table(path, 'A card.', RESULTS)
    assert path.read_text(encoding='utf-8') == '# Guide\n'
