r"""
Input that hardly anybody means to type.

sample.py answers with text, or with status 2 and a sentence that names what is wrong. train.py
refuses a bad configuration before it writes anything. Both report all problems of a command line at
once, and neither ends in a traceback.

In an argument, Python reads the byte 0xff, which is not UTF-8, as \udcff.
"""
import itertools
import json
import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT, TINY, flags, or_skip, refused, run_here, succeeded, tiny_gpt
from fine_tuning import save_run
from generating import split_samples

CHARS = '\n abcdefgh\0\t\r\x7f\u0301\u200d\u2028\ufeff\u05d0\udcff👩'
LINE = b'{"prompt": "a"}'
SURROGATES = '[\ud800-\udfff]'  # as a regular expression


def named(value):
    """The name of a case."""
    return ascii(value)[:40]


def some(cases, every=2):
    """The cases, of which a normal run, to be short, takes the first, and then each second one.

    every: 3 takes each third one instead, and so on. The others are slow tests."""
    params = []
    for number, case in enumerate(cases):
        values = case if isinstance(case, tuple) else (case,)
        marks = [pytest.mark.slow] if number % every > 0 else []
        params.append(pytest.param(*values, marks=marks))
    return params


@pytest.fixture(scope='module')
def models(tmp_path_factory):
    """models(kind): the folder of a random model with the tokenizer 'char', of CHARS, or 'gpt2'."""
    folders = {}

    def model(kind):
        if kind not in folders:
            folders[kind] = tmp_path_factory.mktemp(kind)
            save_model(kind, folders[kind])
        return folders[kind]

    return model


def save_model(kind, folder):
    vocab_size = 30
    if kind == 'gpt2':
        from plaingpt.text.tokenizers import GPT2Tokenizer
        or_skip(GPT2Tokenizer)
        vocab_size = 50304
    gpt = tiny_gpt(vocab_size=vocab_size, block_size=8, n_layer=1)
    save_run(folder, gpt, tokenizer={'kind': kind, 'chars': list(CHARS)})


@pytest.fixture
def sample(models, tmp_path, monkeypatch):
    """A function that runs sample.py in tmp_path.

    sample('', kind, key=value) returns stdout of a run that must end well. With another sentence
    than '' the run must be refused with an error that matches it; the sentence is returned."""
    monkeypatch.chdir(tmp_path)

    def run_sample(sentence, kind='char', **keys):
        defaults = {'out_dir': models(kind), 'device': 'cpu', 'num_samples': 2, 'start': 'a',
                    'max_new_tokens': 3}
        ended = run_here('sample.py', **{**defaults, **keys})
        if sentence == '':
            return succeeded(ended)
        assert re.search(sentence, refused(ended))
        assert ended.stdout == ''
        return sentence

    return run_sample


# ---- prompts ----

PROMPTS = [
    # Nothing, white space, control characters.
    '', '\0', 'a\0b', '\t\r\n', '\r\n\r\n', '\r', ' ', '\n' * 3, '\x7f', '\x1b[31m', '\a',
    # Halves of surrogate pairs, byte-order marks, characters that combine.
    '\udcff', '\udcffa', '\ud800', 'a\udfffb', '\ufeffab', 'ab\ufeff', 'e\u0301',
    'a' + '\u0301' * 999, '\u05d0\u05d0', '\u202eabc', '👩\u200d👩', '日本', '\U0010ffff', '\uffff',
    '\u2028',
    # What a tokenizer or a command line might take for something else.
    'XYZ', 'abcX', '\\n', '\\ud800', '<|endoftext|>', 'a<|endoftext|>b', '<|endoftext',
    '<|im_start|>', 'FILE', '-h', '--', 'None', '"', '%s',
    # Long ones.
    'abc' * 9, 'ab cd\r\n' * 150_000, 'a' * 1_000_000, ' ' * 999_999,
]
TOKENIZERS_AND_WAYS = [('char', 'start'), ('char', 'file'), ('char', 'jsonl'), ('gpt2', 'jsonl')]
PROMPT_CASES = [(prompt, kind, way) for prompt in PROMPTS for kind, way in TOKENIZERS_AND_WAYS]


