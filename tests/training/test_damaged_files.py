"""
Damaged checkpoints, and what is promised of them:

    a damaged checkpoint    holds what was saved, bit for bit, or gives way to the one before with one warning; where it
                            is the only one, a command ends in a sentence that names it and changes nothing
    files in wrong places   the newest state is found under whichever name it has
    an unfit state          valid bytes that a run or a sample cannot go on from are refused in the same way
"""
import contextlib
import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from forgery import (  # noqa: F401
    EXP_AVG,
    GONE,
    INF,
    MOMENT,
    NAN,
    NORM,
    WEIGHT,
    WTE,
    ends_in_time,
    flip,
    forge,
    frugal,
    place,
    problem,
    refusals,
    rezip,
    same,
    saved_checkpoints,
    unzip,
)

from plaingpt.training import checkpoints

pytestmark = pytest.mark.skipif(os.name != 'posix', reason='pipes and alarms, which POSIX systems have')


# ---- damage ----

def cut(where, offset):
    return lambda new, old: new[:place(new, *where.split()) + offset]


def swap_records(new, old):
    records = unzip(new)
    return rezip(new, {WEIGHT: records[f'archive/{MOMENT}'], MOMENT: records[f'archive/{WEIGHT}']})


def swap_names(new, old):
    first, second = (place(new, 'central', name) + 42 for name in (WEIGHT, MOMENT))  # where it says: where they are
    return new[:first] + new[second:second + 4] + new[first + 4:second] + new[first:first + 4] + new[second + 4:]


NANOGPT = forge('config', value={}, nanogpt=True)
SAME_BYTES = forge(*WTE, value=lambda tensor: torch.full_like(tensor, 0.7470588), nanogpt=True)  # finite if shifted
DAMAGE = {  # id: what becomes of last.pt, of which all has to be seen
    **{f'cut {where} {offset}': cut(where, offset) for where, offset in (
        ('local', 1), ('local', 4), ('data', 0), ('data', 99), (f'data {WEIGHT}', 9), (f'data {MOMENT}', 99),
        ('central', 0), ('end', -98), ('end', -42), ('end', -22), ('end', -21), ('end', -1))},
    **{f'flip {where} {offset} {mask}': flip(where, offset, mask) for mask in (1, 0x80) for where, offset in (
        *((f'data {name}', offset) for name in (WEIGHT, 'data/5', MOMENT, 'data/18', 'data/16') for offset in (0, 3)),
        *(('data', offset * 250 + mask) for offset in range(12)), ('data byteorder', 0), ('data version', 0))},
    **{f'zero {where} {length}': flip(where, 0, 0, length) for where, length in (
        ('local', 64), ('data', 500), (f'data {WEIGHT}', 64), (f'data {MOMENT}', 99), ('data', 9000), ('central', 46),
        (f'central {WEIGHT}', 400))},
    **{f'no {keys[-1]}': forge(*keys, value=GONE) for keys in (('model',), ('model_args',), ('iter_num',), ('config',),
       ('digest',), ('model_args', 'n_layer'), WTE, ('model', 'transformer.h.0.attn.c_attn.weight'))},
    **{f'another shape {name}': forge('model', name, value=lambda tensor: torch.ones(3, *tensor.shape))
       for name in (WTE[1], 'transformer.wpe.weight')},
    **{f'{value} {keys[-1]}': forge(*keys, value=lambda tensor, value=value: torch.full_like(tensor, value))
       for value in (NAN, INF, -INF) for keys in (WTE, NORM, EXP_AVG, ('optimizer', 'state', 3, 'exp_avg_sq'))},
    **{f'nanoGPT {where} {offset}': lambda new, old, at=(where, offset): flip(*at)(NANOGPT(new)) for where, offset in (
        (f'data {WEIGHT}', 5), (f'data {MOMENT}', 5), ('data', 500), ('data', 2000))},
    'nanoGPT, deflated': lambda new, old: rezip(SAME_BYTES(new), {}, WEIGHT, 0),
    'swapped records': swap_records, 'swapped names': swap_names,
    'a future version': forge('format_version', value=checkpoints.FORMAT_VERSION + 1),
    'text': lambda new, old: b'This is no checkpoint.\n' * 99, 'nothing': lambda new, old: b'',
    'another zip': lambda new, old: rezip(new, {'data.pkl': b'garbage'}), 'a folder': lambda new, old: None}
MAYBE = {  # some of these bytes mean nothing
    **{f'flip {part} {name} {offset} {mask}': flip(f'{part} {name}', offset, mask)
       for name in ('data.pkl', WEIGHT, MOMENT) for mask in (1, 0xff) for part, offsets in (
           ('local', (0, 4, 6, 8, 14, 18, 22, 26, 28, 30)), ('central', (0, 8, 10, 16, 20, 24, 28, 30, 42, 46)))
       for offset in offsets},
    **{f'flip end {offset}': flip('end', offset) for offset in (  # of the three records that end an archive
        -98, -74, -66, -58, -50, -42, -34, -26, -22, -14, -10, -6, -2)},
    'zero end': flip('end', -18, 0, 8), 'zero padding': flip(f'data {WEIGHT}', -8, 0, 8),
    **{f'{n} bytes after': lambda new, old, n=n: new + b'\xaa' * n for n in (1, 99, 70_000)},
    '9 bytes before': lambda new, old: b'\xaa' * 9 + new, 'the old one after': lambda new, old: new + old,
    'the old one before': lambda new, old: old + new}
