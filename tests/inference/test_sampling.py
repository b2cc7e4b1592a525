"""plaingpt/inference/sampling.py: which token is chosen, and how often."""
import math

import pytest
import torch
from generating import generate, gpt_with_logits, shares
from torch.nn import functional as F

from plaingpt.inference.sampling import SamplingOptions, choose, draw_numbers

P = [0.5, 0.25, 0.15, 0.1]  # the distribution that most tests here sample from
LOGITS = [math.log(p) for p in P]


def shares_of_next_token(logits, **options):
    """The share of each id among 4000 draws of the next token."""
    prompts = torch.zeros(4000, 1, dtype=torch.int64)
    drawn = generate(gpt_with_logits(logits), prompts, 1, **options)[:, 1]
    return shares(drawn, len(logits))


def proportional(*weights):
    """The distribution in which each id has a share in proportion to its weight."""
    return [weight / sum(weights) for weight in weights]


@pytest.mark.parametrize('options, expected', [
    # Options that change nothing.
    (dict(), P),
    (dict(top_k=0), P),
    (dict(top_k=99), P),
    (dict(top_p=1.0), P),
    (dict(min_p=0), P),
    # One option alone.
    (dict(temperature=0.5), proportional(*(p ** 2 for p in P))),
    (dict(temperature=1e-30), [1, 0, 0, 0]),
    (dict(top_k=2), proportional(2, 1, 0, 0)),
    (dict(top_k=1), [1, 0, 0, 0]),
    (dict(top_p=0.5), [1, 0, 0, 0]),
    (dict(top_p=0.6), proportional(2, 1, 0, 0)),
    (dict(top_p=1e-9), [1, 0, 0, 0]),
    (dict(min_p=0.4), proportional(2, 1, 0, 0)),
    (dict(min_p=0.25), proportional(0.5, 0.25, 0.15, 0)),
    (dict(min_p=1), [1, 0, 0, 0]),
    (dict(vocab_size=2), proportional(2, 1, 0, 0)),
    # Several together.
    (dict(vocab_size=3, top_k=2), proportional(2, 1, 0, 0)),
    (dict(min_p=0.26, top_k=2, temperature=2), proportional(2 ** 0.5, 1, 0, 0)),
    (dict(min_p=0.3, temperature=0.5), [1, 0, 0, 0]),
])
def test_samples_follow_the_requested_distribution(options, expected):
    assert shares_of_next_token(LOGITS, **options) == pytest.approx(expected, abs=0.03)


def test_top_k_keeps_exactly_k_tokens_even_among_ties():
    kept = [share for share in shares_of_next_token([1.0] * 8, top_k=3) if share > 0]
    assert len(kept) == 3


@pytest.mark.parametrize('shift', [0, 3], ids=['logits below 0', 'logits above 0'])
def test_a_repetition_penalty_counts_the_prompt_and_the_text_but_not_the_padding(shift):
    logits = torch.tensor(LOGITS) + shift
    penalized = logits * 2 if shift == 0 else logits / 2  # less likely either way

    def expected(seen):
        distribution = F.softmax(torch.where(seen, penalized, logits), dim=-1)
        return distribution.tolist()

    prompts = torch.tensor([[0, 2, 3], [1, 1, 0]])
    lengths = [2, 3]  # the 3 of the first prompt is padding
    texts = generate(gpt_with_logits(logits.tolist()), prompts, 2, lengths=lengths,
                     num_samples=8000, repetition_penalty=2.0)
    for number, length in enumerate(lengths):
        new = texts[8000 * number:8000 * (number + 1), 3:]
        seen = torch.isin(torch.arange(4), prompts[number, :length])
        assert shares(new[:, 0], 4) == pytest.approx(expected(seen), abs=0.025)
        # In the texts that begin with a 3, the second token is penalized for that as well.
        seen[3] = True
        after_3 = new[new[:, 0] == 3, 1]
        assert shares(after_3, 4) == pytest.approx(expected(seen), abs=0.06)


@pytest.mark.parametrize('number', [0.0, 1 - 2 ** -24])  # the smallest and largest that are drawn
@pytest.mark.parametrize('options, unlikely', [
    (dict(), -1e4),
    (dict(top_k=1000), -30.0),
    (dict(top_p=0.9999), -30.0),
    (dict(min_p=1e-3), -30.0),
])
def test_no_number_chooses_a_token_without_probability(options, unlikely, number):
    # Every third token is possible, and the last one is not.
    logits = torch.rand(200, 3000, generator=torch.Generator().manual_seed(0))
    possible = torch.arange(3000) % 3 == 1
    logits[:, ~possible] = unlikely
    chosen = choose(logits, SamplingOptions(**options), torch.full((200, 1), number))
    assert chosen.shape == (200, 1)
    assert possible[chosen].all()


@pytest.mark.parametrize('options', [
    dict(),
    dict(temperature=0, top_k=0, top_p=1.0, min_p=0, repetition_penalty=1e-9),
    dict(temperature=1e300, top_k=10 ** 30, top_p=1e-300, min_p=1, repetition_penalty=1e300),
])
def test_options_in_range_have_no_problems(options):
    assert list(SamplingOptions(**options).problems()) == []


@pytest.mark.parametrize('key, values', [
    ('temperature', [-1e-9, math.inf, math.nan]),
    ('top_k', [-1]),
    ('top_p', [0.0, -0.5, 1.1, math.nan]),
    ('min_p', [-0.1, 1.1, math.nan]),
    ('repetition_penalty', [0.0, -1.0, math.inf, math.nan]),
])
def test_each_option_out_of_range_is_one_problem_that_names_it(key, values):
    for value in values:
        [problem] = SamplingOptions(**{key: value}).problems()
        assert problem.startswith(f'{key}={value} must be ')


def test_all_options_out_of_range_are_named():
    options = SamplingOptions(temperature=-1.0, top_k=-1, top_p=2.0, min_p=2.0,
                              repetition_penalty=0.0)
    named = [problem.partition('=')[0] for problem in options.problems()]
    assert named == ['temperature', 'top_k', 'top_p', 'min_p', 'repetition_penalty']


def test_the_numbers_of_a_row_depend_on_its_seed_alone():
    together = draw_numbers(3, 5, seeds=[7, 8, 7])
    assert together.shape == (3, 5)
    assert torch.equal(together[0], together[2])
    assert not torch.equal(together[0], together[1])
    assert torch.equal(together[1:2], draw_numbers(1, 5, seeds=[8]))
    assert torch.equal(together[:, :3], draw_numbers(3, 3, seeds=[7, 8, 7]))
