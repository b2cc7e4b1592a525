"""Loss curves: the picture shows the figures of metrics.jsonl, and a mistake ends in a sentence."""
import json
import os
import sys

import pytest
from conftest import ROOT, refused, run, run_here, succeeded

import plot
from plaingpt.system.messages import UserError

RECORDS = [
    {'step': 0, 'tokens': 0, 'train_loss': 4.2, 'val_loss': 4.3, 'elapsed': 0.5},
    {'step': 1, 'tokens': 100, 'loss': 4.1, 'lr': 1e-4, 'mfu': None, 'elapsed': 36.0},
    {'step': 2, 'tokens': 200, 'loss': 3.0, 'lr': 1e-3, 'train_loss': 2.9, 'val_loss': 3.1,
     'elapsed': 72.0},
    {'step': 4, 'tokens': 400, 'loss': 2.0, 'lr': 5e-4, 'train_loss': 1.9, 'val_loss': 3.2,
     'elapsed': 144.0},
]


def write_run(folder, records=RECORDS, end=''):
    """The path, as text, of the folder of a run with these records; end: an unfinished line."""
    folder.mkdir(parents=True, exist_ok=True)
    text = ''.join(json.dumps(record) + '\n' for record in records) + end
    (folder / 'metrics.jsonl').write_text(text, encoding='utf-8')
    return str(folder)


def curves(axes):
    """The points of each line of these axes, as lists of (x, y)."""
    lines = []
    for line in axes.get_lines():
        xs, ys = line.get_data()
        lines.append([(float(x), float(y)) for x, y in zip(xs, ys, strict=True)])
    return lines


def legend(picture):
    return [text.get_text() for text in picture.legends[0].get_texts()]


def png_size(path):
    """(width, height) from the header of a PNG."""
    content = path.read_bytes()
    assert content.startswith(b'\x89PNG\r\n\x1a\n')
    assert content.endswith(b'IEND\xaeB\x60\x82')
    width = int.from_bytes(content[16:20], 'big')
    height = int.from_bytes(content[20:24], 'big')
    return width, height


# ---- the picture ----

def test_one_run_is_drawn_into_its_folder_and_several_into_the_working_directory(
        tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / 'out-a')
    write_run(tmp_path / 'out-b')
    printed = succeeded(run('plot.py', 'out-a', cwd=tmp_path))
    assert printed == os.path.join('out-a', 'loss.png') + '\n'
    assert succeeded(run_here('plot.py', 'out-a', 'out-b')) == 'loss.png\n'
    assert succeeded(run_here('plot.py', 'out-b', output='b.PNG', x='hours')) == 'b.PNG\n'
    for path in (tmp_path / 'out-a' / 'loss.png', tmp_path / 'loss.png', tmp_path / 'b.PNG'):
        width, height = png_size(path)
        assert width == 1600
        assert 900 < height < 1200
    assert sorted(os.listdir()) == ['b.PNG', 'loss.png', 'out-a', 'out-b']
    assert sorted(os.listdir('out-a')) == ['loss.png', 'metrics.jsonl']
    assert os.listdir('out-b') == ['metrics.jsonl']


@pytest.mark.parametrize('x, places', [
    ('steps', [0, 1, 2, 4]),
    ('tokens', [0, 100, 200, 400]),
    ('hours', [0.5 / 3600, 0.01, 0.02, 0.04]),
])
def test_the_lines_are_the_figures_of_the_file(tmp_path, x, places):
    picture = plot.figure([write_run(tmp_path / 'out')], x)
    losses, rates = picture.axes
    zero, one, two, four = places
    assert curves(losses) == [
        [(one, 4.1), (two, 3.0), (four, 2.0)],
        [(zero, 4.2), (two, 2.9), (four, 1.9)],
        [(zero, 4.3), (two, 3.1), (four, 3.2)],
        [(two, 3.1)],
    ]
    assert curves(rates) == [[(one, 1e-4), (two, 1e-3), (four, 5e-4)]]
    assert legend(picture)[-1] == f'best validation loss 3.100 at {plot.short(two)} {x}'
    assert losses.get_title('left') == 'out'
    assert losses.get_ylabel() == 'loss (nats per token)'
    assert rates.get_xlabel() == x


