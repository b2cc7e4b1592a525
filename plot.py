"""
Draws the loss curves of runs, of one that is still training too, from the metrics.jsonl that train.py writes:

    python plot.py out-shakespeare-char
    python plot.py out-shakespeare-char --x=tokens
    python plot.py out-a out-b --x=hours --output=losses.png

The picture of one run is loss.png in its folder, that of several ./loss.png.
"""
import argparse
import contextlib
import itertools
import json
import os
import sys
import warnings
from importlib.util import find_spec

from plaingpt.system.messages import UserError, end_with, explained, warn

UNITS = {'steps': ('step', 1), 'tokens': ('tokens', 1), 'hours': ('elapsed', 3600)}  # of x: the key, and its divisor
# Okabe and Ito 2008, Color Universal Design: the colour-blind tell these apart too
GREY, BLUE, VERMILION = '#8c8c8c', '#0072B2', '#D55E00'
COLOURS = BLUE, VERMILION, '#009E73', '#CC79A7', '#E69F00', '#56B4E9', '#000000'
STYLES = {'loss': dict(lw=1.2), 'train_loss': dict(lw=1.5, ls='--'), 'val_loss': dict(lw=1.8, marker='o', ms=3)}
GROUPS = 100  # of logged steps, whose means are drawn where there are more than two steps in each


def read(folder):
    """The records of a run, a list of dicts. UserError says what is wrong with its metrics.jsonl."""
    path, records = os.path.join(folder, 'metrics.jsonl'), []
    if not os.path.isdir(folder):
        raise UserError(f'there is no folder {folder}: name the out_dir of a run')
    if not os.path.exists(path):
        raise UserError(f'{folder} has no metrics.jsonl: name the out_dir of a run of train.py')
    with (explained(OSError, prefix='metrics.jsonl cannot be read: '),
          open(path, encoding='utf-8', errors='replace') as file):
        for number, line in enumerate(file, start=1):
            try:
                records.append({**json.loads(line)})
            except (ValueError, TypeError, RecursionError):
                if line.endswith('\n'):  # else it is being written, or was when the run was killed
                    raise UserError(f'{path}, line {number}: expected a JSON object; delete the line') from None
    return records


def series(records, x, y):
    """The values of x, a name in UNITS, and of the key y, where a record has finite numbers for both: two lists."""
    (key, divisor), limit = UNITS[x], 3.5e38  # float32 ends there
    pairs = [(record.get(key), record.get(y)) for record in records]
    pairs = [(place / divisor, float(value)) for place, value in pairs if type(place) in (int, float)
             and type(value) in (int, float) and abs(place) < limit and abs(value) < limit]
    return [place for place, _ in pairs], [value for _, value in pairs]


def average(values):
    """Means of GROUPS groups of neighbours if there are many values, else the values; and how many make a group."""
    if len(values) <= 2 * GROUPS:
        return values, 1
    import numpy as np
    return [group.mean() for group in np.array_split(values, GROUPS)], round(len(values) / GROUPS)


def settled(places, values):
    """The values after the first twentieth of the way, in which a loss falls from the height of mere chance."""
    first = min(places, default=0)
    begin = first + (max(places, default=0) - first) / 20
    return [value for place, value in zip(places, values, strict=True) if place >= begin]


def short(number, _=None):
    """A number as a label: 0.25, 1,500, 20M, 9B."""
    for unit, letter in (1e12, 'T'), (1e9, 'B'), (1e6, 'M'):
        if number >= unit:
            return f'{number / unit:.4g}{letter}'
    return f'{number:,.0f}' if number >= 1000 else f'{number:.4g}'


def names_of(folders):
    """What the picture calls the runs: the last part of each path if these differ, and no more of it than fits."""
    names = [os.path.basename(os.path.abspath(folder)) for folder in folders]
    names = names if len(set(names)) == len(names) else folders
    names = [name if len(name) <= 40 else '…' + name[-39:] for name in names]
    return [name.encode(errors='replace').decode().replace('$', r'\$') for name in names]  # $ would begin a formula