def refusal_of_prompt(prompt, kind):
    """What the error for a prompt must match; '' if the prompt can be continued."""
    if prompt == '':
        return 'prompt (has no tokens|is empty)'
    if kind == 'char':
        for char in prompt:
            if char not in CHARS:
                return f'U.{ord(char):04X}. is not in this vocabulary'
    return ''


@pytest.mark.parametrize('prompt, kind, way', some(PROMPT_CASES, every=3), ids=named)
def test_any_text_is_continued_or_refused_by_name(sample, tmp_path, prompt, kind, way):
    sentence = refusal_of_prompt(prompt, kind)
    if way == 'start':
        answer = sample(sentence, kind, start=prompt)
        assert sentence or is_text_after(prompt, answer)
    elif way == 'file':
        (tmp_path / 'p.txt').write_bytes(prompt.encode('utf-8', 'surrogatepass'))
        if re.search(SURROGATES, prompt):
            sentence = 'p.txt is not UTF-8'
        answer = sample(sentence, kind, start='FILE:p.txt')
        read = re.sub('\r\n?', '\n', prompt)
        read = read.removeprefix('\ufeff')  # a mark at the head of a file is no text
        assert sentence or is_text_after(read, answer)
    else:
        (tmp_path / 'p.jsonl').write_text(json.dumps({'prompt': prompt}), encoding='utf-8')
        answer = sample(sentence, kind, prompts='p.jsonl', output='o.jsonl')
        assert sentence or answer == ''
        if not sentence:
            line = json.loads((tmp_path / 'o.jsonl').read_text(encoding='utf-8'))
            assert line['prompt'] == prompt
            assert len(line['completions']) == 2


def is_text_after(prompt, stdout):
    """Whether stdout has two samples after the prompt."""
    shown = re.sub(SURROGATES, '?', prompt)
    return stdout.startswith(shown) and stdout.count('\n-----') == 2


@pytest.mark.parametrize('path, sentence', [
    ('gone.txt', 'gone.txt.* cannot be read'),
    ('folder', 'folder.* cannot be read'),
    ('bytes', 'bytes is not UTF-8'),
    ('utf16', 'utf16 is not UTF-8'),
    ('empty', 'no tokens'),
    (os.devnull, 'no tokens'),
    ('', "FILE:|start|''"),
    ('a\0b', 'cannot be read'),
    ('\ud800', 'cannot be read'),
    ('x' * 999, 'cannot be read'),
    ('bytes/x', 'cannot be read'),
], ids=named)
def test_a_file_that_cannot_be_a_prompt_is_refused(sample, tmp_path, path, sentence):
    (tmp_path / 'folder').mkdir()
    (tmp_path / 'bytes').write_bytes(b'a\xff\xfe')
    (tmp_path / 'utf16').write_bytes('ab'.encode('utf-16'))
    (tmp_path / 'empty').write_bytes(b'')
    sample(sentence, start=f'FILE:{path}')


# ---- files of prompts ----

@pytest.mark.parametrize('content', [
    LINE,
    LINE + b'\r\n\r\n' + LINE,
    b'\n\n\t\n ' + LINE,
    b'\xef\xbb\xbf' + LINE,
    b'{"prompt": "X", "prompt": "a"}',
    b'{"prompt": "a", "n": [1, null]}',
    b'{"prompt": "\\u0000"}',
    LINE.replace(b'a', b'a' * 1_000_000),
], ids=named)
def test_a_file_of_prompts_is_completed(sample, tmp_path, content):
    (tmp_path / 'p.jsonl').write_bytes(content)
    sample('', prompts='p.jsonl', output='o.jsonl')
    assert sorted(os.listdir(tmp_path)) == ['o.jsonl', 'p.jsonl']