THREAD = ThreadPoolExecutor(1)  # to start one for each of 50,000 little tensors would take half of the time


@pytest.mark.parametrize('name', [*DAMAGE, *MAYBE])
def test_damage_is_seen_or_does_none(tmp_path, monkeypatch, capsys, saved, name):
    monkeypatch.setattr(checkpoints, 'ThreadPoolExecutor', lambda: contextlib.nullcontext(THREAD))
    path, before = tmp_path / 'last.pt', tmp_path / 'last.prev.pt'
    content = (DAMAGE | MAYBE)[name](saved[3][0], saved[2][0])
    path.mkdir() if content is None else path.write_bytes(content)
    before.write_bytes(saved[2][0])
    loaded, used = checkpoints.load_to_resume(str(tmp_path))
    warning = capsys.readouterr().err
    if used == str(path):
        assert name in MAYBE and warning == '' and same(loaded, saved[3][1])
        return
    assert used == str(before) and same(loaded, saved[2][1])
    assert warning.count('\n') == 1 and warning.count(f'{path} ') == 1 and f'using {before} (step 2)' in warning
    before.unlink()
    assert problem(checkpoints.load_to_resume, str(tmp_path)).startswith(f'{path} ')


@pytest.mark.parametrize('files, used', [
    (dict(last=2, last_prev=3), 'last_prev'), (dict(last=1, ckpt=3), 'ckpt'), (dict(ckpt=1, last=3), 'last'),
    (dict(last=1, last_prev=2, ckpt=1, ckpt_prev=3), 'ckpt_prev'), (dict(ckpt=3, last=3), 'last')])
def test_of_swapped_files_the_newest_wins(tmp_path, capsys, saved, files, used):
    paths = {name: tmp_path / f'{name.replace("_", ".")}.pt' for name in files}
    for name, step in files.items():
        paths[name].write_bytes(saved[step][0])
    loaded, path = checkpoints.load_to_resume(str(tmp_path))
    assert path == str(paths[used]) and same(loaded, saved[3][1]) and capsys.readouterr().err == ''


@pytest.mark.parametrize('name', ['cut data 99', 'cut end -1', f'flip data {WEIGHT} 0 1', 'swapped records', 'nothing',
                                  'no iter_num', f'nan {WTE[1]}', 'a future version', f'nanoGPT data {WEIGHT} 5'])
def test_a_command_refuses_a_damaged_checkpoint(tmp_path, saved, char_data, name):
    for sentence in refusals(tmp_path / 'out', DAMAGE[name](saved[3][0], None), dataset=char_data):
        assert str(tmp_path / 'out' / 'ckpt.pt') in sentence


UNUSABLE = [  # (who can't go on, from a checkpoint with valid digests and this value in this place)
    ('t', GONE, 'optimizer'), ('t', GONE, *EXP_AVG[:3]), ('t', torch.ones(3), *EXP_AVG), ('t', 'x', *EXP_AVG),
    ('t', 'text', 'optimizer', 'state', 0, 'beside'), ('ts', torch.ones(3), *NORM), ('ts', 'text', *NORM),
    ('ts', torch.ones(3), 'model', 'another'), ('ts', [1], 'model'), ('ts', {}, 'model'),
    *(('ts', value, 'model_args', key) for key, value in (
        ('n_layer', 10**9), ('vocab_size', 10**12), ('block_size', 10**12), ('n_embd', 10**9), ('n_head', 10**9),
        ('n_layer', 1.0), ('n_head', 2.0), ('n_head', 0), ('block_size', 16.0), ('n_embd', '8'), ('vocab_size', None),
        ('gelu', ['tanh']), ('another', 1), ('position', 'rope'), ('position', 'sine'), ('position', ['rope']),
        ('n_kv_head', 1.0), ('n_kv_head', 10**9), ('n_kv_head', 0), ('norm', None), ('mlp', 'swiglu'),
        ('rope_theta', 'x'), ('logit_softcap', -1.0))),
    *(('ts', value, key) for key, value in (
        ('iter_num', -1), ('iter_num', '5'), ('iter_num', 1.0), ('best_val_loss', NAN), ('best_val_loss', 10**400),
        ('elapsed', None), ('tokens_seen', 1.5), ('record', {'x': torch.ones(2)}), ('record', [1]), ('run_id', 5),
        ('clipped', -1), ('unlogged', 10**400), ('moments', 'x'),
        ('config', {'x': torch.ones(2)}), ('config', []), ('scaler', 5), ('job', 5), ('tokenizer', 'char'),
        ('tokenizer', {'kind': 'char', 'chars': 'abc'}), ('tokenizer', {'kind': 'char', 'chars': [1, 2]}))),
    *(('t', value, key) for key, value in (('iter_num', 10**20), ('moments', 1), ('elapsed', NAN), ('elapsed', INF),
                                           ('elapsed', 10**400), ('record', {'loss': NAN})))]


@pytest.mark.parametrize('who, value, keys', [(who, value, keys) for who, value, *keys in UNUSABLE],
                         ids=[f'{keys[-1]} {value!r:.16}' for _, value, *keys in UNUSABLE])
def test_a_command_refuses_a_state_that_it_cannot_go_on_from(tmp_path, saved, char_data, who, value, keys):
    with frugal() if 'model_args' in keys else contextlib.nullcontext():  # sizes; it makes a run three times as slow
        assert len(list(refusals(tmp_path / 'out', forge(*keys, value=value)(saved[3][0]), who, dataset=char_data)))
