"""
Draws the loss curves of finished or running runs, from the metrics.jsonl that train.py writes:

    python plot.py out-shakespeare-char
    python plot.py out-shakespeare-char --x=tokens
    python plot.py out-a out-b --x=hours --output=losses.png

The picture of one run is loss.png in its folder, that of several ./loss.png.
"""
import argparse
import itertools
import json
import os
import sys
import warnings
from dataclasses import dataclass
from importlib.util import find_spec
from typing import NamedTuple

from plaingpt.system.files import replacing
from plaingpt.system.messages import UserError, end_with, explained, warn

# For each choice of x: the key in metrics.jsonl, and what its values are divided by.
UNITS = {'steps': ('step', 1), 'tokens': ('tokens', 1), 'hours': ('elapsed', 3600)}

# From Okabe and Ito 2008, Color Universal Design: colour-blind readers tell these apart too.
GREY, BLUE, VERMILION = '#8c8c8c', '#0072B2', '#D55E00'
COLOURS = BLUE, VERMILION, '#009E73', '#CC79A7', '#E69F00', '#56B4E9', '#000000'

STYLES = {
    'loss': dict(lw=1.2),
    'train_loss': dict(lw=1.5, ls='--'),
    'val_loss': dict(lw=1.8, marker='o', ms=3),
    'val_loss_by_data': dict(lw=1.2, ls=':', marker='o', ms=2),
}

# More than twice as many logged steps are drawn as the means of this many groups of neighbours.
GROUPS = 100


# ---- data ----
class Curve(NamedTuple):
    places: list  # where on the x axis
    values: list


@dataclass
class Run:
    """What is drawn of a run."""
    name: str
    steps: Curve     # training loss of the logged steps, or of groups of them
    group_size: int  # logged steps per point of that curve
    train: Curve     # training loss at evaluations
    val: Curve       # validation loss at evaluations
    by_data: dict    # {name: Curve} of the validation loss on each data set of a mixture
    rates: Curve     # learning rates

    @property
    def best(self):
        """(place, value) of the lowest validation loss, or None if there was no evaluation."""
        if not self.val.values:
            return None
        lowest = min(self.val.values)
        return self.val.places[self.val.values.index(lowest)], lowest


def read(folder):
    """The records of a run, a list of dicts. UserError says what is wrong with metrics.jsonl."""
    path = os.path.join(folder, 'metrics.jsonl')
    if not os.path.isdir(folder):
        raise UserError(f'there is no folder {folder}: name the out_dir of a run')
    if not os.path.exists(path):
        raise UserError(f'{folder} has no metrics.jsonl: name the out_dir of a run of train.py')
    records = []
    with (explained(OSError, prefix='metrics.jsonl cannot be read: '),
          open(path, encoding='utf-8', errors='replace') as file):
        for number, line in enumerate(file, start=1):
            record = parse_record(line)
            # A last line without an end is still being written, or was when the run was killed.
            unfinished = not line.endswith('\n')
            if record is not None:
                records.append(record)
            elif not unfinished:
                raise UserError(
                    f'{path}, line {number}: expected a JSON object; delete the line')
    return records


def parse_record(line):
    """The JSON object in a line, as a dict, or None if there is none."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def series(records, x, y):
    """The Curve of the key y over x, a name in UNITS, from the records that have both."""
    key, divisor = UNITS[x]
    curve = Curve([], [])
    for record in records:
        place, value = record.get(key), record.get(y)
        if is_drawable(place) and is_drawable(value):
            curve.places.append(place / divisor)
            curve.values.append(float(value))
    return curve


def series_by_data(records, x):
    """{name: Curve} of the validation loss on each data set, from the records of a mixture."""
    key, divisor = UNITS[x]
    curves = {}
    for record in records:
        place, losses = record.get(key), record.get('val_loss_by_data')
        if not (is_drawable(place) and isinstance(losses, dict)):
            continue
        for name, loss in losses.items():
            if is_drawable(loss):
                curve = curves.setdefault(name, Curve([], []))
                curve.places.append(place / divisor)
                curve.values.append(float(loss))
    return curves


def is_drawable(value):
    """Whether this is a number, but neither True, nan nor beyond float32's range, 3.4e38."""
    return type(value) in (int, float) and abs(value) < 3.5e38