NO_PROMPT = [
    # No JSON.
    b'{"prompt": "\0"}', b'{"prompt": "a\tb"}', LINE + b'\0', LINE[:-1], b'{"prompt": "a}',
    b"{'prompt': 'a'}", b'{prompt: a}',
    # JSON without a prompt.
    b'{}', b'{"Prompt": "a"}', b'{"prompt": null}', b'{"prompt": true}', b'"prompt"',
    b'{"prompt": 1e999}', b'{"prompt": ["a"]}', b'{"prompt": {"a": 1}}', b'null', b'NaN', b'3',
    b'[]', b'[["prompt"]]',
    # JSON that overwhelms its parser.
    b'1' * 5000, b'[' * 100_000, b'{"prompt": ' * 100_000, LINE[:-1] + b', "n": ' + b'[' * 100_000,
]


@pytest.mark.parametrize('content, sentence', [
    (b'', 'p.jsonl has no prompts'),
    (b'\n \n\t\n', 'p.jsonl has no prompts'),
    (b'\xff' + LINE, 'is not UTF-8'),
    (LINE.decode().encode('utf-16'), 'is not UTF-8'),
    (b'{"prompt": "\\ud800"}', 'U.D800'),
    (LINE + b'\n{"prompt": ""}', 'line 2: the prompt is empty'),
    (LINE * 2, 'line 1: expected'),
    *[(b'\n' + line, 'p.jsonl, line 2: expected a JSON object') for line in NO_PROMPT],
], ids=named)
def test_a_file_with_a_bad_prompt_is_refused_with_its_line(sample, tmp_path, content, sentence):
    (tmp_path / 'p.jsonl').write_bytes(content)
    sample(sentence, prompts='p.jsonl', output='o.jsonl')
    assert os.listdir(tmp_path) == ['p.jsonl']


@pytest.mark.parametrize('prompts, output, sentence', [
    ('p.jsonl', '', 'go together'),
    ('', 'o.jsonl', 'go together'),
    ('gone.jsonl', 'o.jsonl', 'gone.jsonl.* cannot be read'),
    ('folder', 'o.jsonl', 'folder.* cannot be read'),
    ('a\0b', 'o.jsonl', 'cannot be read'),
    ('p.jsonl', 'gone/o.jsonl', 'no folder gone'),
    ('p.jsonl', 'p.jsonl/o', 'no folder p.jsonl'),
    ('p.jsonl', 'folder', 'output.*folder'),
    ('p.jsonl', 'folder/', 'output.*folder'),
    ('p.jsonl', '.', 'output'),
    ('p.jsonl', 'x' * 999, 'output'),
    ('p.jsonl', 'a\0b', 'output'),
    ('p.jsonl', '\ud800', 'output cannot be written'),
], ids=named)
def test_with_bad_names_of_prompts_or_output_nothing_is_written(
        sample, tmp_path, prompts, output, sentence):
    (tmp_path / 'folder').mkdir()
    (tmp_path / 'p.jsonl').write_bytes(LINE)
    sample(sentence, prompts=prompts, output=output)
    assert sorted(path.name for path in tmp_path.rglob('*')) == ['folder', 'p.jsonl']


# ---- settings of sample.py ----

def filters():
    """Combinations of extreme values of the options that filter tokens, as dicts of keys."""
    values = itertools.product([1, 0, 'None', 10 ** 30], [0, 1e-30, 1e30], ['None', 1, 1e-9])
    return [dict(top_k=top_k, temperature=temperature, top_p=top_p)
            for top_k, temperature, top_p in values]


