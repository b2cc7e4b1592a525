"""Configuration: keys, flags, files and the report of everything that is wrong with them."""
import re
import runpy
import sys
from pathlib import Path

import pytest
from conftest import ROOT, run, succeeded

from configurator import configure

SCRIPT = '''"""Trains in a test."""
from configurator import configure
CONSTANT = 1
_private = 2
# Output
out_dir = 'out'                 # folder
start = '\\n'                   # the prompt
# Training
max_iters = 100                 # {>= 0} steps
batch_size = 12                 # {>= 1} sequences
shift = 0                       # any number of tokens
learning_rate = 6e-4            # {> 0} peak
dropout = 0.0                   # {[0, 1)} share of the activations
top_p: float | None = None      # {(0, 1]} None: all
top_k: int | None = 200         # likeliest tokens
device = 'mps'                  # where to run
dtype = 'auto'                  # {'auto' | 'float32' | 'float16'}
wandb_log = False               # log there
compile: bool | None = None     # faster
unfreeze: dict | None = None    # by step
def problems():
    if wandb_log and compile: yield f'wandb_log={wandb_log} does not go with compile={compile}'
config, given = configure(globals())
after = 'no key'
'''


@pytest.fixture
def script(tmp_path, monkeypatch):
    """script(*arguments): the globals of SCRIPT after it has run, started from another folder."""
    house = tmp_path / 'house'
    working_directory = tmp_path / 'working_directory'
    house.mkdir()
    working_directory.mkdir()
    path_of_script = house / 'script.py'
    path_of_script.write_text(SCRIPT, encoding='utf-8')
    monkeypatch.chdir(working_directory)

    def run_script(*arguments, path=path_of_script):
        monkeypatch.setattr(sys, 'argv', [str(path), *arguments])
        return runpy.run_path(str(path), run_name='__main__')

    return run_script


@pytest.fixture
def report(script, capsys):
    """report(*arguments): the sentences with which SCRIPT refuses them."""
    def refuse(*arguments):
        with pytest.raises(SystemExit) as ended:
            script(*arguments)
        printed = capsys.readouterr()
        assert ended.value.code == 2
        assert printed.out == ''
        lines = printed.err.splitlines()
        assert lines
        assert all(line.startswith('error: ') for line in lines), printed.err
        return [line.removeprefix('error: ') for line in lines]

    return refuse


def config_file(text, path='config.py'):
    """The absolute path of a config file with this text."""
    Path(path).write_text(text, encoding='utf-8')
    return str(Path(path).resolve())


# ---- flags ----

ODD_TEXTS = ('42', 'a=b', '=', '', 'None', 'True', "'q'", '--help me', '-h', ' ä\n')


@pytest.mark.parametrize('name, meanings', [
    ('learning_rate', {'1': 1.0, '1e-3': 0.001}),
    ('dropout', {'0': 0.0}),
    ('max_iters', {'1e3': 1000, '2.0': 2}),
    ('shift', {'-3': -3, '+3': 3, '9007199254740993': 2 ** 53 + 1}),
    ('out_dir', {'2024': '2024', 'C:\\x': 'C:\\x'}),
    ('start', {text: text for text in ODD_TEXTS}),
    ('top_k', {'None': None, '5': 5, '5e0': 5}),
    ('top_p', {'None': None, '1': 1.0}),
    ('wandb_log', {'True': True, 'true': True, 'FALSE': False}),
    ('compile', {'None': None, 'false': False}),
    ('unfreeze', {'None': None, "{0: 'head', 9: 'all'}": {0: 'head', 9: 'all'}}),
])
def test_a_flag_gives_the_value_in_the_type_of_its_key(script, name, meanings):
    for text, value in meanings.items():
        result = script(f'--{name}={text}')
        assert result[name] == value
        assert type(result[name]) is type(value)
        assert result['given'] == {name}
        assert result['config'][name] is result[name]


