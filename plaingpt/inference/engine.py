"""
Text generation: one new token for each row of a batch after another, with a key-value cache.

window.py keeps the tokens of each row and computes their logits, cache.py the keys and values,
sampling.py chooses from the logits, and graphs.py records these steps as CUDA graphs, so that a
GPU gets each with one launch.

Shapes in comments: B prompts, T time (positions), V vocabulary, rows = B x num_samples.
"""
import math

import torch

from plaingpt.inference import graphs
from plaingpt.inference.sampling import Sampler, SamplingOptions, draw_numbers
from plaingpt.inference.window import Window


class InvalidArguments(ValueError):
    """An argument of stream() is out of range; the message names each in one sentence."""


@torch.no_grad()
def stream(model, idx, max_new_tokens, temperature=1.0, top_k=None, *, top_p=None, min_p=None,
           repetition_penalty=1.0, stop_tokens=(), vocab_size=None, lengths=None, num_samples=1,
           seeds=None, stride=None, context_size=None):
    """Yields the ids of one new position after another, int64 (rows, 1), for idx, int64 (B, T).

    temperature, top_k, top_p, min_p, repetition_penalty: see sampling.SamplingOptions.
    stop_tokens: ids that end a row, which is then filled with that id. Generation ends when all
        rows have ended.
    vocab_size: ids from this on are never chosen; the tokenizer may know fewer than the model.
    lengths: tokens of each row of idx, followed by padding; None: T.
    num_samples: continuations of each row, in rows that follow each other.
    seeds: an int for each of the rows, on which alone its random numbers depend; None: torch's
        generator.
    context_size: most tokens that the model sees, its window; None: block_size. Without learned
        positions it may be more than the model was trained with.
    stride: by how many tokens a full window moves on. With 1, the last context_size tokens always
        decide, as in nanoGPT, at the price of reading them all at each token. None: 1 at
        temperature 0, else half of context_size, so that at least that many decide.

    InvalidArguments for an empty prompt or an argument out of range."""
    options = SamplingOptions(temperature, top_k, top_p, min_p, repetition_penalty)
    tokens_of_prompts = [idx.size(1)] * len(idx) if lengths is None else list(lengths)
    problems = [
        *_problems_of_prompts(idx, tokens_of_prompts, num_samples, seeds, max_new_tokens),
        *options.problems(),
        *_problems_of_window(model.config, context_size, stride),
    ]
    if problems:
        raise InvalidArguments('; '.join(problems))
    if context_size is None:
        context_size = model.config.block_size
    if stride is None:
        stride = 1 if options.is_greedy else math.ceil(context_size / 2)

    device = idx.device
    rows = len(idx) * num_samples
    prompts = _moved_to_the_end(idx, tokens_of_prompts)
    window = Window(model, prompts, tokens_of_prompts, num_samples, max_new_tokens, stride,
                    context_size)
    sampler = Sampler(
        options,
        draw_numbers(rows, max_new_tokens, seeds).to(device),
        prompts.repeat_interleave(num_samples, dim=0),
        torch.tensor(list(stop_tokens), dtype=torch.int64, device=device),
        model.config.vocab_size if vocab_size is None else vocab_size)

    def append_token(logits):
        window.append(sampler.choose_next(logits, window.last_tokens()))

    def decode(visible):
        append_token(window.decode(visible))

    has_graphs = graphs.are_used_on(device)
    decoding_graphs = graphs.DecodingGraphs(decode, device)
    for _ in range(max_new_tokens):
        if window.must_read():
            append_token(window.read())
        elif has_graphs:
            decoding_graphs.run(window.visible(), window.steps_at_this_length())
        else:
            decode(window.visible())
        yield window.count_token()
        if sampler.can_stop and sampler.has_ended.all():
            return


def _moved_to_the_end(idx, lengths):
    """idx (B, T) with each row's tokens in its last columns, and its first token before them."""
    missing = idx.size(1) - torch.tensor(lengths, device=idx.device)[:, None]  # (B, 1)
    columns = torch.arange(idx.size(1), device=idx.device) - missing  # (B, T)
    return idx.gather(1, columns.clamp(min=0))


def _problems_of_prompts(idx, lengths, num_samples, seeds, max_new_tokens):
    """Yields a sentence for each problem with the prompts and how they are to be continued."""
    if idx.numel() == 0 or min(lengths, default=1) < 1:
        yield ('nothing to continue: the prompt has no tokens (give at least one, such as a '
               'newline)')
    if len(lengths) != len(idx) or max(lengths, default=0) > idx.size(-1):
        yield (f'lengths={lengths} must be one for each of {len(idx)} rows, and at most '
               f'{idx.size(-1)}')
    if num_samples < 1:
        yield f'num_samples={num_samples} must be at least 1'
    if seeds is not None and len(seeds) != len(idx) * num_samples:
        yield f'{len(idx)} x {num_samples} rows need as many seeds, not {len(seeds)}'
    if max_new_tokens < 0:
        yield f'max_new_tokens={max_new_tokens} must be at least 0'


def _problems_of_window(config, context_size, stride):
    """Yields a sentence for each problem with the window; config: the model's GPTConfig."""
    if context_size is not None and not 1 <= context_size <= config.longest:
        yield (f'context_size={context_size} must be at least 1, and at most '
               f'block_size={config.block_size} where positions are learned')
    if stride is not None and not 1 <= stride <= (context_size or config.block_size):
        yield f'stride={stride} must be at least 1 and at most the context_size'