@pytest.mark.parametrize('keys', [
    *some(filters()),
    dict(temperature=1e300), dict(temperature='1e-400'), dict(top_p=1e-300),
    dict(num_samples=1), dict(num_samples=99),
    dict(max_new_tokens=0), dict(max_new_tokens=1), dict(max_new_tokens='2.0'),
    dict(max_new_tokens=20),
    dict(dtype='bfloat16'), dict(seed=0), dict(seed=2 ** 32 - 1),
], ids=named)
def test_any_allowed_setting_gives_text(sample, keys):
    prompt = 'abcdefgh' * 3
    texts = split_samples(sample('', start=prompt, **keys))
    assert len(texts) == keys.get('num_samples', 2)
    new_tokens = int(float(keys.get('max_new_tokens', 3)))
    for text in texts:
        assert text.startswith(prompt)
        assert len(text) == len(prompt) + new_tokens


BAD_VALUES = {
    'top_k': ['-1', 'nan', '1.5', 'inf', 'all', 'none', ''],
    'temperature': ['inf', 'nan', '-1', '-1e-30', 'hot', '1e999', 'None', '0x1', ''],
    'top_p': ['0', '1.1', 'nan', '-0.5', 'inf', 'all', ''],
    'max_new_tokens': ['-1', 'nan', 'inf', '1.5', 'None', ''],
    'num_samples': ['0', '-1', 'nan', '1.5', 'None', '', 10 ** 15, 10 ** 25],
    'seed': ['-1', '1.5', 'inf', '', 2 ** 32, 1e30, '9' * 5000],
    'dtype': ['float8', 'Float32', 'None', ''],
    'compile': ['maybe', '1', ''],
    'device': ['foo', 'CPU', 'cuda:x', 'cuda:-1', 'cuda:99', 'meta', ''],
    'init_from': [''],
    'temp': [3],
}


@pytest.mark.parametrize('key, value', [
    (key, value) for key, values in BAD_VALUES.items() for value in values], ids=named)
def test_a_bad_setting_of_sample_py_is_refused_by_name(sample, key, value):
    sample(f'{key}=|memory', **{key: value})


# ---- raw bytes, other encodings ----

# Runs the scripts of a repository one after another, each in a process of its own that has imported
# torch already, and prints their statuses. The arguments of a run are separated by \x1e.
DRIVER = '''
import os, runpy, sys
root, *cases = sys.argv[1:]
sys.path[0] = root
import model
from plaingpt.training import checkpoints
for case in cases:
    if os.fork() == 0:
        sys.argv[:] = case.split(chr(30))
        try:
            runpy.run_path(os.path.join(root, sys.argv[0]), run_name='__main__')
            sys.exit()
        except SystemExit as end:
            # Other exceptions are for sys.excepthook, as in a script that runs by itself.
            sys.stdout.flush()
            os._exit(end.code or 0)  # the clean-up would take a second
    status = os.waitstatus_to_exitcode(os.wait()[1])
    print('status', status, file=sys.stderr, flush=True)
'''
# {arguments: what the error must match}; '' if the run must end well.
SAMPLE_CASES = {
    b'--help': '',
    b'--start=': 'no tokens',
    b'--start=\xff': '',
    b'--start=\xff\xfe': 'U.DCFE',
    b'--start=\xc3': 'U.DCC3',
    b'--start=\xf0\x9f\x91\xa9': '^$|U.DCF0',  # a character to some, four bytes to others
    b'--start=FILE:\xff': 'cannot be read',
    b'--\xff\xfe=3': 'no key',
    b'\xff\xfe.py': 'no such config',
    b'--seed=\xff': 'a whole number',
    b'--out_dir=\xff': 'holds no checkpoint',
    b'--init_from=\xff': 'cannot be loaded',
    b'--device=\xff': 'device=',
    b'--prompts=p.jsonl\x1e--output=\xfe': '',
    b'--prompts=p.jsonl\x1e--output=\xff/o': 'no folder',
    b'--prompts=\xff\x1e--output=o': 'cannot be read',
}
TRAIN_CASES = {
    b'--help': '',
    b'--out_dir=o\xc3\xa9': '^$|out_dir',
    b'--dataset=\xff': 'not found',
    b'--seed=\xff': 'seed=',
}
WITHOUT_UTF8 = dict(LC_ALL='C', PYTHONUTF8='0', PYTHONCOERCECLOCALE='0')
ASCII_OUTPUT = dict(PYTHONIOENCODING='ascii')

