"""Configuration: keys, flags, files and the report of everything that is wrong with them."""
import re
import runpy
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from configurator import configure

SCRIPT = '''from configurator import configure
CONSTANT = 1
_private = 2
out_dir = 'out'                 # folder
start = '\\n'                   # the prompt
max_iters = 100                 # >= 0 steps
batch_size = 12                 # >= 1 sequences
shift = 0                       # any number of tokens
learning_rate = 6e-4            # > 0, the highest
dropout = 0.0                   # [0, 1) of the activations
top_p: float | None = None      # (0, 1], None: all
top_k: int | None = 200         # likeliest tokens
device = 'mps'                  # where to run
dtype = 'auto'                  # 'auto' | 'float32' | 'float16'
wandb_log = False               # log there
compile: bool | None = None     # faster
def problems():
    if wandb_log and compile: yield f'wandb_log={wandb_log} does not go with compile={compile}'
config, given = configure(globals())
after = 'no key'
'''


@pytest.fixture
def script(tmp_path, monkeypatch):
    """script(*arguments): the globals of SCRIPT, in the folder house, run with these from the folder cwd."""
    house, cwd = tmp_path / 'house', tmp_path / 'cwd'
    house.mkdir(), cwd.mkdir()
    (house / 'script.py').write_text(SCRIPT, encoding='utf-8')
    monkeypatch.chdir(cwd)
    def run_script(*arguments, path=house / 'script.py'):
        monkeypatch.setattr(sys, 'argv', [str(path), *arguments])
        return runpy.run_path(str(path), run_name='__main__')
    return run_script


@pytest.fixture
def report(script, capsys):
    """report(*arguments): the sentences with which SCRIPT refuses them."""
    def refuse(*arguments):
        with pytest.raises(SystemExit) as exit:
            script(*arguments)
        printed = capsys.readouterr()
        lines = printed.err.splitlines()
        assert (exit.value.code, printed.out) == (2, '')
        assert lines and all(line.startswith('error: ') for line in lines), printed.err
        return [line.removeprefix('error: ') for line in lines]
    return refuse


def file(text, path='config.py'):
    """The absolute path of a config file with this text."""
    Path(path).write_text(text, encoding='utf-8')
    return str(Path(path).resolve())


@pytest.mark.parametrize('name, meanings', [
    ('learning_rate', {'1': 1.0, '1e-3': 0.001}), ('dropout', {'0': 0.0}), ('max_iters', {'1e3': 1000, '2.0': 2}),
    ('shift', {'-3': -3, '+3': 3, '9007199254740993': 2 ** 53 + 1}), ('out_dir', {'2024': '2024', 'C:\\x': 'C:\\x'}),
    ('start', {t: t for t in ('42', 'a=b', '=', '', 'None', 'True', "'q'", '--help me', '-h', ' ä\n')}),
    ('top_k', {'None': None, '5': 5, '5e0': 5}), ('top_p', {'None': None, '1': 1.0}),
    ('wandb_log', {'True': True, 'true': True, 'FALSE': False}), ('compile', {'None': None, 'false': False})])
def test_a_flag_gives_the_value_in_the_type_of_its_key(script, name, meanings):
    for text, value in meanings.items():
        result = script(f'--{name}={text}')
        assert (result[name], type(result[name]), result['given']) == (value, type(value), {name})
        assert result['config'][name] is result[name]


@pytest.mark.parametrize('name, texts, expected', [
    ('max_iters', ('1.5', '', 'True', 'inf', 'nan'), 'a whole number'), ('shift', ('9' * 400,), 'a whole number'),
    ('dropout', ('None', 'x', 'nan', 'inf', '1e999'), 'a number'), ('top_k', ('1.5', 'none'), 'a whole number or None'),
    ('wandb_log', ('1', 'yes', 'None', ''), 'True or False')])
def test_a_flag_of_another_type_is_refused_with_the_one_expected(report, name, texts, expected):
    flags = [f'--{name}={text}' for text in texts]
    assert report(*flags) == [f'{flag}: expected {expected}' for flag in flags]


