"""
The loss of a model over a whole split, as sums over stretches of the text.

Sums over stretches say more than one sum over all tokens: how far the loss varies within the text,
and where one model does better than another.
"""
import math
import time
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F
from tqdm import tqdm

from model import LOGITS_AT_ONCE
from plaingpt.system.messages import RANK, UserError, print0

# Losses are added as whole multiples of this share of a nat. Integers can be added in any order, so
# any number of ranks finds the same sum. Above a loss of 0.002 float32 itself is coarser, and only
# 2**31 nats in one stretch would overflow.
NAT_SHARE = 2.0 ** -32
HIGHEST_LOSS = 2.0 ** 16  # nats; no model that works has a loss beyond it

# The text is cut into stretches of equally many bytes. They are long, because losses are correlated
# over sentences and scenes: on tiny Shakespeare's validation split the standard error seems to be
# 0.0057 from stretches of 100 bytes, 0.0102 from 1,742 and 0.0115 from 3,485 (a small character
# model). But they must not be too few: from n of them, it is uncertain by a share of 1 / sqrt(2 n),
# which is 13% for 32 and 2% for 1024.
FEWEST_STRETCHES = 32
MOST_STRETCHES = 1024
STRETCH_BYTES = 4096  # in between

LINE_SECONDS = 30  # between printed lines where no terminal shows a progress bar


@dataclass(frozen=True)
class SplitLoss:
    """The losses of a model on the targets of a split. Arrays have one element a stretch."""
    text_length: int        # bytes of the text, with its first token, which nothing predicts
    nats: np.ndarray        # float64, over all targets
    targets: np.ndarray     # int64, how many they are
    text_nats: np.ndarray   # float64, over the targets that stand for text: no special tokens
    text_bytes: np.ndarray  # int64, how long these targets are
    knows_bytes: bool = True  # False: the tokenizer does not tell, and each token counts as a byte