not_bytes = pytest.mark.skipif(sys.platform in ('darwin', 'win32'),
                               reason='on this system an argument is always text')


def run_cases(cases, folder, stdout, environment):
    """[(stderr, status)] of the commands that are cases, run by DRIVER in a folder."""
    inherited = {key: value for key, value in os.environ.items()
                 if not key.startswith(('PYTHON', 'LC_', 'LANG'))}
    ended = subprocess.run([sys.executable, '-c', DRIVER, ROOT, *cases], cwd=folder,
                           env={**inherited, **environment}, timeout=120, stdout=stdout,
                           stderr=subprocess.PIPE)
    said = re.findall(r'(?s)(.*?)^status (-?\d+)\n', ended.stderr.decode(), flags=re.MULTILINE)
    return [(text, int(status)) for text, status in said]


def all_cases(models, char_data):
    """{command line: what the error must match} of both scripts."""
    sampling = ['sample.py', f'--out_dir={models("char")}', '--device=cpu', '--max_new_tokens=3']
    training = ['train.py', *flags({**TINY, 'dataset': char_data, 'max_iters': 1})]
    cases = {}
    for arguments, sentence in SAMPLE_CASES.items():
        cases['\x1e'.join(sampling).encode() + b'\x1e' + arguments] = sentence
    for arguments, sentence in TRAIN_CASES.items():
        cases['\x1e'.join(training).encode() + b'\x1e' + arguments] = sentence
    return cases


def errors_in(text):
    """The lines of stderr that are errors; no traceback may be among the others."""
    assert 'Traceback' not in text
    return '\n'.join(line for line in text.splitlines() if line.startswith('error: '))


@not_bytes
@pytest.mark.parametrize('environment', some([WITHOUT_UTF8, ASCII_OUTPUT]), ids=named)
def test_arguments_that_are_not_text_end_in_no_traceback(models, char_data, tmp_path, environment):
    (tmp_path / 'p.jsonl').write_bytes(LINE)
    cases = all_cases(models, char_data)
    said = run_cases(cases, tmp_path, subprocess.PIPE, environment)
    for (case, sentence), (text, status) in zip(cases.items(), said, strict=True):
        errors = errors_in(text)
        assert re.search(sentence or '^$', errors), case
        assert status == (2 if errors else 0), case


@not_bytes
def test_output_that_nobody_reads_ends_in_no_traceback(models, char_data, tmp_path):
    (tmp_path / 'p.jsonl').write_bytes(LINE)
    cases = {case: sentence for case, sentence in all_cases(models, char_data).items()
             if re.match(sentence, '')}  # those that may end well
    reader, writer = os.pipe()
    os.close(reader)  # as `| head` does once it has enough
    said = run_cases(cases, tmp_path, writer, {})
    os.close(writer)
    for (case, sentence), (text, _) in zip(cases.items(), said, strict=True):
        assert re.search(sentence or '^$', errors_in(text)), case


# ---- configurations of train.py ----

@pytest.fixture
def train(char_data, tmp_path, monkeypatch):
    """train(*arguments, key=value): the errors of train.py, a list, after which it must end.

    Nothing may have been written."""
    monkeypatch.chdir(tmp_path)

    def refusal(*arguments, **keys):
        before = sorted(tmp_path.rglob('*'))
        settings = {**TINY, 'dataset': char_data, 'out_dir': 'out', **keys}
        ended = run_here('train.py', *arguments, **settings)
        assert sorted(tmp_path.rglob('*')) == before
        assert ended.stdout == ''
        return refused(ended).split('\n')

    return refusal


