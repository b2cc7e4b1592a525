"""generation.py: what generate() and stream() promise."""
import math

import pytest
import torch
from conftest import tiny_gpt as tiny
from conftest import tiny_ids as ids
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from plaingpt.inference.sampling import SamplingOptions, choose


def lively(**changes):
    """A GPT whose text goes on changing: at initial weights the likeliest token is mostly the last one again."""
    model = tiny(**changes)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.5)
    return model


def generate(model, x, n, seed=0, **options):
    rows = len(x) * options.get('num_samples', 1)
    return model.generate(x, n, seeds=range(seed, seed + rows), **options)


# ---- windows and batches ----

def naive(model, row, n, stride):
    """The row and its n likeliest tokens, as a list, by encoding all of the window for each of them."""
    row, begin = list(row), max(0, len(row) - 16)
    for _ in range(n):
        if len(row) - begin > 16:
            begin = len(row) - (16 - stride + 1)
        row.append(model(torch.tensor([row[begin:]]))[0].argmax().item())
    return row


@pytest.mark.parametrize('stride', [None, 2, 5, 16])
@pytest.mark.parametrize('length', [1, 15, 16, 17, 40])
def test_greedy_text_is_that_of_encoding_the_whole_window_at_each_token(length, stride):
    model, x = lively(), ids(2, length)
    expected = torch.tensor([naive(model, row, 40, stride or 1) for row in x.tolist()])
    assert len(expected[:, length:].unique()) > 9
    assert torch.equal(model.generate(x, 40, temperature=0, stride=stride), expected)
    assert torch.equal(model.generate(x[1:], 40, temperature=0, stride=stride), expected[1:])
    assert torch.equal(model.generate(x, 0), x)


def test_sampling_moves_a_full_window_by_half_of_it_unless_told():
    model, x = lively(block_size=13), ids(2, 5)
    assert torch.equal(generate(model, x, 40), generate(model, x, 40, stride=7))
    assert not torch.equal(generate(model, x, 40), generate(model, x, 40, stride=6))


@pytest.mark.parametrize('options', [
    dict(temperature=0), dict(temperature=0, stride=5, repetition_penalty=3.0), dict(stride=1, repetition_penalty=3.0),
    dict(top_p=0.9), dict(stride=5, min_p=0.02)])
def test_a_padded_row_continues_as_it_would_alone(options):
    model, rows = lively(), [ids(length, seed=length) for length in (3, 20, 1, 16, 11)]
    padded = pad_sequence(rows, batch_first=True, padding_value=30)
    together = generate(model, padded, 30, lengths=[len(row) for row in rows], num_samples=2, **options)
    for number, row in enumerate(rows):
        alone = generate(model, row[None], 30, 2 * number, num_samples=2, **options)
        assert torch.equal(together[2 * number:][:2, 20:], alone[:, len(row):])