def test_each_of_several_runs_has_its_name_and_colour(tmp_path):
    folders = [write_run(tmp_path / 'out-a'), write_run(tmp_path / 'out-$b', RECORDS[1:2])]
    picture = plot.figure(folders)
    losses, rates = picture.axes
    assert legend(picture)[-2:] == ['out-a, best 3.100 at 2 steps', r'out-\$b']
    first, second = (line.get_color() for line in rates.get_lines())
    assert first != second
    assert [line.get_color() for line in losses.get_lines()] == [first] * 4 + [second] * 3


def test_runs_in_folders_of_one_name_are_told_apart_by_their_paths(tmp_path):
    folders = [write_run(tmp_path / folder) for folder in ('lr1/out', 'lr2/out', 'x' * 50)]
    labels = [label for label in legend(plot.figure(folders)) if 'best' in label]
    assert len(set(labels)) == 3
    assert all(len(label) < 80 for label in labels)


def test_many_steps_are_drawn_as_means_and_the_legend_says_of_how_many(tmp_path):
    few = [{'step': n, 'loss': 5 + n % 2} for n in range(1, 201)]
    many = [{'step': n, 'loss': 5 + n % 2} for n in range(1, 1001)]
    picture = plot.figure([write_run(tmp_path / 'few', few)])
    assert len(curves(picture.axes[0])[0]) == 200
    assert 'training, logged steps' in legend(picture)

    picture = plot.figure([write_run(tmp_path / 'many', many)])
    means = curves(picture.axes[0])[0]
    assert len(means) == 100
    assert means[0] == (5.5, 5.5)
    assert 'training, means of 10 logged steps' in legend(picture)

    picture = plot.figure([str(tmp_path / 'few'), str(tmp_path / 'many')])
    assert 'training, means of 1 to 10 logged steps' in legend(picture)


def test_a_high_start_is_cut_off_and_the_picture_says_so(tmp_path):
    records = [{'step': n, 'loss': 11 if n < 3 else 3 - n / 1000} for n in range(1, 101)]
    losses = plot.figure([write_run(tmp_path, records)]).axes[0]
    low, high = losses.get_ylim()
    assert 2.8 < low < 2.9
    assert 2.994 < high < 3.1
    assert losses.get_title('right') == 'the start, at 11, is above'

    for without_high_start in (records[2:], records[:2], RECORDS):
        losses = plot.figure([write_run(tmp_path, without_high_start)]).axes[0]
        assert losses.get_title('right') == ''
        highest = max(y for curve in curves(losses) for _, y in curve)
        assert losses.get_ylim()[1] > highest


