"""A part of the GPU suite: its programs, its time limit, and what it reads back."""
import time

import pytest

from plaingpt.benchmarking.part import PartFailed, PartRun, largest_difference, values


@pytest.fixture
def part(tmp_path):
    return PartRun(tmp_path / 'part', limit=60)


def test_a_program_that_fails_is_named_by_its_last_lines(part):
    with pytest.raises(PartFailed, match='exit status 3: .*the reason'):
        part.python('-c', 'print("the reason", flush=True); raise SystemExit(3)')
    assert 'the reason' in (part.folder / 'log.txt').read_text(encoding='utf-8')


def test_a_program_is_killed_at_the_time_limit_with_its_children(tmp_path):
    part = PartRun(tmp_path / 'part', limit=1.0)
    # The grandchild would write the file two seconds after its start.
    late = 'import time; time.sleep(2); open("late", "w").close()'
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', '''{late}'''])"
    with pytest.raises(PartFailed, match='time limit of 1 s'):
        part.python('-c', child)
    time.sleep(2)
    assert not (part.folder / 'late').exists()


def test_a_program_can_be_killed_on_a_condition_and_must_not_end_before(part):
    started = part.folder / 'started'
    program = 'import time; open("started", "w").close(); time.sleep(30)'
    begin = time.monotonic()
    part.python('-c', program, kill_when=started.exists)
    assert started.exists() and time.monotonic() - begin < 20
    with pytest.raises(PartFailed, match='ended before'):
        part.python('-c', 'pass', kill_when=(part.folder / 'never').exists)


def test_a_part_begins_in_an_empty_folder(tmp_path):
    (tmp_path / 'part' / 'old').mkdir(parents=True)
    part = PartRun(tmp_path / 'part', limit=60)
    assert list(part.folder.iterdir()) == []


def test_only_complete_lines_of_a_record_count(part):
    assert part.records('run') == []
    (part.folder / 'run').mkdir()
    (part.folder / 'run' / 'metrics.jsonl').write_text(
        '{"step": 1, "loss": 2.5}\n{"step": 2, "val_loss": 3.0}\n{"step": 3, "lo', encoding='utf-8')
    records = part.records('run')
    assert values(records, 'loss') == {1: 2.5}
    assert values(records, 'val_loss') == {2: 3.0}


def test_differences_are_relative_and_need_the_same_steps():
    assert largest_difference({1: 2.2, 2: 4.0}, {1: 2.0, 2: 4.0}) == pytest.approx(0.1)
    with pytest.raises(PartFailed, match='steps'):
        largest_difference({1: 2.0}, {1: 2.0, 2: 4.0})
    with pytest.raises(PartFailed, match='steps'):
        largest_difference({}, {})