def averaged(curve):
    """(a Curve of at most 2 * GROUPS points, how many points of curve each of them stands for)."""
    points = len(curve.values)
    if points <= 2 * GROUPS:
        return curve, 1
    import numpy as np
    places = [group.mean() for group in np.array_split(curve.places, GROUPS)]
    values = [group.mean() for group in np.array_split(curve.values, GROUPS)]
    return Curve(places, values), round(points / GROUPS)


def load_run(folder, name, x):
    """The Run in a folder. UserError if it cannot be read or has no loss to draw yet."""
    records = read(folder)
    steps = series(records, x, 'loss')
    val = series(records, x, 'val_loss')
    if not steps.values and not val.values:
        path = os.path.join(folder, 'metrics.jsonl')
        raise UserError(f'{path} has no loss to draw over {x} yet')
    steps, group_size = averaged(steps)
    train = series(records, x, 'train_loss')
    rates = series(records, x, 'lr')
    return Run(name, steps, group_size, train, val, series_by_data(records, x), rates)


# ---- text ----
def short(number, position=None):
    """A number as a label: 0.25, 1,500, 20M, 9B. position: passed by matplotlib, and not needed."""
    for unit, letter in ((1e12, 'T'), (1e9, 'B'), (1e6, 'M')):
        if number >= unit:
            return f'{number / unit:.4g}{letter}'
    return f'{number:,.0f}' if number >= 1000 else f'{number:.4g}'


def names_of(folders):
    """What the picture calls the runs: the names of their folders, or the paths if names repeat."""
    names = [os.path.basename(os.path.abspath(folder)) for folder in folders]
    if len(set(names)) < len(names):
        names = folders
    return [printable(name) for name in names]


def printable(name):
    """A name as matplotlib can draw it: its last 40 characters, without formulas."""
    if len(name) > 40:
        name = '…' + name[-39:]
    name = name.encode(errors='replace').decode()  # undecodable bytes become question marks
    return name.replace('$', r'\$')  # $ would begin a formula


def label_of(run, x, alone):
    """The legend's text for a run, with its best validation loss if it has one."""
    if run.best is None:
        return run.name
    place, lowest = run.best
    title = 'best validation loss' if alone else f'{run.name}, best'
    return f'{title} {lowest:#.4g} at {short(place)} {x}'


def label_of_steps(runs):
    """The legend's text for the curves of logged steps."""
    smallest = min(run.group_size for run in runs)
    largest = max(run.group_size for run in runs)
    if largest == 1:
        return 'training, logged steps'
    size = short(largest) if smallest == largest else f'{short(smallest)} to {short(largest)}'
    return f'training, means of {size} logged steps'


# ---- the picture ----
class Colours(NamedTuple):
    """Colours of the three curves of a run."""
    steps: str
    train: str
    val: str


ALONE = Colours(GREY, BLUE, VERMILION)


def figure(folders, x='steps'):
    """A matplotlib Figure of the runs in these folders: losses above, learning rates below.

    x: a name in UNITS. UserError if a run cannot be read or matplotlib is missing."""
    try:
        # Not pyplot: Figure draws with Agg, which needs no display and keeps no global state.
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError('drawing needs the package: pip install matplotlib') from None
    runs = [load_run(folder, name, x)
            for folder, name in zip(folders, names_of(folders), strict=True)]

    # One run has a colour for each of its curves; of several, each run has its own colour.
    alone = len(runs) == 1
    if alone:
        palette = [ALONE]
    else:
        own_colours = itertools.islice(itertools.cycle(COLOURS), len(runs))
        palette = [Colours(colour, colour, colour) for colour in own_colours]

    height = 4.9 + len(runs) / 10  # the legend grows with the number of runs
    picture = Figure(figsize=(8, height), dpi=200, layout='constrained')
    loss_axes, rate_axes = picture.subplots(2, sharex=True, height_ratios=[7, 2])
    for run, colours in zip(runs, palette, strict=True):
        draw_losses(loss_axes, run, colours, alpha=1 if alone else 0.5)
        if alone:
            draw_data_sets(loss_axes, run)
        rate_axes.plot(*run.rates, color=colours.steps, lw=1.5)
    add_legend(picture, runs, palette, x)
    if alone:
        loss_axes.set_title(runs[0].name, loc='left', fontsize=11)
    loss_axes.set_ylabel('loss (nats per token)')
    limit_height(loss_axes, runs)
    dress_rate_axes(rate_axes, x)
    for axes in (loss_axes, rate_axes):
        dress(axes)
    picture.align_ylabels()
    return picture


