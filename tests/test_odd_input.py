r"""What hardly anybody means to type. sample.py answers with text, or with status 2 and a sentence that names what is
wrong; train.py refuses a bad configuration before it writes anything; both say all that is wrong with a command line at
once. Nothing ends in a traceback. (\udcff is how Python reads the byte 0xff in an argument.)"""
import itertools
import json
import os
import re
import subprocess
import sys
from dataclasses import asdict

import pytest
from conftest import ROOT, TINY, or_skip, refused, run_here, succeeded, tiny_gpt

CHARS = '\n abcdefgh\0\t\r\x7f\u0301\u200d\u2028\ufeff\u05d0\udcff👩'
LINE = b'{"prompt": "a"}'


def named(value):
    """The name of a case."""
    return ascii(value)[:40]


def some(cases, every=2):
    """The cases, of which the normal run, to be short, takes only the first and every second (or third…) after it."""
    cases = [case if isinstance(case, tuple) else (case,) for case in cases]
    return [pytest.param(*case, marks=pytest.mark.slow if n % every else ()) for n, case in enumerate(cases)]


@pytest.fixture(scope='module')
def models(tmp_path_factory):
    """models(kind): the folder of a random model with the tokenizer 'char', of CHARS, or 'gpt2'."""
    made = {}
    def model(kind):
        if kind not in made:
            from plaingpt.text.tokenizers import GPT2Tokenizer
            from plaingpt.training import checkpoints
            size = 50304 if kind == 'gpt2' and or_skip(GPT2Tokenizer) else 30
            gpt, made[kind] = tiny_gpt(vocab_size=size, block_size=8, n_layer=1), tmp_path_factory.mktemp(kind)
            checkpoints.save(str(made[kind]), {
                'model': gpt.state_dict(), 'optimizer': {}, 'model_args': asdict(gpt.config), 'iter_num': 7,
                'config': {}, 'tokenizer': {'kind': kind, 'chars': list(CHARS)}}, ['ckpt'])
        return made[kind]
    return model


@pytest.fixture
def sample(models, tmp_path, monkeypatch):
    """sample(sentence, kind, key=value): stdout of sample.py in tmp_path, which has to end well if sentence is '', and
    else to be refused with a sentence that this pattern fits."""
    monkeypatch.chdir(tmp_path)
    def run_sample(sentence, kind='char', **keys):
        ended = run_here('sample.py', **{'out_dir': models(kind), 'device': 'cpu', 'num_samples': 2, 'start': 'a',
                                         'max_new_tokens': 3, **keys})
        assert not sentence or re.search(sentence, refused(ended)) and not ended.stdout, ended
        return sentence or succeeded(ended)
    return run_sample


# ---- prompts ----

WAYS = [('char', 'start'), ('char', 'file'), ('char', 'jsonl'), ('gpt2', 'jsonl')]
PROMPTS = [
    '', '\0', 'a\0b', '\t\r\n', '\r\n\r\n', '\r', ' ', '\n' * 3, '\x7f', '\x1b[31m', '\a', '\udcff', '\udcffa',
    '\ud800', 'a\udfffb', '\ufeffab', 'ab\ufeff', 'e\u0301', 'a' + '\u0301' * 999, '\u05d0\u05d0', '\u202eabc',
    '👩\u200d👩', '日本', '\U0010ffff', '\uffff', '\u2028', 'XYZ', 'abcX', '\\n', '\\ud800', '<|endoftext|>',
    'a<|endoftext|>b', '<|endoftext', '<|im_start|>', 'FILE', '-h', '--', 'None', '"', '%s', 'abc' * 9,
    'ab cd\r\n' * 150_000, 'a' * 1_000_000, ' ' * 999_999]


@pytest.mark.parametrize('prompt, kind, way', some(((prompt, *way) for prompt in PROMPTS for way in WAYS), every=3),
                         ids=named)
