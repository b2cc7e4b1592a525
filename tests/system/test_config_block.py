"""plaingpt/system/config_block.py: keys, types and rules are what the script's text says."""
import re

import pytest
from conftest import ROOT

from plaingpt.system.config_block import Rule, parse_rule, read_block


def scripts():
    """The scripts of the repository that have a configuration block."""
    paths = [*ROOT.glob('*.py'), *ROOT.glob('data/**/*.py')]
    return sorted(str(path.relative_to(ROOT)) for path in paths
                  if '\nfrom configurator import configure' in path.read_text(encoding='utf-8'))


def block_of(script):
    """{name: Key} of a script of the repository, whose block is run and nothing after it."""
    source = (ROOT / script).read_text(encoding='utf-8')
    head = re.split(r'^(?:config, given = |if __name__ )', source, flags=re.MULTILINE)[0]
    namespace = {'__file__': str(ROOT / script), '__name__': 'block'}
    exec(compile(head, script, 'exec'), namespace)
    return read_block(source, namespace)


def key_of(line):
    """The Key of one line of a block."""
    namespace = {'__file__': 'script.py'}
    exec(line, namespace)
    [key] = read_block(line, namespace).values()
    return key


# ---- the scripts of the repository ----

def test_the_scripts_with_a_block_are_found():
    known = {'train.py', 'sample.py', 'bench.py', 'data/openwebtext/prepare.py'}
    assert known <= set(scripts())


@pytest.mark.parametrize('script', scripts())
def test_every_rule_of_a_script_can_be_parsed_and_allows_the_default(script):
    keys = block_of(script)
    rules = 0
    for name, key in keys.items():
        if key.rule:
            rules += 1
            assert key.default is None or key.rule.allows(key.default), name
    assert rules >= 2


@pytest.mark.parametrize('script', scripts())
def test_every_key_of_a_script_is_explained(script):
    for name, key in block_of(script).items():
        assert key.comment or key.rule, name


# ---- keys ----

@pytest.mark.parametrize('line, kind, nullable', [
    ("out_dir = 'out'", str, False),
    ('steps = 3', int, False),
    ('rate = 0.5', float, False),
    ('log = True', bool, False),
    ('top_k: int | None = 200', int, True),
    ('top_p: float | None = None', float, True),
    ('compile: bool | None = None', bool, True),
    ('unfreeze: dict | None = None', dict, True),
])
def test_the_type_of_a_key_is_that_of_its_default_or_annotation(line, kind, nullable):
    key = key_of(line)
    assert key.type is kind
    assert key.nullable is nullable


def test_a_key_without_a_type_is_an_error_of_the_script():
    with pytest.raises(ValueError, match=r'^script\.py, key top_k: needs one type, .* int \| None'):
        key_of('top_k = None')


def test_constants_private_names_and_what_follows_the_call_are_not_keys():
    source = ('from math import pi\nCONSTANT = 1\n_private = 2\nlayers = [1, 2]\nfirst = 3\n'
              'def function():\n    inner = 4\n'
              'config, given = configure(globals())\nafter = 5\n')
    namespace = {'__file__': 'script.py', 'configure': lambda namespace: ({}, set())}
    exec(source, namespace)
    assert list(read_block(source, namespace)) == ['first']


def test_a_heading_is_the_comment_line_above_a_key():
    source = '# Data\nfirst = 1  # one\nsecond = 2\n\n# Model\n\nthird = 3  # three\n'
    namespace = {'__file__': 'script.py'}
    exec(source, namespace)
    keys = read_block(source, namespace)
    assert [key.heading for key in keys.values()] == ['Data', '', '']
    assert [key.comment for key in keys.values()] == ['one', '', 'three']


# ---- rules ----

@pytest.mark.parametrize('text, allowed, forbidden, demand', [
    ('>= 1', [1, 1.0, 7], [0, 0.5, -3], '>= 1'),
    ('> 0', [1e-9, 3], [0, -1], '> 0'),
    ('>= -2.5', [-2.5, 0], [-2.6], '>= -2.5'),
    ('> 1e-3', [0.01], [1e-3], '> 1e-3'),
    ('[0, 1)', [0, 0.5], [1, -0.1], 'in [0, 1)'),
    ('(0, 1]', [0.1, 1], [0, 1.1], 'in (0, 1]'),
    ('(0, 1)', [0.5], [0, 1], 'in (0, 1)'),
    ('[0, 4294967295]', [0, 2 ** 32 - 1], [2 ** 32, -1], 'in [0, 4294967295]'),
    ("'auto' | 'float32'", ['auto', 'float32'], ['', 'auto '], "one of 'auto', 'float32'"),
    ("'' | 'hf'", ['', 'hf'], ['h'], "one of '', 'hf'"),
])
def test_a_rule_allows_what_it_states(text, allowed, forbidden, demand):
    rule = parse_rule(text)
    assert all(rule.allows(value) for value in allowed)
    assert not any(rule.allows(value) for value in forbidden)
    assert rule.demand == demand


@pytest.mark.parametrize('comment', [
    '{}', '{>= 1', '{>=1} steps', '{at least 1} step', '{< 1}', '{[0, 1} share', '{0, 1}',
    '{[0 1)}', "{'a'}", "{'a' | b}", "{'a', 'b'}", '{first step: trainable} of a run'])
def test_a_rule_that_cannot_be_parsed_is_an_error_that_names_script_and_key(comment):
    with pytest.raises(ValueError, match=r'^script\.py, key dropout: the (rule|comment) .*\{'):
        key_of(f'dropout = 0.0  # {comment}')


@pytest.mark.parametrize('line', [
    "steps = 3  # {'a' | 'b'}", "name = 'a'  # {>= 1}", 'log = True  # {>= 0}',
    'unfreeze: dict | None = None  # {>= 0}'])
def test_a_rule_that_does_not_fit_the_type_of_its_key_is_an_error(line):
    with pytest.raises(ValueError, match='does not fit the type'):
        key_of(line)


@pytest.mark.parametrize('prose', [
    '', 'steps', '> 5 steps', ', at least 1 and in [3, 4]', "'a' | 'b'", '{>= 3} of them'])
def test_rewording_the_prose_after_a_rule_changes_nothing(prose):
    rule = Rule('>= 1', '>= 1', low=1, includes_low=True)
    key = key_of(f'steps = 3  # {{>= 1}} {prose}')
    assert key.rule == rule
    assert key.comment == prose


@pytest.mark.parametrize('prose', [
    '>= 5 steps', "'a' | 'b', or another", '[0, 1) of the steps', 'steps, {>= 5}', ''])
def test_only_a_comment_that_begins_with_a_brace_has_a_rule(prose):
    key = key_of(f'steps = 3  # {prose}')
    assert key.rule is None
    assert key.comment == prose
