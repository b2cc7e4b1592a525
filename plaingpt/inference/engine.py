"""
Text generation: one new token for each sequence of a batch after another, with a key-value cache.

Shapes at the ends of lines: B prompts, T time, V vocabulary, rows = B x samples of each, hs head size.

References:
[1] Holtzman et al. 2020, The Curious Case of Neural Text Degeneration, arXiv 1904.09751: top-p
[2] Nguyen et al. 2024, Turning Up the Heat: Min-p Sampling, arXiv 2407.01082
[3] Keskar et al. 2019, CTRL, arXiv 1909.05858, section 4.1: repetition penalty
"""
import math

import torch

from plaingpt.inference.sampling import GREEDY, _choose, _draws
from plaingpt.inference.window import Window


@torch.no_grad()
def stream(model, idx, max_new_tokens, temperature=1.0, top_k=None, *, top_p=None, min_p=None, repetition_penalty=1.0,
           stop_tokens=(), vocab_size=None, lengths=None, num_samples=1, seeds=None, stride=None, context_size=None):
    """Yields the ids of one new position after another, int64 (B * num_samples, 1), for idx, int64 (B, T).

    temperature: 0 (or below 1e-6) takes the likeliest token, 1 samples from the model's own distribution
    top_k: sample from the k likeliest tokens only; None or 0: from all
    top_p: sample from the fewest likeliest tokens whose probabilities reach p [1]; None or 1: from all
    min_p: sample from tokens at least this times as likely as the likeliest [2]; None or 0: from all
    repetition_penalty: divides the logits of tokens that a row has already, or multiplies those below 0 [3]; 1: none
    stop_tokens: ids that end a row, which is then filled with that id; generation ends when all rows have
    vocab_size: ids from this on are never chosen (a tokenizer may know fewer than the padded model)
    lengths: how many tokens each row of idx has, where those after them are padding; None: T
    num_samples: continuations of each row, in rows that follow each other
    seeds: an int for each row returned, on which alone its random numbers depend; None: from torch's generator
    context_size: how many tokens the model sees at most, its window. None: block_size; where positions are not learned
        it may be more than the model was trained with
    stride: by how many tokens a window that has reached context_size moves on. Positions are absolute, so its tokens
        must then all be encoded again. 1: at every token, so that the last context_size tokens decide, as in nanoGPT;
        more: the last context_size - stride + 1 to context_size do. None: 1 at temperature 0, else half of context_size
    ValueError for an empty context or an argument out of range."""
    lengths = [idx.size(1)] * len(idx) if lengths is None else list(lengths)
    _check(idx, lengths, num_samples, seeds, max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty,
           stride, context_size, model.config)
    context_size = context_size or model.config.block_size
    if stride is None:
        stride = 1 if temperature < GREEDY else math.ceil(context_size / 2)
    rows, device = len(idx) * num_samples, idx.device
    draws = _draws(rows, max_new_tokens, seeds).to(device)  # (rows, new)
    stop_tokens = torch.tensor(list(stop_tokens), dtype=torch.int64, device=device)
    ended = torch.zeros(rows, 1, dtype=torch.bool, device=device)
    seen = None
    if repetition_penalty != 1:
        padding = torch.arange(idx.size(1), device=device) >= torch.tensor(lengths, device=device)[:, None]
        seen = torch.zeros(len(idx), model.config.vocab_size, dtype=torch.bool, device=device)
        seen.scatter_(1, torch.where(padding, idx[:, :1], idx), True)
        seen = seen.repeat_interleave(num_samples, dim=0)[:, :vocab_size]  # (rows, V)

    window = Window(model, idx, lengths, max_new_tokens, num_samples, stride, context_size)
    for step in range(max_new_tokens):
        logits = window.logits()[:, :vocab_size].float()  # (rows, V)
        if seen is not None:
            penalized = torch.where(logits > 0, logits / repetition_penalty, logits * repetition_penalty)
            logits = torch.where(seen, penalized, logits)
        chosen = _choose(logits, temperature, top_k, top_p, min_p, draws[:, step:step + 1])  # (rows, 1)
        if len(stop_tokens):
            chosen = torch.where(ended, window.last_tokens(), chosen)
        yield chosen
        if len(stop_tokens):
            ended = ended | torch.isin(chosen, stop_tokens)
            if ended.all():
                return
        if seen is not None:
            seen.scatter_(1, chosen, True)
        window.append(chosen)


def _check(idx, lengths, num_samples, seeds, max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty,
           stride, context_size, config):
    wrong = [sentence for sentence, fine in (
        ('nothing to continue: the prompt has no tokens (give at least one, such as a newline)',
         idx.numel() > 0 and min(lengths, default=1) > 0),
        (f'lengths={lengths} must be one for each of {len(idx)} rows, and at most {idx.size(-1)}',
         len(lengths) == len(idx) and max(lengths, default=0) <= idx.size(-1)),
        (f'num_samples={num_samples} must be at least 1', num_samples >= 1),
        (f'{len(idx)} x {num_samples} rows need as many seeds, not {len(seeds or ())}',
         seeds is None or len(seeds) == len(idx) * num_samples),
        (f'max_new_tokens={max_new_tokens} must be at least 0', max_new_tokens >= 0),
        (f'temperature={temperature} must be a number of at least 0', temperature >= 0 and math.isfinite(temperature)),
        (f'top_k={top_k} must be at least 1, or 0 or None for all', top_k is None or top_k >= 0),
        (f'top_p={top_p} must be above 0 and at most 1', top_p is None or 0 < top_p <= 1),
        (f'min_p={min_p} must be at least 0 and at most 1', min_p is None or 0 <= min_p <= 1),
        (f'repetition_penalty={repetition_penalty} must be above 0', 0 < repetition_penalty < math.inf),
        (f'context_size={context_size} must be at least 1, and at most block_size={config.block_size} where positions '
         'are learned', context_size is None or 1 <= context_size <= config.longest),
        (f'stride={stride} must be at least 1 and at most the context_size',
         stride is None or 1 <= stride <= (context_size or config.block_size)),
    ) if not fine]
    if wrong:
        raise ValueError('; '.join(wrong))