def test_any_text_is_continued_or_refused_by_name(sample, tmp_path, prompt, kind, way):
    unknown = next((char for char in prompt if char not in CHARS), None) if kind == 'char' else None
    sentence = f'U.{ord(unknown):04X}. is not among' if unknown else '' if prompt else 'prompt (has no tokens|is empty)'
    if way == 'jsonl':
        (tmp_path / 'p.jsonl').write_text(json.dumps({'prompt': prompt}), encoding='utf-8')
        if not sample(sentence, kind, prompts='p.jsonl', output='o.jsonl'):
            line = json.loads((tmp_path / 'o.jsonl').read_text(encoding='utf-8'))
            assert line['prompt'] == prompt and len(line['completions']) == 2
        return
    if way == 'file':
        (tmp_path / 'p.txt').write_bytes(prompt.encode('utf-8', 'surrogatepass'))
        sentence = 'p.txt is not UTF-8' if re.search('[\ud800-\udfff]', prompt) else sentence
    stdout = sample(sentence, kind, start='FILE:p.txt' if way == 'file' else prompt)
    if way == 'file':
        prompt = re.sub('\r\n?', '\n', prompt).removeprefix('\ufeff')  # a mark at the head of a file is no text
    assert sentence or stdout.startswith(re.sub('[\ud800-\udfff]', '?', prompt)) and stdout.count('\n-----') == 2


@pytest.mark.parametrize('path, sentence', [
    ('gone.txt', 'gone.txt.* cannot be read'), ('folder', 'folder.* cannot be read'), ('bytes', 'bytes is not UTF-8'),
    ('utf16', 'utf16 is not UTF-8'), ('empty', 'no tokens'), (os.devnull, 'no tokens'), ('', "FILE:|start|''"),
    *((path, 'cannot be read') for path in ('a\0b', '\ud800', 'x' * 999, 'bytes/x'))], ids=named)
def test_a_file_that_is_no_prompt_is_refused(sample, tmp_path, path, sentence):
    (tmp_path / 'folder').mkdir()
    for name, content in ('bytes', b'a\xff\xfe'), ('utf16', 'ab'.encode('utf-16')), ('empty', b''):
        (tmp_path / name).write_bytes(content)
    sample(sentence, start=f'FILE:{path}')


@pytest.mark.parametrize('content, sentence', [
    (LINE, ''), (LINE + b'\r\n\r\n' + LINE, ''), (b'\n\n\t\n ' + LINE, ''), (b'\xef\xbb\xbf' + LINE, ''),
    (b'{"prompt": "X", "prompt": "a"}', ''), (b'{"prompt": "a", "n": [1, null]}', ''), (b'{"prompt": "\\u0000"}', ''),
    (LINE.replace(b'a', b'a' * 1_000_000), ''), (LINE * 2, 'line 1: expected'), (b'', 'p.jsonl has no prompts'),
    (b'\n \n\t\n', 'p.jsonl has no prompts'), (b'\xff' + LINE, 'is not UTF-8'), (b'{"prompt": "\\ud800"}', 'U.D800'),
    (LINE.decode().encode('utf-16'), 'is not UTF-8'), (LINE + b'\n{"prompt": ""}', 'line 2: the prompt is empty'),
    *((b'\n' + line, 'p.jsonl, line 2: expected a JSON object') for line in (
        b'{"prompt": "\0"}', b'{"prompt": "a\tb"}', LINE + b'\0', LINE[:-1], b'{"prompt": "a}', b'{}',
        b'{"Prompt": "a"}', b"{'prompt': 'a'}", b'{prompt: a}', b'{"prompt": null}', b'{"prompt": true}',
        b'"prompt"', b'{"prompt": 1e999}', b'{"prompt": ["a"]}', b'{"prompt": {"a": 1}}', b'null', b'NaN', b'3', b'[]',
        b'[["prompt"]]', b'1' * 5000, b'[' * 100_000, b'{"prompt": ' * 100_000,
        LINE[:-1] + b', "n": ' + b'[' * 100_000))], ids=named)
def test_a_file_of_prompts_is_completed_or_refused_with_its_line(sample, tmp_path, content, sentence):
    (tmp_path / 'p.jsonl').write_bytes(content)
    sample(sentence, prompts='p.jsonl', output='o.jsonl')
    assert sorted(os.listdir(tmp_path)) == (['p.jsonl'] if sentence else ['o.jsonl', 'p.jsonl'])


@pytest.mark.parametrize('prompts, output, sentence', [
    ('p.jsonl', '', 'go together'), ('', 'o.jsonl', 'go together'), ('p.jsonl', 'gone/o.jsonl', 'no folder gone'),
    ('gone.jsonl', 'o.jsonl', 'gone.jsonl.* cannot be read'), ('folder', 'o.jsonl', 'folder.* cannot be read'),
    ('p.jsonl', 'folder', 'output.*folder'), ('p.jsonl', 'folder/', 'output.*folder'), ('p.jsonl', '.', 'output'),
    ('p.jsonl', 'p.jsonl/o', 'no folder p.jsonl'), ('p.jsonl', 'x' * 999, 'output'), ('p.jsonl', 'a\0b', 'output'),
    ('a\0b', 'o.jsonl', 'cannot be read')], ids=named)
