"""The loss over a whole split, against a slow and plain computation of each token's loss."""
import contextlib
import math

import numpy as np
import pytest
import torch
from conftest import tiny_gpt, tiny_ids
from torch.nn import functional as F

from plaingpt.evaluation import split_loss as module
from plaingpt.evaluation.split_loss import split_loss, token_losses
from plaingpt.evaluation.windows import Windows
from plaingpt.system.devices import place
from plaingpt.system.messages import UserError
from plaingpt.text.token_files import TokenFile
from plaingpt.training.processes import Process

CPU = torch.device('cpu')
IDS = tiny_ids(203)
BYTES = 1 + np.arange(31, dtype=np.int64) % 3  # of each id
FIELDS = ('nats', 'targets', 'text_nats', 'text_bytes')


@pytest.fixture
def token_file(tmp_path):
    IDS.numpy().astype('<u2').tofile(tmp_path / 'val.bin')
    return TokenFile(str(tmp_path / 'val.bin'), vocab_size=31)


@pytest.fixture(scope='module')
def gpt():
    return place(tiny_gpt(), CPU)


def measure(gpt, token_file, context=16, stride=8, batch_size=4, byte_counts=BYTES,
            process=None):
    windows = Windows.over(len(token_file), context, stride)
    return split_loss(gpt, token_file, windows, byte_counts, batch_size, process or Process(CPU),
                      contextlib.nullcontext)


@torch.no_grad()
def plain_losses(gpt, context, stride):
    """The loss of each target, computed by itself: its window up to it is read anew."""
    losses = []
    start = 0
    for target in range(1, len(IDS)):
        if target > start + context:
            start = min(start + stride, len(IDS) - 1 - context)
        logits, _ = gpt(IDS[None, start:target])
        losses.append(F.cross_entropy(logits[0, -1:].double(), IDS[target:target + 1]).item())
    return losses


@pytest.mark.parametrize('context, stride, batch_size', [
    (16, 8, 4), (16, 16, 3), (16, 1, 64), (16, 5, 1), (7, 7, 100)])
def test_the_sums_are_those_of_each_tokens_own_loss(gpt, token_file, context, stride, batch_size):
    result = measure(gpt, token_file, context, stride, batch_size)
    expected = plain_losses(gpt, context, stride)
    assert result.nats.sum() == pytest.approx(math.fsum(expected), rel=1e-6)
    assert result.targets.sum() == len(IDS) - 1
    assert result.text_bytes.sum() == BYTES[IDS[1:]].sum()
    assert result.text_length == BYTES[IDS].sum()

    # And stretch by stretch, by the byte at which each token begins.
    ends = np.cumsum(BYTES[IDS])
    begins = ends[:-1]  # of the targets
    stretches = begins * len(result.nats) // ends[-1]
    by_stretch = np.bincount(stretches, weights=expected, minlength=len(result.nats))
    np.testing.assert_allclose(result.nats, by_stretch, rtol=1e-5)
    assert result.targets.tolist() == np.bincount(stretches, minlength=len(result.nats)).tolist()


def test_with_the_stride_of_a_window_it_is_the_mean_over_disjoint_windows(gpt, tmp_path):
    IDS[:161].numpy().astype('<u2').tofile(tmp_path / 'val.bin')
    token_file = TokenFile(str(tmp_path / 'val.bin'), vocab_size=31)
    result = measure(gpt, token_file, context=16, stride=16)
    idx = IDS[:160].view(10, 16)
    targets = IDS[1:161].view(10, 16)
    with torch.no_grad():
        _, loss = gpt(idx, targets)
    assert result.nats.sum() / result.targets.sum() == pytest.approx(loss.item(), rel=1e-6)


def test_the_shares_of_two_ranks_add_up_to_the_sums_of_one_bit_for_bit(gpt, token_file):
    alone = measure(gpt, token_file)
    first = measure(gpt, token_file, process=Process(CPU, rank=0, world_size=2))
    second = measure(gpt, token_file, process=Process(CPU, rank=1, world_size=2))
    for field in FIELDS:
        total = getattr(first, field) + getattr(second, field)
        np.testing.assert_array_equal(total, getattr(alone, field))
    assert 0 < first.targets.sum() < alone.targets.sum()


def test_special_tokens_count_for_the_loss_but_not_for_the_text(gpt, token_file):
    byte_counts = BYTES.copy()
    byte_counts[5] = 0
    result = measure(gpt, token_file, byte_counts=byte_counts)
    expected = np.array(plain_losses(gpt, 16, 8))
    is_text = IDS[1:].numpy() != 5
    assert not is_text.all()
    assert result.nats.sum() == pytest.approx(expected.sum(), rel=1e-6)
    assert result.text_nats.sum() == pytest.approx(expected[is_text].sum(), rel=1e-6)
    assert result.text_bytes.sum() == byte_counts[IDS[1:]].sum()


def test_a_tokenizer_that_does_not_tell_has_stretches_of_tokens(gpt, token_file):
    result = measure(gpt, token_file, byte_counts=None)
    assert not result.knows_bytes
    assert len(result.nats) == 32
    assert set(result.targets) <= {6, 7}


def test_a_split_of_special_tokens_alone_is_one_stretch(gpt, token_file):
    result = measure(gpt, token_file, byte_counts=np.zeros(31, dtype=np.int64))
    assert result.targets.tolist() == [202]
    assert result.text_nats.tolist() == [0]


def test_a_split_of_two_tokens_has_one_loss(gpt, tmp_path):
    IDS[:2].numpy().astype('<u2').tofile(tmp_path / 'val.bin')
    result = measure(gpt, TokenFile(str(tmp_path / 'val.bin'), vocab_size=31))
    with torch.no_grad():
        _, loss = gpt(IDS[None, :1], IDS[None, 1:2])
    assert result.nats.sum() == pytest.approx(loss.item(), rel=1e-6)


@pytest.mark.parametrize('changes', [{}, dict(position='rope', logit_softcap=5.0)], ids=str)
def test_few_logits_at_a_time_give_the_losses_of_all(monkeypatch, changes):
    gpt = tiny_gpt(**changes)
    idx = tiny_ids(3, 16)
    targets = tiny_ids(3, 16, seed=2)
    with torch.no_grad():
        logits, _ = gpt(idx, targets)
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction='none')
    sizes = []
    original = gpt.logits

    def logits_of(x):
        sizes.append(len(x))
        return original(x)

    monkeypatch.setattr(gpt, 'logits', logits_of)
    monkeypatch.setattr(module, 'LOGITS_AT_ONCE', 10 * 31)
    torch.testing.assert_close(token_losses(gpt, idx, targets).flatten(), expected)
    assert max(sizes) == 10


@pytest.mark.parametrize('value', [math.nan, math.inf])
def test_damaged_weights_are_refused(token_file, value):
    gpt = tiny_gpt()
    with torch.no_grad():
        gpt.transformer.ln_f.weight[0] = value
    with pytest.raises(UserError, match='becomes nan: the weights are damaged, or need another'):
        measure(gpt, token_file)


def test_where_no_terminal_shows_a_bar_lines_say_how_long_it_takes(gpt, token_file, monkeypatch,
                                                                  capsys):
    monkeypatch.setattr(module, 'LINE_SECONDS', 0)
    measure(gpt, token_file)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith('1 of 7 batches, ')
    assert lines[-1] == '7 of 7 batches, 0.0 minutes left'
