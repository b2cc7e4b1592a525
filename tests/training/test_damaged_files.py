"""
Damaged checkpoints, and what is promised of them:

    a damaged checkpoint    holds what was saved, bit for bit, or gives way to the one before with
                            one warning; if it is the only one, a command ends in a sentence that
                            names it, and changes nothing
    files in wrong places   the newest state is found under whichever name it has
    an unfit state          valid bytes that a run or a sample cannot use are refused in the same
                            way
"""
import contextlib
import os
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import pytest
import torch
from forgery import (EXP_AVG, GONE, INF, MOMENT, NAN, NORM, WEIGHT, WTE, flip, forge, frugal,
                     offset_of, problem, refusals, rezip, same, unzip, zero)

from plaingpt.training import checkpoints, verification

pytestmark = [
    pytest.mark.skipif(os.name != 'posix', reason='pipes and alarms, which POSIX systems have'),
    pytest.mark.usefixtures('ends_in_time'),
]


# ---- damage ----
# Each kind is a function of the bytes of last.pt, and of the file before it, to other bytes.

def cut(where, offset):
    def make(new, old):
        return new[:offset_of(new, where) + offset]
    return make


def swap_records(new, old):
    records = unzip(new)
    swapped = {WEIGHT: records[f'archive/{MOMENT}'], MOMENT: records[f'archive/{WEIGHT}']}
    return rezip(new, swapped)


def swap_names(new, old):
    """Two entries of the central directory point to each other's record."""
    first = offset_of(new, f'central {WEIGHT}') + 42
    second = offset_of(new, f'central {MOMENT}') + 42
    swapped = bytearray(new)
    swapped[first:first + 4] = new[second:second + 4]
    swapped[second:second + 4] = new[first:first + 4]
    return bytes(swapped)


def damaged_nanogpt(where, offset):
    """nanoGPT's format, with a flipped byte."""
    def make(new, old):
        return flip(where, offset)(forge('config', value={}, nanogpt=True)(new))
    return make


def deflated_nanogpt(new, old):
    """nanoGPT's format with a compressed record; these weights stay finite if read shifted."""
    same_bytes = forge(*WTE, value=lambda tensor: torch.full_like(tensor, 0.7470588), nanogpt=True)
    return rezip(same_bytes(new), {}, WEIGHT, level=0)


def filled(value):
    return lambda tensor: torch.full_like(tensor, value)


def another_shape(tensor):
    return torch.ones(3, *tensor.shape)


def text_instead(new, old):
    return b'This is no checkpoint.\n' * 99


def nothing_instead(new, old):
    return b''


def folder_instead(new, old):
    return None


def damaged_bytes():
    """{name: what becomes of last.pt}, where bytes are lost or changed."""
    kinds = {}
    for where, offset in (
            ('local', 1), ('local', 4), ('data', 0), ('data', 99), (f'data {WEIGHT}', 9),
            (f'data {MOMENT}', 99), ('central', 0), ('end', -98), ('end', -42), ('end', -22),
            ('end', -21), ('end', -1)):
        kinds[f'cut {where} {offset}'] = cut(where, offset)

    for mask in 1, 0x80:
        for name in WEIGHT, 'data/5', MOMENT, 'data/18', 'data/16':
            for offset in 0, 3:
                kinds[f'flip data {name} {offset} {mask}'] = flip(f'data {name}', offset, mask)
        for number in range(12):
            offset = number * 250 + mask
            kinds[f'flip data {offset} {mask}'] = flip('data', offset, mask)
        for name in 'byteorder', 'version':
            kinds[f'flip data {name} 0 {mask}'] = flip(f'data {name}', 0, mask)

    for where, length in (
            ('local', 64), ('data', 500), (f'data {WEIGHT}', 64), (f'data {MOMENT}', 99),
            ('data', 9000), ('central', 46), (f'central {WEIGHT}', 400)):
        kinds[f'zero {where} {length}'] = zero(where, 0, length)
    kinds['swapped records'] = swap_records
    kinds['swapped names'] = swap_names
    return kinds


def damaged_entries():
    """{name: what becomes of last.pt}, where the file is sound, but not its content."""
    kinds = {}
    for keys in (('model',), ('model_args',), ('iter_num',), ('config',), ('digest',),
                 ('model_args', 'n_layer'), WTE, ('model', 'transformer.h.0.attn.c_attn.weight')):
        kinds[f'no {keys[-1]}'] = forge(*keys, value=GONE)
    for name in WTE[1], 'transformer.wpe.weight':
        kinds[f'another shape {name}'] = forge('model', name, value=another_shape)
    for value in NAN, INF, -INF:
        for keys in WTE, NORM, EXP_AVG, ('optimizer', 'state', 3, 'exp_avg_sq'):
            kinds[f'{value} {keys[-1]}'] = forge(*keys, value=filled(value))
    kinds['a future version'] = forge('format_version', value=verification.FORMAT_VERSION + 1)
    return kinds