@pytest.mark.parametrize('name, texts, expected', [
    ('max_iters', ('1.5', '', 'True', 'inf', 'nan', 'None'), 'a whole number'),
    ('shift', ('9' * 400, '9' * 5000), 'a whole number'),
    ('dropout', ('None', 'x', 'nan', 'inf', '1e999'), 'a number'),
    ('top_k', ('1.5', 'none'), 'a whole number or None'),
    ('wandb_log', ('1', 'yes', 'None', ''), 'True or False'),
    ('compile', ('maybe',), 'True or False or None'),
    ('unfreeze', ('1', '[', 'head', '{' * 999), "a dict such as {0: 'head', 1000: 'all'} or None"),
])
def test_a_flag_of_another_type_is_refused_with_the_one_expected(report, name, texts, expected):
    flags = [f'--{name}={text}' for text in texts]
    assert report(*flags) == [f'{flag}: expected {expected}' for flag in flags]


@pytest.mark.parametrize('argument, offer', [
    ('--compile', '--compile=True'),
    ('--max_iters', '--max_iters='),
    ('config/none.py', '--key=value'),
    ('max_iters=3', '--key=value'),
    ('-max_iters=3', '--key=value'),
    ('.', '--key=value'),
    ('', '--key=value'),
])
def test_an_argument_that_is_neither_a_file_nor_a_full_flag_is_refused(report, argument, offer):
    [sentence] = report(argument)
    assert sentence.startswith(f'{argument}: ')
    assert offer in sentence


# ---- config files ----

@pytest.mark.parametrize('line, value', [
    ('learning_rate = 1', 1.0),
    ('max_iters = 1e3', 1000),
    ('top_k = None', None),
    ("out_dir = '7'", '7'),
    ('batch_size = 12', 12),  # the default
    ('wandb_log = False', False),  # the default
])
def test_a_file_gives_the_value_in_the_type_of_its_key_even_the_default(script, line, value):
    name = line.partition(' ')[0]
    result = script(config_file(line))
    assert result[name] == value
    assert type(result[name]) is type(value)
    assert result['given'] == {name}


@pytest.mark.parametrize('line', [
    'max_iters = 1.5', 'max_iters = True', "max_iters = '3'", 'max_iters = None',
    'max_iters = 10 ** 400', "learning_rate = float('nan')", "learning_rate = float('inf')",
    'learning_rate = 10 ** 400', 'top_k = [3]', 'wandb_log = 1', "wandb_log = 'True'",
    'out_dir = 2024', 'out_dir = None', 'dropout = lambda step: 0.1'])
def test_a_file_with_a_value_of_another_type_is_refused(report, line):
    name = line.partition(' ')[0]
    [sentence] = report(config_file(line))
    assert f'config.py: {name} = ' in sentence
    assert ': expected ' in sentence


def test_imports_functions_and_underscored_names_in_a_file_are_not_keys(script):
    result = script(config_file('import math\n'
                                'from math import floor\n'
                                '_half = 4\n'
                                'def twice(x):\n'
                                '    return 2 * x\n'
                                'max_iters = floor(math.pi) * twice(_half)\n'))
    assert result['max_iters'] == 24
    assert result['given'] == {'max_iters'}


def test_later_files_and_flags_win(script):
    one = config_file('max_iters = 1000\ndropout = 0.1', 'one.py')
    two = config_file('max_iters = 2000', 'two.py')
    expected = {'max_iters': 2000, 'dropout': 0.1, 'batch_size': 12}
    assert script(one, two)['config'].items() >= expected.items()
    assert script(two, one)['max_iters'] == 1000
    assert script('--max_iters=3000', one)['max_iters'] == 1000
    assert script(one, '--max_iters=3000', '--max_iters=4000')['max_iters'] == 4000


def test_a_file_sees_the_values_set_before_it(script):
    one = config_file('max_iters = 1000', 'one.py')
    product = config_file('max_iters *= batch_size', 'product.py')
    assert script(one, product, '--batch_size=10')['max_iters'] == 12000
    assert script('--batch_size=10', one, product)['max_iters'] == 10000