@pytest.mark.parametrize('line, value', [('learning_rate = 1', 1.0), ('max_iters = 1e3', 1000), ('top_k = None', None),
                                         ("out_dir = '7'", '7'), ('batch_size = 12', 12), ('wandb_log = False', False)])
def test_a_file_gives_the_value_in_the_type_of_its_key_even_the_default(script, line, value):
    result, name = script(file(line)), line.partition(' ')[0]
    assert (result[name], type(result[name]), result['given']) == (value, type(value), {name})


@pytest.mark.parametrize('line', [
    'max_iters = 1.5', 'max_iters = True', "max_iters = '3'", 'max_iters = None', 'max_iters = 10 ** 400',
    "learning_rate = float('nan')", "learning_rate = float('inf')", 'learning_rate = 10 ** 400', 'top_k = [3]',
    'wandb_log = 1', "wandb_log = 'True'", 'out_dir = 2024', 'out_dir = None', 'dropout = lambda step: 0.1'])
def test_a_file_value_of_another_type_is_refused(report, line):
    [sentence] = report(file(line))
    assert f'config.py: {line.partition(" ")[0]} = ' in sentence and ': expected ' in sentence


@pytest.mark.parametrize('name, texts, rule', [
    ('max_iters', '-1', '>= 0'), ('learning_rate', '0 -1', '> 0'), ('dropout', '1 -0.1', '[0, 1)'),
    ('top_p', '0 1.1', '(0, 1]'), ('dtype', "'float17' ''", "'auto' | 'float32' | 'float16'")])
def test_a_value_outside_what_the_comment_allows_is_refused(report, name, texts, rule):
    for text in texts.split():
        for argument in f'--{name}=' + text.strip("'"), file(f'{name} = {text}'):
            [sentence] = report(argument)
            assert sentence.startswith(f'{name}=') and sentence.endswith(rule)


def test_unknown_names_are_refused_with_the_nearest_key(report):
    for name, offer in {'learnig_rate': 'learning_rate?', 'Compile': 'compile?', 'zzz': '--help', '': '--help',
                        '__name__': '', '_private': '', 'CONSTANT': '', 'after': '', 'config': ''}.items():
        [sentence] = report(f'--{name}=3')
        assert sentence.startswith(f'--{name}=3: there is no key ') and offer in sentence
        if name.isidentifier() and name[0] != '_':
            path = file(f'{name} = 3')
            [sentence] = report(path)
            assert sentence.startswith(f'{path}: {name} is no key: ') and offer in sentence


def test_imports_functions_and_underscored_names_in_a_file_are_no_keys(script):
    result = script(file('import math\nfrom math import floor\n_half = 4\ndef twice(x):\n    return 2 * x\n'
                         'max_iters = floor(math.pi) * twice(_half)'))
    assert (result['max_iters'], result['given']) == (24, {'max_iters'})


def test_later_files_and_flags_win(script):
    one, two = file('max_iters = 1000\ndropout = 0.1', 'one.py'), file('max_iters = 2000', 'two.py')
    assert script(one, two)['config'].items() >= {'max_iters': 2000, 'dropout': 0.1, 'batch_size': 12}.items()
    assert script(two, one)['max_iters'] == script('--max_iters=3000', one)['max_iters'] == 1000
    assert script(one, '--max_iters=3000', '--max_iters=4000')['max_iters'] == 4000
    assert script(one, file('max_iters *= batch_size'), '--batch_size=10')['max_iters'] == 12000


def test_a_file_is_found_in_the_working_directory_and_then_beside_the_script(script):
    file('max_iters = 500', '../house/a.py')
    assert script('a.py')['max_iters'] == 500
    file('max_iters = 600', 'a.py')
    assert script('a.py')['max_iters'] == 600


