"""plaingpt/training/checkpoints.py: saving without loss, loading without risk, and choosing."""
import os
import pickle
from unittest.mock import Mock

import pytest
import torch
from forgery import problem
from runs import SMALL, small_checkpoint, take_step, trained_model

from model import GPT, GPTConfig
from plaingpt.system import files
from plaingpt.training import checkpoints, resuming
from plaingpt.training.verification import REQUIRED_ENTRIES

SCALER = torch.amp.GradScaler('cpu', enabled=False)


def save(folder, **steps):
    """Saves a checkpoint of each of these steps under its name."""
    for name, step in steps.items():
        checkpoints.save(folder, small_checkpoint(step), [name])


def steps_of(folder):
    """{name: step} of the files in a folder; fails if one is no whole checkpoint."""
    return {path.name: checkpoints.load(str(path))['iter_num'] for path in sorted(folder.iterdir())}


def damage(path, part):
    """Changes one bit of a tensor in the file."""
    tree = torch.load(path, weights_only=True)
    if part == 'model':
        tensor = tree['model']['transformer.wpe.weight']
    else:
        tensor = tree['optimizer']['state'][0]['exp_avg']
    content = bytearray(path.read_bytes())
    content[content.index(tensor.numpy().tobytes()) + 9] ^= 1
    path.write_bytes(content)


# ---- saving ----

def test_a_checkpoint_comes_back_bit_for_bit(tmp_path):
    folder = tmp_path / 'new' / 'folder'
    original = small_checkpoint(3, extra={'a': [1, 2.5, None]})
    original['model']['half'] = torch.randn(3, 2).bfloat16().t()
    checkpoints.save(folder, original, ['last'])
    loaded = checkpoints.load(str(folder / 'last.pt'))
    torch.testing.assert_close(loaded['model'], dict(original['model']), rtol=0, atol=0)
    torch.testing.assert_close(loaded['optimizer']['state'], original['optimizer']['state'],
                               rtol=0, atol=0)
    for key in original.keys() - {'model', 'optimizer'}:
        assert loaded[key] == original[key]
    assert loaded['versions']['torch'] == str(torch.__version__)
    assert 'git_revision' in loaded


def test_the_checkpoint_before_is_kept_and_the_new_one_forced_to_disk(tmp_path, monkeypatch):
    save(tmp_path, last=1)
    save(tmp_path, last=2)
    forced = []  # inodes, in the order of the fsyncs
    monkeypatch.setattr(os, 'fsync', lambda fd: forced.append(os.fstat(fd).st_ino))
    save(tmp_path, last=3)
    assert steps_of(tmp_path) == {'last.pt': 3, 'last.prev.pt': 2}
    expected = [(tmp_path / 'last.pt').stat().st_ino]
    if os.name == 'posix':  # Windows can't sync a folder
        expected.append(tmp_path.stat().st_ino)
    assert forced == expected


@pytest.mark.parametrize('links', [True, False])
def test_a_joint_save_writes_once_and_later_saves_leave_the_other_name_alone(tmp_path, monkeypatch,
                                                                             links):
    if not links:
        monkeypatch.setattr(os, 'link', Mock(side_effect=OSError))
    checkpoints.save(tmp_path, small_checkpoint(1), ['last', 'ckpt'])
    assert os.path.samefile(tmp_path / 'last.pt', tmp_path / 'ckpt.pt') is links
    save(tmp_path, last=2)
    assert steps_of(tmp_path) == {'ckpt.pt': 1, 'last.pt': 2, 'last.prev.pt': 1}


def full(*arguments):
    raise OSError('full')


def write_half(checkpoint, file):
    file.write(b'half a file')
    raise OSError('full')


def open_full_disk(path, mode):
    return open('/dev/full', mode)


