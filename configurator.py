"""
Configuration of a script: the block of `key = default  # comment` lines at its head, which ends with

    config, given = configure(globals())

The block is all there is: its names are the keys, its defaults give the types, its comments are the --help text. On the
command line come config files (Python, run in order, so only run those you trust) and --key=value, later ones winning:

    python train.py config/train_shakespeare_char.py --max_iters=1e3 --compile=False

A comment may begin with what its key allows, which is then checked: `>= 1`, `> 0`, `[0, 1)` or `'a' | 'b'`. An
annotation `key: int | None` allows None. A script may define problems(), a generator of sentences about keys that do
not fit together, before the call. All problems are printed at once, a line each, with exit status 2.
"""
import ast
import contextlib
import difflib
import inspect
import io
import os
import re
import signal
import sys
import tokenize
from types import SimpleNamespace

from plaingpt.system.messages import end_with, warn


def read_block(source, values):
    """{name: key} of a script's configuration block, where key has the fields type, nullable, default, comment, heading
    (the comment line above it, or ''). source: the script's text; values: its globals, for the defaults."""
    comments = {token.start[0]: (token.start[1], token.string.lstrip('#').strip())
                for token in tokenize.generate_tokens(io.StringIO(source).readline) if token.type == tokenize.COMMENT}
    keys = {}
    for node in ast.parse(source).body:
        value = getattr(node, 'value', None)
        if isinstance(value, ast.Call) and ast.unparse(value.func) in ('configure', 'exec'):
            break
        if not isinstance(node, (ast.Assign, ast.AnnAssign)):
            continue
        target = node.target if isinstance(node, ast.AnnAssign) else node.targets[0]
        if not isinstance(target, ast.Name) or not target.id[0].islower():
            continue  # _names and CONSTANTS are the script's own
        default = values[target.id]
        if not (default is None or isinstance(default, (bool, int, float, str))):
            continue  # nor is what nanoGPT's scripts keep their keys in
        annotation = getattr(node, 'annotation', None)
        kinds = ast.unparse(annotation).split(' | ') if annotation else [type(default).__name__]
        kind = next(kind for kind in kinds if kind != 'None')
        column, heading = comments.get(node.lineno - 1, (1, ''))
        kind = {'bool': bool, 'int': int, 'float': float, 'str': str, 'dict': dict}[kind]
        keys[target.id] = SimpleNamespace(type=kind, nullable='None' in kinds, default=default,
                                          comment=comments.get(node.end_lineno, (0, ''))[1],
                                          heading=heading if column == 0 else '')
    return keys


def parse_text(key, text):
    """The value that the text of a flag stands for; ValueError says what was expected."""
    if key.nullable and text == 'None':
        return None
    if key.type is str:
        return text
    if key.type is dict:
        with contextlib.suppress(SyntaxError, ValueError, TypeError, MemoryError, RecursionError):  # of what is none
            text = ast.literal_eval(text)
        return check_value(key, text)
    if key.type is bool:
        if text.lower() not in ('true', 'false'):
            raise ValueError('expected True or False')
        return text.lower() == 'true'
    try:
        return check_value(key, int(text) if key.type is int and re.fullmatch(r'[+-]?\d+', text) else float(text))
    except ValueError as error:
        raise ValueError(str(error) if str(error).startswith('expected') else f'expected {describe(key)}') from None


def check_value(key, value):
    """The value as the key's type; ValueError says what was expected."""
    if value is None and key.nullable:
        return None
    if key.type in (int, float):
        if isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max and (
                key.type is float or value == int(value)):
            return key.type(value)
    elif isinstance(value, key.type):
        return value
    raise ValueError(f'expected {describe(key)}')


def describe(key):
    names = {bool: 'True or False', int: 'a whole number', float: 'a number', str: 'a text in quotes',
             dict: "a dict as {0: 'head', 1000: 'all'}"}
    return names[key.type] + (' or None' if key.nullable else '')


def broken_rule(key, value):
    """What the head of the key's comment demands, if the value breaks it, else None."""
    if value is None:
        return None
    number = r'(-?[\d.]*\d(?:e-?\d+)?)'
    if match := re.match(rf'(>=|>) {number}', key.comment):
        bound = float(match[2])
        return None if value > bound or (match[1] == '>=' and value == bound) else match[0]
    if match := re.match(rf'([\[(]){number}, {number}([\])])', key.comment):  # an interval as in mathematics
        low, high = float(match[2]), float(match[3])
        inside = low < value < high or (value == low and match[1] == '[') or (value == high and match[4] == ']')
        return None if inside else match[0]
    if match := re.match(r"'[^']*'(?: \| '[^']*')+(?! \|)", key.comment):
        return None if value in ast.literal_eval(f"[{match[0].replace(' | ', ', ')}]") else match[0]
    return None


def nearest(name, keys):
    close = difflib.get_close_matches(name, keys, n=1, cutoff=0.6)
    return f'did you mean {close[0]}?' if close else '--help lists the keys'