@pytest.mark.parametrize('arguments, device, max_iters', [
    ('fit.py', 'mps', 7000),
    ('fit.py --device=cpu --max_iters=60', 'cpu', 60),
    ('--device=cpu fit.py', 'cpu', 50),
    ('--device=cuda fit.py --device=cpu', 'cpu', 50),
    ('fit.py --device=cpu --device=cuda', 'cuda', 7000),
    ('--device=cuda cpu.py fit.py', 'cpu', 50),
    ('cpu.py fit.py --device=cuda', 'cuda', 7000),
])
def test_a_file_sees_the_device_that_the_run_will_have(script, arguments, device, max_iters):
    config_file("device = 'cpu'", 'cpu.py')
    config_file("max_iters = 50 if device == 'cpu' else 7000", 'fit.py')
    result = script(*arguments.split())
    assert result['device'] == device
    assert result['max_iters'] == max_iters


def test_a_file_is_found_in_the_working_directory_and_then_beside_the_script(script):
    config_file('max_iters = 500', '../house/a.py')
    assert script('a.py')['max_iters'] == 500
    config_file('max_iters = 600', 'a.py')
    assert script('a.py')['max_iters'] == 600


@pytest.mark.parametrize('text, line, kind', [
    ('max_iters = 5\nbatch_size = = 3\n', 2, 'SyntaxError'),
    ('\n\nmax_iters = 1 / 0\n', 3, 'ZeroDivisionError'),
    ('def f():\n    pass\nf(1)\n', 3, 'TypeError'),
    ('batch_size = batch * 2', 1, 'NameError'),
    ("\nraise ValueError('two\\nlines')", 2, 'ValueError'),
    ('\n\nimport json; json.loads("?")', 3, 'JSONDecodeError'),
])
def test_an_error_in_a_file_names_the_file_and_the_line(report, text, line, kind):
    [sentence] = report(config_file(text))
    assert f'config.py, line {line}: {kind}' in sentence


# ---- mistakes ----

@pytest.mark.parametrize('name, texts, demand', [
    ('max_iters', '-1', '>= 0'),
    ('learning_rate', '0 -1', '> 0'),
    ('dropout', '1 -0.1', 'in [0, 1)'),
    ('top_p', '0 1.1', 'in (0, 1]'),
    ('dtype', "'float17' ''", "one of 'auto', 'float32', 'float16'"),
])
def test_a_value_that_the_rule_forbids_is_refused(report, name, texts, demand):
    for text in texts.split():
        flag = f'--{name}=' + text.strip("'")
        file = config_file(f'{name} = {text}')
        for argument in (flag, file):
            [sentence] = report(argument)
            assert sentence.startswith(f'{name}=')
            assert sentence.endswith(f': must be {demand}')


NEAREST = {
    'learnig_rate': 'learning_rate?',
    'Compile': 'compile?',
    'zzz': '--help',
    '': '--help',
    '__name__': '',
    '_private': '',
    'CONSTANT': '',
    'after': '',
    'config': '',
}


@pytest.mark.parametrize('name, offer', NEAREST.items())
def test_a_flag_for_an_unknown_name_is_refused_with_the_nearest_key(report, name, offer):
    [sentence] = report(f'--{name}=3')
    assert sentence.startswith(f'--{name}=3: there is no key ')
    assert offer in sentence


@pytest.mark.parametrize('name, offer', [
    item for item in NEAREST.items() if item[0].isidentifier() and not item[0].startswith('_')])
def test_a_file_with_an_unknown_name_is_refused_with_the_nearest_key(report, name, offer):
    path = config_file(f'{name} = 3')
    [sentence] = report(path)
    assert sentence.startswith(f'{path}: {name} is not a key: ')
    assert offer in sentence


def test_all_mistakes_are_reported_at_once_one_line_each(report):
    config_file("bacth_size = 3\nmax_iters = 'x'")
    arguments = ['config.py', '--device', '--nothing=1', '--dropout=2', '--compile=True', 'gone.py',
                 '--wandb_log=True']
    expected = ["max_iters = 'x'", 'bacth_size', '--device', '--nothing=1', 'gone.py',
                'dropout=2.0', ' does not go with ']
    sentences = report(*arguments)
    assert len(sentences) == len(expected)
    for part, sentence in zip(expected, sentences, strict=True):
        assert part in sentence