@pytest.mark.parametrize('replacements', [
    {'torch.save': write_half},
    {'os.fsync': full},
    {'os.replace': full},
    {'os.link': full, 'shutil.copyfile': full},
    {'plaingpt.system.files.open': open_full_disk},
], ids=lambda replacements: next(iter(replacements)))
def test_a_save_that_fails_loses_nothing(tmp_path, monkeypatch, replacements):
    checkpoints.save(tmp_path, small_checkpoint(1), ['last', 'ckpt'])
    with monkeypatch.context() as patch, pytest.raises(OSError):
        for name, replacement in replacements.items():
            patch.setattr(name, replacement, raising=False)
        checkpoints.save(tmp_path, small_checkpoint(2), ['last', 'ckpt'])
    assert steps_of(tmp_path) == {'ckpt.pt': 1, 'last.pt': 1}


class Killed(BaseException):
    """In place of a kill: no handler for errors catches it."""


@pytest.mark.parametrize('renames', range(4))
def test_a_kill_between_two_renames_leaves_a_state_to_resume_and_one_to_sample(tmp_path,
                                                                               monkeypatch,
                                                                               renames):
    checkpoints.save(tmp_path, small_checkpoint(1), ['last', 'ckpt'])
    replace = os.replace
    done = []

    def replace_or_die(source, target):
        if len(done) == renames:
            raise Killed
        done.append(target)
        replace(source, target)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(os, 'replace', replace_or_die)
        patch.setattr(checkpoints, 'remove', lambda paths: None)  # a kill does not clean up
        checkpoints.save(tmp_path, small_checkpoint(2), ['last', 'ckpt'])
    newest = 2 if renames >= 2 else 1
    assert checkpoints.load_to_resume(tmp_path)[0]['iter_num'] == newest
    assert checkpoints.load_to_sample(tmp_path)[0]['iter_num'] == 1
    checkpoints.save(tmp_path, small_checkpoint(3), ['last', 'ckpt'])
    assert steps_of(tmp_path) == {'ckpt.pt': 3, 'ckpt.prev.pt': 1, 'last.pt': 3,
                                  'last.prev.pt': newest}


def fail_to_save(folder, step):
    with pytest.MonkeyPatch.context() as patch, pytest.raises(OSError):
        patch.setattr(os, 'fsync', full)
        save(folder, last=step)


def test_a_save_drops_the_oldest_first_if_this_process_wrote_the_one_after_it(tmp_path):
    for step in 1, 2, 3:
        save(tmp_path, last=step)
    fail_to_save(tmp_path, 4)
    assert steps_of(tmp_path) == {'last.pt': 3}


def test_a_save_keeps_the_oldest_if_another_process_wrote_the_one_after_it(tmp_path):
    for step in 1, 2, 3:
        save(tmp_path, last=step)
    checkpoints._written.clear()  # as in another process, and the file breaks meanwhile
    damage(tmp_path / 'last.pt', 'model')
    fail_to_save(tmp_path, 4)
    assert sorted(os.listdir(tmp_path)) == ['last.prev.pt', 'last.pt']
    assert checkpoints.load_to_resume(str(tmp_path))[0]['iter_num'] == 2


def test_files_that_a_kill_has_left_do_not_spoil_the_next_save(tmp_path):
    save(tmp_path, last=1)
    for name in 'ckpt.pt', 'last.pt':
        os.link(tmp_path / 'last.pt', files.temporary_path(str(tmp_path / name)))
    checkpoints.save(tmp_path, small_checkpoint(2), ['last', 'ckpt'])
    assert steps_of(tmp_path) == {'ckpt.pt': 2, 'last.pt': 2, 'last.prev.pt': 1}


@pytest.mark.parametrize('part', ['model', 'optimizer'])
@pytest.mark.parametrize('value', [float('nan'), float('inf'), -float('inf')])
def test_numbers_that_are_not_finite_are_not_saved(tmp_path, part, value):
    save(tmp_path, last=1)
    spoilt = small_checkpoint(2)
    if part == 'model':
        spoilt['model']['transformer.wpe.weight'][3, 5] = value
    else:
        spoilt['optimizer']['state'][0]['exp_avg'][3, 5] = value
    with pytest.raises(checkpoints.NotFinite, match=f'{part}.* not finite'):
        checkpoints.save(tmp_path, spoilt, ['last'])
    assert steps_of(tmp_path) == {'last.pt': 1}