@pytest.mark.parametrize('argument, offer', [
    ('--compile', '--compile=True'), ('--max_iters', '--max_iters='), ('config/none.py', '--key=value'),
    ('max_iters=3', '--key=value'), ('-max_iters=3', '--key=value'), ('.', '--key=value'), ('', '--key=value')])
def test_what_is_neither_file_nor_flag_with_a_value_is_refused(report, argument, offer):
    [sentence] = report(argument)
    assert sentence.startswith(f'{argument}: ') and offer in sentence


@pytest.mark.parametrize('arguments, device, max_iters', [
    ('fit.py', 'mps', 7000), ('fit.py --device=cpu --max_iters=60', 'cpu', 60), ('--device=cpu fit.py', 'cpu', 50),
    ('--device=cuda fit.py --device=cpu', 'cpu', 50), ('fit.py --device=cpu --device=cuda', 'cuda', 7000),
    ('--device=cuda cpu.py fit.py', 'cpu', 50), ('cpu.py fit.py --device=cuda', 'cuda', 7000)])
def test_a_file_sees_the_device_that_the_run_will_have(script, arguments, device, max_iters):
    file("device = 'cpu'", 'cpu.py')
    file("max_iters = 50 if device == 'cpu' else 7000", 'fit.py')
    result = script(*arguments.split())
    assert (result['device'], result['max_iters']) == (device, max_iters)


@pytest.mark.parametrize('text, line, kind', [
    ('max_iters = 5\nbatch_size = = 3\n', 2, 'SyntaxError'), ('\n\nmax_iters = 1 / 0\n', 3, 'ZeroDivisionError'),
    ('def f():\n    pass\nf(1)\n', 3, 'TypeError'), ('batch_size = batch * 2', 1, 'NameError'),
    ("\nraise ValueError('two\\nlines')", 2, 'ValueError'), ('\n\nimport json; json.loads("?")', 3, 'JSONDecodeError')])
def test_an_error_in_a_file_names_the_file_and_the_line(report, text, line, kind):
    [sentence] = report(file(text))
    assert f'config.py, line {line}: {kind}' in sentence


def test_all_problems_are_reported_at_once_a_line_each(report):
    file("bacth_size = 3\nmax_iters = 'x'")
    sentences = report(*'config.py --device --nothing=1 --dropout=2 --compile=True gone.py --wandb_log=True'.split())
    parts = ("max_iters = 'x'", 'bacth_size', '--device', '--nothing=1', 'gone.py', 'dropout=2.0', ' does not go with ')
    assert [part in sentence for part, sentence in zip(parts, sentences, strict=True)] == [True] * 7


def test_other_ranks_leave_the_report_to_the_first(script, capsys, monkeypatch):
    monkeypatch.setattr('plaingpt.system.messages.LOCAL_RANK', 1)
    monkeypatch.setattr('plaingpt.system.messages.time.sleep', sys.exit)  # torchrun ends them meanwhile
    with pytest.raises(SystemExit):
        script('--nothing=1')
    assert capsys.readouterr() == ('', '')


def namespace_of(name):
    """The globals of a script of the repository just before it configures itself."""
    head, call, _ = (ROOT / name).read_text(encoding='utf-8').partition('config, given = configure(globals())')
    assert call, name
    namespace = {'__file__': str(ROOT / name), '__name__': name}
    exec(compile(head, name, 'exec'), namespace)
    return namespace


@pytest.mark.parametrize('name, flag', [('train.py', '--help'), ('sample.py', '-h'), ('bench.py', '--help')])
def test_help_lists_every_key_with_default_and_comment(script, name, flag, capsys):
    with pytest.raises(SystemExit) as exit:
        script('--nothing=1', flag, path=ROOT / name)
    printed = capsys.readouterr()
    assert (exit.value.code, printed.err) == (0, '')
    block = (ROOT / name).read_text(encoding='utf-8').partition('# ---- configuration ----')[2].partition('\n\n')[0]
    keys, namespace = re.findall(r'^([a-z]\w*)(?:: [\w |]+)? = .*? +# (.+)$', block, re.MULTILINE), namespace_of(name)
    assert len(keys) == len(re.findall(r'^[a-z]', block, re.MULTILINE)) > 10
    for key, comment in keys:
        line = re.escape(f'  --{key}={namespace[key]!r}') + ' +' + re.escape(comment)
        assert re.search(f'^{line}$', printed.out, re.MULTILINE), line


