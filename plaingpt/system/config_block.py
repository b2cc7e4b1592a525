"""
The configuration block of a script: its keys, their types, and the values that each key allows.

configurator.py explains how to write a block. This module reads it from the script's source, since
comments and headings are not in the script's globals.
"""
import ast
import io
import math
import re
import sys
import tokenize
from dataclasses import dataclass


# ---- rules ----
@dataclass(frozen=True)
class Rule:
    """The values that a key allows: numbers from low to high, or one of several texts."""
    text: str      # as it stands between the braces
    demand: str    # for the sentence 'key=value: must be …'
    low: float = -math.inf
    high: float = math.inf
    includes_low: bool = False
    includes_high: bool = False
    choices: tuple = ()

    def allows(self, value):
        if self.choices:
            return value in self.choices
        above = value > self.low or (self.includes_low and value == self.low)
        below = value < self.high or (self.includes_high and value == self.high)
        return above and below


NUMBER = r'-?\d+(?:\.\d+)?(?:e-?\d+)?'
LOWER_BOUND = re.compile(rf'(>=|>) ({NUMBER})')
INTERVAL = re.compile(rf'([\[(])({NUMBER}), ({NUMBER})([\])])')
CHOICES = re.compile(r"'[^']*'( \| '[^']*')+")


def parse_rule(text):
    """The Rule that a text without its braces stands for. ValueError if it is none."""
    bound = LOWER_BOUND.fullmatch(text)
    if bound:
        sign, low = bound.groups()
        return Rule(text, text, low=float(low), includes_low=sign == '>=')
    interval = INTERVAL.fullmatch(text)
    if interval:
        opening, low, high, closing = interval.groups()
        return Rule(text, f'in {text}', low=float(low), high=float(high),
                    includes_low=opening == '[', includes_high=closing == ']')
    if CHOICES.fullmatch(text):
        choices = tuple(re.findall(r"'([^']*)'", text))
        return Rule(text, f'one of {text.replace(" |", ",")}', choices=choices)
    raise ValueError(f'the rule {{{text}}} cannot be parsed: write it as {{>= 1}}, {{[0, 1)}} or '
                     "{'a' | 'b'}")


def split_comment(comment):
    """(Rule or None, prose) of a key's comment. ValueError if a { does not begin a rule."""
    if not comment.startswith('{'):
        return None, comment
    rule, brace, prose = comment[1:].partition('}')
    if not brace:
        raise ValueError(f'the comment {comment!r} begins with {{ but has no }}')
    return parse_rule(rule), prose.strip()


# ---- the block ----
@dataclass(frozen=True)
class Key:
    """One line of a configuration block."""
    type: type            # bool, int, float, str or dict
    nullable: bool        # whether None is allowed too
    default: object
    comment: str          # without the rule
    heading: str          # the comment line above the key, or ''
    rule: Rule | None


TYPES = {'bool': bool, 'int': int, 'float': float, 'str': str, 'dict': dict}


def read_block(source, namespace):
    """{name: Key} of a script's configuration block.

    source: the text of the script; namespace: its globals, which hold the defaults. ValueError,
    with script and key, if the block is not well-formed: a mistake of the script's author."""
    trailing_comments, headings = read_comments(source)
    keys = {}
    for node in ast.parse(source).body:
        if ends_block(node):
            break
        name = assigned_name(node)
        if name is None or not name[0].islower():
            continue
        default = namespace[name]
        if default is not None and not isinstance(default, (bool, int, float, str)):
            continue  # such as config_keys, the list of keys that nanoGPT's scripts make
        try:
            kind, nullable = declared_type(node, default)
            rule, prose = split_comment(trailing_comments.get(node.end_lineno, ''))
            if rule:
                check_rule_fits(rule, kind)
        except ValueError as error:
            raise ValueError(f"{namespace['__file__']}, key {name}: {error}") from None
        heading = headings.get(node.lineno - 1, '')
        keys[name] = Key(kind, nullable, default, prose, heading, rule)
    return keys


def read_comments(source):
    """Two dicts {line number: comment}: comments beside or within code, and those at the margin."""
    trailing, headings = {}, {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            line, column = token.start
            comments = headings if column == 0 else trailing
            comments[line] = token.string.lstrip('#').strip()
    return trailing, headings


def ends_block(node):
    """Whether this statement is the call of configure(), or nanoGPT's exec() of this file."""
    value = getattr(node, 'value', None)
    return isinstance(value, ast.Call) and ast.unparse(value.func) in ('configure', 'exec')


def assigned_name(node):
    """The name that a statement assigns to, or None if it is no plain assignment."""
    if isinstance(node, ast.AnnAssign):
        target = node.target
    elif isinstance(node, ast.Assign):
        target = node.targets[0]
    else:
        return None
    return target.id if isinstance(target, ast.Name) else None


def declared_type(node, default):
    """(type, whether None is allowed) by the annotation of an assignment, else by its default."""
    if isinstance(node, ast.AnnAssign):
        names = ast.unparse(node.annotation).split(' | ')
    else:
        names = [type(default).__name__]
    types = [TYPES[name] for name in names if name in TYPES]
    if len(types) != 1:
        raise ValueError('needs one type, by its default or by an annotation such as int | None')
    return types[0], 'None' in names


def check_rule_fits(rule, kind):
    """ValueError if the rule is about numbers and the key is not a number, or the reverse."""
    fitting_types = (str,) if rule.choices else (int, float)
    if kind not in fitting_types:
        raise ValueError(f'the rule {{{rule.text}}} does not fit the type {kind.__name__}')


# ---- values ----
def describe(key):
    """The values that a key expects, for error messages."""
    names = {
        bool: 'True or False',
        int: 'a whole number',
        float: 'a number',
        str: 'a text in quotes',
        dict: "a dict such as {0: 'head', 1000: 'all'}",
    }
    alternative = ' or None' if key.nullable else ''
    return names[key.type] + alternative


def check_value(key, value):
    """The value in its key's type, so that 3 becomes 3.0. ValueError if it is of another type."""
    if value is None and key.nullable:
        return None
    if key.type in (int, float):
        fits = is_finite_number(value) and (key.type is float or value == int(value))
    else:
        fits = isinstance(value, key.type)
    if fits:
        return key.type(value)
    raise ValueError(f'expected {describe(key)}')


def is_finite_number(value):
    """Whether this is an int or float, neither inf nor nan, and in the range of a float."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and abs(value) <= sys.float_info.max


def parse_flag_value(key, text):
    """The value that a flag's text stands for. ValueError if it is not of the key's type."""
    if key.type is str:
        is_none = key.nullable and text == 'None'
        return None if is_none else text
    try:
        value = parse_literal(key.type, text)
    except ValueError:
        raise ValueError(f'expected {describe(key)}') from None
    return check_value(key, value)


def parse_literal(kind, text):
    """The value written in a text, for a key of any type but str. ValueError if there is none."""
    if text == 'None':
        return None
    if kind is bool:
        if text.lower() not in ('true', 'false'):
            raise ValueError(text)
        return text.lower() == 'true'
    if kind is int and re.fullmatch(r'[+-]?\d+', text):
        return int(text)  # not by way of float, which rounds from 2**53 on
    if kind in (int, float):
        return float(text)
    try:
        return ast.literal_eval(text)
    except (SyntaxError, TypeError, MemoryError, RecursionError) as error:
        raise ValueError(str(error)) from None