def test_numbers_whose_sum_overflows_are_saved(tmp_path):
    checkpoint = small_checkpoint(1)
    checkpoint['model']['transformer.wpe.weight'].fill_(3e38)
    checkpoints.save(tmp_path, checkpoint, ['last'])
    assert steps_of(tmp_path) == {'last.pt': 1}


# ---- loading ----

@pytest.mark.parametrize('steps, to_resume, to_sample', [
    (dict(ckpt=3, last=5), 'last', 'ckpt'),
    (dict(last=3, ckpt=5), 'ckpt', 'ckpt'),
    (dict(ckpt=3), 'ckpt', 'ckpt'),
    (dict(last=3), 'last', 'last'),
])
def test_the_newest_is_resumed_and_the_best_is_sampled(tmp_path, capsys, steps, to_resume,
                                                       to_sample):
    save(tmp_path, **steps)
    loaded, path = checkpoints.load_to_resume(str(tmp_path))
    assert path == str(tmp_path / f'{to_resume}.pt')
    assert loaded['iter_num'] == steps[to_resume]
    loaded, path = checkpoints.load_to_sample(str(tmp_path))
    assert path == str(tmp_path / f'{to_sample}.pt')
    assert loaded['iter_num'] == steps[to_sample]
    assert capsys.readouterr().err == ''


@pytest.mark.parametrize('load', [checkpoints.load_to_resume, checkpoints.load_to_sample])
@pytest.mark.parametrize('part', ['model', 'optimizer'])
def test_a_damaged_checkpoint_gives_way_to_the_one_before_with_a_warning(tmp_path, capsys, load,
                                                                         part):
    save(tmp_path, last=4)
    save(tmp_path, last=5)
    damage(tmp_path / 'last.pt', part)
    loaded, path = load(str(tmp_path))
    warning = capsys.readouterr().err
    if load is checkpoints.load_to_sample and part == 'optimizer':  # which sampling does not read
        assert (os.path.basename(path), loaded['iter_num']) == ('last.pt', 5)
        assert warning == ''
        return
    assert (os.path.basename(path), loaded['iter_num']) == ('last.prev.pt', 4)
    assert warning.count('\n') == 1
    assert 'last.pt is damaged: ' in warning
    assert f'using {path} (step 4) instead' in warning
    os.remove(path)
    assert 'last.pt is damaged: ' in problem(load, str(tmp_path))


@pytest.mark.parametrize('options', [
    dict(position='rope', norm='rmsnorm', mlp='swiglu', qk_norm=True, n_kv_head=1, tied=False,
         bias=False),
    dict(position='alibi', mlp='relu2', logit_softcap=15.0),
    dict(position='none', zero_init=True),
])
def test_a_checkpoint_of_another_architecture_is_read_and_must_fit_its_model_args(tmp_path,
                                                                                  options):
    saved = small_checkpoint(2, model_args=options)
    checkpoints.save(tmp_path, saved, ['last'])
    loaded, path = checkpoints.load_to_resume(str(tmp_path))
    assert loaded['model_args'] == saved['model_args']
    assert 'transformer.wpe.weight' not in loaded['model']
    model = GPT(GPTConfig(**loaded['model_args']))
    resuming.restore_model(model, loaded, path)
    torch.testing.assert_close(model.state_dict(), saved['model'], rtol=0, atol=0)

    for key, value in (('vocab_size', 10**9), ('n_embd', 10**6), ('n_layer', 10**6),
                       ('position', 'learned')):
        torch.save({**saved, 'model_args': {**saved['model_args'], key: value}}, path)
        assert ('holds weights that do not fit the model_args beside them'
                in problem(checkpoints.load, path))
    for value in 1.0, '1', True, [1]:
        torch.save({**saved, 'model_args': {**saved['model_args'], 'n_kv_head': value}}, path)
        assert 'has sizes that are not whole numbers' in problem(checkpoints.load, path)
    # A table of positions that torch would ignore without a word.
    weights = {**saved['model'], 'transformer.wpe.weight': torch.ones(8, 8)}
    torch.save({**saved, 'model': weights}, path)
    assert 'holds weights that do not fit' in problem(checkpoints.load, path)