def test_where_prompts_or_output_cannot_be_nothing_is_written(sample, tmp_path, prompts, output, sentence):
    (tmp_path / 'folder').mkdir()
    (tmp_path / 'p.jsonl').write_bytes(LINE)
    sample(sentence, prompts=prompts, output=output)
    assert sorted(path.name for path in tmp_path.rglob('*')) == ['folder', 'p.jsonl']


# ---- settings of sample.py ----

FILTERS = itertools.product((1, 0, 'None', 10**30), (0, 1e-30, 1e30), ('None', 1, 1e-9))


@pytest.mark.parametrize('keys', [
    *some(dict(zip(('top_k', 'temperature', 'top_p'), values, strict=True)) for values in FILTERS),
    dict(temperature=1e300), dict(temperature='1e-400'), dict(top_p=1e-300), dict(num_samples=1), dict(num_samples=99),
    dict(dtype='bfloat16'), dict(seed=0), dict(seed=2**32 - 1),
    *(dict(max_new_tokens=number) for number in (0, 1, '2.0', 20))], ids=named)
def test_any_allowed_setting_gives_text(sample, keys):
    samples = sample('', start='abcdefgh' * 3, **keys).split('\n---------------\n')[:-1]
    assert len(samples) == keys.get('num_samples', 2)
    assert {(text[:24], len(text) - 24) for text in samples} == {
        ('abcdefgh' * 3, int(float(keys.get('max_new_tokens', 3))))}


BAD = {'top_k': '-1 nan 1.5 inf all none', 'temperature': 'inf nan -1 -1e-30 hot 1e999 None 0x1', 'seed': '-1 1.5 inf',
       'top_p': '0 1.1 nan -0.5 inf all', 'max_new_tokens': '-1 nan inf 1.5 None', 'num_samples': '0 -1 nan 1.5 None',
       'dtype': 'float8 Float32 None', 'compile': 'maybe 1', 'device': 'foo CPU cuda:x cuda:-1 cuda:99 meta'}


@pytest.mark.parametrize('key, value', [
    *((key, value) for key, values in BAD.items() for value in [*values.split(), '']), ('seed', 2**32), ('seed', 1e30),
    ('seed', '9' * 5000), ('init_from', ''), ('temp', 3), ('num_samples', 10**15), ('num_samples', 10**25)], ids=named)
def test_a_setting_that_cannot_be_is_refused_by_name(sample, key, value):
    sample(f'{key}=|memory', **{key: value})


# ---- raw bytes, other encodings ----

DRIVER = '''import os, runpy, sys
root, *cases = sys.argv[1:]
sys.path[0] = root
import model
from plaingpt.training import checkpoints
for case in cases:
    if not os.fork():
        sys.argv[:] = case.split(chr(30))
        try:
            runpy.run_path(os.path.join(root, sys.argv[0]), run_name='__main__')
            sys.exit()
        except SystemExit as end:  # what else comes is for sys.excepthook, as when a script is run by itself
            sys.stdout.flush()
            os._exit(end.code or 0)  # the clean-up would take a second
    print('status', os.waitstatus_to_exitcode(os.wait()[1]), file=sys.stderr, flush=True)
'''
SAMPLE = {
    b'--start=\xff\xfe': 'U.DCFE', b'--start=\xff': '', b'--start=\xc3': 'U.DCC3', b'--start=': 'no tokens',
    b'--start=\xf0\x9f\x91\xa9': '^$|U.DCF0', b'--start=FILE:\xff': 'cannot be read', b'--\xff\xfe=3': 'no key',
    b'\xff\xfe.py': 'no such config', b'--seed=\xff': 'a whole number', b'--out_dir=\xff': 'holds no checkpoint',
    b'--init_from=\xff': 'cannot be loaded', b'--device=\xff': 'device=', b'--prompts=p.jsonl\x1e--output=\xfe': '',
    b'--prompts=\xff\x1e--output=o': 'cannot be read', b'--prompts=p.jsonl\x1e--output=\xff/o': 'no folder',
    b'--help': ''}
