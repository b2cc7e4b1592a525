"""
What nanoGPT's checkpoints, and this repository's from earlier versions, have in another form.

Without this module, and its uses in checkpoints.py and verification.py, only today's form is read.
"""
import math

import torch

# Entries that only earlier versions have written, with their types.
OPTIONAL_ENTRIES = {
    'record': (dict, type(None)),  # figures of a line of metrics.jsonl that was not yet written
    'stale': int,                  # evaluations since the best validation loss
}
# Keys of a run's config: their product is the number of tokens in a step.
BATCH_KEYS = ('gradient_accumulation_steps', 'batch_size', 'block_size')


def modernize(checkpoint):
    """Gives the dict of a checkpoint today's form, in place; its entries have the right types."""
    config = checkpoint['config']

    # nanoGPT keeps the best loss as a tensor, and does not count tokens.
    best = checkpoint.setdefault('best_val_loss', math.inf)
    if isinstance(best, torch.Tensor):
        checkpoint['best_val_loss'] = best.item()
    if 'tokens_seen' not in checkpoint:
        tokens_per_step = math.prod(config.get(key, 0) for key in BATCH_KEYS)
        checkpoint['tokens_seen'] = checkpoint['iter_num'] * tokens_per_step

    # The names of a compiled model carry a prefix, and nanoGPT on torch 1 kept its causal masks.
    weights = {}
    for name, weight in checkpoint['model'].items():
        name = str(name).removeprefix('_orig_mod.')
        if not name.endswith('.attn.bias'):
            weights[name] = weight
    checkpoint['model'] = weights
    # nanoGPT has the exact GELU alone; our checkpoints name theirs.
    checkpoint['model_args'].setdefault('gelu', 'exact')

    # Earlier versions kept the number of evaluations since the best loss, not its step.
    if 'best_step' not in checkpoint:
        stale = checkpoint.get('stale', 0)
        eval_interval = config.get('eval_interval', 1)
        if not isinstance(eval_interval, int):
            eval_interval = 1
        checkpoint['best_step'] = max(0, checkpoint['iter_num'] - stale * eval_interval)
    if 'figures' not in checkpoint:
        checkpoint['figures'] = checkpoint.get('record') or {}


def may_lack_moments(checkpoint):
    """Whether parameters may have no moments although the checkpoint does not count them.

    Today it counts those that have moments; earlier, only its config told that some were frozen."""
    config = checkpoint.get('config', {})
    was_frozen = config.get('trainable', 'all') != 'all' or bool(config.get('unfreeze'))
    return 'moments' not in checkpoint and was_frozen
