"""The batches on which bench.py trains."""
import torch
from conftest import read_tokens, tiny_gpt

from plaingpt.benchmarking.batches import batch_source

CPU = torch.device('cpu')


def check_random_tokens(batch, vocab_size):
    """Checks that a function gives 3 x 16 random tokens, which depend on the step alone."""
    x, y = batch(1)
    again, _ = batch(1)
    other, _ = batch(2)
    assert x.shape == y.shape == (3, 16)
    assert torch.equal(x[:, 1:], y[:, :-1])
    assert x.max() < vocab_size
    assert torch.equal(x, again)
    assert not torch.equal(x, other)


def test_without_a_data_set_tokens_are_random(capsys):
    batch = batch_source(None, tiny_gpt().config, 3, 0, CPU)
    check_random_tokens(batch, 31)
    assert capsys.readouterr().out == ''


def test_a_data_set_that_is_missing_is_noted(capsys):
    check_random_tokens(batch_source('nowhere', tiny_gpt().config, 3, 0, CPU), 31)
    assert 'nowhere/train.bin is missing, so the tokens are random' in capsys.readouterr().out


def test_a_data_set_with_a_larger_vocabulary_is_noted(char_data, capsys):
    config = tiny_gpt(vocab_size=3).config
    check_random_tokens(batch_source(str(char_data), config, 3, 0, CPU), 3)
    assert 'tokens, so the tokens are random' in capsys.readouterr().out


def test_batches_are_stretches_of_the_data_set(char_data, capsys):
    x, y = batch_source(str(char_data), tiny_gpt().config, 3, 0, CPU)(5)
    stretches = torch.tensor(read_tokens(char_data, 'train')).unfold(0, 17, 1)
    for row in torch.cat([x, y[:, -1:]], dim=1):
        assert (stretches == row).all(dim=1).any()
    assert torch.equal(x[:, 1:], y[:, :-1])
    assert capsys.readouterr().out == ''
