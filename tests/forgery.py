"""
What test_damaged_files.py and test_hostile_files.py share: three checkpoints of a small run, the means to forge others
from their bytes, and what every refusal must look like. A module that imports the two fixtures has them.
"""
import contextlib
import copy
import io
import signal
import struct
import tracemalloc
import zipfile
from dataclasses import asdict

import pytest
import torch
from conftest import TINY, refused, run_here, tiny_gpt, tiny_ids

from plaingpt.system.messages import UserError
from plaingpt.text import data_sets
from plaingpt.training import checkpoints

WEIGHT, MOMENT = 'data/0', 'data/17'  # the records of wte.weight and of its exp_avg, which have one shape
WTE, NORM = ('model', 'transformer.wte.weight'), ('model', 'transformer.ln_f.weight')
EXP_AVG = ('optimizer', 'state', 0, 'exp_avg')
NAN, INF, GONE = float('nan'), float('inf'), object()


@pytest.fixture(autouse=True)
def ends_in_time():
    """Ends a test that hangs, as one does at a pipe that nobody writes into. None comes near these seconds."""
    before = signal.signal(signal.SIGALRM, lambda *_: pytest.fail('it hangs'))  # no Exception, so nothing catches it
    signal.alarm(30)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def problem(call, *arguments):
    """The one line of the UserError that the call must raise."""
    with pytest.raises(UserError) as error:
        call(*arguments)
    assert '\n' not in str(error.value)
    return str(error.value)


def one_sentence(finished):
    """The one error of a run that has ended with status 2."""
    assert refused(finished) == finished.stderr.rstrip().splitlines()[-1] and finished.stderr.count('error: ') == 1
    return refused(finished)


@contextlib.contextmanager
def frugal():
    """Fails if Python's objects take more than 100 MiB meanwhile."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < 100 * 2**20
    finally:
        tracemalloc.stop()


def refusals(folder, content, scripts='ts', name='ckpt.pt', **keys):
    """Yields the sentences of train.py and sample.py (t, s), which must change nothing, on a folder with this file."""
    folder.mkdir()
    (folder / name).write_bytes(content)
    (folder / 'metrics.jsonl').write_text('{"step": 1}\n{"step": 9}\n', encoding='utf-8')
    def files():
        return {path: path.is_file() and path.read_bytes() for path in folder.parent.rglob('*') if path.name != '.lock'}

    before = files()
    for script in scripts:
        yield one_sentence(
            run_here('train.py', **TINY, out_dir=folder, init_from='resume', **keys) if script == 't' else
            run_here('sample.py', out_dir=folder, num_samples=1, max_new_tokens=2, device='cpu'))
        assert before == files()


# ---- checkpoints, whole and forged ----

@pytest.fixture(scope='module', name='saved')
def saved_checkpoints(tmp_path_factory, char_data):
    """{step: (bytes of the file, what is in it)} of three checkpoints of a run on char_data."""
    folder, meta, files = tmp_path_factory.mktemp('saved'), data_sets.read_meta(str(char_data)), {}
    model = tiny_gpt(n_layer=1, n_embd=8, vocab_size=meta['vocab_size'])
    optimizer = model.configure_optimizers(0.1, 1e-2, (0.9, 0.95), 'cpu')
    for step in 1, 2, 3:
        ids = tiny_ids(2, 16, vocab_size=meta['vocab_size'], seed=step)
        model(ids, ids)[1].backward(), optimizer.step()
        checkpoints.save(folder, {
            'model': model.state_dict(), 'optimizer': optimizer.state_dict(), 'model_args': asdict(model.config),
            'iter_num': step, 'best_val_loss': 2.5 - step / 10, 'config': {'dataset': str(char_data), 'step': step},
            'scaler': {}, 'tokenizer': meta['tokenizer'], 'tokens_seen': 128 * step, 'elapsed': 1.5, 'record': None,
            'run_id': 'abcd', 'job': None}, ['last'])
        files[step] = (folder / 'last.pt').read_bytes(), copy.deepcopy(checkpoints.load(str(folder / 'last.pt')))
    for name, tensor in (WEIGHT, files[3][1]['model'][WTE[1]]), (MOMENT, optimizer.state_dict()['state'][0]['exp_avg']):
        assert unzip(files[3][0])[f'archive/{name}'] == tensor.numpy().tobytes()
    return files


def same(loaded, original):
    """Whether two checkpoints are equal bit for bit."""
    return loaded.keys() == original.keys() and checkpoints.digest(loaded) == checkpoints.digest(original)


def saved_by_torch(value, **options):
    torch.save(value, file := io.BytesIO(), **options)
    return file.getvalue()


def forge(*keys, value, nanogpt=False):
    """Makes of a file one with tree[key][key]… = value (GONE: without it; a function: of the old one) and digests that
    fit, or in nanoGPT's format, which has none."""
    def make(content, _=None):
        tree = root = torch.load(io.BytesIO(content), weights_only=True)
        for key in keys[:-1]:
            tree = tree[key]
        tree[keys[-1]] = value(tree[keys[-1]]) if callable(value) else value
        if value is GONE:
            del tree[keys[-1]]
        if nanogpt:
            root = {key: root[key] for key in (*checkpoints.VERIFIED, 'model_args', 'iter_num', 'config')}
        elif keys[0] in checkpoints.VERIFIED:
            with contextlib.suppress(Exception):  # not of what has no bytes
                root['digest'] = {part: checkpoints.digest(root[part]) for part in checkpoints.VERIFIED if part in root}
        return saved_by_torch(root)
    return make


def unzip(content):
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return {entry.filename: archive.read(entry) for entry in archive.infolist()}


def rezip(content, changes, deflated=None, level=9):
    """The archive with records replaced, {name: bytes}, and right checksums; this one deflated."""
    with zipfile.ZipFile(file := io.BytesIO(), 'w') as archive:
        for name, data in unzip(content).items():
            kind = zipfile.ZIP_DEFLATED if name == f'archive/{deflated}' else zipfile.ZIP_STORED
            archive.writestr(name, changes.get(name[8:], data), kind, level)
    return file.getvalue()


def place(content, part, name=None):
    """Offset of a record's local header, central header or data, or of the end of the file."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        entry = archive.getinfo(f'archive/{name or "data.pkl"}')
        local, names = entry.header_offset, content.rindex(entry.filename.encode())
        return {'local': local, 'central': names - 46, 'end': len(content),
                'data': local + 30 + sum(struct.unpack('<HH', content[local + 26:local + 30]))}[part]


def flip(where, offset, mask=0xff, length=1):
    """Flips these bits of a byte; mask 0: makes all of these bytes 0."""
    def make(new, old=None):
        at = place(new, *where.split()) + offset
        return new[:at] + bytes(byte ^ mask if mask else 0 for byte in new[at:at + length]) + new[at + length:]
    return make