@torch.no_grad()
def token_losses(gpt, idx, targets):
    """Cross-entropy of each target in nats, float32 (B, T); idx and targets are int64 (B, T).

    At most LOGITS_AT_ONCE logits exist at a time."""
    gpt.check_length(idx.size(1))
    positions = torch.arange(idx.size(1), device=idx.device)
    x = gpt.residuals(idx, positions).flatten(0, 1)  # (B T, C)
    rows = max(1, LOGITS_AT_ONCE // gpt.config.vocab_size)
    losses = []
    for x_part, targets_part in zip(x.split(rows), targets.flatten().split(rows), strict=True):
        logits = gpt.logits(x_part).float()  # (rows, V)
        losses.append(F.cross_entropy(logits, targets_part, reduction='none'))
    return torch.cat(losses).view_as(targets)


def split_loss(gpt, token_file, windows, byte_counts, batch_size, process, autocast):
    """The SplitLoss of a GPT, which is in evaluation mode on the device of the process.

    token_file, windows: the TokenFile of the split, and the Windows in which it is read.
    byte_counts: token_bytes() of its tokenizer, which may be None.
    batch_size: windows that the model reads together.
    process: the Process of this rank. Ranks take turns at whole batches, and all return the same
    sums; those do not depend on the number of ranks, bit for bit.
    autocast: a function that returns a context manager, from precision().

    UserError if a loss is not finite."""
    knows_bytes = byte_counts is not None
    if not knows_bytes:
        byte_counts = np.ones(gpt.config.vocab_size, dtype=np.int64)
    batches = Batches(token_file, windows, batch_size)
    text = Stretches(batches, byte_counts)
    nats = np.zeros(text.count, dtype=np.int64)  # in units of NAT_SHARE
    targets = np.zeros(text.count, dtype=np.int64)
    text_nats = np.zeros(text.count, dtype=np.int64)  # in units of NAT_SHARE
    lengths = np.zeros(text.count, dtype=np.int64)

    own_batches = range(process.rank, len(batches), process.world_size)
    progress = Progress(len(own_batches))
    for number in own_batches:
        # The losses of the targets that count, in the order of the text.
        batch = batches.read(number)
        tokens = torch.from_numpy(batch.tokens).to(process.device)
        with autocast():
            losses = token_losses(gpt, tokens[:, :-1], tokens[:, 1:])
        losses = losses.cpu().numpy()[batch.counted]
        ids = batch.tokens[:, 1:][batch.counted]
        is_sound = losses <= HIGHEST_LOSS  # False for NaN, too
        if not is_sound.all():
            raise UserError(f'the loss on {token_file.path} becomes {losses[~is_sound][0]}: the '
                            'weights are damaged, or need another --dtype, such as float32')

        # Each goes to the stretch in which its token begins.
        stretch = text.stretches_of(number, ids)
        byte_count = byte_counts[ids]
        units = np.rint(losses.astype(np.float64) / NAT_SHARE).astype(np.int64)
        np.add.at(nats, stretch, units)
        np.add.at(targets, stretch, 1)
        np.add.at(text_nats, stretch, np.where(byte_count > 0, units, 0))
        np.add.at(lengths, stretch, byte_count)
        progress.step()
    progress.close()

    # The arrays of each rank hold the share of its batches.
    for sums in (nats, targets, text_nats, lengths):
        process.sum(torch.from_numpy(sums))  # in place
    return SplitLoss(text.length, nats * NAT_SHARE, targets, text_nats * NAT_SHARE, lengths,
                     knows_bytes)


class Batches:
    """The windows of a split in batches of consecutive ones, numbered from 0."""

    def __init__(self, token_file, windows, batch_size):
        self.token_file = token_file
        self.windows = windows
        self.batch_size = batch_size

    def __len__(self):
        return math.ceil(len(self.windows) / self.batch_size)

    def read(self, number):
        """The WindowBatch of a batch."""
        first = number * self.batch_size
        last = min(first + self.batch_size, len(self.windows))
        return self.windows.read(self.token_file, first, last)

    def counted_before(self, number):
        """How many targets the batches before this one count."""
        first = min(number * self.batch_size, len(self.windows))
        return self.windows.counted_before(first)

    def counted_ids(self, number):
        """The ids of the targets that a batch counts, int64, in the order of the text."""
        begin = self.counted_before(number)
        count = self.counted_before(number + 1) - begin
        return self.token_file.rows([begin + 1], count)[0]  # target i is token i + 1


class Stretches:
    """The stretches of the text of a split: which one a token begins in."""

    def __init__(self, batches, byte_counts):
        """Reads the whole split once, which takes about 12 s for a billion tokens."""
        self.byte_counts = byte_counts
        first_id = batches.token_file.rows([0], 1)[0]
        position = int(byte_counts[first_id].sum())
        self.positions = []  # bytes of text before the targets of each batch
        for number in range(len(batches)):
            self.positions.append(position)
            position += int(byte_counts[batches.counted_ids(number)].sum())
        self.length = position
        count = min(max(FEWEST_STRETCHES, position // STRETCH_BYTES), MOST_STRETCHES)
        self.count = max(1, min(count, position))  # a very short text has fewer bytes than that

    def stretches_of(self, number, ids):
        """The number of the stretch in which each token begins, int64.

        ids: those of the targets that batch `number` counts."""
        lengths = self.byte_counts[ids]
        begins = self.positions[number] + np.cumsum(lengths) - lengths
        stretches = begins * self.count // max(1, self.length)
        return np.minimum(stretches, self.count - 1)  # special tokens may begin at the very end


class Progress:
    """Shows how many batches are done: a bar on a terminal, elsewhere a line now and then."""

    def __init__(self, batches):
        self.batches = batches
        self.done = 0
        self.began = time.monotonic()
        self.printed = self.began
        is_hidden = True
        if RANK == 0:
            is_hidden = None  # tqdm's word for: unless the output is a terminal
        self.bar = tqdm(total=batches, desc='eval', unit='batch', leave=False, disable=is_hidden)

    def step(self):
        """Counts a batch."""
        self.done += 1
        self.bar.update()
        now = time.monotonic()
        if not self.bar.disable or now - self.printed < LINE_SECONDS:
            return
        self.printed = now
        minutes_left = (now - self.began) / self.done * (self.batches - self.done) / 60
        print0(f'{self.done:,} of {self.batches:,} batches, {minutes_left:.1f} minutes left')

    def close(self):
        self.bar.close()
