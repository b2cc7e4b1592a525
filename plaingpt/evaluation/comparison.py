"""
Figures of a model on a split, with their standard errors, and differences between models.

All figures are ratios of two sums over a text: nats to targets, or bits to bytes. The tokens of a
text are correlated, so the number of tokens does not say how sure a ratio is. The standard error
comes from n stretches of the text [1], taken as independent. With y and x the sums of a stretch, Y
and X those of the whole text, and R = Y / X, a stretch contributes u = (y - R x) / X to the error
of R, and

    standard error = sqrt(n / (n - 1) * sum of u**2)        [2]

For two models on the same text, u is the difference of their contributions [1]. What makes a
stretch hard for both cancels, so the difference is known better than the figures themselves.

References:
[1] Miller 2024, Adding Error Bars to Evals, arXiv 2411.00640 (clusters, paired differences)
[2] Cochran 1977, Sampling Techniques, chapter 6 (ratio estimates)
"""
import json
import math
from typing import NamedTuple

import numpy as np

NOISE = 2  # standard errors within which a difference may be chance: about 95%


# ---- ratios ----

class Ratio(NamedTuple):
    """A ratio of two sums over a text; nan if it is unknown."""
    value: float
    contributions: np.ndarray  # float64 (stretches,), to its error


def ratio(numerators, denominators):
    """The Ratio of two sums; the arrays have one element a stretch."""
    total = float(denominators.sum())
    if total == 0:
        return Ratio(math.nan, np.full(len(numerators), math.nan))
    value = float(numerators.sum()) / total
    return Ratio(value, (numerators - value * denominators) / total)


def standard_error(contributions):
    """The standard error of what stretches contribute to; nan if there is a single one."""
    n = len(contributions)
    if n < 2:
        return math.nan
    return math.sqrt(n / (n - 1) * np.square(contributions).sum())


def loss(measured):
    """The Ratio of nats to targets of a SplitLoss: the mean cross-entropy."""
    return ratio(measured.nats, measured.targets)


def bits_per_byte(measured):
    """The Ratio of bits to bytes of text of a SplitLoss, without special tokens.

    It is unknown if the tokenizer does not tell how many bytes there are."""
    if not measured.knows_bytes:
        return ratio(measured.text_nats, np.zeros_like(measured.text_bytes))
    return ratio(measured.text_nats / math.log(2), measured.text_bytes)


# ---- figures of a model, and of two ----

def figures(measured):
    """The figures of a SplitLoss, {name: number}; bytes is None if the tokenizer does not tell."""
    mean_loss = loss(measured)
    bits = bits_per_byte(measured)
    return {
        'loss': mean_loss.value,
        'loss_standard_error': standard_error(mean_loss.contributions),
        'perplexity': math.exp(mean_loss.value) if mean_loss.value < 700 else math.inf,
        'bits_per_byte': bits.value,
        'bits_per_byte_standard_error': standard_error(bits.contributions),
        'tokens': int(measured.targets.sum()),
        'bytes': int(measured.text_bytes.sum()) if measured.knows_bytes else None,
        'stretches': len(measured.targets),
    }


def difference(first, second, of):
    """How much a figure of the second SplitLoss is above that of the first one, a dict.

    of: 'loss' or 'bits per byte'. The models are paired if their texts have equally many bytes."""
    figure = loss if of == 'loss' else bits_per_byte
    a = figure(first)
    b = figure(second)
    value = b.value - a.value
    is_paired = first.text_length == second.text_length
    if is_paired:
        error = standard_error(b.contributions - a.contributions)
    else:
        error = math.hypot(standard_error(a.contributions), standard_error(b.contributions))
    exceeds_noise = None  # unknown
    if not math.isnan(value) and not math.isnan(error):
        exceeds_noise = abs(value) > NOISE * error
    return {
        'of': of,
        'value': value,
        'standard_error': error,
        'is_paired': is_paired,
        'exceeds_noise': exceeds_noise,
    }


# ---- as text ----

def describe(result):
    """The lines about one model.

    result: its figures(), and the keys 'split' and so on that evaluate.py adds."""
    loss_text = _with_error(result['loss'], result['loss_standard_error'])
    bits_text = _with_error(result['bits_per_byte'], result['bits_per_byte_standard_error'])
    size = f'{result["tokens"]:,} predicted tokens'
    if result['bytes'] is not None:
        size += f', {result["bytes"]:,} bytes of text'
    return (f'loss {loss_text}, perplexity {result["perplexity"]:,.3f}, '
            f'bits per byte {bits_text}\n'
            f'{size}; ± is the standard error, from {result["stretches"]} stretches of the text')


def table(results):
    """The lines of a table of models, compared with the first one.

    results: one for each model, as in describe(); but for the first one with a 'difference'."""
    of = results[1]['difference']['of']
    rows = [['model', 'loss', 'bits per byte', f'difference in {of}', 'beyond noise']]
    for result in results:
        row = [
            result['model'],
            _with_error(result['loss'], result['loss_standard_error']),
            _with_error(result['bits_per_byte'], result['bits_per_byte_standard_error']),
        ]
        if 'difference' in result:
            compared = result['difference']
            row.append(_with_error(compared['value'], compared['standard_error'], sign='+'))
            row.append({True: 'yes', False: 'no', None: 'n/a'}[compared['exceeds_noise']])
        else:
            row += ['', '']
        rows.append(row)

    columns = zip(*rows, strict=True)
    widths = [max(len(cell) for cell in column) for column in columns]
    lines = []
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append('  '.join(cells).rstrip())
    pairing = 'paired by stretches of the text'
    if not all(result['difference']['is_paired'] for result in results[1:]):
        pairing = 'not all paired, because the texts differ in length'
    lines.append(f'± is the standard error; differences to the first model, {pairing}; beyond '
                 f'noise: more than {NOISE} standard errors (95%)')
    return lines


def _with_error(value, error, sign='-'):
    """A number and its standard error; sign: '+' to show the sign of positive ones, too."""
    if math.isnan(value):
        return 'n/a'
    error_text = 'n/a' if math.isnan(error) else f'{error:.4f}'
    return f'{value:{sign}.4f} ± {error_text}'


def to_json(results):
    """The results as bytes of JSON; null stands for a number that is unknown or infinite."""
    return (json.dumps(_finite(results), indent=2) + '\n').encode()


def _finite(value):
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_finite(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