# Keys by the value just outside of their range, and by a text that they can't be.
POSITIVE_COUNTS = ['eval_interval', 'log_interval', 'eval_iters', 'gradient_accumulation_steps',
                   'batch_size', 'block_size', 'n_embd', 'n_layer', 'n_head']
COUNTS = ['checkpoint_interval', 'seed', 'max_iters', 'warmup_iters', 'lr_decay_iters']
NUMBERS = ['learning_rate', 'weight_decay', 'grad_clip', 'min_lr', 'dropout', 'beta1']
BELOW_1 = ['dropout', 'beta1', 'beta2']
NUMBER_CASES = [
    *[(key, '0', '1.5', 'a whole number') for key in POSITIVE_COUNTS],
    *[(key, '-1', '1.5', 'a whole number') for key in COUNTS],
    *[(key, '-1', '1,5', 'a number') for key in NUMBERS],
    *[(key, '1', '1,5', 'a number') for key in BELOW_1],
]


@pytest.mark.parametrize('key, outside, odd, kind', some(NUMBER_CASES))
def test_a_bad_number_is_refused_by_its_key(train, key, outside, odd, kind):
    texts = [odd, '', 'nan', '-inf', 'x', 'True', 'None', '9' * 400, '0x1']
    arguments = [f'--{key}={text}' for text in texts]
    *others, last = train(*arguments, **{key: outside})
    assert others == [f'error: {argument}: expected {kind}' for argument in arguments]
    assert re.match(rf'error: {key}={outside}(\.0)?: must be ', last)


SETTINGS = [
    ('n_head', [3], 'n_embd=16 must be a multiple of n_head=3'),
    ('n_embd', [10 ** 14, 10 ** 30], 'n_embd|memory'),
    ('block_size', [10 ** 6, 10 ** 300], 'size=10{6}'),
    ('bias', ['yes', ''], 'bias=.*True or False'),
    ('compile', ['maybe', '', '1'], 'compile=.*True or False'),
    ('device', ['foo', '', 'cuda:x', 'cuda:99', 'cuda:-1', 'CPU', 'meta'], 'device='),
    ('backend', ['foo'], 'backend='),
    ('dtype', ['float8', '', 'torch.float32'], 'dtype='),
    ('wandb_log', ['', True], 'wandb'),
    ('init_from', ['', 'folder'], 'init_from='),
    ('init_from', ['scrach'], 'init_from=scrach.*scratch'),
    ('init_from', ['Resume'], 'init_from=Resume.*resume'),
    ('dataset', ['', 'gone', '../..', 'a\0b'], 'bin not found'),
    ('out_dir', ['', 'file', 'file/out', 'x' * 999, 'a\0b', 'o\udcff'], 'out_dir'),
    # Names that are not keys.
    ('learnig_rate', [1], 'did you mean learning_rate'),
    ('Batch_size', [1], 'did you mean batch_size'),
    ('zzz', [1], 'zzz=1.*--help'),
    ('__file__', ['x'], '__file__=x'),
]


def some_values(settings):
    """Cases (key, value, sentence) for some of the values of each key."""
    cases = []
    for key, values, sentence in settings:
        cases += some([(key, value, sentence) for value in values])
    return cases


@pytest.fixture
def folder_and_file(tmp_path):
    """'folder' and 'file' in tmp_path."""
    (tmp_path / 'folder').mkdir()
    (tmp_path / 'file').touch()


@pytest.mark.parametrize('key, value, sentence', some_values(SETTINGS), ids=named)
def test_a_bad_setting_of_train_py_is_refused(
        train, folder_and_file, monkeypatch, key, value, sentence):
    monkeypatch.setitem(sys.modules, 'wandb', None)  # as if it were not installed
    [said] = train(**{'n_head': 1, key: value})
    assert re.search(sentence, said)