def test_a_learning_rate_search_is_drawn_with_its_suggestion(tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr(plot, 'save', lambda picture, path: saved.append((picture, path)))
    plot.draw_sweep([1e-4, 1e-3, 1e-2], [4.0, 3.0, 9.0], [4.0, 3.5, 8.0], 1e-3, 'find_lr.png')
    [(picture, path)] = saved
    assert path == 'find_lr.png'
    [axes] = picture.axes
    raw, smoothed, suggestion = curves(axes)
    assert raw == [(1e-4, 4.0), (1e-3, 3.0), (1e-2, 9.0)]
    assert smoothed == [(1e-4, 4.0), (1e-3, 3.5), (1e-2, 8.0)]
    assert [x for x, _ in suggestion] == [1e-3, 1e-3]
    low, high = axes.get_ylim()
    assert low < 3.5
    assert 4.0 < high < 8.0  # the height to which the loss diverges is cut off


def test_the_data_sets_of_a_mixture_have_curves_of_their_own(tmp_path):
    mixed = [
        {'step': 0, 'val_loss': 4.0, 'val_loss_by_data': {'owt': 3.5, 'co$de': 6.0}},
        {'step': 2, 'val_loss': 3.0, 'val_loss_by_data': {'owt': 2.5, 'co$de': 5.0}},
        {'step': 4, 'val_loss': 2.9, 'val_loss_by_data': {'owt': None, 'co$de': 4.5}},
        {'step': 6, 'val_loss': 2.8, 'val_loss_by_data': 'damaged'},
    ]
    folder = write_run(tmp_path / 'a', mixed)
    picture = plot.figure([folder])
    drawn = curves(picture.axes[0])
    assert [(0, 3.5), (2, 2.5)] in drawn
    assert [(0, 6.0), (2, 5.0), (4, 4.5)] in drawn
    assert 'validation on owt' in legend(picture)
    assert r'validation on co\$de' in legend(picture)
    low, high = picture.axes[0].get_ylim()
    assert low < 2.5 and high > 5.0
    picture = plot.figure([folder, write_run(tmp_path / 'b')])  # several runs: too many curves
    assert [(0, 3.5), (2, 2.5)] not in curves(picture.axes[0])


# ---- files that are not quite as they should be ----

def test_figures_that_are_not_finite_numbers_are_left_out(tmp_path):
    odd = [
        {'step': 5, 'tokens': 500, 'error': 'the loss is nan – sorry'},
        {'step': 6, 'loss': None, 'val_loss': None},
        {'step': 7, 'loss': float('nan'), 'val_loss': float('-inf'), 'lr': float('inf')},
        {'loss': 1.0},
        {},
        {'step': 8, 'loss': 'low', 'val_loss': True, 'lr': [1]},
        {'step': 10 ** 400, 'loss': 1, 'skipped': 2},
        {'step': 9, 'val_loss': -10 ** 400},
    ]
    expected = plot.figure([write_run(tmp_path / 'a')])
    picture = plot.figure([write_run(tmp_path / 'b', RECORDS + odd)])
    assert [curves(axes) for axes in picture.axes] == [curves(axes) for axes in expected.axes]


@pytest.mark.parametrize('records', [
    RECORDS[:1],
    RECORDS[1:2],
    [{'step': 0, 'loss': 0.0}],
    [{'step': 1, 'loss': 3e38, 'val_loss': 3e38, 'lr': 3e38}, {'step': 10 ** 30, 'loss': -3e38}],
])
def test_few_and_extreme_figures_make_a_picture_too(tmp_path, records, recwarn):
    folder = write_run(tmp_path / '_$x^{ 日本', records)
    plot.draw([folder], str(tmp_path / 'a.png'))
    plot.draw([folder] * 9, str(tmp_path / 'b.png'))
    for name in ('a.png', 'b.png'):
        width, _ = png_size(tmp_path / name)
        assert width == 1600
    assert not [warning for warning in recwarn if issubclass(warning.category, UserWarning)]


@pytest.mark.parametrize('end', ['{', '{"step": 6, "tok', '{"step": 6, "loss": 3', '\0\0\0', '"'])
def test_a_last_line_that_a_kill_cut_short_is_left_out(tmp_path, end):
    assert plot.read(write_run(tmp_path, end=end)) == RECORDS


# ---- mistakes and failures ----

@pytest.mark.parametrize('line', ['{"step": 6, "tok', '', '3', '[[1]]', 'null', '[' * 100_000])
def test_a_broken_line_is_named(tmp_path, line):
    message = r'metrics\.jsonl, line 5: expected a JSON object; delete the line$'
    with pytest.raises(UserError, match=message):
        plot.read(write_run(tmp_path, end=line + '\n'))


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """The working directory, with a run and with folders that cannot be drawn."""
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / 'out')
    write_run(tmp_path / 'no_loss', [{'step': 1, 'lr': 1}])
    write_run(tmp_path / 'new', [])
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'odd' / 'metrics.jsonl').mkdir(parents=True)
    (tmp_path / 'folder.png').mkdir()
    return tmp_path


@pytest.mark.parametrize('arguments, sentence', [
    ('nowhere', 'there is no folder nowhere: name the out_dir of a run'),
    ('out/metrics.jsonl', 'there is no folder out/metrics.jsonl'),
    ('out empty', 'empty has no metrics.jsonl: name the out_dir of a run of train.py'),
    ('odd', 'metrics.jsonl cannot be read: '),
    ('no_loss', 'metrics.jsonl has no loss to draw over steps yet'),
    ('new', 'has no loss to draw over steps'),
    ('out --output=a.jpg', 'output=a.jpg: the picture is a PNG'),
    ('out --output=missing/a.png', 'the picture cannot be written: '),
    ('out --output=folder.png', 'the picture cannot be written: '),
    ('out --x=time', "invalid choice: 'time'"),
    ('out --z=1', 'unrecognized arguments: --z=1'),
    ('', 'the following arguments are required: out_dir'),
])
def test_a_mistake_ends_in_one_sentence_and_writes_nothing(folders, arguments, sentence):
    before = sorted(folders.rglob('*'))
    finished = run_here('plot.py', *arguments.split())
    assert sentence in refused(finished)
    assert finished.stderr.count('\n') == 1
    assert finished.stdout == ''
    assert sorted(folders.rglob('*')) == before