def run_file(path, keys, values, wrong):
    """Runs a config file over the present values and returns what it changes; appends to wrong what is not right."""
    try:
        with open(path, encoding='utf-8') as file:
            tree = ast.parse(file.read(), path)
        code = compile(tree, path, 'exec')
        namespace = dict(values, __file__=path, __name__='config')
        exec(code, namespace)
    except (Exception, SystemExit) as error:  # a config file is a program: anything can be wrong with it
        frames = inspect.getinnerframes(error.__traceback__)
        own = error.lineno if isinstance(error, SyntaxError) and error.filename == path else 0
        line = own or max((f.lineno for f in frames if f.filename == path), default=0)
        wrong.append(' '.join(f'{path}, line {line}: {type(error).__name__}: {error}'.split()))
        return {}
    names = (node for node in ast.walk(tree) if isinstance(node, ast.Name))
    changes, assigned = {}, {node.id for node in names if isinstance(node.ctx, ast.Store)}
    for name, value in namespace.items():
        if name.startswith('_') or (value is values.get(name, namespace) and name not in assigned):
            continue
        if name not in keys:
            if inspect.ismodule(value) or callable(value):
                continue
            wrong.append(f'{path}: {name} is no key: {nearest(name, keys)} (a helper of the file starts with _)')
            continue
        try:
            changes[name] = check_value(keys[name], value)
        except ValueError as error:
            wrong.append(f'{path}: {name} = {value!r}: {error}')
    return changes


def run_flag(argument, keys, wrong):
    """{key: value} of one --key=value, or {} with the reason appended to wrong."""
    name, equals, text = argument[2:].partition('=')
    if name not in keys:
        wrong.append(f'{argument}: there is no key {name!r}: {nearest(name, keys)}')
    elif not equals:
        wrong.append(f'{argument}: give it a value, --{name}={"True" if keys[name].type is bool else "…"}')
    else:
        try:
            return {name: parse_text(keys[name], text)}
        except ValueError as error:
            wrong.append(f'{argument}: {error}')
    return {}


def configure(namespace, arguments=None):
    """Applies the arguments (None: the command line) to the keys of the script whose globals are namespace.

    Returns config, {key: value}, and given, the set of keys that a file or a flag has set. Exits with status 2 if
    anything is wrong, and with 0 after --help."""
    script, arguments = namespace['__file__'], sys.argv[1:] if arguments is None else arguments
    if hasattr(sys.stdout, 'reconfigure'):  # a name that the terminal can't show must not end a run
        sys.stdout.reconfigure(errors='backslashreplace')
    with open(script, encoding='utf-8') as file:
        source = file.read()
    keys = read_block(source, namespace)
    if '--help' in arguments or '-h' in arguments:
        print_help(script, ast.get_docstring(ast.parse(source)) or '', keys)
        sys.exit(0)
    values, given, wrong = {name: key.default for name, key in keys.items()}, set(), []
    for position, argument in enumerate(arguments):
        if argument.startswith('--'):
            changes = run_flag(argument, keys, wrong)
        else:
            beside_script = os.path.join(os.path.dirname(os.path.abspath(script)), argument)
            path = next((path for path in (argument, beside_script) if os.path.isfile(path)), None)
            if path is None:
                wrong.append(f'{argument}: no such config file, here or beside {os.path.basename(script)}; '
                             'a setting is written --key=value')
                continue
            # A file may fit itself to the device, so it sees the one that a flag will choose.
            devices = [later[9:] for later in arguments[position:] if later.startswith('--device=')]
            seen = dict(values, device=devices[-1]) if devices and 'device' in keys else values
            changes = run_file(path, keys, seen, wrong)
        values.update(changes)
        given.update(changes)
    for name, key in keys.items():
        if name in given and (rule := broken_rule(key, values[name])):
            wrong.append(f'{name}={values[name]!r}: allowed is {rule}')
    namespace.update(values)
    if 'problems' in namespace:
        wrong.extend(namespace['problems']())
    if wrong:
        end_with(wrong)
    return values, given


def overrule(config, given, decided):
    """Puts what a checkpoint or a pretrained model decides over the values of config, with a warning where another was
    given; returns decided."""
    for key, value in decided.items():
        if key in given and config[key] != value:
            warn(f'{key}={config[key]} is not used: the model and run to go on from have {key}={value}')
    config.update(decided)
    return decided


def print_help(script, docstring, keys):
    if hasattr(signal, 'SIGPIPE'):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it, without a traceback
    lines = [f'usage: python {os.path.basename(script)} [config file …] [--key=value …]\n', docstring.strip(), '']
    width = max(len(f'--{name}={key.default!r}') for name, key in keys.items())
    for name, key in keys.items():
        if key.heading:
            lines += ['', key.heading]
        lines.append(f'  {f"--{name}={key.default!r}":<{min(width, 40)}}  {key.comment}')
    print('\n'.join(lines))


if __name__ != 'configurator':  # a script written for nanoGPT execs this file
    from configurator import configure  # of the module: a key of the script (compile) must not shadow what it calls

    config, given = configure(globals())
