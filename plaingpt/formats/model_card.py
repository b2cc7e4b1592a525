"""
The model card of an exported model: what it is, and the figures of the run that trained it.
"""
import math


def model_card(name, config, saved):
    """Markdown for people who find the exported model.

    name: of the model. config: its GPTConfig. saved: the checkpoint that it comes from; {} for a
    model of another program, whose card knows of no run."""
    lines = [
        f'# {name}',
        '',
        'Exported by plainGPT (`export.py`), after its logits were compared with those that '
        'transformers computes.',
        '',
        f'{config.n_layer} blocks of {config.n_embd} channels, {config.n_head} heads, a context of '
        f'{config.block_size} tokens.',
    ]
    if saved:
        lines += ['', '| training | |', '|---|---|']
        for entry, value in _figures(saved).items():
            lines.append(f'| {entry} | {value} |')
    return '\n'.join(lines) + '\n'


def _figures(saved):
    """{entry: value} of what a checkpoint says about its run."""
    figures = {'steps': f"{saved['iter_num']:,}"}
    dataset = saved['config'].get('dataset')
    if dataset is not None:
        figures['data set'] = _one_line(dataset)
    if saved['tokens_seen'] > 0:
        figures['tokens seen'] = f"{saved['tokens_seen']:,}"
    if math.isfinite(saved['best_val_loss']):
        figures['best validation loss'] = f"{saved['best_val_loss']:.4f} nats a token"
    for library, version in saved.get('versions', {}).items():
        figures[library] = _one_line(version)
    return figures


def _one_line(value):
    """A value as it can stand in a table."""
    return ' '.join(str(value).replace('|', ' ').split())[:200]
