"""
Text generation: one new token for each sequence of a batch after another, with a key-value cache.

Shapes at the ends of lines: B prompts, T time, V vocabulary, rows = B x samples of each, hs head size.

References:
[1] Holtzman et al. 2020, The Curious Case of Neural Text Degeneration, arXiv 1904.09751: top-p
[2] Nguyen et al. 2024, Turning Up the Heat: Min-p Sampling, arXiv 2407.01082
[3] Keskar et al. 2019, CTRL, arXiv 1909.05858, section 4.1: repetition penalty
"""
import torch
from torch.nn import functional as F

GREEDY = 1e-6  # temperatures below take the likeliest token; dividing by less would overflow float32


def _draws(rows, steps, seeds):
    """Numbers in [0, 1), float32 (rows, steps), drawn on the CPU: the same for a row whatever else is in the batch and
    wherever it is computed."""
    if seeds is None:
        return torch.rand(rows, steps)
    return torch.stack([torch.rand(steps, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def _choose(logits, temperature, top_k, top_p, min_p, draws):
    """One id for each row of logits (B, V), as int64 (B, 1), by numbers in [0, 1) drawn for it, (B, 1)."""
    if temperature < GREEDY:
        return logits.argmax(dim=-1, keepdim=True)
    order, V = None, logits.size(-1)
    if (top_k and top_k < V) or (top_p or 1) < 1:
        # In order of likelihood top-k is a slice, which keeps exactly k among ties, and top-p a running sum.
        logits, order = logits.topk(min(top_k or V, V), dim=-1)  # (B, k), sorted
    probabilities = F.softmax(logits / temperature, dim=-1)
    if (top_p or 1) < 1:
        before = probabilities.cumsum(dim=-1) - probabilities  # the first is always kept: nothing is before it
        probabilities = probabilities.masked_fill((before >= top_p) & (before > 0), 0.0)
    if min_p:
        probabilities = probabilities.masked_fill(probabilities < min_p * probabilities.amax(-1, keepdim=True), 0.0)
    cumulative = probabilities.cumsum(dim=-1).cummax(dim=-1).values  # CUDA's sums may fall by a rounding
    chosen = (cumulative <= draws * cumulative[:, -1:]).sum(dim=-1, keepdim=True)  # the first beyond the draw
    return chosen if order is None else order.gather(1, chosen)
