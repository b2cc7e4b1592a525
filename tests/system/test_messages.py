"""plaingpt/system/messages.py: a user's mistake ends in one sentence, and one rank speaks."""
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
from conftest import ROOT, refused, run

from plaingpt.system import messages
from plaingpt.system.messages import UserError

# ---- errors ----

def script_that_raises(folder, error):
    """A finished process that raised this error, given as Python code."""
    code = ('import torch\nfrom plaingpt.system.messages import UserError\n'
            f'print("before")\nraise {error}\n')
    (folder / 'script.py').write_text(code, encoding='utf-8')
    ended = run(folder / 'script.py', env={'PYTHONPATH': str(ROOT)})
    assert ended.stdout == 'before\n'
    return ended


def test_a_users_mistake_ends_in_one_sentence(tmp_path):
    mistake = script_that_raises(tmp_path, "UserError('x.bin is empty: prepare it')")
    assert refused(mistake) == mistake.stderr.strip() == 'error: x.bin is empty: prepare it'


def test_a_gpu_out_of_memory_ends_in_one_sentence(tmp_path):
    ended = script_that_raises(tmp_path, "torch.OutOfMemoryError('CUDA')")
    assert 'the GPU is out of memory: use fewer or shorter sequences' in refused(ended)


def test_a_bug_ends_in_its_traceback(tmp_path):
    bug = script_that_raises(tmp_path, "KeyError('bug')")
    assert bug.returncode == 1
    assert 'Traceback' in bug.stderr
    assert "KeyError: 'bug'" in bug.stderr
    assert 'error: ' not in bug.stderr


def test_a_lost_connection_points_to_the_error_of_the_other_rank(tmp_path):
    text = '[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer'
    ended = script_that_raises(tmp_path, f'RuntimeError({text!r})')
    assert ended.returncode == 1
    assert ended.stderr == ("error: rank 0 lost its connection to another rank; "
                            "see that rank's error\n")


@pytest.mark.parametrize('error', [
    MemoryError(),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
])
def test_too_little_ram_is_the_users_to_mend(error):
    assert messages.sentence_for(error).startswith('there is not enough memory: ')


@pytest.mark.parametrize('local_rank', [0, 1])
def test_the_first_rank_prints_at_once_and_another_only_if_nobody_ends_it(
        monkeypatch, capsys, local_rank):
    printed_before_the_wait = []

    def sleep(seconds):
        printed_before_the_wait.append(capsys.readouterr().err)

    monkeypatch.setattr(messages, 'LOCAL_RANK', local_rank)
    monkeypatch.setattr(messages, 'time', SimpleNamespace(sleep=sleep))
    with pytest.raises(SystemExit) as ended:
        messages.end_with(['one', 'two'])
    assert ended.value.code == 2
    assert capsys.readouterr().err == 'error: one\nerror: two\n'
    assert printed_before_the_wait == ([''] if local_rank == 1 else [])


def test_explained_turns_only_the_named_kinds_into_a_users_mistake():
    with (pytest.raises(UserError, match='^out_dir: full$'),
          messages.explained(OSError, ValueError, prefix='out_dir: ')):
        raise OSError('full')
    with pytest.raises(KeyError), messages.explained(OSError, ValueError):
        raise KeyError('bug')


def test_complaints_are_the_sentence_of_a_refusal_or_none():
    def check(number):
        if number < 0:
            raise UserError(f'{number} is negative')

    assert messages.complaints(check, -1) == ['-1 is negative']
    assert messages.complaints(check, 1) == []


# ---- output ----

@pytest.mark.parametrize('rank, printed', [(0, ('step 1\n', 'warning: slow\n')), (1, ('', ''))])
def test_only_the_first_rank_warns_and_prints(monkeypatch, capsys, rank, printed):
    monkeypatch.setattr(messages, 'RANK', rank)
    messages.warn('slow')
    messages.print0('step 1')
    assert capsys.readouterr() == printed


def test_numbers_with_their_nouns():
    assert [messages.counted(number, 'document') for number in (0, 1, 2000)] == [
        '0 documents', '1 document', '2,000 documents']


@pytest.mark.skipif(os.name != 'posix', reason='needs the signals of POSIX systems')
def test_output_that_nobody_reads_asks_the_process_to_stop(monkeypatch):
    stopped, discarded = [], []

    def write(line):
        raise BrokenPipeError

    monkeypatch.setattr(messages.tqdm, 'write', write)
    monkeypatch.setattr(messages, 'discard_output', discarded.append)
    signal.signal(signal.SIGTERM, lambda number, frame: stopped.append(number))
    messages.print0('step 1')
    assert stopped == [signal.SIGTERM]
    assert discarded == [messages.STDOUT]


def test_a_line_that_a_full_disk_cannot_take_is_lost(monkeypatch):
    def write(line):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(messages.tqdm, 'write', write)
    messages.print0('step 1')


def test_scripts_that_prepare_data_start_without_torch():
    code = ('import sys, configurator\n'
            'from plaingpt.corpus import preparation, readers, vocabulary\n'
            'from plaingpt.inspection import report, tokenizer_comparison\n'
            'sys.exit("torch" in sys.modules)')
    assert subprocess.run([sys.executable, '-c', code], cwd=ROOT).returncode == 0
