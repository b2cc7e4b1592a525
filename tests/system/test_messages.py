"""errors.py: the one sentence in which a user's mistake ends, and who speaks."""
import subprocess
import sys
from types import SimpleNamespace

import pytest
from conftest import ROOT, refused, run

from plaingpt.system import messages
from plaingpt.system.messages import UserError


def raising(folder, error):
    """How a script ends that raises this."""
    (folder / 'script.py').write_text(f'import torch; from plaingpt.system.messages import UserError\nprint("before")\nraise {error}\n')
    ended = run(folder / 'script.py', env={'PYTHONPATH': str(ROOT)})
    assert ended.stdout == 'before\n'
    return ended


def test_a_users_mistake_ends_in_one_sentence_and_a_bug_in_its_traceback(tmp_path):
    mistake = raising(tmp_path, "UserError('x.bin is empty: prepare it')")
    assert refused(mistake) == mistake.stderr.strip() == 'error: x.bin is empty: prepare it'
    assert 'the GPU is out of memory' in refused(raising(tmp_path, "torch.OutOfMemoryError('CUDA')"))
    bug = raising(tmp_path, "KeyError('bug')")
    assert bug.returncode == 1 and 'Traceback' in bug.stderr and "KeyError: 'bug'" in bug.stderr
    assert 'error: ' not in bug.stderr


@pytest.mark.parametrize('local_rank', [0, 1])
def test_the_first_rank_speaks_at_once_and_another_only_if_it_is_left_alone(monkeypatch, capsys, local_rank):
    heard_while_waiting = []
    monkeypatch.setattr(messages, 'LOCAL_RANK', local_rank)
    monkeypatch.setattr(messages, 'time', SimpleNamespace(
        sleep=lambda seconds: heard_while_waiting.append(capsys.readouterr().err)))
    with pytest.raises(SystemExit) as exit:
        messages.end_with(['one', 'two'])
    assert (exit.value.code, capsys.readouterr().err) == (2, 'error: one\nerror: two\n')
    assert heard_while_waiting == [''] * local_rank


def test_explained_turns_only_the_named_kinds_into_a_users_mistake():
    with pytest.raises(UserError, match='^out_dir: full$'), messages.explained(OSError, ValueError, prefix='out_dir: '):
        raise OSError('full')
    with pytest.raises(KeyError), messages.explained(OSError, ValueError):
        raise KeyError('bug')


@pytest.mark.parametrize('rank', [0, 1])
def test_only_the_first_rank_warns_and_prints(monkeypatch, capsys, rank):
    monkeypatch.setattr(messages, 'RANK', rank)
    messages.warn('slow')
    messages.print0('step 1')
    assert capsys.readouterr() == (('step 1\n', 'warning: slow\n') if rank == 0 else ('', ''))


def test_what_prepares_data_starts_without_torch():
    code = 'import sys, configurator; from plaingpt.text import parallel, publishing, tokenizers; sys.exit("torch" in sys.modules)'
    assert subprocess.run([sys.executable, '-c', code], cwd=ROOT).returncode == 0
