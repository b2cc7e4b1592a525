"""An out_dir: saving without loss, loading without risk, and choosing what to continue."""
import os
import pickle
from unittest.mock import Mock

import pytest
import torch

from model import GPT, GPTConfig
from plaingpt.system.messages import UserError
from plaingpt.training import checkpoints

SCALER = torch.amp.GradScaler('cpu', enabled=False)
ARGS = dict(block_size=8, vocab_size=16, n_layer=1, n_head=2, n_embd=8, dropout=0.0, bias=True)


def trained(seed=0, kind=None):
    """(model, optimizer) after two steps, with the optimizer that model.py makes, or another kind."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**ARGS))
    optimizer = model.configure_optimizers(0.1, 1e-2, (0.9, 0.95), 'cpu')
    if kind:
        optimizer = kind([{**group, 'fused': False} for group in optimizer.param_groups])
    step(model, optimizer), step(model, optimizer)
    return model, optimizer


def step(model, optimizer):
    optimizer.zero_grad()
    model(torch.arange(8).view(1, 8), torch.arange(1, 9).view(1, 8))[1].backward()
    optimizer.step()


def state(iter_num=1, **changes):
    """What train.py saves, of another model for each iter_num."""
    model, optimizer = trained(iter_num)
    return {'model': model.state_dict(), 'optimizer': optimizer.state_dict(), 'model_args': {**ARGS, 'gelu': 'tanh'},
            'iter_num': iter_num, 'best_val_loss': 1.5, 'config': {'dataset': 'x'}, **changes}


def save(folder, **files):
    """Saves a checkpoint under each of these names, of this step."""
    for name, iter_num in files.items():
        checkpoints.save(folder, state(iter_num), [name])


def steps(folder):
    """{name: step} of the checkpoints in a folder; fails if one is broken, or anything else is there."""
    return {path.name: checkpoints.load(str(path))['iter_num'] for path in sorted(folder.iterdir())}


def problem(call, *arguments):
    """The one line of the UserError that the call must raise."""
    with pytest.raises(UserError) as error:
        call(*arguments)
    assert '\n' not in str(error.value)
    return str(error.value)


def damage(path, part):
    """Changes one bit of a tensor in the file."""
    content, tree = bytearray(path.read_bytes()), torch.load(path, weights_only=True)
    tensor = tree['model']['transformer.wpe.weight'] if part == 'model' else tree['optimizer']['state'][0]['exp_avg']
    content[content.index(tensor.numpy().tobytes()) + 9] ^= 1
    path.write_bytes(content)


# ---- saving ----

def test_what_is_saved_comes_back_bit_for_bit(tmp_path):
    original = state(3, extra={'a': [1, 2.5, None]})
    original['model']['half'] = torch.randn(3, 2).bfloat16().t()
    checkpoints.save(tmp_path / 'new' / 'folder', original, ['last'])
    loaded = checkpoints.load(str(tmp_path / 'new' / 'folder' / 'last.pt'))
    torch.testing.assert_close(loaded['model'], dict(original['model']), rtol=0, atol=0)
    torch.testing.assert_close(loaded['optimizer']['state'], original['optimizer']['state'], rtol=0, atol=0)
    assert all(loaded[key] == original[key] for key in original.keys() - {'model', 'optimizer'})
    assert loaded['versions']['torch'] == str(torch.__version__) and 'git_revision' in loaded


def test_the_checkpoint_before_is_kept_and_the_new_one_forced_to_disk(tmp_path, monkeypatch):
    save(tmp_path, last=1), save(tmp_path, last=2)
    forced = []  # what each fsync was of
    monkeypatch.setattr(os, 'fsync', lambda descriptor: forced.append(os.fstat(descriptor).st_ino))
    save(tmp_path, last=3)
    assert steps(tmp_path) == {'last.pt': 3, 'last.prev.pt': 2}
    assert forced == [path.stat().st_ino for path in (tmp_path / 'last.pt', tmp_path)][:2 if os.name == 'posix' else 1]


@pytest.mark.parametrize('links', [True, False])
def test_a_joint_save_writes_once_and_later_saves_leave_the_other_name_alone(tmp_path, monkeypatch, links):
    monkeypatch.setattr(os, 'link', os.link if links else Mock(side_effect=OSError))
    checkpoints.save(tmp_path, state(1), ['last', 'ckpt'])
    assert os.path.samefile(tmp_path / 'last.pt', tmp_path / 'ckpt.pt') is links
    save(tmp_path, last=2)
    assert steps(tmp_path) == {'ckpt.pt': 1, 'last.pt': 2, 'last.prev.pt': 1}


@pytest.mark.parametrize('call', ['torch.save', 'os.fsync', 'os.replace', 'os.link shutil.copyfile', 'plaingpt.training.checkpoints.open'])
def test_a_save_that_fails_loses_nothing(tmp_path, monkeypatch, call):
    def fail(source, target=None):
        if call.endswith('.open'):
            return open('/dev/full', target)
        if call == 'torch.save':
            target.write(b'half a file')
        raise OSError('full')

    checkpoints.save(tmp_path, state(1), ['last', 'ckpt'])
    with monkeypatch.context() as patch, pytest.raises(OSError):
        for name in call.split():
            patch.setattr(name, fail, raising=False)
        checkpoints.save(tmp_path, state(2), ['last', 'ckpt'])
    assert steps(tmp_path) == {'ckpt.pt': 1, 'last.pt': 1}


@pytest.mark.parametrize('renames', range(4))
def test_a_kill_between_two_renames_leaves_a_state_to_resume_and_one_to_sample(tmp_path, monkeypatch, renames):
    checkpoints.save(tmp_path, state(1), ['last', 'ckpt'])
    replace, left = os.replace, iter(range(renames))
    with monkeypatch.context() as patch, pytest.raises(StopIteration):
        patch.setattr(os, 'replace', lambda *paths: (next(left), replace(*paths)))
        patch.setattr(checkpoints, 'remove', lambda paths: None)  # nor does a kill clean up
        checkpoints.save(tmp_path, state(2), ['last', 'ckpt'])
    newest = 1 + (renames >= 2)
    assert checkpoints.load_to_resume(tmp_path)[0]['iter_num'] == newest
    assert checkpoints.load_to_sample(tmp_path)[0]['iter_num'] == 1
    checkpoints.save(tmp_path, state(3), ['last', 'ckpt'])
    assert steps(tmp_path) == {'ckpt.pt': 3, 'ckpt.prev.pt': 1, 'last.pt': 3, 'last.prev.pt': newest}


def test_a_save_goes_without_the_oldest_only_if_this_process_has_written_the_one_after_it(tmp_path, monkeypatch):
    save(tmp_path, last=1), save(tmp_path, last=2)
    for written, left in (True, {'last.pt'}), (False, {'last.pt', 'last.prev.pt'}):
        save(tmp_path, last=3)
        if not written:  # by another, and broken meanwhile: the oldest is all there is
            checkpoints._written.clear()
            damage(tmp_path / 'last.pt', 'model')
        with monkeypatch.context() as patch, pytest.raises(OSError):
            patch.setattr(os, 'fsync', Mock(side_effect=OSError))
            save(tmp_path, last=4)
        assert set(os.listdir(tmp_path)) == left
    assert checkpoints.load_to_resume(str(tmp_path))[0]['iter_num'] == 3


def test_what_a_kill_has_left_does_not_spoil_the_next_save(tmp_path):
    save(tmp_path, last=1)
    for name in 'ckpt', 'last':
        os.link(tmp_path / 'last.pt', tmp_path / f'.{name}.pt.tmp')
    checkpoints.save(tmp_path, state(2), ['last', 'ckpt'])
    assert steps(tmp_path) == {'ckpt.pt': 2, 'last.pt': 2, 'last.prev.pt': 1}


# ---- loading ----

@pytest.mark.parametrize('files, to_resume, to_sample', [
    (dict(ckpt=3, last=5), 'last.pt', 'ckpt.pt'), (dict(last=3, ckpt=5), 'ckpt.pt', 'ckpt.pt'),
    (dict(ckpt=3), 'ckpt.pt', 'ckpt.pt'), (dict(last=3), 'last.pt', 'last.pt')])
def test_the_newest_is_resumed_and_the_best_is_sampled(tmp_path, capsys, files, to_resume, to_sample):
    save(tmp_path, **files)
    for load, name in (checkpoints.load_to_resume, to_resume), (checkpoints.load_to_sample, to_sample):
        loaded, path = load(str(tmp_path))
        assert (path, loaded['iter_num']) == (str(tmp_path / name), files[name[:-3]])
    assert capsys.readouterr().err == ''


@pytest.mark.parametrize('load, part, verified', [
    (checkpoints.load_to_resume, 'model', True), (checkpoints.load_to_resume, 'optimizer', True),
    (checkpoints.load_to_sample, 'model', True), (checkpoints.load_to_sample, 'optimizer', False)])
def test_a_damaged_checkpoint_gives_way_to_the_one_before_with_a_warning(tmp_path, capsys, load, part, verified):
    save(tmp_path, last=4), save(tmp_path, last=5)
    damage(tmp_path / 'last.pt', part)
    loaded, path = load(str(tmp_path))
    warning = capsys.readouterr().err
    assert (os.path.basename(path), loaded['iter_num']) == (('last.prev.pt', 4) if verified else ('last.pt', 5))
    assert warning.count('\n') == verified
    if verified:
        assert 'last.pt is damaged: ' in warning and f'using {path} (step 4) instead' in warning
        os.remove(path)
        assert 'last.pt is damaged: ' in problem(load, str(tmp_path))


@pytest.mark.parametrize('bias', [True, False])
def test_a_checkpoint_of_nanogpt_is_read_and_goes_on_under_our_weight_decay_and_betas(tmp_path, bias, monkeypatch):
    monkeypatch.setitem(ARGS, 'bias', bias)
    theirs, their_optimizer = trained(kind=torch.optim.AdamW)
    weights = {f'_orig_mod.{name}': tensor for name, tensor in theirs.state_dict().items()}
    masks = {'_orig_mod.transformer.h.0.attn.bias': torch.ones(1, 1, 8, 8)}  # of nanoGPT on torch 1
    torch.save({'model': weights | masks, 'optimizer': their_optimizer.state_dict(), 'model_args': dict(ARGS),
                'iter_num': 2, 'best_val_loss': torch.tensor(1.5), 'config': {'dataset': 'x'}}, tmp_path / 'ckpt.pt')
    loaded, path = checkpoints.load_to_resume(str(tmp_path))
    assert loaded['model_args'] == {**ARGS, 'gelu': 'exact'} and float(loaded['best_val_loss']) == 1.5
    ours = GPT(GPTConfig(**ARGS))
    checkpoints.restore_model(ours, loaded, path)
    optimizer = ours.configure_optimizers(0.3, 0.1, (0.8, 0.7), 'cpu')
    checkpoints.restore_optimizer(optimizer, SCALER, loaded, path)
    for group, decay in zip(their_optimizer.param_groups, (0.3, 0.0), strict=True):
        group.update(weight_decay=decay, lr=0.1, betas=(0.8, 0.7))
    step(ours, optimizer), step(theirs, their_optimizer)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('options', [
    dict(position='rope', norm='rmsnorm', mlp='swiglu', qk_norm=True, n_kv_head=1, tied=False, bias=False),
    dict(position='alibi', mlp='relu2', logit_softcap=15.0), dict(position='none', zero_init=True)])
def test_a_checkpoint_of_another_architecture_is_read_and_holds_what_its_sizes_say(tmp_path, monkeypatch, options):
    for key, value in options.items():
        monkeypatch.setitem(ARGS, key, value)
    saved = state(2)
    checkpoints.save(tmp_path, saved, ['last'])
    loaded, path = checkpoints.load_to_resume(str(tmp_path))
    assert loaded['model_args'] == saved['model_args'] and 'transformer.wpe.weight' not in loaded['model']
    model = GPT(GPTConfig(**loaded['model_args']))
    checkpoints.restore_model(model, loaded, path)
    torch.testing.assert_close(model.state_dict(), saved['model'], rtol=0, atol=0)
    for key, value in ('vocab_size', 10 ** 9), ('n_embd', 10 ** 6), ('n_layer', 10 ** 6), ('position', 'learned'):
        torch.save({**saved, 'model_args': saved['model_args'] | {key: value}}, path)
        assert 'holds weights that do not fit the model_args beside them' in problem(checkpoints.load, path)
    for value in 1.0, '1', True, None, [1]:
        torch.save({**saved, 'model_args': saved['model_args'] | {'n_kv_head': value}}, path)
        assert 'has sizes that are no whole numbers' in problem(checkpoints.load, path)
    torch.save({**saved, 'model': saved['model'] | {'transformer.wpe.weight': torch.ones(8, 8)}}, path)
    assert 'holds weights that do not fit' in problem(checkpoints.load, path)  # torch would leave it out without a word


def test_a_checkpoint_of_version_1_is_verified_by_the_checksums_of_its_archive(tmp_path):
    path = tmp_path / 'last.pt'
    torch.save({**state(4), 'format_version': 1, 'digest': {'model': 'of another kind', 'optimizer': ''}}, path)
    assert checkpoints.load_to_resume(str(tmp_path))[0]['iter_num'] == 4
    damage(path, 'optimizer')
    assert 'its checksums do not match' in problem(checkpoints.load, str(path))


@pytest.mark.parametrize('load', [checkpoints.load_to_sample, checkpoints.load_to_resume])
@pytest.mark.parametrize('write', [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value, protocol=2))])
def test_a_checkpoint_that_runs_a_command_is_refused_and_does_nothing(tmp_path, write, load):
    call = type('Call', (), {'__reduce__': lambda self: (os.system, (f'echo > {tmp_path / "canary"}',))})()
    write(state(config={'x': call}), tmp_path / 'ckpt.pt')
    sentence = problem(load, str(tmp_path))
    assert os.listdir(tmp_path) == ['ckpt.pt'] and ('system' in sentence or write is not torch.save)
    assert 'mmap' not in sentence and 'weights_only' not in sentence  # torch's advice is for programmers


@pytest.mark.parametrize('content', [
    b'', b'text\n' * 100, None, [1], {}, *({key: None} for key in checkpoints.NEEDED), {'model': torch.ones(3)},
    {'iter_num': '5'}, {'format_version': 2}, {'format_version': 'two'}, {'digest': None}], ids=lambda x: repr(x)[:25])
def test_what_is_no_checkpoint_is_refused_by_its_name(tmp_path, content):
    path = tmp_path / 'last.pt'
    torch.save({**state(), **content} if content and isinstance(content, dict) else content, path)
    if not isinstance(content, (dict, list)):
        path.write_bytes(path.read_bytes()[:-99] if content is None else content)
    sentence = problem(checkpoints.load, str(path))
    assert sentence.startswith(f'{path} ') and 'Error' not in sentence


def test_a_folder_without_a_checkpoint_is_refused_by_its_name(tmp_path):
    for load, path in (checkpoints.load_to_resume, tmp_path), (checkpoints.load_to_sample, tmp_path / 'missing'):
        assert problem(load, str(path)).startswith(f'{path} holds no checkpoint')


def test_state_of_another_model_is_refused(tmp_path):
    model, optimizer = trained()
    assert 'weights in a.pt' in problem(checkpoints.restore_model, model, {'model': {}}, 'a.pt')
    small, moments = torch.ones(1), optimizer.state_dict()['state']
    some = {'state': {0: moments[0]}}
    for other in (None, {}, some, {'state': {i + 1: moments[i] for i in moments}},
                  {'state': dict.fromkeys(moments, {'step': torch.tensor(1.), 'exp_avg': small, 'exp_avg_sq': small})},
                  {'state': dict.fromkeys(moments, {'momentum_buffer': small})}, {'state': dict.fromkeys(moments)}):
        assert 'state in a.pt' in problem(checkpoints.restore_optimizer, optimizer, SCALER,
                                          {'optimizer': other}, 'a.pt')
    for allowed, count in (some, 1), ({'state': {}}, 0):  # the others were frozen, or no step was finite
        checkpoints.restore_optimizer(optimizer, SCALER, {'optimizer': allowed, 'moments': count}, 'a.pt')
    for config in {'trainable': 'head'}, {'unfreeze': {0: 'head'}}:
        checkpoints.restore_optimizer(optimizer, SCALER, {'optimizer': some, 'config': config}, 'a.pt')
        assert 'state in a.pt' in problem(checkpoints.restore_optimizer, optimizer, SCALER,
                                          {'optimizer': some, 'config': config, 'moments': 2}, 'a.pt')


def test_a_checkpoint_stripped_of_its_optimizer_lacks_nothing_else(tmp_path):
    save(tmp_path, last=5)
    kept = {key: value for key, value in torch.load(tmp_path / 'last.pt').items() if key != 'optimizer'}
    torch.save(kept, tmp_path / 'last.pt')
    loaded, path = checkpoints.load_to_resume(str(tmp_path))
    assert loaded['iter_num'] == 5
    assert path in problem(checkpoints.restore_optimizer, trained()[1], SCALER, loaded, path)