TRAIN = {b'--help': '', b'--out_dir=o\xc3\xa9': '^$|out_dir', b'--dataset=\xff': 'not found', b'--seed=\xff': 'seed='}
ENVIRONMENTS = [dict(LC_ALL='C', PYTHONUTF8='0', PYTHONCOERCECLOCALE='0'), dict(PYTHONIOENCODING='ascii'), {}]


@pytest.mark.skipif(sys.platform in ('darwin', 'win32'), reason='there an argument is always text')
@pytest.mark.parametrize('env', some(ENVIRONMENTS), ids=named)
def test_bytes_that_are_no_text_end_in_no_traceback_whatever_becomes_of_the_output(models, char_data, tmp_path, env):
    (tmp_path / 'p.jsonl').write_bytes(LINE)
    always = [f'--{key}={value}' for key, value in {**TINY, 'dataset': char_data, 'max_iters': 1}.items()]
    runs = [('sample.py', f'--out_dir={models("char")}', '--device=cpu', '--max_new_tokens=3'), ('train.py', *always)]
    cases = {'\x1e'.join(run).encode() + b'\x1e' + case: sentence
             for run, table in zip(runs, (SAMPLE, TRAIN), strict=True)
             for case, sentence in table.items() if env or re.match(sentence, '')}
    reader, writer = os.pipe()
    os.close(reader)  # as in `| head`, nobody reads it
    others = {key: value for key, value in os.environ.items() if not key.startswith(('PYTHON', 'LC_', 'LANG'))}
    ended = subprocess.run([sys.executable, '-c', DRIVER, ROOT, *cases], env={**others, **env}, cwd=tmp_path,
                           timeout=120, stdout=subprocess.PIPE if env else writer, stderr=subprocess.PIPE)
    os.close(writer)
    said = re.findall(r'(?s)(.*?)^status (-?\d+)\n', ended.stderr.decode(), flags=re.MULTILINE)
    wrong = []
    for (case, sentence), (text, status) in zip(cases.items(), said, strict=True):
        errors = '\n'.join(line for line in text.splitlines() if line.startswith('error: '))
        fine = re.search(sentence or '^$', errors) and (status == '02'[bool(errors)] or not env)
        if 'Traceback' in text or not fine:
            wrong.append((case.split(b'\x1e')[0], case.split(b'\x1e')[-1], text[-400:], status))
    assert not wrong, wrong


# ---- configurations of train.py ----

@pytest.fixture
def train(char_data, tmp_path, monkeypatch):
    """train(*arguments, key=value): what train.py says in refusing them, a line each; it has written nothing."""
    monkeypatch.chdir(tmp_path)
    def refuse(*arguments, **keys):
        before = sorted(tmp_path.rglob('*'))
        ended = run_here('train.py', *arguments, **{**TINY, 'dataset': char_data, 'out_dir': 'out', **keys})
        assert sorted(tmp_path.rglob('*')) == before and ended.stdout == ''
        return refused(ended).split('\n')
    return refuse


NUMBERS = [
    ('0', '1.5', 'eval_interval log_interval eval_iters gradient_accumulation_steps batch_size block_size n_embd'),
    ('0', '1.5', 'n_layer n_head'), ('-1', '1.5', 'checkpoint_interval seed max_iters warmup_iters lr_decay_iters'),
    ('-1', '1,5', 'learning_rate weight_decay grad_clip min_lr dropout beta1'), ('1', '1,5', 'dropout beta1 beta2')]


@pytest.mark.parametrize('key, beyond, odd', some(
    (key, beyond, odd) for beyond, odd, keys in NUMBERS for key in keys.split()))
def test_a_number_that_cannot_be_is_refused_by_its_key(train, key, beyond, odd):
    texts = [odd, '', 'nan', '-inf', 'x', 'True', 'None', '9' * 400, '0x1']
    *others, last = train(*(f'--{key}={text}' for text in texts), **{key: beyond})
    kind = 'a whole number' if odd == '1.5' else 'a number'
    assert others == [f'error: --{key}={text}: expected {kind}' for text in texts]
    assert re.match(rf'error: {key}={beyond}(\.0)?: must be ', last)