def test_other_ranks_leave_the_report_to_the_first(script, capsys, monkeypatch):
    monkeypatch.setattr('plaingpt.system.messages.LOCAL_RANK', 1)
    # torchrun ends the other ranks while they wait.
    monkeypatch.setattr('plaingpt.system.messages.time.sleep', sys.exit)
    with pytest.raises(SystemExit):
        script('--nothing=1')
    assert capsys.readouterr() == ('', '')


# ---- the scripts and configs of the repository ----

def namespace_of(name):
    """The globals of a script of the repository just before it configures itself."""
    source = (ROOT / name).read_text(encoding='utf-8')
    head, call, _ = source.partition('config, given = configure(globals())')
    assert call, name
    namespace = {'__file__': str(ROOT / name), '__name__': name}
    exec(compile(head, name, 'exec'), namespace)
    return namespace


@pytest.mark.parametrize('name, flag', [
    ('train.py', '--help'), ('sample.py', '-h'), ('bench.py', '--help')])
def test_help_lists_every_key_with_its_default_and_its_comment_as_written(
        script, name, flag, capsys):
    with pytest.raises(SystemExit) as ended:
        script('--nothing=1', flag, path=ROOT / name)
    printed = capsys.readouterr()
    assert ended.value.code == 0
    assert printed.err == ''

    source = (ROOT / name).read_text(encoding='utf-8')
    block = source.partition('# ---- configuration ----')[2].partition('\n\n')[0]
    keys = re.findall(r'^([a-z]\w*)(?:: [\w |]+)? = .*? +# (.+)$', block, re.MULTILINE)
    assert len(keys) == len(re.findall(r'^[a-z]', block, re.MULTILINE)) > 10
    namespace = namespace_of(name)
    for key, comment in keys:
        line = re.escape(f'  --{key}={namespace[key]!r}') + ' +' + re.escape(comment)
        assert re.search(f'^{line}$', printed.out, re.MULTILINE), line


def test_help_shows_docstring_headings_and_rules(script, capsys):
    with pytest.raises(SystemExit):
        script('--help')
    lines = capsys.readouterr().out.splitlines()
    assert lines[:11] == [
        'usage: python script.py [config file …] [--key=value …]',
        '',
        'Trains in a test.',
        '',
        '',
        'Output',
        "  --out_dir='out'         folder",
        "  --start='\\n'            the prompt",
        '',
        'Training',
        '  --max_iters=100         {>= 0} steps',
    ]


def test_a_model_without_heads_is_refused_in_a_sentence(capsys):
    with pytest.raises(SystemExit):
        configure(namespace_of('train.py'), ['--n_head=0'])
    assert capsys.readouterr().err == 'error: n_head=0: must be >= 1\n'


BABY = dict(
    eval_interval=250, log_interval=10, always_save_checkpoint=False, gradient_accumulation_steps=1,
    learning_rate=1e-3, min_lr=1e-4, beta2=0.99, warmup_iters=100, wandb_project='shakespeare-char')
