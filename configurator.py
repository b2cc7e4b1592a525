"""
Reads the configuration of a script from config files and command-line flags.

A configuration is the block of `key = default  # comment` lines at the head of a script. It ends
with

    config, given = configure(globals())

The names in the block are the keys, their defaults give the types, and their comments are the text
of --help. Names that begin with an underscore or a capital letter are the script's own. A user then
passes config files, which are Python (so run only those you trust), and flags; later ones win:

    python train.py config/train_shakespeare_char.py --max_iters=1e3 --compile=False

To allow None, annotate the key: `top_k: int | None = 200`. To restrict its values, begin the
comment with a rule in braces:

    max_iters = 100    # {>= 0} steps in all               a lower bound: >= or >
    dropout = 0.0      # {[0, 1)} share of activations     an interval; [ and ] include the bound
    dtype = 'auto'     # {'auto' | 'float32'} precision    one of several texts

Everything after the rule is prose, and has no effect. To check keys against each other, define
problems() above the call: a generator of sentences about what does not fit.

All mistakes are printed at once, one line each, and the script exits with status 2.
"""
import ast
import difflib
import inspect
import os
import signal
import sys

from plaingpt.system.config_block import check_value, parse_flag_value, read_block
from plaingpt.system.messages import end_with, warn


# ---- flags and files ----
def nearest(name, keys):
    """A hint for a misspelt key."""
    close = difflib.get_close_matches(name, keys, n=1, cutoff=0.6)
    return f'did you mean {close[0]}?' if close else '--help lists the keys'


def read_flag(argument, keys, mistakes):
    """{name: value} of one --key=value; {} if it is wrong, and then mistakes gets a sentence."""
    name, equals, text = argument.removeprefix('--').partition('=')
    if name not in keys:
        mistakes.append(f'{argument}: there is no key {name!r}: {nearest(name, keys)}')
        return {}
    if not equals:
        example = 'True' if keys[name].type is bool else '…'
        mistakes.append(f'{argument}: give it a value, --{name}={example}')
        return {}
    try:
        return {name: parse_flag_value(keys[name], text)}
    except ValueError as error:
        mistakes.append(f'{argument}: {error}')
        return {}


def find_config_file(argument, script):
    """The path of a config file, from the working directory or beside the script, or None."""
    beside_script = os.path.join(os.path.dirname(os.path.abspath(script)), argument)
    for path in (argument, beside_script):
        if os.path.isfile(path):
            return path
    return None


def run_config_file(path, keys, values, mistakes):
    """Runs a config file, which sees these values; {name: value} of the keys that it sets.

    For each mistake in the file, mistakes gets a sentence."""
    namespace = dict(values, __file__=path, __name__='config')
    try:
        with open(path, encoding='utf-8') as file:
            tree = ast.parse(file.read(), path)
        exec(compile(tree, path, 'exec'), namespace)
    except (Exception, SystemExit) as error:  # the file is a program, which can raise anything
        text = f'{path}, line {line_of(error, path)}: {type(error).__name__}: {error}'
        mistakes.append(' '.join(text.split()))
        return {}

    # A name counts if the file assigns to it, even the value it had, or has changed it otherwise.
    assigned = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            assigned.add(node.id)
    changes = {}
    for name, value in namespace.items():
        unchanged = name in values and value is values[name] and name not in assigned
        if unchanged or name.startswith('_'):
            continue
        if name in keys:
            try:
                changes[name] = check_value(keys[name], value)
            except ValueError as error:
                mistakes.append(f'{path}: {name} = {value!r}: {error}')
        elif not (inspect.ismodule(value) or callable(value)):  # imports and functions are helpers
            mistakes.append(f'{path}: {name} is not a key: {nearest(name, keys)} '
                            '(begin the name of a helper with _)')
    return changes


def line_of(error, path):
    """The line of this file at which an exception was raised; 0 if it has none."""
    if isinstance(error, SyntaxError) and error.filename == path:
        return error.lineno or 0
    frames = inspect.getinnerframes(error.__traceback__)
    return max((frame.lineno for frame in frames if frame.filename == path), default=0)