def figure(folders, x='steps'):
    """A matplotlib Figure of the runs in these folders, losses above learning rates, over x, a name in UNITS. UserError
    if a run can't be read or matplotlib is missing."""
    try:
        from matplotlib.figure import Figure  # without pyplot: it draws with Agg, needs no display and leaves no state
        from matplotlib.lines import Line2D
    except ImportError:
        raise UserError('drawing needs the package: pip install matplotlib') from None
    picture = Figure(figsize=(8, 4.9 + len(folders) / 10), dpi=200, layout='constrained')  # the legend grows
    losses, rates = picture.subplots(2, sharex=True, height_ratios=[7, 2])
    alone, names, curves, counts, best = len(folders) == 1, names_of(folders), [], [], []
    for folder, name, own in zip(folders, names, itertools.cycle(COLOURS), strict=False):
        records, colours = read(folder), (GREY, BLUE, VERMILION) if alone else (own, own, own)
        steps, train, val = (series(records, x, key) for key in STYLES)
        if not (steps[1] or val[1]):
            raise UserError(f'{os.path.join(folder, "metrics.jsonl")} has no loss to draw over {x} yet')
        (places, _), (means, count) = map(average, steps)
        losses.plot(places, means, color=colours[0], alpha=1 if alone else 0.5, **STYLES['loss'],
                    marker='.' if len(means) == 1 else None)
        losses.plot(*train, color=colours[1], **STYLES['train_loss'])
        losses.plot(*val, color=colours[2], **STYLES['val_loss'], markevery=len(val[1]) // 40 + 1)
        rates.plot(*series(records, x, 'lr'), color=colours[0], lw=1.5)
        if val[1]:
            lowest, place = min(zip(*reversed(val), strict=True))
            losses.plot(place, lowest, color=colours[2], marker='*', ms=13, mec='white', zorder=3)
            name = ('best validation loss' if alone else f'{name}, best') + f' {lowest:#.4g} at {short(place)} {x}'
        if val[1] or not alone:
            best.append(Line2D([], [], color=colours[2], lw=0 if alone else 1.8, marker='*', ms=11, mec='white',
                               label=name))
        counts.append(count)
        curves += [(places, means), train, val]
    of = ' to '.join(map(short, sorted({min(counts), max(counts)})))
    labels = ('training, ' + ('logged steps' if of == '1' else f'means of {of} logged steps'),
              'training, at evaluations', 'validation, at evaluations')
    kinds = [Line2D([], [], color=colour if alone else GREY, label=label, **style) for colour, label, style
             in zip((GREY, BLUE, VERMILION), labels, STYLES.values(), strict=True)]
    # Not among the curves: a validation loss that rises again would end below it.
    picture.legend(handles=kinds + best, loc='outside upper center', ncols=2, frameon=False, fontsize=9)
    if alone:
        losses.set_title(names[0], loc='left', fontsize=11)
    losses.set_ylabel('loss (nats per token)')
    limit_height(losses, curves)
    rates.set(ylabel='learning rate', xlabel=x)
    rates.set_ylim(bottom=0)
    rates.locator_params(axis='y', nbins=3)
    rates.xaxis.set_major_formatter(short)
    rates.yaxis.set_major_formatter('{x:g}')
    for axes in losses, rates:
        axes.grid(color='#e5e5e5', lw=0.6)
        axes.spines[['top', 'right']].set_visible(False)
    picture.align_ylabels()
    return picture


def limit_height(losses, curves):
    """Ends the axis below the losses of the start where they would take more than half of the height."""
    drawn = [value for _, values in curves for value in values]
    low, peak = min(drawn), max(drawn)
    high = max(value for curve in curves for value in settled(*curve))
    if peak - low > 2 * (high - low) > 0:
        losses.set_title(f'the start, at {peak:.3g}, is above', loc='right', fontsize=9, color='#666666')
    else:
        high = peak
    margin = (high - low) / 20 or abs(high) / 20 or 1
    losses.set_ylim(low - margin, high + margin)


def draw(folders, path, x='steps'):
    """Writes the figure of these runs to path, a PNG 1600 pixels wide, whole or not at all. UserError as from figure(),
    and if path can't be written."""
    save(figure(folders, x), path)


def save(picture, path):
    """Writes a matplotlib Figure to path, whole or not at all. UserError if that can't be written."""
    folder, name = os.path.split(path)
    temporary = os.path.join(folder, f'.{name}.tmp')
    with (explained(OSError, prefix='the picture cannot be written: '),
          warnings.catch_warnings(action='ignore', category=UserWarning)):  # of letters in a name that the font lacks
        try:
            picture.savefig(temporary, format='png')
            os.replace(temporary, path)
        finally:
            with contextlib.suppress(OSError):
                os.remove(temporary)


def draw_sweep(rates, losses, smoothed, suggestion, path):
    """Writes a picture of losses over rising learning rates, raw and smoothed, and of the rate that is suggested."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return warn('no picture of the learning rates: it needs the package matplotlib')
    picture = Figure(figsize=(8, 4.5), dpi=200, layout='constrained')
    axes = picture.subplots()
    axes.plot(rates, losses, color=GREY, alpha=0.6, label='training, each step', **STYLES['loss'])
    axes.plot(rates, smoothed, color=BLUE, lw=1.8, label='smoothed')
    axes.axvline(suggestion, color=VERMILION, ls='--', lw=1.5, label=f'suggestion, {suggestion:.1e}')
    axes.set(xscale='log', xlabel='learning rate', ylabel='loss (nats per token)')
    low, high = min(smoothed), smoothed[0]
    axes.set_ylim(low - 0.1 * (high - low) - 0.01, high + 0.2 * (high - low) + 0.01)  # and not up to where it diverges
    axes.grid(color='#e5e5e5', lw=0.6)
    axes.spines[['top', 'right']].set_visible(False)
    axes.legend(frameon=False)
    save(picture, path)


def draw_finished(out_dir):
    """At the end of a run: its loss.png, where matplotlib is there. A failure costs a warning."""
    if find_spec('matplotlib'):
        try:
            draw([out_dir], os.path.join(out_dir, 'loss.png'))
        except Exception as error:  # what a broken matplotlib raises must not spoil the end of a run that is saved
            warn(f'no loss.png: {error}')


def command_line(arguments=None):
    """What the arguments (None: those of the process) say. A mistake ends it in one sentence."""
    parser = argparse.ArgumentParser('python plot.py', description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('folders', nargs='+', metavar='out_dir', help='folder of a run')
    parser.add_argument('--x', choices=UNITS, default='steps', help='what to draw over')
    parser.add_argument('--output', metavar='FILE.png', help='where to write the picture')
    parser.error = lambda message: end_with([f'{message} (--help says more)'])
    return parser.parse_args(arguments)


def main():
    sys.stdout.reconfigure(errors='backslashreplace')  # a name that the terminal can't show must not end it
    chosen = command_line()
    path = chosen.output or os.path.join(chosen.folders[0] if len(chosen.folders) == 1 else '', 'loss.png')
    if not path.lower().endswith('.png'):
        raise UserError(f'output={path}: the picture is a PNG, so let its name end with .png')
    draw(chosen.folders, path, chosen.x)
    print(path)


if __name__ == '__main__':
    main()
