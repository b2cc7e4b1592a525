"""
Helpers of the tests of damaged and hostile files: three checkpoints of a small run, the
means to forge others from their bytes, and what every refusal must look like.

The fixtures that these tests use, saved and ends_in_time, are in conftest.py.
"""
import contextlib
import copy
import io
import os
import struct
import subprocess
import tracemalloc
import zipfile
from dataclasses import asdict
from typing import NamedTuple

import pytest
import torch
from conftest import TINY, refused, run_here, tiny_gpt, tiny_ids

from plaingpt.system.messages import UserError
from plaingpt.text import data_sets
from plaingpt.training import checkpoints

# Records of the archive: that of wte.weight, and of its exp_avg, which has the same shape.
WEIGHT = 'data/0'
MOMENT = 'data/17'
# Keys that lead to tensors in the checkpoint.
WTE = ('model', 'transformer.wte.weight')
NORM = ('model', 'transformer.ln_f.weight')
EXP_AVG = ('optimizer', 'state', 0, 'exp_avg')
NAN = float('nan')
INF = float('inf')
GONE = object()  # in place of a value: the key is dropped


# ---- refusals ----

def problem(call, *arguments):
    """The one line of the UserError that the call must raise."""
    with pytest.raises(UserError) as error:
        call(*arguments)
    assert '\n' not in str(error.value)
    return str(error.value)


def one_sentence(finished):
    """The one error, and last line on stderr, of a run that has ended with status 2."""
    sentence = refused(finished)
    assert sentence == finished.stderr.rstrip().splitlines()[-1]
    assert finished.stderr.count('error: ') == 1
    return sentence


@contextlib.contextmanager
def frugal():
    """Fails if Python's objects take more than 100 MiB meanwhile."""
    tracemalloc.start()
    try:
        yield
        _, peak = tracemalloc.get_traced_memory()
        assert peak < 100 * 2**20
    finally:
        tracemalloc.stop()


def refusals(folder, content, scripts=('train.py', 'sample.py'), name='ckpt.pt', **keys):
    """Yields the sentence with which each script refuses a folder that holds this checkpoint.

    Asserts that the scripts change no file. keys: further flags of train.py."""
    folder.mkdir()
    (folder / name).write_bytes(content)
    (folder / 'metrics.jsonl').write_text('{"step": 1}\n{"step": 9}\n', encoding='utf-8')
    before = contents(folder.parent)
    for script in scripts:
        if script == 'train.py':
            ended = run_here(script, **TINY, out_dir=folder, init_from='resume', **keys)
        else:
            ended = run_here(script, out_dir=folder, num_samples=1, max_new_tokens=2, device='cpu')
        yield one_sentence(ended)
        assert contents(folder.parent) == before


def contents(folder):
    """{path: bytes} of all files below a folder but locks; None for what is no file."""
    found = {}
    for path in folder.rglob('*'):
        if path.name != '.lock':
            found[path] = path.read_bytes() if path.is_file() else None
    return found


# ---- checkpoints, whole and forged ----

class SavedRun(NamedTuple):
    """A checkpoint that was saved, and what is in it."""
    content: bytes
    tree: dict


def save_three_steps(folder, char_data):
    """{step: SavedRun} of the steps 1 to 3 of a run on the data set in char_data."""
    meta = data_sets.read_meta(str(char_data))
    model = tiny_gpt(n_layer=1, n_embd=8, vocab_size=meta['vocab_size'])
    optimizer = model.configure_optimizers(0.1, 1e-2, (0.9, 0.95), 'cpu')
    path = folder / 'last.pt'
    runs = {}
    for step in 1, 2, 3:
        ids = tiny_ids(2, 16, vocab_size=meta['vocab_size'], seed=step)
        _, loss = model(ids, ids)
        loss.backward()
        optimizer.step()
        checkpoint = {
            'model': model.state_dict(),
            'optimizer': optimizer.state_dict(),
            'model_args': asdict(model.config),
            'iter_num': step,
            'best_val_loss': 2.5 - step / 10,
            'best_step': step,
            'config': {'dataset': str(char_data), 'step': step},
            'scaler': {},
            'tokenizer': meta['tokenizer'],
            'tokens_seen': 128 * step,
            'elapsed': 1.5,
            'figures': {'loss': 2.5},
            'run_id': 'abcd',
            'job': None,
        }
        checkpoints.save(folder, checkpoint, ['last'])
        runs[step] = SavedRun(path.read_bytes(), copy.deepcopy(checkpoints.load(str(path))))

    # WEIGHT and MOMENT are the records that they are meant to be.
    records = unzip(runs[3].content)
    exp_avg = optimizer.state_dict()['state'][0]['exp_avg']
    assert records[f'archive/{WEIGHT}'] == model.transformer.wte.weight.detach().numpy().tobytes()
    assert records[f'archive/{MOMENT}'] == exp_avg.numpy().tobytes()
    return runs