def test_samples_of_a_prompt_share_its_encoding_and_are_what_they_would_be_alone(monkeypatch):
    model, x, encoded = lively(), ids(2, 6), []
    alone = [generate(model, x[number // 3:][:1], 10, number) for number in range(6)]

    def residuals(idx, *arguments, original=model.residuals):
        encoded.extend([tuple(idx.shape)] if idx.size(1) > 1 else [])
        return original(idx, *arguments)

    monkeypatch.setattr(model, 'residuals', residuals)
    assert torch.equal(generate(model, x, 10, num_samples=3), torch.cat(alone))
    assert encoded == [(2, 6)]
    assert torch.equal(generate(model, x[1:], 10, 4, num_samples=2), torch.cat(alone[4:]))
    assert len(torch.cat(alone).unique(dim=0)) == 6


def test_seeds_alone_decide_the_text_and_without_them_torchs_does():
    model, x = lively(), ids(2, 3)

    def after(torch_seed, generate):
        torch.manual_seed(torch_seed)
        return generate(model, x, 30).tolist()

    assert after(1, generate) == after(2, generate) != generate(model, x, 30, seed=1).tolist()
    assert after(1, type(model).generate) == after(1, type(model).generate) != after(2, type(model).generate)


@pytest.mark.parametrize('enabled', [True, False])
@pytest.mark.parametrize('rows, fails', [(1, False), (1, True), (2, False)])
def test_one_row_on_a_cpu_is_decoded_without_onednn_which_then_is_as_before(monkeypatch, rows, fails, enabled):
    if not torch.backends.mkldnn.is_available():
        pytest.skip('this torch has no oneDNN')
    model, x, during = lively().bfloat16(), ids(rows, 5), []

    def forward(*arguments, original=model.forward, **keys):
        during.append(torch._C._get_mkldnn_enabled())
        return None if fails and len(during) == 2 else original(*arguments, **keys)

    monkeypatch.setattr(model, 'forward', forward)
    with torch.backends.mkldnn.flags(enabled=enabled, allow_tf32=None, fp32_precision=None):
        if fails:
            with pytest.raises(TypeError):
                model.generate(x, 6, temperature=0)
        else:
            new = model.generate(x, 6, temperature=0)
        assert torch._C._get_mkldnn_enabled() is enabled
    assert during == [enabled and rows > 1] * (2 if fails else 5)
    if not fails:
        logits = model.float()(new[:, :-1], new[:, 1:])[0][:, 4:]
        assert (logits.gather(2, new[:, 5:, None])[..., 0] > logits.amax(-1) - 0.1 * logits.std()).all()


def test_a_compiled_model_gives_the_same_text():
    graphs, model, x = [], lively(), ids(2, 5)
    expected = model.generate(x, 20, temperature=0)

    def compiler(graph, inputs):
        graphs.append(graph)
        return graph.forward

    model.compile(backend=compiler, dynamic=True)
    assert torch.equal(model.generate(x, 20, temperature=0), expected) and 0 < len(graphs) < 5


# ---- choice of a token ----

class Constant(torch.nn.Module):
    """A head that gives these logits to every position."""

    def __init__(self, logits):
        super().__init__()
        self.weight = torch.tensor(logits)

    def forward(self, x):
        return self.weight.expand(*x.shape[:-1], -1)


def with_logits(logits):
    """A GPT whose next-token logits are these, whatever the prompt."""
    model = tiny(vocab_size=len(logits), n_embd=2, n_head=1)
    model.lm_head = Constant(logits)
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
    (dict(vocab_size=2), [2 / 3, 1 / 3, 0, 0]), (dict(vocab_size=3, top_k=2), [2 / 3, 1 / 3, 0, 0]),
    (dict(min_p=0), P), (dict(min_p=0.4), [2 / 3, 1 / 3, 0, 0]), (dict(min_p=0.25), [5 / 9, 5 / 18, 1 / 6, 0]),
    (dict(min_p=1), [1, 0, 0, 0]), (dict(min_p=0.26, top_k=2, temperature=2), [2 ** 0.5 / (1 + 2 ** 0.5),
                                                                              1 / (1 + 2 ** 0.5), 0, 0]),
    (dict(min_p=0.3, temperature=0.5), [1, 0, 0, 0])])
def test_sampling_follows_the_distribution_asked_for(options, expected):
    assert shares(with_logits(LOGITS), **options) == pytest.approx(expected, abs=0.03)


@pytest.mark.parametrize('shift', [0, 3])  # all logits below 0, all above
def test_a_repetition_penalty_is_for_the_tokens_of_the_prompt_and_the_text_but_not_of_padding(shift):
    logits = torch.tensor(LOGITS) + shift

    def expected(seen):
        return F.softmax(torch.where(seen, logits * 2 if shift == 0 else logits / 2, logits), dim=-1).tolist()

    prompts = torch.tensor([[0, 2, 3], [1, 1, 0]])
    options = dict(lengths=[2, 3], num_samples=8000, repetition_penalty=2.0)
    for prompt, drawn in enumerate(generate(with_logits(logits.tolist()), prompts, 2, **options)[:, 3:].chunk(2)):
        seen = torch.isin(torch.arange(4), prompts[prompt, :options['lengths'][prompt]])
        assert (torch.bincount(drawn[:, 0], minlength=4) / 8000).tolist() == pytest.approx(expected(seen), abs=0.025)
        second = drawn[drawn[:, 0] == 3, 1]
        seen[3] = True
        assert (torch.bincount(second, minlength=4) / len(second)).tolist() == pytest.approx(expected(seen), abs=0.06)


@pytest.mark.parametrize('draw', [0.0, 1 - 2 ** -24])  # the smallest and the largest float32 of [0, 1)
@pytest.mark.parametrize('options, unlikely', [
    (dict(), -1e4), (dict(top_k=1000), -30.0), (dict(top_p=0.9999), -30.0), (dict(min_p=1e-3), -30.0)])
def test_no_draw_takes_a_token_that_has_no_probability(options, unlikely, draw):
    logits = torch.rand(200, 3000, generator=torch.Generator().manual_seed(0))
    logits[:, torch.arange(3000) % 3 != 1] = unlikely
    chosen = choose(logits, SamplingOptions(**options), torch.full((200, 1), draw))
    assert (chosen % 3 == 1).all() and chosen.shape == (200, 1)


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
    (3, dict(top_k=-1), 'top_k'), (3, dict(top_p=0.0), 'top_p'), (3, dict(top_p=1.5), 'top_p'),
    (3, dict(min_p=-0.1), 'min_p'), (3, dict(min_p=1.5), 'min_p'), (3, dict(min_p=math.nan), 'min_p'),
    (3, dict(repetition_penalty=0.0), 'repetition_penalty'), (3, dict(repetition_penalty=math.inf), 'repetition_pen'),
    (3, dict(stride=0), 'stride'), (3, dict(stride=17), 'stride'), (3, dict(max_new_tokens=-1), 'max_new_tokens'),
    (3, dict(lengths=[0]), 'no tokens'), (3, dict(lengths=[4]), 'no tokens|lengths'),
    (3, dict(lengths=[3, 3]), 'no tokens|lengths'), (3, dict(stride=0, min_p=2), 'min_p.*; stride')])
def test_what_cannot_be_sampled_is_refused(context, options, reason):
    with pytest.raises(ValueError, match=reason):
        tiny().generate(torch.zeros(1, context, dtype=torch.int64), **{'max_new_tokens': 3, **options})