BABY_ON_GPU = dict(n_layer=6, n_head=6, n_embd=384, block_size=256, dropout=0.2)
BABY_ON_CPU = dict(n_layer=4, n_head=4, n_embd=128, block_size=64, dropout=0.0)
MODERN = dict(optimizer='muon', position='rope', tied=False)
EVALUATION = dict(batch_size=8, eval_iters=500, eval_only=True)
CONFIGS = {
    'train_shakespeare_char.py --device=cuda': {
        **BABY, **BABY_ON_GPU, 'eval_iters': 200, 'batch_size': 64, 'max_iters': 5000},
    'train_shakespeare_char.py --device=cpu': {
        **BABY, **BABY_ON_CPU, 'eval_iters': 20, 'batch_size': 12, 'max_iters': 2000},
    'train_shakespeare_char_modern.py --device=cuda': {**MODERN, **BABY_ON_GPU},
    'train_shakespeare_char_modern.py --device=cpu': {**MODERN, **BABY_ON_CPU},
    'train_gpt2_modern.py': dict(
        optimizer='muon', position='rope', schedule='wsd', batch_size=12, block_size=1024,
        gradient_accumulation_steps=40),
    'finetune_lora.py': dict(
        init_from='gpt2', lora_rank=8, early_stop=3, dataset='shakespeare'),
    'finetune_smollm2.py': dict(
        init_from='data/smollm2/SmolLM2-135M-Instruct.Q4_1.gguf', lora_rank=8, dataset='smollm2'),
    'train_gpt2.py': dict(
        wandb_log=True, batch_size=12, block_size=1024, gradient_accumulation_steps=40,
        max_iters=600000, eval_interval=1000, weight_decay=0.1),
    'finetune_shakespeare.py': dict(
        init_from='gpt2-xl', batch_size=1, gradient_accumulation_steps=32, max_iters=20,
        learning_rate=3e-5, decay_lr=False, eval_interval=5, always_save_checkpoint=False),
    'eval_gpt2.py': {**EVALUATION, 'init_from': 'gpt2'},
    'eval_gpt2_medium.py': {**EVALUATION, 'init_from': 'gpt2-medium'},
    'eval_gpt2_large.py': {**EVALUATION, 'init_from': 'gpt2-large'},
    'eval_gpt2_xl.py': {**EVALUATION, 'init_from': 'gpt2-xl'},
}


def test_every_file_in_config_is_tested_below():
    assert {path.name for path in (ROOT / 'config').glob('*.py')} == {
        line.split()[0] for line in CONFIGS}


@pytest.mark.parametrize('line, expected', CONFIGS.items(), ids=list(CONFIGS))
def test_a_file_in_config_has_the_values_of_the_reference(monkeypatch, tmp_path, line, expected):
    monkeypatch.chdir(tmp_path)
    # As if this machine had all devices.
    monkeypatch.setattr('plaingpt.planning.plan.check_device', lambda device: None)
    config, _ = configure(namespace_of('train.py'), f'config/{line}'.split())
    assert {key: config[key] for key in expected} == expected


# ---- configurator.py itself, run or executed ----

@pytest.mark.parametrize('arguments', [[], ['--help']])
def test_run_by_itself_it_explains_how_to_write_a_block(tmp_path, arguments):
    explanation = succeeded(run('configurator.py', *arguments, cwd=tmp_path))
    assert 'config, given = configure(globals())' in explanation
    assert '{[0, 1)}' in explanation


NANOGPT_SCRIPT = '''
import time
batch_size = 12
dtype = 'float16'
compile = True # use PyTorch 2.0
{config_keys}
exec(open('configurator.py').read()) # overrides
print(batch_size, compile, dtype)
after = 1
'''
CONFIG_KEYS = "config_keys = [k for k in globals() if not k.startswith('_')]"


@pytest.mark.parametrize('config_keys', ['', CONFIG_KEYS])
def test_a_script_of_nanogpt_that_execs_the_configurator_works(
        script, monkeypatch, config_keys):
    path = config_file(NANOGPT_SCRIPT.format(config_keys=config_keys), 'nano.py')
    config = config_file('batch_size = 3')
    monkeypatch.chdir(ROOT)
    result = script(config, '--compile=False', path=path)
    assert (result['batch_size'], result['compile'], result['dtype']) == (3, False, 'float16')


def test_a_script_of_nanogpt_works_as_a_process_too(tmp_path):
    """Its __name__ is '__main__', as that of `python configurator.py`."""
    script = tmp_path / 'nano.py'
    script.write_text(NANOGPT_SCRIPT.format(config_keys=CONFIG_KEYS), encoding='utf-8')
    ended = run(script, batch_size=3, compile=False, cwd=ROOT, env={'PYTHONPATH': str(ROOT)})
    assert succeeded(ended) == '3 False float16\n'