def same(loaded, original):
    """Whether two checkpoints are equal bit for bit."""
    if loaded.keys() != original.keys():
        return False
    return checkpoints.digest(loaded) == checkpoints.digest(original)


def saved_by_torch(value, **options):
    """The bytes that torch.save makes of a value."""
    file = io.BytesIO()
    torch.save(value, file, **options)
    return file.getvalue()


def forge(*keys, value, nanogpt=False):
    """A function from a checkpoint's bytes to those of one with tree[key][key]… = value.

    value: GONE drops the key; a function makes the new value of the old one. The digests fit the
    new content, unless nanogpt=True: nanoGPT's format has none."""
    def make(content, older_content=None):
        root = torch.load(io.BytesIO(content), weights_only=True)
        tree = root
        for key in keys[:-1]:
            tree = tree[key]
        last_key = keys[-1]
        if value is GONE:
            del tree[last_key]
        elif callable(value):
            tree[last_key] = value(tree[last_key])
        else:
            tree[last_key] = value
        if nanogpt:
            kept = (*checkpoints.VERIFIED, 'model_args', 'iter_num', 'config')
            root = {key: root[key] for key in kept}
        elif keys[0] in checkpoints.VERIFIED:
            with contextlib.suppress(Exception):  # some values, such as meta tensors, have no bytes
                root['digest'] = digests(root)
        return saved_by_torch(root)
    return make


def digests(root):
    return {part: checkpoints.digest(root[part]) for part in checkpoints.VERIFIED if part in root}


def unzip(content):
    """{name: bytes} of the records of an archive."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return {entry.filename: archive.read(entry) for entry in archive.infolist()}


def rezip(content, changes, deflated=None, level=9):
    """The archive with records replaced, {name: bytes}, and right checksums.

    deflated: the name of a record to compress, at this level."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, 'w') as archive:
        for path, data in unzip(content).items():
            name = path.removeprefix('archive/')
            kind = zipfile.ZIP_DEFLATED if name == deflated else zipfile.ZIP_STORED
            archive.writestr(path, changes.get(name, data), kind, level)
    return file.getvalue()


def offset_of(content, where):
    """The offset of a part of an archive.

    where: 'end', or 'local', 'central' or 'data' for a record's local header, central header or
    data; then the record's name, as in 'data data/0'. Without a name it is data.pkl."""
    part, _, name = where.partition(' ')
    if part == 'end':
        return len(content)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        entry = archive.getinfo(f'archive/{name or "data.pkl"}')
    if part == 'central':
        return content.rindex(entry.filename.encode()) - 46
    local = entry.header_offset
    if part == 'local':
        return local
    name_length, extra_length = struct.unpack('<HH', content[local + 26:local + 30])
    return local + 30 + name_length + extra_length


def flip(where, offset, mask=0xff, length=1):
    """A function that flips these bits of `length` bytes; where: as in offset_of()."""
    def make(content, older_content=None):
        at = offset_of(content, where) + offset
        flipped = bytes(byte ^ mask for byte in content[at:at + length])
        return content[:at] + flipped + content[at + length:]
    return make


def zero(where, offset, length):
    """A function that sets `length` bytes to 0; where: as in offset_of()."""
    def make(content, older_content=None):
        at = offset_of(content, where) + offset
        end = min(at + length, len(content))
        return content[:at] + bytes(end - at) + content[end:]
    return make


# ---- code in a file ----

class Call:
    """An object that pickles as the call of a function."""

    def __init__(self, function, *arguments):
        self.function = function
        self.arguments = arguments

    def __reduce__(self):
        return self.function, self.arguments


def calls(canary):
    """{name: a Call that would make the file canary}."""
    return {
        'os.system': Call(os.system, f'echo > {canary}'),
        'exec': Call(exec, f'open({canary!r}, "w")'),
        'eval': Call(eval, f'open({canary!r}, "w")'),
        'subprocess': Call(subprocess.check_call, ['touch', canary]),
    }
