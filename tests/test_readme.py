"""What README.md and docs/ say exists: every command, file, link and module that they name."""
import ast
import re
import shlex
import subprocess
import sys
import tomllib

import pytest
from conftest import ROOT

import plot
from configurator import configure

README = ROOT / 'README.md'
GUIDES = [README, *sorted(ROOT.glob('docs/*.md')), *sorted(ROOT.glob('data/*/readme.md'))]
CONFIGS = sorted(ROOT.glob('config/*.py'))
COMMAND = re.compile(r'(srun )?(python|torchrun) .*\.py\b')


def read(path):
    return path.read_text(encoding='utf-8')


def name_of(path):
    return str(path.relative_to(ROOT))


# ---- commands ----

def commands_in(text):
    """Every `python …` and `torchrun …` command of a text, from code blocks and inline code."""
    text = text.replace('\\\n', ' ')  # join continued lines
    candidates = re.findall(r'`([^`\n]+)`', text)
    for line in text.splitlines():
        for part in line.lstrip('# ').split('&&'):
            candidates.append(part.strip())
    return [' '.join(candidate.split()) for candidate in candidates if COMMAND.match(candidate)]


def documented_commands():
    """The commands of all guides, and of the comments at the head of each config, each once."""
    commands = {}  # a dict keeps the order
    for path in [*GUIDES, *CONFIGS]:
        for command in commands_in(read(path)):
            commands[command] = name_of(path)
    # The README names these three by their endings only.
    for size in ('medium', 'large', 'xl'):
        commands[f'python train.py config/eval_gpt2_{size}.py'] = name_of(README)
    return commands


def split_command(command):
    """(script, arguments) of a command, without its comment."""
    words = shlex.split(command, comments=True)
    position = next(i for i, word in enumerate(words) if word.endswith('.py'))
    return words[position], words[position + 1:]


def configuration_block(script):
    """The globals of a script as they are when it calls configure()."""
    body = ast.parse(read(ROOT / script)).body
    end = next(i for i, node in enumerate(body) if 'configure(globals())' in ast.unparse(node))
    namespace = {'__file__': str(ROOT / script), '__name__': 'readme'}
    exec(compile(ast.Module(body[:end], []), script, 'exec'), namespace)
    return namespace


@pytest.mark.parametrize('command', documented_commands())
def test_every_documented_command_has_its_files_and_its_keys(command, monkeypatch):
    script, arguments = split_command(command)
    if script.startswith('data/mine/'):
        return  # the reader makes this folder
    if arguments == ['--help']:
        assert (ROOT / script).exists()
        return  # it would end this process
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, 'argv', [script, *arguments])
    source = read(ROOT / script)
    if 'configure(globals())' in source:
        configuration_block(script)  # imports all modules, before check_device is replaced
    # The command may be for a device that this machine does not have.
    monkeypatch.setattr('plaingpt.system.devices.check_device', lambda device: None)
    monkeypatch.setattr('plaingpt.planning.plan.check_device', lambda device: None)
    if script == 'plot.py':
        plot.command_line(arguments)
    elif 'configure(globals())' in source:
        configure(configuration_block(script), arguments)
    elif 'argparse' in source:
        # argparse checks the arguments before it gets to --help.
        subprocess.run([sys.executable, script, *arguments, '--help'], check=True,
                       capture_output=True)
    else:
        assert arguments == []


def test_the_commands_that_a_reader_types_first_are_found():
    # The test above would pass if commands_in() found nothing.
    commands = documented_commands()
    assert 'python train.py config/train_shakespeare_char.py' in commands
    assert 'python sample.py --out_dir=out-shakespeare-char' in commands
    assert 'python bench.py --real_data=False --num_steps=3 --warmup_steps=1 --baseline=plain' \
        in commands
    assert any(command.startswith('srun torchrun') for command in commands)


def test_continuous_integration_runs_the_readmes_test_command():
    command = 'pip install -r requirements-dev.txt && python -m pytest'
    assert f'\n{command}\n' in read(README)
    assert command in read(ROOT / '.ci' / 'run')


# ---- files, links, modules ----

@pytest.mark.parametrize('guide', GUIDES, ids=name_of)
def test_every_link_leads_to_a_file_and_a_heading(guide):
    for link in re.findall(r'\]\(([^)]+)\)', read(guide)):
        if link.startswith('http'):
            continue
        path, _, anchor = link.partition('#')
        target = guide.parent / path
        assert target.exists(), link
        if anchor:
            headings = re.findall(r'^#+ (.+)$', read(target), re.MULTILINE)
            anchors = [re.sub(r'[^\w -]', '', heading.lower()).replace(' ', '-')
                       for heading in headings]
            assert anchor in anchors, link


@pytest.mark.parametrize('guide', GUIDES, ids=name_of)
def test_every_file_of_the_repository_that_a_guide_names_exists(guide):
    pattern = r'\b(?:plaingpt|experiments|tests|config)/[\w/]+\.py\b'
    for path in re.findall(pattern, read(guide)):
        assert (ROOT / path).exists(), path


def packages():
    """The folders of plaingpt/, from their __init__.py."""
    return sorted(path.parent for path in ROOT.glob('plaingpt/*/__init__.py'))


@pytest.mark.parametrize('package', packages(), ids=name_of)
def test_the_map_names_exactly_the_modules_of_each_folder(package):
    row = re.search(rf'^\| {name_of(package)}/ \| (.+) \|$', read(README), re.MULTILINE)
    named = re.findall(r'`(\w+)`', row[1])
    modules = [path.stem for path in package.glob('*.py') if path.stem != '__init__']
    assert sorted(named) == sorted(modules)


def test_the_map_names_every_script():
    table = read(README).split('## The map')[1].split('| folder |')[0]
    for script in ROOT.glob('*.py'):
        assert script.name in table


# ---- packaging ----

def test_the_package_has_every_script_and_every_folder_of_plaingpt():
    with open(ROOT / 'pyproject.toml', 'rb') as file:
        setuptools = tomllib.load(file)['tool']['setuptools']
    scripts = [path.stem for path in ROOT.glob('*.py')]
    assert sorted(setuptools['py-modules']) == sorted(scripts)
    # setuptools finds the folders that match, if they have an __init__.py.
    assert setuptools['packages']['find']['include'] == ['plaingpt*']
    folders = {path.parent for path in ROOT.glob('plaingpt/*/*.py')}
    assert sorted(folders) == packages()


def test_the_development_requirements_include_the_others():
    lines = read(ROOT / 'requirements-dev.txt').splitlines()
    assert '-r requirements.txt' in lines