def other_files():
    """{name: what becomes of last.pt}, where it is of another kind."""
    kinds = {}
    for where, offset in ((f'data {WEIGHT}', 5), (f'data {MOMENT}', 5), ('data', 500),
                          ('data', 2000)):
        kinds[f'nanoGPT {where} {offset}'] = damaged_nanogpt(where, offset)
    kinds['nanoGPT, deflated'] = deflated_nanogpt
    kinds['text'] = text_instead
    kinds['nothing'] = nothing_instead
    kinds['a folder'] = folder_instead
    kinds['another zip'] = lambda new, old: rezip(new, {'data.pkl': b'garbage'})
    return kinds


def appended(count):
    return lambda new, old: new + b'\xaa' * count


def damage_that_may_mean_nothing():
    """{name: what becomes of last.pt}, of kinds that change bytes which may have no meaning."""
    kinds = {}
    offsets_in = {'local': (0, 4, 6, 8, 14, 18, 22, 26, 28, 30),
                  'central': (0, 8, 10, 16, 20, 24, 28, 30, 42, 46)}
    for name in 'data.pkl', WEIGHT, MOMENT:
        for part, offsets in offsets_in.items():
            for offset in offsets:
                for mask in 1, 0xff:
                    kinds[f'flip {part} {name} {offset} {mask}'] = flip(f'{part} {name}', offset,
                                                                       mask)
    # Of the three records that end an archive.
    for offset in -98, -74, -66, -58, -50, -42, -34, -26, -22, -14, -10, -6, -2:
        kinds[f'flip end {offset}'] = flip('end', offset)
    kinds['zero end'] = zero('end', -18, 8)
    kinds['zero padding'] = zero(f'data {WEIGHT}', -8, 8)
    for count in 1, 99, 70_000:
        kinds[f'{count} bytes after'] = appended(count)
    kinds['9 bytes before'] = lambda new, old: b'\xaa' * 9 + new
    kinds['the old one after'] = lambda new, old: new + old
    kinds['the old one before'] = lambda new, old: old + new
    return kinds


TO_BE_SEEN = {**damaged_bytes(), **damaged_entries(), **other_files()}
MAY_MEAN_NOTHING = damage_that_may_mean_nothing()


@pytest.fixture(scope='module')
def one_thread():
    """A pool for all digests: starting one for 50,000 little tensors would take half of the time.
    """
    with ThreadPoolExecutor(1) as pool:
        yield pool


@pytest.mark.parametrize('name', [*TO_BE_SEEN, *MAY_MEAN_NOTHING])
def test_damage_is_seen_or_does_none(tmp_path, monkeypatch, capsys, saved, one_thread, name):
    monkeypatch.setattr(verification, 'ThreadPoolExecutor',
                        lambda: contextlib.nullcontext(one_thread))
    path = tmp_path / 'last.pt'
    before = tmp_path / 'last.prev.pt'
    make = {**TO_BE_SEEN, **MAY_MEAN_NOTHING}[name]
    content = make(saved[3].content, saved[2].content)
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content)
    before.write_bytes(saved[2].content)

    loaded, used = checkpoints.load_to_resume(str(tmp_path))
    warning = capsys.readouterr().err
    if used == str(path):
        assert name in MAY_MEAN_NOTHING
        assert warning == ''
        assert same(loaded, saved[3].tree)
        return
    assert used == str(before)
    assert same(loaded, saved[2].tree)
    assert warning.count('\n') == 1
    assert warning.count(f'{path} ') == 1
    assert f'using {before} (step 2)' in warning
    before.unlink()
    assert problem(checkpoints.load_to_resume, str(tmp_path)).startswith(f'{path} ')


@pytest.mark.parametrize('steps, used', [
    ({'last': 2, 'last.prev': 3}, 'last.prev'),
    ({'last': 1, 'ckpt': 3}, 'ckpt'),
    ({'ckpt': 1, 'last': 3}, 'last'),
    ({'last': 1, 'last.prev': 2, 'ckpt': 1, 'ckpt.prev': 3}, 'ckpt.prev'),
    ({'ckpt': 3, 'last': 3}, 'last'),
])
def test_the_newest_of_swapped_files_wins(tmp_path, capsys, saved, steps, used):
    for name, step in steps.items():
        (tmp_path / f'{name}.pt').write_bytes(saved[step].content)
    loaded, path = checkpoints.load_to_resume(str(tmp_path))
    assert path == str(tmp_path / f'{used}.pt')
    assert same(loaded, saved[3].tree)
    assert capsys.readouterr().err == ''