def test_no_heads_are_refused_in_a_sentence(capsys):
    with pytest.raises(SystemExit):
        configure(namespace_of('train.py'), ['--n_head=0'])
    assert capsys.readouterr().err == 'error: n_head=0: allowed is >= 1\n'


BABY = dict(eval_interval=250, log_interval=10, always_save_checkpoint=False, gradient_accumulation_steps=1,
            learning_rate=1e-3, min_lr=1e-4, beta2=0.99, warmup_iters=100, wandb_project='shakespeare-char')
CONFIGS = {
    'train_shakespeare_char.py --device=cuda': BABY | dict(
        eval_iters=200, batch_size=64, block_size=256, n_layer=6, n_head=6, n_embd=384, dropout=0.2, max_iters=5000),
    'train_shakespeare_char.py --device=cpu': BABY | dict(
        eval_iters=20, batch_size=12, block_size=64, n_layer=4, n_head=4, n_embd=128, dropout=0.0, max_iters=2000),
    'train_shakespeare_char_modern.py --device=cuda': dict(
        optimizer='muon', position='rope', tied=False, n_layer=6, n_head=6, n_embd=384, block_size=256, dropout=0.2),
    'train_shakespeare_char_modern.py --device=cpu': dict(
        optimizer='muon', position='rope', tied=False, n_layer=4, n_head=4, n_embd=128, block_size=64, dropout=0.0),
    'train_gpt2_modern.py': dict(optimizer='muon', position='rope', schedule='wsd', batch_size=12, block_size=1024,
                                 gradient_accumulation_steps=40),
    'finetune_lora.py': dict(init_from='gpt2', lora_rank=8, early_stop=3, dataset='shakespeare'),
    'train_gpt2.py': dict(wandb_log=True, batch_size=12, block_size=1024, gradient_accumulation_steps=40,
                          max_iters=600000, eval_interval=1000, weight_decay=0.1),
    'finetune_shakespeare.py': dict(init_from='gpt2-xl', batch_size=1, gradient_accumulation_steps=32, max_iters=20,
                                    learning_rate=3e-5, decay_lr=False, eval_interval=5, always_save_checkpoint=False),
    **{f'eval_{name}.py': dict(batch_size=8, eval_iters=500, eval_only=True, init_from=name.replace('_', '-'))
       for name in ('gpt2', 'gpt2_medium', 'gpt2_large', 'gpt2_xl')}}


def test_every_file_in_config_has_the_values_of_the_reference(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr('plaingpt.planning.plan.check_device', lambda device: None)  # as if all of them were here
    assert {path.name for path in (ROOT / 'config').glob('*.py')} == {line.split()[0] for line in CONFIGS}
    for line, expected in CONFIGS.items():
        config, _ = configure(namespace_of('train.py'), f'config/{line}'.split())
        assert {key: config[key] for key in expected} == expected, line


@pytest.mark.parametrize('extra', ['', "config_keys = [k for k in globals() if not k.startswith('_')]\n"])
def test_a_script_of_nanogpt_that_execs_the_configurator_works(extra, script, monkeypatch):
    path = file("import time\nbatch_size = 12\ndtype = 'float16'\ncompile = True # use PyTorch 2.0\n" + extra +
                "exec(open('configurator.py').read()) # overrides\nafter = 1", 'nano.py')
    config = file('batch_size = 3')
    monkeypatch.chdir(ROOT)
    result = script(config, '--compile=False', path=path)
    assert (result['batch_size'], result['compile'], result['dtype']) == (3, False, 'float16')
