"""Loss curves: what is drawn is what metrics.jsonl says, and what can't be drawn ends in a sentence."""
import json
import os
import sys

import pytest
from conftest import ROOT, refused, run, run_here, succeeded

import plot
from plaingpt.system.messages import UserError

RECORDS = [{'step': 0, 'tokens': 0, 'train_loss': 4.2, 'val_loss': 4.3, 'elapsed': 0.5},
           {'step': 1, 'tokens': 100, 'loss': 4.1, 'lr': 1e-4, 'mfu': None, 'elapsed': 36.0},
           {'step': 2, 'tokens': 200, 'loss': 3.0, 'lr': 1e-3, 'train_loss': 2.9, 'val_loss': 3.1, 'elapsed': 72.0},
           {'step': 4, 'tokens': 400, 'loss': 2.0, 'lr': 5e-4, 'train_loss': 1.9, 'val_loss': 3.2, 'elapsed': 144.0}]


def write_run(folder, records=RECORDS, end=''):
    """A folder of a run with these records, as text."""
    folder.mkdir(parents=True, exist_ok=True)
    text = ''.join(json.dumps(record) + '\n' for record in records) + end
    (folder / 'metrics.jsonl').write_text(text, encoding='utf-8')
    return str(folder)


def curves(axes):
    """The points of each line of these axes, as lists of (x, y)."""
    return [[(float(x), float(y)) for x, y in zip(*line.get_data(), strict=True)] for line in axes.get_lines()]


def legend(picture):
    return [text.get_text() for text in picture.legends[0].get_texts()]


def png_size(path):
    """(width, height) from the header of a PNG."""
    content = path.read_bytes()
    assert content.startswith(b'\x89PNG\r\n\x1a\n') and content.endswith(b'IEND\xaeB\x60\x82')
    return int.from_bytes(content[16:20], 'big'), int.from_bytes(content[20:24], 'big')


# ---- the picture ----

def test_one_run_is_drawn_into_its_folder_and_several_where_one_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / 'out-a'), write_run(tmp_path / 'out-b')
    assert succeeded(run('plot.py', 'out-a', cwd=tmp_path)) == os.path.join('out-a', 'loss.png') + '\n'
    assert succeeded(run_here('plot.py', 'out-a', 'out-b')) == 'loss.png\n'
    assert succeeded(run_here('plot.py', 'out-b', output='b.PNG', x='hours')) == 'b.PNG\n'
    for path in tmp_path / 'out-a' / 'loss.png', tmp_path / 'loss.png', tmp_path / 'b.PNG':
        width, height = png_size(path)
        assert width == 1600 and 900 < height < 1200
    assert sorted(os.listdir()) == ['b.PNG', 'loss.png', 'out-a', 'out-b']
    assert sorted(os.listdir('out-a')) == ['loss.png', 'metrics.jsonl'] and os.listdir('out-b') == ['metrics.jsonl']


@pytest.mark.parametrize('x, places', [('steps', [0, 1, 2, 4]), ('tokens', [0, 100, 200, 400]),
                                       ('hours', [0.5 / 3600, 0.01, 0.02, 0.04])])
def test_the_lines_are_the_numbers_of_the_file(tmp_path, x, places):
    picture = plot.figure([write_run(tmp_path / 'out')], x)
    losses, rates = picture.axes
    zero, one, two, four = places
    assert curves(losses) == [[(one, 4.1), (two, 3.0), (four, 2.0)], [(zero, 4.2), (two, 2.9), (four, 1.9)],
                              [(zero, 4.3), (two, 3.1), (four, 3.2)], [(two, 3.1)]]
    assert curves(rates) == [[(one, 1e-4), (two, 1e-3), (four, 5e-4)]]
    assert legend(picture)[-1] == f'best validation loss 3.100 at {plot.short(two)} {x}'
    assert (losses.get_title('left'), losses.get_ylabel(), rates.get_xlabel()) == ('out', 'loss (nats per token)', x)


def test_runs_overlaid_have_a_name_and_a_colour_each(tmp_path):
    folders = [write_run(tmp_path / 'out-a'), write_run(tmp_path / 'out-$b', RECORDS[1:2])]
    picture = plot.figure(folders)
    losses, rates = picture.axes
    assert legend(picture)[-2:] == ['out-a, best 3.100 at 2 steps', r'out-\$b']
    first, second = (line.get_color() for line in rates.get_lines())
    assert first != second
    assert [line.get_color() for line in losses.get_lines()] == [first] * 4 + [second] * 3
    same_end = [write_run(tmp_path / folder) for folder in ('lr1/out', 'lr2/out', 'x' * 50)]
    long = [name for name in legend(plot.figure(same_end)) if 'best' in name]
    assert len(set(long)) == 3 and all(len(name) < 80 for name in long)


