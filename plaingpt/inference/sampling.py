"""
Sampling: choosing the next token from the logits, by random numbers that depend on a seed alone.

References:
[1] Holtzman et al. 2020, The Curious Case of Neural Text Degeneration, arXiv 1904.09751: top-p
[2] Nguyen et al. 2024, Turning Up the Heat: Min-p Sampling, arXiv 2407.01082
[3] Keskar et al. 2019, CTRL, arXiv 1909.05858, section 4.1: repetition penalty
"""
import math
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from plaingpt.inference import graphs
from plaingpt.inference.decoding_kernels import top_k

LOWEST_TEMPERATURE = 1e-6  # dividing by less would overflow float32, so below it sampling is greedy


@dataclass(frozen=True)
class SamplingOptions:
    """How the next token is chosen.

    temperature: 0 takes the likeliest token, 1 samples from the model's own distribution.
    top_k: samples from the k likeliest tokens only; None or 0: from all.
    top_p: samples from the fewest likeliest tokens whose probabilities reach p [1]; None or 1: all.
    min_p: samples from tokens at least this times as likely as the likeliest [2]; None or 0: all.
    repetition_penalty: divides the logits of tokens that a row already has, or multiplies them
    where they are negative [3]; 1: none."""
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0

    @property
    def is_greedy(self):
        return self.temperature < LOWEST_TEMPERATURE

    def problems(self):
        """Yields a sentence for each option that is out of range."""
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            yield f'temperature={self.temperature} must be a number of at least 0'
        if self.top_k is not None and self.top_k < 0:
            yield f'top_k={self.top_k} must be at least 1, or 0 or None for all'
        if self.top_p is not None and not 0 < self.top_p <= 1:
            yield f'top_p={self.top_p} must be above 0 and at most 1'
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            yield f'min_p={self.min_p} must be at least 0 and at most 1'
        if not 0 < self.repetition_penalty < math.inf:
            yield f'repetition_penalty={self.repetition_penalty} must be above 0 and finite'


def draw_numbers(rows, steps, seeds=None):
    """Numbers in [0, 1), float32 (rows, steps), drawn on the CPU.

    seeds: one int a row, on which alone its numbers depend, whatever else is in the batch and
    wherever it is computed; None: torch's generator."""
    if seeds is None:
        return torch.rand(rows, steps)
    numbers = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        numbers.append(torch.rand(steps, generator=generator))
    return torch.stack(numbers)


def penalize_repetition(logits, seen, penalty):
    """logits (rows, V) in which the tokens that a row has seen, bool (rows, V), are less likely."""
    penalized = torch.where(logits > 0, logits / penalty, logits * penalty)
    return torch.where(seen, penalized, logits)


class Sampler:
    """Chooses one token after another for each row of a batch.

    What changes from token to token stays in place on the device, so that a CUDA graph can choose
    too, and the host waits for none."""

    def __init__(self, options, numbers, prompts, stop_tokens, vocab_size):
        """options: SamplingOptions. numbers: of draw_numbers(), on the device.

        prompts: int64 (rows, T), no other ids than those that a row has.
        stop_tokens: ids, int64 (S,). A row that has chosen one repeats it from then on.
        vocab_size: ids from this on are never chosen."""
        rows = len(prompts)
        device = prompts.device
        self.options = options
        self.numbers = numbers
        self.step = torch.zeros(1, dtype=torch.int64, device=device)  # a column of numbers
        self.stop_tokens = stop_tokens
        self.can_stop = len(stop_tokens) > 0
        self.has_ended = torch.zeros(rows, 1, dtype=torch.bool, device=device)
        self.vocab_size = vocab_size
        self.penalizes = options.repetition_penalty != 1
        if self.penalizes:
            # Which ids each row has; those that are never chosen share the last column.
            seen = torch.zeros(rows, vocab_size + 1, dtype=torch.bool, device=device)
            seen.scatter_(1, prompts.clamp(max=vocab_size), True)
            self.seen = seen[:, :vocab_size]

    def choose_next(self, logits, last_tokens):
        """The next token of each row, int64 (rows, 1).

        logits: (rows, V). last_tokens: int64 (rows, 1), the token before."""
        logits = logits[:, :self.vocab_size].float()
        if self.penalizes:
            logits = penalize_repetition(logits, self.seen, self.options.repetition_penalty)
        chosen = choose(logits, self.options, self.numbers.index_select(1, self.step))
        self.step += 1
        if self.can_stop:
            chosen = torch.where(self.has_ended, last_tokens, chosen)
            self.has_ended |= (chosen == self.stop_tokens).any(dim=1, keepdim=True)
        if self.penalizes:
            self.seen.scatter_(1, chosen, True)
        return chosen


