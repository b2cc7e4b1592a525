"""Figures, standard errors and differences, by hand."""
import json
import math

import numpy as np
import pytest

from plaingpt.evaluation import comparison
from plaingpt.evaluation.split_loss import SplitLoss


def measured(nats, targets=(2, 2, 4), text_nats=None, text_bytes=(4, 4, 8), **changes):
    """A SplitLoss of three stretches."""
    fields = dict(
        text_length=17, nats=np.array(nats, float), targets=np.array(targets),
        text_nats=np.array(nats if text_nats is None else text_nats, float),
        text_bytes=np.array(text_bytes))
    return SplitLoss(**{**fields, **changes})


def test_the_figures_are_those_computed_by_hand():
    figures = comparison.figures(measured([2, 6, 8], text_nats=[1, 5, 8]))
    assert figures['loss'] == 2
    assert figures['perplexity'] == pytest.approx(math.exp(2))
    assert figures['bits_per_byte'] == pytest.approx(14 / math.log(2) / 16)
    assert (figures['tokens'], figures['bytes'], figures['stretches']) == (8, 16, 3)
    # The stretches are 2, -2 and 0 nats away from the mean loss of 2.
    assert figures['loss_standard_error'] == pytest.approx(math.sqrt(3 / 2 * (4 + 4)) / 8)


def test_with_equal_stretches_the_standard_error_is_that_of_a_mean():
    losses = np.array([1.0, 2.5, 3.0, 0.5])
    ratio = comparison.ratio(10 * losses, np.full(4, 10))
    expected = losses.std(ddof=1) / math.sqrt(4)
    assert comparison.standard_error(ratio.contributions) == pytest.approx(expected)


def test_a_model_does_not_differ_from_itself():
    model = measured([2, 6, 8])
    for of in 'loss', 'bits per byte':
        difference = comparison.difference(model, model, of)
        assert difference == {'of': of, 'value': 0, 'standard_error': 0, 'is_paired': True,
                              'exceeds_noise': False}


def test_what_is_hard_for_both_models_cancels():
    first = measured([2, 6, 8])
    second = measured([2.2, 6.2, 8.4])  # 0.1 more for each token
    difference = comparison.difference(first, second, 'loss')
    assert difference['value'] == pytest.approx(0.1)
    assert difference['standard_error'] == pytest.approx(0, abs=1e-12)
    assert difference['exceeds_noise']


def test_texts_of_different_length_are_not_paired():
    first = measured([2, 6, 8])
    second = measured([2.2, 6.2, 8.4], text_length=18)
    difference = comparison.difference(first, second, 'loss')
    assert not difference['is_paired']
    assert not difference['exceeds_noise']
    error = comparison.figures(first)['loss_standard_error']
    assert difference['standard_error'] == pytest.approx(math.sqrt(2) * error)


def test_different_tokens_of_one_text_are_compared_by_their_bytes():
    first = measured([2, 6, 8])
    second = measured([1, 3, 4], targets=(1, 1, 2))
    difference = comparison.difference(first, second, 'bits per byte')
    assert difference['is_paired']
    assert difference['value'] == pytest.approx(-8 / math.log(2) / 16)


def test_what_is_unknown_is_not_a_number_in_the_table_and_null_in_the_file():
    figures = comparison.figures(measured([2, 6, 8], knows_bytes=False))
    assert math.isnan(figures['bits_per_byte'])
    assert 'bits per byte n/a' in comparison.describe(figures)
    assert 'bytes of text' not in comparison.describe(figures)
    [entry] = json.loads(comparison.to_json([figures]))
    assert entry['bits_per_byte'] is None
    assert entry['loss'] == 2
    single = measured([2], targets=(2,), text_bytes=(4,))
    assert math.isnan(comparison.figures(single)['loss_standard_error'])


def test_a_difference_that_is_unknown_is_neither_beyond_noise_nor_within():
    unknown = measured([2, 6, 8], knows_bytes=False)
    difference = comparison.difference(unknown, unknown, 'bits per byte')
    assert difference['exceeds_noise'] is None
    results = [{'model': 'a', **comparison.figures(unknown)},
               {'model': 'b', **comparison.figures(unknown), 'difference': difference}]
    assert comparison.table(results)[2].split()[-1] == 'n/a'


def test_a_loss_beyond_the_range_of_exp_has_an_infinite_perplexity():
    assert comparison.figures(measured([9e3, 9e3, 9e3]))['perplexity'] == math.inf


def test_the_table_compares_with_the_first_model():
    first = measured([2, 6, 8])
    second = measured([2.2, 6.2, 8.4])
    results = [{'model': 'a', **comparison.figures(first)},
               {'model': 'b', **comparison.figures(second)}]
    results[1]['difference'] = comparison.difference(first, second, 'loss')
    header, row, other_row, footer = comparison.table(results)
    assert ' '.join(header.split()) == 'model loss bits per byte difference in loss beyond noise'
    assert row.split()[:2] == ['a', '2.0000']
    assert other_row.split()[-4:] == ['+0.1000', '±', '0.0000', 'yes']
    assert 'paired by stretches' in footer