def test_many_steps_are_drawn_as_means_and_the_legend_says_of_how_many(tmp_path):
    few, many = ([{'step': n, 'loss': 5 + n % 2} for n in range(1, end)] for end in (201, 1001))
    picture = plot.figure([write_run(tmp_path / 'few', few)])
    assert len(curves(picture.axes[0])[0]) == 200 and 'training, logged steps' in legend(picture)
    picture = plot.figure([write_run(tmp_path / 'many', many)])
    means = curves(picture.axes[0])[0]
    assert means[0] == (5.5, 5.5) and len(means) == 100
    assert 'training, means of 10 logged steps' in legend(picture)
    picture = plot.figure([str(tmp_path / 'few'), str(tmp_path / 'many')])
    assert 'training, means of 1 to 10 logged steps' in legend(picture)


def test_the_fall_at_the_start_does_not_flatten_the_rest_and_is_told(tmp_path):
    records = [{'step': n, 'loss': 11 if n < 3 else 3 - n / 1000} for n in range(1, 101)]
    losses = plot.figure([write_run(tmp_path, records)]).axes[0]
    low, high = losses.get_ylim()
    assert 2.8 < low < 2.9 < 2.994 < high < 3.1
    assert losses.get_title('right') == 'the start, at 11, is above'
    for slow in records[2:], records[:2], RECORDS:
        losses = plot.figure([write_run(tmp_path, slow)]).axes[0]
        assert losses.get_title('right') == ''
        assert losses.get_ylim()[1] > max(y for curve in curves(losses) for _, y in curve)


# ---- files that are not quite as they should be ----

def test_what_is_no_finite_number_is_left_out(tmp_path):
    odd = [{'step': 5, 'tokens': 500, 'error': 'the loss is nan – sorry'}, {'step': 6, 'loss': None, 'val_loss': None},
           {'step': 7, 'loss': float('nan'), 'val_loss': float('-inf'), 'lr': float('inf')}, {'loss': 1.0}, {},
           {'step': 8, 'loss': 'low', 'val_loss': True, 'lr': [1]}, {'step': 10 ** 400, 'loss': 1, 'skipped': 2},
           {'step': 9, 'val_loss': -10 ** 400}]
    expected = plot.figure([write_run(tmp_path / 'a')])
    picture = plot.figure([write_run(tmp_path / 'b', RECORDS + odd)])
    assert [curves(axes) for axes in picture.axes] == [curves(axes) for axes in expected.axes]


@pytest.mark.parametrize('records', [RECORDS[:1], RECORDS[1:2], [{'step': 0, 'loss': 0.0}], [
    {'step': 1, 'loss': 3e38, 'val_loss': 3e38, 'lr': 3e38}, {'step': 10 ** 30, 'loss': -3e38}]])
def test_little_and_extreme_numbers_make_a_picture_too(tmp_path, records, recwarn):
    folder = write_run(tmp_path / '_$x^{ 日本', records)
    plot.draw([folder], str(tmp_path / 'a.png'))
    plot.draw([folder] * 9, str(tmp_path / 'b.png'))
    assert png_size(tmp_path / 'a.png')[0] == png_size(tmp_path / 'b.png')[0] == 1600
    assert not [warning for warning in recwarn if issubclass(warning.category, UserWarning)]


@pytest.mark.parametrize('end', ['{', '{"step": 6, "tok', '{"step": 6, "loss": 3', '\0\0\0', '"'])
def test_a_last_line_that_a_kill_cut_short_is_left_out(tmp_path, end):
    assert plot.read(write_run(tmp_path, end=end)) == RECORDS


# ---- what is refused ----

@pytest.mark.parametrize('line', ['{"step": 6, "tok', '', '3', '[[1]]', 'null', '[' * 100_000])
def test_a_broken_line_is_named(tmp_path, line):
    with pytest.raises(UserError, match=r'metrics\.jsonl, line 5: expected a JSON object; delete the line$'):
        plot.read(write_run(tmp_path, end=line + '\n'))