def write_pickle(value, path):
    path.write_bytes(pickle.dumps(value, protocol=2))


@pytest.mark.parametrize('load', [checkpoints.load_to_sample, checkpoints.load_to_resume])
@pytest.mark.parametrize('write', [torch.save, write_pickle])
def test_a_checkpoint_that_runs_a_command_is_refused_and_does_nothing(tmp_path, write, load):
    class Call:
        def __reduce__(self):
            return os.system, (f'echo > {tmp_path / "canary"}',)

    write(small_checkpoint(config={'x': Call()}), tmp_path / 'ckpt.pt')
    sentence = problem(load, str(tmp_path))
    assert os.listdir(tmp_path) == ['ckpt.pt']
    if write is torch.save:
        assert 'system' in sentence
    # torch's own advice is for programmers.
    assert 'mmap' not in sentence
    assert 'weights_only' not in sentence


@pytest.mark.parametrize('content', [b'', b'text\n' * 100], ids=['nothing', 'text'])
def test_bytes_that_are_no_checkpoint_are_refused_by_their_name(tmp_path, content):
    path = tmp_path / 'last.pt'
    path.write_bytes(content)
    assert_refused_by_name(path)


def test_a_checkpoint_cut_short_is_refused_by_its_name(tmp_path):
    path = tmp_path / 'last.pt'
    torch.save(small_checkpoint(), path)
    path.write_bytes(path.read_bytes()[:-99])
    assert_refused_by_name(path)


@pytest.mark.parametrize('value', [None, [1], {}, 'text'], ids=repr)
def test_a_file_of_torch_that_is_no_checkpoint_is_refused_by_its_name(tmp_path, value):
    path = tmp_path / 'last.pt'
    torch.save(value, path)
    assert_refused_by_name(path)


@pytest.mark.parametrize('key, value', [
    *[(key, None) for key in REQUIRED_ENTRIES],
    ('model', torch.ones(3)),
    ('iter_num', '5'),
    ('format_version', 2),  # without digests
    ('format_version', 'two'),
    ('digest', None),
])
def test_a_checkpoint_with_a_bad_entry_is_refused_by_its_name(tmp_path, key, value):
    path = tmp_path / 'last.pt'
    torch.save({**small_checkpoint(), key: value}, path)
    assert_refused_by_name(path)


def assert_refused_by_name(path):
    sentence = problem(checkpoints.load, str(path))
    assert sentence.startswith(f'{path} ')
    assert 'Error' not in sentence


@pytest.mark.parametrize('check', [
    'checkpoints.problem_of_values',
    'checkpoints.problem_of_entries',
    'checkpoints.problem_of_weights',
    'checkpoints.problem_of_bytes',
    'verification.digest',
    'older_checkpoints.modernize',
])
def test_a_bug_in_a_check_keeps_its_traceback(tmp_path, monkeypatch, check):
    save(tmp_path, last=1)
    monkeypatch.setattr(f'plaingpt.training.{check}', Mock(side_effect=ValueError('a bug')))
    with pytest.raises(ValueError, match='a bug'):
        checkpoints.load_to_resume(str(tmp_path))


def test_a_file_that_cannot_be_read_now_does_not_give_way_to_an_older_one(tmp_path, monkeypatch):
    save(tmp_path, last=1)
    save(tmp_path, last=2)
    monkeypatch.setattr(torch, 'load', Mock(side_effect=OSError(5, 'Input/output error')))
    sentence = problem(checkpoints.load_to_resume, str(tmp_path))
    assert f"{tmp_path / 'last.pt'} cannot be read now" in sentence


