"""model.py: what generate() and stream() promise."""
import math

import pytest
import torch
from conftest import tiny_gpt as tiny
from conftest import tiny_ids as ids


def generate(model, x, n, seed=0, **options):
    return model.generate(x, n, generator=torch.Generator().manual_seed(seed), **options)


def test_temperature_0_is_greedy_also_past_block_size():
    model, x = tiny(), ids(2, 5)
    for _ in range(20):
        x = torch.cat([x, model(x[:, -16:])[0][:, -1].argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(model.generate(ids(2, 5), 20, temperature=0), x)


def test_a_prompt_longer_than_block_size_continues_its_end():
    model, x = tiny(), ids(2, 40)
    cut = model.generate(x[:, -16:], 5, temperature=0)
    assert torch.equal(model.generate(x, 5, temperature=0)[:, 40:], cut[:, 16:])
    assert torch.equal(model.generate(x, 0), x)


def test_the_same_generator_gives_the_same_text_whatever_the_global_seed():
    model = tiny()
    torch.manual_seed(1)
    first = generate(model, ids(2, 3), 30)
    torch.manual_seed(2)
    assert torch.equal(generate(model, ids(2, 3), 30), first)
    assert not torch.equal(generate(model, ids(2, 3), 30, seed=1), first)


def with_logits(logits):
    """A GPT whose next-token logits are these, whatever the prompt."""
    model = tiny(vocab_size=len(logits), n_embd=2, n_head=1)
    model.forward = lambda idx, targets=None: (torch.tensor(logits).expand(len(idx), 1, -1), None)
    return model


def shares(model, **options):
    drawn = generate(model, torch.zeros(4000, 1, dtype=torch.int64), 1, **options)[:, 1]
    return (torch.bincount(drawn, minlength=model.config.vocab_size) / 4000).tolist()


P = [0.5, 0.25, 0.15, 0.1]
LOGITS = [math.log(p) for p in P]


@pytest.mark.parametrize('options, expected', [
    (dict(), P), (dict(top_k=0), P), (dict(top_k=99), P), (dict(top_p=1.0), P),
    (dict(top_k=2), [2 / 3, 1 / 3, 0, 0]), (dict(top_k=1), [1, 0, 0, 0]),
    (dict(top_p=0.5), [1, 0, 0, 0]), (dict(top_p=0.6), [2 / 3, 1 / 3, 0, 0]), (dict(top_p=1e-9), [1, 0, 0, 0]),
    (dict(temperature=0.5), [p * p / sum(q * q for q in P) for p in P]), (dict(temperature=1e-30), [1, 0, 0, 0]),
    (dict(vocab_size=2), [2 / 3, 1 / 3, 0, 0]), (dict(vocab_size=3, top_k=2), [2 / 3, 1 / 3, 0, 0])])
def test_sampling_follows_the_distribution_asked_for(options, expected):
    assert shares(with_logits(LOGITS), **options) == pytest.approx(expected, abs=0.03)


def test_top_k_keeps_exactly_k_among_ties():
    assert sum(share > 0 for share in shares(with_logits([1.0] * 8), top_k=3)) == 3


def test_a_row_ends_at_a_stop_token_and_all_ended_end_it():
    model = tiny(seed=3)
    free = generate(model, ids(4, 3), 40)
    stop = free[0, 10].item()
    stopped = generate(model, ids(4, 3), 40, stop_tokens=[stop])
    for row in stopped[:, 3:].tolist():
        if stop in row:
            assert set(row[row.index(stop):]) == {stop}
    assert stop in stopped[0, 3:].tolist() and torch.equal(stopped[0, :11], free[0, :11])
    always = with_logits([0.0, 100.0])
    assert always.generate(torch.zeros(3, 1, dtype=torch.int64), 40, stop_tokens=[1]).shape == (3, 2)


@pytest.mark.parametrize('context, options, reason', [
    (0, {}, 'no tokens'), (3, dict(temperature=-1.0), 'temperature'), (3, dict(temperature=math.nan), 'temperature'),
    (3, dict(top_k=-1), 'top_k'), (3, dict(top_p=0.0), 'top_p'), (3, dict(top_p=1.5), 'top_p')])
def test_what_cannot_be_sampled_is_refused(context, options, reason):
    with pytest.raises(ValueError, match=reason):
        tiny().generate(torch.zeros(1, context, dtype=torch.int64), 3, **options)