@pytest.mark.parametrize('out_dir', some(['folder', 'gone', 'file', '', 'a\0b']), ids=named)
def test_a_bad_out_dir_to_resume_is_refused(train, folder_and_file, out_dir):
    [said] = train(init_from='resume', out_dir=out_dir)
    assert re.search('no checkpoint|out_dir', said)


@pytest.mark.parametrize('source, sentence', some([
    # Code that fails.
    ('max_iters = = 3', 'line 1: SyntaxError'),
    ('\nmax_iters = 1 / 0', 'line 2: ZeroDivision'),
    ('def f(): f()\nf()', 'RecursionError'),
    ('import nowhere', 'ModuleNotFound'),
    ('exit()', ''),
    ('import sys\nsys.exit("not here")', 'not here'),
    ('raise SystemExit(0)', ''),
    ('(' * 999, ''),
    ('\0', ''),
    ('\udcff', ''),
    # Names that are not keys.
    ('zzz = 3', 'zzz'),
    ('batch_sise = 3', 'batch_sise .*batch_size'),
    ('b = "\\ud800"', 'b is not a key'),
    ('from math import pi', 'pi'),
    # Values of the wrong type.
    ('max_iters = "3"', 'max_iters'),
    ('max_iters = 1.5', 'max_iters'),
    ('max_iters = None', 'max_iters'),
    ('max_iters = print', 'max_iters'),
    ('learning_rate = "1e-3"', 'learning_rate'),
    ('learning_rate = float("nan")', 'learning_rate'),
    ('dropout = 1j', 'dropout'),
    ('dataset = 3', 'dataset'),
    ('compile = "yes"', 'compile'),
    ('wandb_project = 3', 'wandb_project'),
    ('wandb_run_name = None', 'wandb_run_name'),
    ('batch_size = lambda: 3', 'batch_size'),
    ('batch_size = [12]', 'batch_size'),
    ('device = None', 'device'),
]), ids=named)
def test_a_bad_config_file_is_refused_by_its_name(train, tmp_path, source, sentence):
    (tmp_path / 'odd.py').write_bytes(source.encode('utf-8', 'surrogateescape'))
    [said] = train('odd.py')
    assert re.search(f'odd.py.*{sentence}', said)


# ---- all problems at once ----

def check_all_are_named(folder, ended, keys, others=0):
    """Asserts that each bad file and key has an error of its own; others: how many more follow."""
    wanted = ['gone.py: ', 'odd.py, line 1: ', '--seed: ', *[f'{key}=' for key in keys]]
    lines = ended.stderr.splitlines()
    assert ended.returncode == 2
    assert all(line.startswith('error: ') for line in lines), ended.stderr
    for name in wanted:
        assert len([line for line in lines if name in line]) == 1, name
    assert len(lines) == len(wanted) + others
    assert os.listdir(folder) == ['odd.py']


@pytest.fixture
def odd_config(tmp_path, monkeypatch):
    """The folder, which is the working directory, of a config file that fails, odd.py."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'odd.py').write_text('seed = 1 / 0', encoding='utf-8')
    return tmp_path


def test_all_problems_of_a_command_line_of_train_py_are_named_at_once(odd_config):
    keys = dict(n_layer='x', dropout=2, n_embd=5, dtype='float8', learnig_rate=1, device='foo')
    ended = run_here('train.py', 'gone.py', 'odd.py', '--seed', '--n_head=2', **keys)
    check_all_are_named(odd_config, ended, keys)


def test_all_problems_of_a_command_line_of_sample_py_are_named_at_once(odd_config):
    keys = dict(top_k='x', top_p=2, temperature='nan', strat='a', device='foo', dtype='x')
    ended = run_here('sample.py', 'gone.py', 'odd.py', '--seed', '--output=o', **keys)
    check_all_are_named(odd_config, ended, keys, others=1)  # output goes together with prompts