SETTINGS = [
    ('n_head', [3], 'n_embd=16 must be a multiple of n_head=3'), ('n_embd', [10**14, 10**30], 'n_embd|memory'),
    ('learnig_rate', [1], 'did you mean learning_rate'), ('Batch_size', [1], 'did you mean batch_size'),
    ('zzz', [1], 'zzz=1.*--help'), ('__file__', ['x'], '__file__=x'), ('bias', ['yes', ''], 'bias=.*True or False'),
    ('device', ['foo', '', 'cuda:x', 'cuda:99', 'cuda:-1', 'CPU', 'meta'], 'device='), ('backend', ['foo'], 'backend='),
    ('dtype', ['float8', '', 'torch.float32'], 'dtype='), ('compile', ['maybe', '', '1'], 'compile=.*True or False'),
    ('init_from', ['', 'folder'], 'init_from='), ('init_from', ['scrach'], 'init_from=scrach.*scratch'),
    ('init_from', ['Resume'], 'init_from=Resume.*resume'), ('dataset', ['', 'gone', '../..', 'a\0b'], 'bin not found'),
    ('resume', ['folder', 'gone', 'file', '', 'a\0b'], 'no checkpoint|out_dir'),
    ('block_size', [10**6, 10**300], 'size=10{6}'), ('wandb_log', ['', True], 'wandb'),
    ('out_dir', ['', 'file', 'file/out', 'x' * 999, 'a\0b', 'o\udcff'], 'out_dir')]


@pytest.mark.parametrize('key, value, sentence', [case for key, values, said in SETTINGS for case in some(
    (key, value, said) for value in values)], ids=named)
def test_a_setting_that_cannot_be_trained_with_is_refused(train, tmp_path, monkeypatch, key, value, sentence):
    (tmp_path / 'folder').mkdir()
    (tmp_path / 'file').touch()
    monkeypatch.setitem(sys.modules, 'wandb', None)  # as if it were not installed
    [said] = train(**{'n_head': 1, **({'init_from': 'resume', 'out_dir': value} if key == 'resume' else {key: value})})
    assert re.search(sentence, said)


@pytest.mark.parametrize('source, sentence', some([
    ('max_iters = = 3', 'line 1: SyntaxError'), ('\nmax_iters = 1 / 0', 'line 2: ZeroDivision'), ('zzz = 3', 'zzz'),
    ('exit()', ''), ('import sys\nsys.exit("not here")', 'not here'), ('raise SystemExit(0)', ''), ('(' * 999, ''),
    ('def f(): f()\nf()', 'RecursionError'), ('import nowhere', 'ModuleNotFound'), ('\0', ''), ('\udcff', ''),
    ('batch_sise = 3', 'batch_sise .*batch_size'), ('b = "\\ud800"', 'b is not a key'), ('from math import pi', 'pi'),
    *((line, line.partition(' =')[0]) for line in (
        'max_iters = "3"', 'max_iters = 1.5', 'max_iters = None', 'max_iters = print', 'learning_rate = "1e-3"',
        'learning_rate = float("nan")', 'dropout = 1j', 'dataset = 3', 'compile = "yes"', 'wandb_project = 3',
        'wandb_run_name = None', 'batch_size = lambda: 3', 'batch_size = [12]', 'device = None'))]), ids=named)
def test_a_config_file_that_cannot_be_is_refused_by_its_name(train, tmp_path, source, sentence):
    (tmp_path / 'odd.py').write_bytes(source.encode('utf-8', 'surrogateescape'))
    [said] = train('odd.py')
    assert re.search(f'odd.py.*{sentence}', said)


@pytest.mark.parametrize('script, keys, others', [
    ('train.py', dict(n_layer='x', dropout=2, n_embd=5, dtype='float8', learnig_rate=1, device='foo'), ['--n_head=2']),
    ('sample.py', dict(top_k='x', top_p=2, temperature='nan', strat='a', device='foo', dtype='x'), ['--output=o'])])
def test_all_that_is_wrong_with_a_command_line_is_said_at_once(tmp_path, monkeypatch, script, keys, others):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'odd.py').write_text('seed = 1 / 0', encoding='utf-8')
    ended = run_here(script, 'gone.py', 'odd.py', '--seed', *others, **keys)
    wanted = ['gone.py: ', 'odd.py, line 1: ', '--seed: ', *(f'{key}=' for key in keys)]
    lines = ended.stderr.splitlines()
    assert ended.returncode == 2 and all(line.startswith('error: ') for line in lines), ended.stderr
    assert [start for start in wanted if sum(start in line for line in lines) != 1] == []
    assert len(lines) == len(wanted) + (script == 'sample.py')  # output goes together with prompts
    assert os.listdir(tmp_path) == ['odd.py']