def choose(logits, options, numbers):
    """One id for each row of logits (rows, V), int64 (rows, 1).

    options: SamplingOptions. numbers: in [0, 1), (rows, 1), one drawn for each row."""
    if options.is_greedy:
        return logits.argmax(dim=-1, keepdim=True)
    vocab_size = logits.size(-1)
    keeps_k = bool(options.top_k) and options.top_k < vocab_size
    keeps_p = options.top_p is not None and options.top_p < 1

    candidates = None  # the id of each column of logits, once they are sorted
    # In order of likelihood top-k is a slice, which keeps exactly k ids even among ties, and top-p
    # a running sum.
    if keeps_k:
        logits, candidates = likeliest(logits, options.top_k)
    probabilities = F.softmax(logits / options.temperature, dim=-1)
    if keeps_p and not keeps_k:
        probabilities, candidates = sort_for_top_p(probabilities, options.top_p)
    if keeps_p:
        # Drop what comes after p is reached; the first token has nothing before it, and stays.
        before = probabilities.cumsum(dim=-1) - probabilities
        dropped = (before >= options.top_p) & (before > 0)
        probabilities = probabilities.masked_fill(dropped, 0.0)
    if options.min_p:
        highest = probabilities.amax(dim=-1, keepdim=True)
        probabilities = probabilities.masked_fill(probabilities < options.min_p * highest, 0.0)

    # The number picks the first token whose cumulative probability lies beyond it.
    cumulative = probabilities.cumsum(dim=-1)
    if cumulative.device.type != 'cpu':
        cumulative = cumulative.cummax(dim=-1).values  # on CUDA a sum may fall by a rounding
    total = cumulative[:, -1:]
    chosen = (cumulative <= numbers * total).sum(dim=-1, keepdim=True)
    if candidates is None:
        return chosen
    return candidates.gather(1, chosen)


def likeliest(logits, k):
    """(logits, ids), each (rows, k), of the k likeliest tokens of each row, in this order."""
    if graphs.are_used_on(logits.device):  # which can't call C++ of our own
        return logits.topk(k, dim=-1)
    return top_k(logits, k)


def sort_for_top_p(probabilities, top_p):
    """(probabilities, ids), each (rows, k), of all tokens that top-p may keep, likeliest first.

    probabilities: (rows, V). Rows with fewer of them are filled with probabilities of 0."""
    vocab_size = probabilities.size(-1)
    device = probabilities.device
    if device.type != 'cpu' or graphs.are_used_on(device):
        return probabilities.topk(vocab_size, dim=-1)  # the host need not wait for their number
    # All tokens below the bound together are less likely than what top-p drops; half of it leaves
    # room for roundings. 16 rows of GPT-2's 50304 tokens take 4 to 10 ms, and 30 if all are sorted.
    # Tokens that are equally likely stand in the order of their ids, whatever the other rows are.
    bound = (1 - top_p) / vocab_size / 2
    found = []
    ids_found = []
    for row in probabilities:
        ids = (~(row < bound)).nonzero().flatten()
        likely, order = row[ids].sort(descending=True, stable=True)
        found.append(likely)
        ids_found.append(ids[order])
    return (torch.nn.utils.rnn.pad_sequence(found, batch_first=True),
            torch.nn.utils.rnn.pad_sequence(ids_found, batch_first=True))