@pytest.mark.parametrize('name', [
    'cut data 99', 'cut end -1', f'flip data {WEIGHT} 0 1', 'swapped records', 'nothing',
    'no iter_num', f'nan {WTE[1]}', 'a future version', f'nanoGPT data {WEIGHT} 5'])
def test_a_command_refuses_a_damaged_checkpoint(tmp_path, saved, char_data, name):
    content = TO_BE_SEEN[name](saved[3].content, None)
    for sentence in refusals(tmp_path / 'out', content, dataset=char_data):
        assert str(tmp_path / 'out' / 'ckpt.pt') in sentence


# ---- a state that cannot be used ----

class Unusable(NamedTuple):
    """A value, with valid digests, that the scripts must refuse in this place of a checkpoint."""
    scripts: tuple
    keys: tuple
    value: object


def unusable():
    cases = []

    def train_refuses(*keys, value):
        cases.append(Unusable(('train.py',), keys, value))

    def both_refuse(*keys, value):
        cases.append(Unusable(('train.py', 'sample.py'), keys, value))

    train_refuses('optimizer', value=GONE)
    train_refuses('optimizer', value=None)
    train_refuses(*EXP_AVG[:3], value=GONE)
    train_refuses(*EXP_AVG, value=torch.ones(3))
    train_refuses(*EXP_AVG, value='x')
    train_refuses('optimizer', 'state', 0, 'beside', value='text')
    both_refuse(*NORM, value=torch.ones(3))
    both_refuse(*NORM, value='text')
    both_refuse('model', 'another', value=torch.ones(3))
    both_refuse('model', value=[1])
    both_refuse('model', value={})

    for key, values in {
        'n_layer': [10**9, 1.0],
        'vocab_size': [10**12, None],
        'block_size': [10**12, 16.0],
        'n_embd': [10**9, '8'],
        'n_head': [10**9, 2.0, 0],
        'n_kv_head': [1.0, 10**9, 0],
        'head_size': [1.0, 10**9, 0],
        'mlp_width': ['64', 10**9, -1],
        'norm_eps': [-1.0, 'x'],
        'qk_norm_weight': [True],
        'rope_scaling': [1, {}, {'factor': 8.0}],
        'gelu': [['tanh']],
        'position': ['rope', 'sine', ['rope']],
        'norm': [None],
        'mlp': ['swiglu'],
        'rope_theta': ['x'],
        'logit_softcap': [-1.0],
        'another': [1],
    }.items():
        for value in values:
            both_refuse('model_args', key, value=value)

    a_tensor = {'x': torch.ones(2)}
    for key, values in {
        'iter_num': [-1, '5', 1.0],
        'best_val_loss': [NAN, 10**400, torch.ones(2), torch.ones((), device='meta')],
        'best_step': [-1, 1.0],
        'elapsed': [None],
        'tokens_seen': [1.5],
        'figures': [a_tensor, [1]],
        'record': [a_tensor, [1]],
        'stale': [1.5],
        'run_id': [5],
        'clipped': [-1],
        'skipped': [-1],
        'unlogged': [10**400],
        'moments': ['x'],
        'config': [a_tensor, []],
        'scaler': [5],
        'job': [5],
        'tokenizer': ['char', {'kind': 'char', 'chars': 'abc'}, {'kind': 'char', 'chars': [1, 2]}],
    }.items():
        for value in values:
            both_refuse(key, value=value)

    for key, values in {
        'iter_num': [10**20],
        'moments': [1],
        'elapsed': [NAN, INF, 10**400],
        'figures': [{'loss': NAN}],
        'record': [{'loss': NAN}],
    }.items():
        for value in values:
            train_refuses(key, value=value)
    return cases


@pytest.mark.parametrize('case', unusable(),
                         ids=lambda case: f'{case.keys[-1]} {case.value!r:.16}')
def test_a_command_refuses_a_state_that_it_cannot_use(tmp_path, saved, char_data, case):
    content = forge(*case.keys, value=case.value)(saved[3].content)
    # Sizes must cost no memory. Watching it makes a run three times as slow.
    watched = frugal() if 'model_args' in case.keys else contextlib.nullcontext()
    with watched:
        sentences = list(refusals(tmp_path / 'out', content, case.scripts, dataset=char_data))
    assert len(sentences) == len(case.scripts)