def draw_losses(axes, run, colours, alpha):
    """Draws the three curves of a run, and a star at its best validation loss."""
    # A line through a single point is invisible, so that point gets a marker.
    marker = '.' if len(run.steps.values) == 1 else None
    axes.plot(*run.steps, color=colours.steps, alpha=alpha, marker=marker, **STYLES['loss'])
    axes.plot(*run.train, color=colours.train, **STYLES['train_loss'])
    evaluations_per_marker = len(run.val.values) // 40 + 1
    axes.plot(*run.val, color=colours.val, **STYLES['val_loss'], markevery=evaluations_per_marker)
    if run.best is not None:
        place, lowest = run.best
        axes.plot(place, lowest, color=colours.val, marker='*', ms=13, mec='white', zorder=3)


def data_set_colours(run):
    """{name: colour} of the data sets of a run alone, none of which its other curves have."""
    return dict(zip(run.by_data, itertools.cycle(COLOURS[2:])))


def draw_data_sets(axes, run):
    """Draws the validation loss of a run on each data set of a mixture."""
    for name, colour in data_set_colours(run).items():
        axes.plot(*run.by_data[name], color=colour, **STYLES['val_loss_by_data'])


def add_legend(picture, runs, palette, x):
    """Adds the legend: the kinds of curves, then the runs."""
    from matplotlib.lines import Line2D
    alone = len(runs) == 1
    kind_colours = ALONE if alone else Colours(GREY, GREY, GREY)
    entries = [
        Line2D([], [], color=kind_colours.steps, label=label_of_steps(runs), **STYLES['loss']),
        Line2D([], [], color=kind_colours.train, label='training, at evaluations',
               **STYLES['train_loss']),
        Line2D([], [], color=kind_colours.val, label='validation, at evaluations',
               **STYLES['val_loss']),
    ]
    if alone:
        for name, colour in data_set_colours(runs[0]).items():
            entries.append(Line2D([], [], color=colour, label=f'validation on {printable(name)}',
                                  **STYLES['val_loss_by_data']))
    for run, colours in zip(runs, palette, strict=True):
        if alone and run.best is None:
            continue  # its name is the title already
        entries.append(Line2D([], [], color=colours.val, lw=0 if alone else 1.8, marker='*', ms=11,
                              mec='white', label=label_of(run, x, alone)))
    # Outside the axes: inside, it would cover the end of a validation loss that rises again.
    picture.legend(handles=entries, loc='outside upper center', ncols=2, frameon=False, fontsize=9)


def limit_height(axes, runs):
    """Cuts off the axis above the settled losses if the start would take more than half of it."""
    curves = []
    for run in runs:
        curves += [run.steps, run.train, run.val]
        if len(runs) == 1:
            curves += run.by_data.values()
    values = [value for curve in curves for value in curve.values]
    low, peak = min(values), max(values)
    high = max(value for curve in curves for value in settled(curve))
    if peak - low > 2 * (high - low) > 0:
        axes.set_title(f'the start, at {peak:.3g}, is above', loc='right', fontsize=9,
                       color='#666666')
    else:
        high = peak
    # A margin of a twentieth, or some height if all losses are equal.
    margin = (high - low) / 20 or abs(high) / 20 or 1
    axes.set_ylim(low - margin, high + margin)


def settled(curve):
    """The values after the first twentieth of the x axis, in which the loss falls from chance."""
    if not curve.places:
        return []
    first, last = min(curve.places), max(curve.places)
    begin = first + (last - first) / 20
    return [value for place, value in zip(*curve, strict=True) if place >= begin]


