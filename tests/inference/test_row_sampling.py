"""Choosing for rows that have options, seeds and log-probabilities of their own."""
import math

import pytest
import torch
from torch.nn import functional as F

from plaingpt.inference.row_sampling import (RowSampler, choose_for_rows, finite_rows,
                                             logprobs_of)
from plaingpt.inference.sampling import Sampler, SamplingOptions, draw_numbers, sort_for_top_p

VOCAB = 300
STEPS = 6
ALL_OPTIONS = [
    SamplingOptions(),
    SamplingOptions(temperature=0),
    SamplingOptions(temperature=0.7, top_k=5),
    SamplingOptions(top_p=0.8),
    SamplingOptions(temperature=1.5, top_p=0.95, top_k=40),
    SamplingOptions(min_p=0.2),
    SamplingOptions(temperature=0, repetition_penalty=1.5),
    SamplingOptions(temperature=0.9, repetition_penalty=3.0, top_p=0.9),
]
PROMPTS = [[row, row + 7, VOCAB - 1, VOCAB + 3] for row in range(len(ALL_OPTIONS))]


def logits_of(step, rows, scale=3.0):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(rows, VOCAB, generator=generator) * scale


def sampler_of(row, options):
    return RowSampler(options, seed=row, prompt=PROMPTS[row], max_tokens=STEPS, vocab_size=VOCAB,
                      device=torch.device('cpu'))


def test_rows_choose_together_what_each_chooses_by_itself():
    samplers = [sampler_of(row, options) for row, options in enumerate(ALL_OPTIONS)]
    together = []
    for step in range(STEPS):
        together.append(choose_for_rows(logits_of(step, len(samplers)), samplers))

    for row, options in enumerate(ALL_OPTIONS):
        # The same as a batch of one row, as engine.stream() has it.
        alone = Sampler(options, draw_numbers(1, STEPS, [row]), torch.tensor([PROMPTS[row]]),
                        torch.tensor([], dtype=torch.int64), VOCAB)
        last = torch.tensor([[0]])
        for step in range(STEPS):
            last = alone.choose_next(logits_of(step, len(samplers))[row:row + 1], last)
            assert last.item() == together[step][row], (options, step)


@pytest.mark.parametrize('options', ALL_OPTIONS)
def test_neighbours_with_equal_options_change_nothing(options):
    logits = logits_of(0, 8, scale=0.3)
    logits[:, ::3] = 1.0  # many ties
    chosen = choose_for_rows(logits, [sampler_of(row, options) for row in range(8)])
    for row in range(8):
        [alone] = choose_for_rows(logits[row:row + 1], [sampler_of(row, options)])
        assert alone == chosen[row]


@pytest.mark.parametrize('top_p', [1e-9, 0.3, 0.9, 1 - 1e-6])
@pytest.mark.parametrize('scale', [0.0, 1e-3, 1.0, 10.0])
def test_all_that_top_p_keeps_is_sorted(top_p, scale):
    probabilities = logits_of(0, 4, scale).softmax(dim=-1)
    likeliest, ids = sort_for_top_p(probabilities, top_p)
    assert torch.equal(likeliest[:, 0], probabilities.amax(dim=-1))
    assert (likeliest.diff(dim=-1) <= 0).all()
    for row in range(4):
        kept = likeliest[row] > 0
        assert torch.equal(probabilities[row, ids[row, kept]], likeliest[row, kept])
        assert len(ids[row, kept].unique()) == kept.sum()
        # What is missing is less than what top-p drops.
        assert 1 - likeliest[row].double().sum() < 1 - top_p + 1e-6
    if scale == 10.0 and top_p == 0.9:
        assert ids.size(1) < VOCAB / 4


def test_a_penalty_counts_what_a_row_has_chosen():
    options = SamplingOptions(temperature=0, repetition_penalty=4.0)
    sampler = RowSampler(options, 0, [0], 4, 3, torch.device('cpu'))
    logits = torch.tensor([[3.0, 2.0, 1.0]])
    # 3 / 4 for the prompt's token, then 2 / 4 for the one just chosen, then all are penalized.
    assert [choose_for_rows(logits, [sampler])[0] for _ in range(3)] == [1, 2, 0]


def test_logprobs_are_those_of_the_whole_distribution():
    logits = logits_of(0, 3)
    logits[:, 250] = 50.0  # beyond the tokenizer's ids: it has probability, but is not listed
    expected = F.log_softmax(logits, dim=-1)
    ids = [4, 299, 7]
    found = logprobs_of(logits, ids, [2, 0, 999], vocab_size=250)
    for row, logprobs in enumerate(found):
        assert logprobs.id == ids[row]
        assert logprobs.logprob == pytest.approx(expected[row, ids[row]].item())
    best = expected[:, :250].sort(descending=True)
    assert [id for id, _ in found[0].top] == best.indices[0, :2].tolist()
    assert [logprob for _, logprob in found[0].top] == pytest.approx(best.values[0, :2].tolist())
    assert found[1].top == ()
    assert len(found[2].top) == 250


def test_rows_with_a_number_that_is_not_finite_are_found():
    logits = logits_of(0, 4)
    logits[1, 5] = math.nan
    logits[2, 5] = math.inf
    logits[3, 5] = -math.inf
    assert finite_rows(logits) == [True, False, False, False]