def configure(namespace, arguments=None):
    """Applies config files and flags to the keys of the script whose globals are namespace.

    arguments: those of the command line if None. Returns config, {key: value}, and given, the set
    of keys that a file or a flag has set. Exits with status 2 after a mistake, with 0 after --help.
    """
    script = namespace['__file__']
    if arguments is None:
        arguments = sys.argv[1:]
    if hasattr(sys.stdout, 'reconfigure'):
        # A name that the terminal cannot show must not end a run.
        sys.stdout.reconfigure(errors='backslashreplace')
    with open(script, encoding='utf-8') as file:
        source = file.read()
    keys = read_block(source, namespace)
    if '--help' in arguments or '-h' in arguments:
        print_help(script, source, keys)
        sys.exit(0)

    # Apply the arguments from left to right.
    values = {name: key.default for name, key in keys.items()}
    given = set()
    mistakes = []
    for position, argument in enumerate(arguments):
        if argument.startswith('--'):
            changes = read_flag(argument, keys, mistakes)
        else:
            path = find_config_file(argument, script)
            if path is None:
                mistakes.append(f'{argument}: no such config file, here or beside '
                                f'{os.path.basename(script)}; a setting is written --key=value')
                continue
            visible = with_final_device(values, arguments[position:])
            changes = run_config_file(path, keys, visible, mistakes)
        values.update(changes)
        given.update(changes)

    namespace.update(values)
    mistakes.extend(check_result(namespace, keys, given))
    if mistakes:
        end_with(mistakes)
    return values, given


def check_result(namespace, keys, given):
    """Yields a sentence for each value that breaks its key's rule, and what problems() yields."""
    broken = set()
    for name, key in keys.items():
        value = namespace[name]
        if name in given and key.rule and value is not None and not key.rule.allows(value):
            broken.add(name)
            yield f'{name}={value!r}: must be {key.rule.demand}'
    if 'problems' in namespace:
        for sentence in namespace['problems']():
            about = sentence.partition('=')[0]
            if about not in broken:  # else that key has its sentence already
                yield sentence


def with_final_device(values, later_arguments):
    """What a config file sees: these values, but the device that a later flag will choose.

    A file may fit the run to the device, as config/train_shakespeare_char.py does."""
    flag = '--device='
    devices = [argument.removeprefix(flag) for argument in later_arguments
               if argument.startswith(flag)]
    if devices and 'device' in values:
        return dict(values, device=devices[-1])
    return values


def overrule(config, given, decided):
    """Replaces values of config by those that a checkpoint or a pretrained model has decided.

    Warns of each key in given that loses its value by this. Returns the entries of decided that
    are keys of the script."""
    decided = {key: value for key, value in decided.items() if key in config}
    for key, value in decided.items():
        if key in given and config[key] != value:
            warn(f'{key}={config[key]} is not used: the loaded checkpoint has {key}={value}')
    config.update(decided)
    return decided


# ---- help ----
def print_help(script, source, keys):
    """Prints the docstring of a script and all keys with their defaults, rules and comments."""
    if hasattr(signal, 'SIGPIPE'):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends the script, silently
    docstring = ast.get_docstring(ast.parse(source)) or ''
    print(f'usage: python {os.path.basename(script)} [config file …] [--key=value …]\n')
    print(docstring.strip())
    print()
    flags = {name: f'--{name}={key.default!r}' for name, key in keys.items()}
    width = min(40, max(map(len, flags.values())))
    for name, key in keys.items():
        if key.heading:
            print(f'\n{key.heading}')
        rule = f'{{{key.rule.text}}}' if key.rule else ''
        explanation = f'{rule} {key.comment}'.strip()
        print(f'  {flags[name]:<{width}}  {explanation}')


# ---- this file, not imported but run ----
if __name__ != 'configurator':
    if os.path.basename(__file__) == 'configurator.py':  # by its name: show how to use it
        print(__doc__.strip())
    else:
        # By a script of nanoGPT, which calls exec(open('configurator.py').read()), so that these
        # globals are the script's. The import gives configure() globals of its own, where a key of
        # the script, such as compile, does not hide a builtin function.
        from configurator import configure

        config, given = configure(globals())