def test_each_mistake_ends_in_a_sentence(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / 'out'), write_run(tmp_path / 'none', [{'step': 1, 'lr': 1}]), write_run(tmp_path / 'new', [])
    (tmp_path / 'empty').mkdir(), (tmp_path / 'odd' / 'metrics.jsonl').mkdir(parents=True)
    (tmp_path / 'dir.png').mkdir()
    for arguments, sentence in (
            (['nowhere'], 'there is no folder nowhere: name the out_dir of a run'),
            (['out/metrics.jsonl'], 'there is no folder out/metrics.jsonl'),
            (['out', 'empty'], 'empty has no metrics.jsonl: name the out_dir of a run of train.py'),
            (['odd'], 'metrics.jsonl cannot be read: '),
            (['none'], 'metrics.jsonl has no loss to draw over steps yet'), (['new'], 'has no loss to draw over steps'),
            (['out', '--output=a.jpg'], 'output=a.jpg: the picture is a PNG'),
            (['out', '--output=missing/a.png'], 'the picture cannot be written: '),
            (['out', '--output=dir.png'], 'the picture cannot be written: '),
            (['out', '--x=time'], "invalid choice: 'time'"), (['out', '--z=1'], 'unrecognized arguments: --z=1'),
            ([], 'the following arguments are required: out_dir')):
        finished = run_here('plot.py', *arguments)
        assert sentence in refused(finished) and finished.stderr.count('\n') == 1 and not finished.stdout
    assert sorted(os.listdir()) == ['dir.png', 'empty', 'new', 'none', 'odd', 'out'] and os.listdir('dir.png') == []
    finished = run('plot.py', 'nowhere', cwd=tmp_path)
    assert refused(finished) + '\n' == finished.stderr


def test_a_picture_that_fails_half_way_leaves_the_old_one(tmp_path, monkeypatch):
    folder = write_run(tmp_path / 'out')
    (tmp_path / 'loss.png').write_text('old')

    def fill_the_disk(self, path, **_):
        with open(path, 'wb') as file:
            file.write(b'\x89PNG')
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr('matplotlib.figure.Figure.savefig', fill_the_disk)
    with pytest.raises(UserError, match='the picture cannot be written: .*No space left'):
        plot.draw([folder], str(tmp_path / 'loss.png'))
    assert (tmp_path / 'loss.png').read_text() == 'old' and sorted(os.listdir(tmp_path)) == ['loss.png', 'out']


def test_without_matplotlib_it_says_what_to_install(tmp_path, monkeypatch):
    folder = write_run(tmp_path / 'out')
    for name in [name for name in sys.modules if name.split('.')[0] == 'matplotlib']:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, 'matplotlib', None)
    assert refused(run_here('plot.py', folder)) == 'error: drawing needs the package: pip install matplotlib'
    assert os.listdir(folder) == ['metrics.jsonl']


def test_at_the_end_of_a_run_a_picture_that_cannot_be_costs_a_warning(tmp_path, monkeypatch, capsys):
    folder = write_run(tmp_path / 'out')
    plot.draw_finished(folder)
    assert (tmp_path / 'out' / 'loss.png').read_bytes().startswith(b'\x89PNG') and capsys.readouterr().err == ''
    os.remove(tmp_path / 'out' / 'loss.png')
    monkeypatch.setattr(plot, 'find_spec', lambda name: None)  # no matplotlib, no picture, no word
    plot.draw_finished(folder)
    assert os.listdir(folder) == ['metrics.jsonl'] and capsys.readouterr().err == ''
    monkeypatch.undo()
    (tmp_path / 'out' / 'metrics.jsonl').write_text('')
    plot.draw_finished(folder)
    assert capsys.readouterr().err.startswith('warning: no loss.png: ') and os.listdir(folder) == ['metrics.jsonl']


def test_neither_importing_nor_drawing_sets_up_a_display(tmp_path):
    write_run(tmp_path / 'out')
    program = ('import sys, plot; assert "matplotlib" not in sys.modules and "torch" not in sys.modules\n'
               'plot.draw(["out"], "loss.png"); assert "matplotlib.pyplot" not in sys.modules')
    (tmp_path / 'program.py').write_text(program, encoding='utf-8')
    env = {'PYTHONPATH': str(ROOT), 'MPLBACKEND': 'tkagg', 'DISPLAY': ''}
    succeeded(run(tmp_path / 'program.py', cwd=tmp_path, env=env))


def test_help_prints_the_commands():
    said = succeeded(run_here('plot.py', '--help'))
    assert said.startswith('usage: python plot.py') and 'python plot.py out-a out-b --x=hours' in said