def test_a_mistake_ends_the_process_in_one_sentence(tmp_path):
    finished = run('plot.py', 'nowhere', cwd=tmp_path)
    assert refused(finished) + '\n' == finished.stderr


def test_a_picture_that_fails_half_way_leaves_the_old_one(tmp_path, monkeypatch):
    folder = write_run(tmp_path / 'out')
    (tmp_path / 'loss.png').write_text('old', encoding='utf-8')

    def fill_the_disk(picture, file, format):
        file.write(b'\x89PNG')
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr('matplotlib.figure.Figure.savefig', fill_the_disk)
    with pytest.raises(UserError, match='the picture cannot be written: .*No space left'):
        plot.draw([folder], str(tmp_path / 'loss.png'))
    assert (tmp_path / 'loss.png').read_text(encoding='utf-8') == 'old'
    assert sorted(os.listdir(tmp_path)) == ['loss.png', 'out']


@pytest.fixture
def no_matplotlib(monkeypatch):
    """As if matplotlib were not installed."""
    for name in list(sys.modules):
        if name.split('.')[0] == 'matplotlib':
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, 'matplotlib', None)


def test_without_matplotlib_it_says_what_to_install(tmp_path, no_matplotlib):
    folder = write_run(tmp_path / 'out')
    sentence = 'error: drawing needs the package: pip install matplotlib'
    assert refused(run_here('plot.py', folder)) == sentence
    assert os.listdir(folder) == ['metrics.jsonl']


def test_without_matplotlib_a_learning_rate_search_warns(tmp_path, no_matplotlib, capsys):
    plot.draw_sweep([1e-4, 1e-3], [4.0, 3.0], [4.0, 3.5], 1e-3, str(tmp_path / 'find_lr.png'))
    assert capsys.readouterr().err.startswith('warning: no find_lr.png: ')
    assert os.listdir(tmp_path) == []


# ---- the picture at the end of a run ----

def test_a_finished_run_gets_its_picture(tmp_path, capsys):
    folder = write_run(tmp_path / 'out')
    plot.draw_finished(folder)
    assert png_size(tmp_path / 'out' / 'loss.png')[0] == 1600
    assert capsys.readouterr().err == ''


def test_without_matplotlib_a_finished_run_gets_neither_picture_nor_warning(
        tmp_path, no_matplotlib, capsys):
    folder = write_run(tmp_path / 'out')
    plot.draw_finished(folder)
    assert os.listdir(folder) == ['metrics.jsonl']
    assert capsys.readouterr().err == ''


def test_a_picture_that_cannot_be_drawn_costs_a_finished_run_a_warning(
        tmp_path, monkeypatch, capsys):
    folder = write_run(tmp_path / 'out', records=[])
    plot.draw_finished(folder)
    assert capsys.readouterr().err.startswith('warning: no loss.png: ')

    def fail(*arguments):
        raise AttributeError('a broken matplotlib')

    monkeypatch.setattr(plot, 'draw', fail)
    plot.draw_finished(folder)
    warning = capsys.readouterr().err
    assert warning == 'warning: no loss.png (AttributeError: a broken matplotlib)\n'
    assert os.listdir(folder) == ['metrics.jsonl']


# ---- start ----

def test_neither_importing_nor_drawing_sets_up_a_display(tmp_path):
    write_run(tmp_path / 'out')
    program = ('import sys, plot\n'
               'assert "matplotlib" not in sys.modules and "torch" not in sys.modules\n'
               'plot.draw(["out"], "loss.png")\n'
               'assert "matplotlib.pyplot" not in sys.modules\n')
    (tmp_path / 'program.py').write_text(program, encoding='utf-8')
    env = {'PYTHONPATH': str(ROOT), 'MPLBACKEND': 'tkagg', 'DISPLAY': ''}
    succeeded(run(tmp_path / 'program.py', cwd=tmp_path, env=env))


def test_help_prints_the_commands():
    printed = succeeded(run_here('plot.py', '--help'))
    assert printed.startswith('usage: python plot.py')
    assert 'python plot.py out-a out-b --x=hours' in printed
