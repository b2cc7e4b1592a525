"""
The batches on which bench.py trains: those of a data set, or random tokens.
"""
import os

import torch

from plaingpt.text.data_sets import folder_of, read_meta
from plaingpt.text.shards import has_split
from plaingpt.text.token_files import TokenFile


def batch_source(dataset, config, batch_size, seed, device):
    """A function from a step's number to its x and y, each int64 (batch_size, block_size).

    dataset: a folder under data/; None: random tokens. config: the model's GPTConfig. device: the
    torch.device of x and y. If the data set is missing or has other tokens than the model, a note
    says so, and the tokens are random."""
    def random_batch(step):
        generator = torch.Generator(device).manual_seed(seed + step)
        tokens = torch.randint(config.vocab_size, (batch_size, config.block_size + 1),
                               generator=generator, device=device)
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    if dataset is None:
        return random_batch
    folder = folder_of(dataset)
    train_bin = os.path.join(folder, 'train.bin')
    if not has_split(train_bin):
        print(f'note: {train_bin} is missing, so the tokens are random')
        return random_batch
    meta = read_meta(folder)
    data_vocab_size = meta['vocab_size'] or 0
    if data_vocab_size > config.vocab_size:
        print(f'note: the vocabulary of {train_bin} has {data_vocab_size} tokens, '
              'so the tokens are random')
        return random_batch
    data = TokenFile(train_bin, meta['dtype'], config.vocab_size, config.block_size)

    def real_batch(step):
        return data.batch(seed, 'train', step, 0, batch_size, config.block_size, device)

    return real_batch