def dress_rate_axes(axes, x):
    axes.set(ylabel='learning rate', xlabel=x)
    axes.set_ylim(bottom=0)
    axes.locator_params(axis='y', nbins=3)
    axes.xaxis.set_major_formatter(short)
    axes.yaxis.set_major_formatter('{x:g}')


def dress(axes):
    """A light grid, and no frame above and to the right."""
    axes.grid(color='#e5e5e5', lw=0.6)
    axes.spines[['top', 'right']].set_visible(False)


def draw_sweep(rates, losses, smoothed, suggestion, path):
    """Writes a picture of a learning-rate search to path: losses, raw and smoothed, over rates.

    suggestion: the learning rate to mark. Without matplotlib, it warns and writes nothing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        warn(f'no {os.path.basename(path)}: drawing needs the package: pip install matplotlib')
        return
    picture = Figure(figsize=(8, 4.5), dpi=200, layout='constrained')
    axes = picture.subplots()
    axes.plot(rates, losses, color=GREY, alpha=0.6, label='training, each step', **STYLES['loss'])
    axes.plot(rates, smoothed, color=BLUE, lw=1.8, label='smoothed')
    axes.axvline(suggestion, color=VERMILION, ls='--', lw=1.5,
                 label=f'suggestion, {suggestion:.1e}')
    axes.set(xscale='log', xlabel='learning rate', ylabel='loss (nats per token)')
    # Show the losses from the start to the lowest, not the heights to which the search diverges.
    lowest, first = min(smoothed), smoothed[0]
    fall = first - lowest
    axes.set_ylim(lowest - 0.1 * fall - 0.01, first + 0.2 * fall + 0.01)
    dress(axes)
    axes.legend(frameon=False)
    save(picture, path)


# ---- files ----
def draw(folders, path, x='steps'):
    """Writes the figure of these runs to path, a PNG 1600 pixels wide, all or nothing.

    UserError as from figure(), and if path cannot be written."""
    save(figure(folders, x), path)


def save(picture, path):
    """Writes a matplotlib Figure to path, all or nothing. UserError if path cannot be written."""
    with (explained(OSError, prefix='the picture cannot be written: '),
          # matplotlib warns of each letter in a run's name that its font lacks.
          warnings.catch_warnings(action='ignore', category=UserWarning),
          replacing(path) as file):
        picture.savefig(file, format='png')


def draw_finished(out_dir):
    """Draws loss.png at the end of a run if matplotlib is installed; a failure costs a warning."""
    if find_spec('matplotlib') is None:
        return
    try:
        draw([out_dir], os.path.join(out_dir, 'loss.png'))
    except UserError as error:
        warn(f'no loss.png: {error}')
    except Exception as error:
        # All is saved by now. Whatever a broken matplotlib raises, it must not turn the run into a
        # failed one, which torchrun would start again.
        warn(f'no loss.png ({type(error).__name__}: {error})')


# ---- command line ----
class Parser(argparse.ArgumentParser):
    """Reports a mistake in one sentence, as the other scripts do."""

    def error(self, message):
        end_with([f'{message} (--help says more)'])


def command_line(arguments=None):
    """The parsed arguments, those of the process if None. A mistake ends the process."""
    parser = Parser('python plot.py', description=__doc__, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('folders', nargs='+', metavar='out_dir', help='folder of a run')
    parser.add_argument('--x', choices=UNITS, default='steps', help='unit of the x axis')
    parser.add_argument('--output', metavar='FILE.png', help='where to write the picture')
    return parser.parse_args(arguments)


def main():
    # A name that the terminal cannot show must not end the script.
    sys.stdout.reconfigure(errors='backslashreplace')
    chosen = command_line()
    path = chosen.output
    if not path:
        folder = chosen.folders[0] if len(chosen.folders) == 1 else ''
        path = os.path.join(folder, 'loss.png')
    if not path.lower().endswith('.png'):
        raise UserError(f'output={path}: the picture is a PNG, so end its name with .png')
    draw(chosen.folders, path, chosen.x)
    print(path)


if __name__ == '__main__':
    main()