@pytest.mark.parametrize('load', [checkpoints.load_to_resume, checkpoints.load_to_sample])
@pytest.mark.parametrize('folder', ['.', 'missing'])
def test_a_folder_without_a_checkpoint_is_refused_by_its_name(tmp_path, load, folder):
    path = str(tmp_path / folder)
    assert problem(load, path).startswith(f'{path} holds no checkpoint')


# ---- into a model ----

def test_weights_of_another_model_are_refused():
    model, _ = trained_model()
    assert 'weights in a.pt' in problem(resuming.restore_model, model, {'model': {}}, 'a.pt')


def misfits():
    """{name: the optimizer's entry} of checkpoints that do not fit the optimizer of a small GPT."""
    _, optimizer = trained_model()
    moments = optimizer.state_dict()['state']
    small = torch.ones(1)
    small_moments = {'step': torch.tensor(1.), 'exp_avg': small, 'exp_avg_sq': small}
    return {
        'nothing': None,
        'no state': {},
        'one parameter': {'state': {0: moments[0]}},
        'other numbers': {'state': {number + 1: moments[number] for number in moments}},
        'other shapes': {'state': dict.fromkeys(moments, small_moments)},
        'other names': {'state': dict.fromkeys(moments, {'momentum_buffer': small})},
        'no moments': {'state': dict.fromkeys(moments)},
    }


@pytest.mark.parametrize('name', misfits())
def test_moments_that_do_not_fit_the_optimizer_are_refused(name):
    _, optimizer = trained_model()
    assert_moments_refused(optimizer, {'optimizer': misfits()[name]})


def assert_moments_refused(optimizer, checkpoint):
    sentence = problem(resuming.restore_optimizer, optimizer, SCALER, checkpoint, 'a.pt')
    assert 'state in a.pt' in sentence


def test_a_checkpoint_may_lack_the_moments_of_parameters_that_it_does_not_count():
    _, optimizer = trained_model()
    some = {'state': {0: optimizer.state_dict()['state'][0]}}
    # The other parameters were frozen; or no step was finite.
    for moments, count in (some, 1), ({'state': {}}, 0):
        resuming.restore_optimizer(optimizer, SCALER, {'optimizer': moments, 'moments': count},
                                      'a.pt')
    assert_moments_refused(optimizer, {'optimizer': some, 'moments': 2})


def test_a_checkpoint_stripped_of_its_optimizer_lacks_nothing_else(tmp_path):
    save(tmp_path, last=5)
    path = str(tmp_path / 'last.pt')
    stripped = torch.load(path)
    del stripped['optimizer']
    torch.save(stripped, path)
    loaded, _ = checkpoints.load_to_resume(str(tmp_path))
    assert loaded['iter_num'] == 5
    _, optimizer = trained_model()
    assert path in problem(resuming.restore_optimizer, optimizer, SCALER, loaded, path)


@pytest.mark.parametrize('bias', [True, False])
def test_a_run_of_nanogpt_continues_under_our_weight_decay_and_betas(tmp_path, bias):
    # nanoGPT's optimizer is not fused, its names are those of a compiled model, and on torch 1 it
    # keeps its causal masks.
    theirs, fused = trained_model(bias=bias)
    groups = [{**group, 'fused': False} for group in fused.param_groups]
    their_optimizer = torch.optim.AdamW(groups)
    take_step(theirs, their_optimizer)
    take_step(theirs, their_optimizer)
    weights = {f'_orig_mod.{name}': tensor for name, tensor in theirs.state_dict().items()}
    weights['_orig_mod.transformer.h.0.attn.bias'] = torch.ones(1, 1, 8, 8)
    model_args = {**SMALL, 'bias': bias}
    torch.save({
        'model': weights,
        'optimizer': their_optimizer.state_dict(),
        'model_args': model_args,
        'iter_num': 2,
        'best_val_loss': torch.tensor(1.5),
        'config': {'dataset': 'x'},
    }, tmp_path / 'ckpt.pt')

    loaded, path = checkpoints.load_to_resume(str(tmp_path))
    assert loaded['model_args'] == {**model_args, 'gelu': 'exact'}
    assert loaded['best_val_loss'] == 1.5
    ours = GPT(GPTConfig(**model_args))
    resuming.restore_model(ours, loaded, path)
    optimizer = ours.configure_optimizers(0.3, 0.1, (0.8, 0.7), 'cpu')
    resuming.restore_optimizer(optimizer, SCALER, loaded, path)
    for group, decay in zip(their_optimizer.param_groups, (0.3, 0.0), strict=True):
        group.update(weight_decay=decay, lr=0.1, betas=(0.8, 0.7))
    take_step(ours, optimizer)
    take_step(theirs, their_optimizer)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=1e-5, atol=1e-6)


