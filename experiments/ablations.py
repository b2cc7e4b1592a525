"""
Measures what each part of config/train_shakespeare_char_modern.py is worth, alone and left out,
over several seeds, and prints the table of docs/modern.md. Every row is a run of train.py on a CPU.
The runs take turns: each row with one seed, then each row with the next, so that a change in the
machine's speed affects all rows alike. Everything takes half an hour on two cores.

    python experiments/ablations.py
    python experiments/ablations.py --seeds 1 --only all "plain, 2000 steps"
"""
import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PLAIN = 'train_shakespeare_char.py'
MODERN = 'train_shakespeare_char_modern.py'
TARGET = 1.885  # the validation loss that nanoGPT's CPU flags reach in 2000 steps

# Most rows train for 200 steps, which is enough to tell the parts apart.
SHORT = {'max_iters': 200, 'lr_decay_iters': 200, 'eval_interval': 20}


class Part(NamedTuple):
    """The keys that take one part out of the modern recipe, and the keys that put it in."""
    without: dict
    included: dict


PARTS = {
    'rope': Part({'position': 'learned'}, {'position': 'rope', 'rope_theta': 30.0}),
    'query-key norm': Part({'qk_norm': False}, {'qk_norm': True}),
    'SwiGLU': Part({'mlp': 'gelu'}, {'mlp': 'swiglu'}),
    'RMSNorm': Part({'norm': 'layernorm'}, {'norm': 'rmsnorm'}),
    'untied head': Part({'tied': True}, {'tied': False}),
    'Muon': Part({'optimizer': 'adamw', 'learning_rate': 3e-3, 'warmup_iters': 20},
                 {'optimizer': 'muon', 'learning_rate': 2e-2, 'warmup_iters': 0}),
}

# Changes to the whole recipe: another part in place of one of its own, or one part more.
CHANGES = {
    'squared ReLU for SwiGLU': {'mlp': 'relu2'},
    'ALiBi for rope': {'position': 'alibi'},
    'no positions for rope': {'position': 'none'},
    'theta 10000': {'rope_theta': 1e4},
    '2 heads of keys and values': {'n_kv_head': 2},
    'soft cap 15': {'logit_softcap': 15.0},
    'zero init': {'zero_init': True},
    "Muon's momentum 0.95": {'muon_momentum': 0.95},
}


class Variant(NamedTuple):
    """A row of the table: a file in config/ and the keys that override it."""
    config: str
    keys: dict


class Evaluation(NamedTuple):
    """One evaluation of a run: the step, seconds since the start, validation loss in nats."""
    step: int
    seconds: float
    loss: float


def all_variants():
    """The rows of the table by name, in the table's order."""
    # GPT-2's architecture in the modern config: every part taken out.
    bare = dict(SHORT)
    for part in PARTS.values():
        bare.update(part.without)

    variants = {
        'plain, 2000 steps': Variant(PLAIN, {'eval_interval': 100}),
        'none of the parts': Variant(MODERN, bare),
    }
    for name, part in PARTS.items():
        variants[f'{name} alone'] = Variant(MODERN, bare | part.included)
    variants['all'] = Variant(MODERN, SHORT)
    for name, part in PARTS.items():
        variants[f'all but {name}'] = Variant(MODERN, SHORT | part.without)
    for name, keys in CHANGES.items():
        variants[f'all, {name}'] = Variant(MODERN, SHORT | keys)
    variants['all, 100 steps'] = Variant(
        MODERN, {'max_iters': 100, 'lr_decay_iters': 100, 'eval_interval': 100})
    variants['all, 1000 steps'] = Variant(MODERN, {'eval_interval': 100})
    return variants


def train(variant, seed):
    """Trains a variant in a temporary folder and returns its evaluations, in order."""
    with tempfile.TemporaryDirectory() as out_dir:
        command = [sys.executable, str(ROOT / 'train.py'), str(ROOT / 'config' / variant.config),
                   '--device=cpu', f'--out_dir={out_dir}', f'--seed={seed}']
        for key, value in variant.keys.items():
            command.append(f'--{key}={value}')
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        lines = (Path(out_dir) / 'metrics.jsonl').read_text(encoding='utf-8').splitlines()

    evaluations = []
    for line in lines:
        record = json.loads(line)
        if 'val_loss' in record:
            evaluation = Evaluation(record['step'], record['elapsed'], record['val_loss'])
            evaluations.append(evaluation)
    return evaluations


def first_at_target(run):
    """The first evaluation of a run whose loss is at most TARGET, or None."""
    for evaluation in run:
        if evaluation.loss <= TARGET:
            return evaluation
    return None


def spread(values, digits):
    """'mean (lowest to highest)' of numbers, as a cell of the table."""
    mean = statistics.mean(values)
    return f'{mean:.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})'


def row(name, runs):
    """A line of the table. runs: a variant's evaluations, one list a seed."""
    # The columns about the target stay empty unless every seed reaches it.
    reached = [first_at_target(run) for run in runs]
    if None in reached:
        steps = '–'
        seconds = '–'
    else:
        steps = spread([evaluation.step for evaluation in reached], digits=0)
        seconds = spread([evaluation.seconds for evaluation in reached], digits=1)

    last = [run[-1] for run in runs]
    losses = spread([evaluation.loss for evaluation in last], digits=3)
    total = statistics.mean([evaluation.seconds for evaluation in last])
    return f'| {name} | {steps} | {seconds} | {losses} | {total:.0f} |'


def main():
    variants = all_variants()
    parser = argparse.ArgumentParser('python experiments/ablations.py', description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--seeds', type=int, nargs='+', default=[1, 2, 3])
    parser.add_argument('--only', nargs='+', choices=variants, default=variants, metavar='NAME')
    arguments = parser.parse_args()

    runs = {name: [] for name in arguments.only}
    for seed in arguments.seeds:
        for name in arguments.only:
            run = train(variants[name], seed)
            runs[name].append(run)
            print(f'seed {seed}, {name}: {run[-1]}', file=sys.stderr)

    print(f'| run | steps to {TARGET} | seconds to {TARGET} | last validation loss '
          '| seconds in all |')
    print('|---|---|---|---|---|')
    for name in runs:
        print(row(name, runs[name]))


if __name__ == '__main__':
    main()
