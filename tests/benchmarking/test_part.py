"""A part of the GPU suite: its programs, its time limit, and what it reads back."""
import math
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


# Like torchrun, it has something to do on SIGTERM.
ENDS_ITSELF = """
import signal, sys, time
def end(number, frame):
    open('asked', 'w').close()
    sys.exit()
signal.signal(signal.SIGTERM, end)
open('started', 'w').close()
time.sleep(30)
"""


def test_at_the_time_limit_a_program_can_end_its_children_itself(tmp_path):
    part = PartRun(tmp_path / 'part', limit=3.0)
    with pytest.raises(PartFailed, match='time limit of 3 s'):
        part.python('-c', ENDS_ITSELF)
    assert (part.folder / 'asked').exists()


def test_a_program_that_is_killed_is_not_asked_to_end(part):
    part.python('-c', ENDS_ITSELF, kill_when=(part.folder / 'started').exists)
    assert not (part.folder / 'asked').exists()


@pytest.mark.parametrize('warning', [
    'warning: torch.compile failed, continuing without it (no compiler)',
    'warning: no CUDA graph can be recorded, so decoding is slower (why)',
])
def test_a_program_that_goes_on_in_a_slower_way_fails(part, warning):
    with pytest.raises(PartFailed) as failure:
        part.python('-c', f'print("before"); print({warning!r}); print("after")')
    assert str(failure.value) == warning


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


@pytest.mark.parametrize('a, b', [(math.nan, 2.0), (2.0, math.nan), (math.inf, math.inf)])
def test_differences_must_be_finite(a, b):
    with pytest.raises(PartFailed, match='finite'):
        largest_difference({1: 2.0, 2: a}, {1: 2.0, 2: b})