# ---- which data set, which changes ----

@pytest.mark.parametrize('saved, given, outcome', [
    ('shakespeare_char', 'openwebtext', 'shakespeare_char'),
    ('a:0.7, b.c:3e-1', 'openwebtext', 'a:0.7, b.c:3e-1'),
    ('/a/folder', '/a/folder', '/a/folder'),  # the user names it, too
    (None, 'openwebtext', 'openwebtext'),     # nanoGPT's file may lack it
])
def test_a_resumed_run_takes_the_data_set_of_its_checkpoint(saved, given, outcome):
    config = {} if saved is None else {'dataset': saved}
    assert resuming.data_set({'config': config}, 'a.pt', given) == outcome


@pytest.mark.parametrize('saved', [
    '/a/folder', '../x', '..', '', 'a\nb', 5, 'a:1,/b:1', '../a:1,b:1', '..:1,b:1', 'a:1,b', 'a,b',
    'a:1,', 'a:/b', 'a:1\n,b:1'])
def test_a_checkpoint_may_not_name_a_data_set_outside_data(saved):
    sentence = problem(resuming.data_set, {'config': {'dataset': saved}}, 'a.pt', 'openwebtext')
    assert 'a.pt was trained on the data set' in sentence
    assert '--dataset' in sentence


def test_resuming_is_described_with_the_keys_that_have_changed():
    checkpoint = {'iter_num': 5, 'config': {'max_iters': 10, 'out_dir': 'a', 'beta1': 0.9}}
    config = {'max_iters': 20, 'out_dir': 'b', 'beta1': 0.9, 'a_new_key': 1}
    line = resuming.describe_resume(checkpoint, 'a/last.pt', config, hidden=['out_dir'])
    assert line == 'resuming a/last.pt at step 5; now max_iters 10 -> 20'
    line = resuming.describe_resume(checkpoint, 'a/last.pt', {'beta1': 0.9}, hidden=[])
    assert line == 'resuming a/last.pt at step 5'


# ---- what a run continues ----

def step_to_resume(folder, init_from='scratch', resume='never', restarted=False):
    checkpoint, path = resuming.to_resume(str(folder), init_from, resume, restarted)
    assert (path is None) == (checkpoint == {})
    return checkpoint.get('iter_num')


def test_a_run_continues_if_it_is_told_to(tmp_path):
    save(tmp_path, last=4)
    assert step_to_resume(tmp_path) is None
    assert step_to_resume(tmp_path, resume='auto') == 4
    assert step_to_resume(tmp_path, resume='always') == 4
    assert step_to_resume(tmp_path, init_from='resume') == 4


def test_without_a_checkpoint_auto_starts_and_always_is_refused(tmp_path):
    assert step_to_resume(tmp_path, resume='auto') is None
    for keys in ('scratch', 'always'), ('resume', 'never'):
        assert 'holds no checkpoint' in problem(resuming.to_resume, str(tmp_path), *keys, False)


def test_a_job_that_torchrun_restarts_continues_what_it_has_saved_itself(tmp_path, monkeypatch):
    checkpoints.save(tmp_path, small_checkpoint(4, job='this'), ['last'])
    for job, step in ('this', 4), ('another', None), (None, None):
        monkeypatch.setattr(resuming, 'JOB', job)
        assert step_to_resume(tmp_path, restarted=True) == step
        assert step_to_resume(tmp_path, restarted=False) is None
