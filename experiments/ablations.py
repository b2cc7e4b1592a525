"""
What each part of config/train_shakespeare_char_modern.py is worth, alone and left out, over several seeds: the table of
docs/modern.md. Every run is one of train.py's, on a CPU, one after the other, all with one seed and then all with the
next, so that a change of the machine's speed meets all rows alike. All take half an hour on two cores.

    python experiments/ablations.py
    python experiments/ablations.py --seeds 1 --only all "plain, 2000 steps"
"""
import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile

ROOT = os.path.abspath(os.path.join(__file__, '..', '..'))
PLAIN, MODERN = 'train_shakespeare_char.py', 'train_shakespeare_char_modern.py'
TARGET = 1.885  # of nanoGPT's CPU flags, after 2000 steps
STEPS = {'max_iters': 200, 'lr_decay_iters': 200, 'eval_interval': 20}

PARTS = {  # name: (without it, with it)
    'rope': ({'position': 'learned'}, {'position': 'rope', 'rope_theta': 30.0}),
    'query-key norm': ({'qk_norm': False}, {'qk_norm': True}),
    'SwiGLU': ({'mlp': 'gelu'}, {'mlp': 'swiglu'}),
    'RMSNorm': ({'norm': 'layernorm'}, {'norm': 'rmsnorm'}),
    'untied head': ({'tied': True}, {'tied': False}),
    'Muon': ({'optimizer': 'adamw', 'learning_rate': 3e-3, 'warmup_iters': 20},
             {'optimizer': 'muon', 'learning_rate': 2e-2, 'warmup_iters': 0}),
}
OTHERS = {'squared ReLU for SwiGLU': {'mlp': 'relu2'}, 'ALiBi for rope': {'position': 'alibi'},
          'no positions for rope': {'position': 'none'}, 'theta 10000': {'rope_theta': 1e4},
          '2 heads of keys and values': {'n_kv_head': 2}, 'soft cap 15': {'logit_softcap': 15.0},
          'zero init': {'zero_init': True}, "Muon's momentum 0.95": {'muon_momentum': 0.95}}


def variants():
    """{name: (config, keys)} of all runs, of which those of one seed are compared."""
    bare = {key: value for without, _ in PARTS.values() for key, value in without.items()}
    found = {'plain, 2000 steps': (PLAIN, {'eval_interval': 100}), 'none of the parts': (MODERN, STEPS | bare)}
    found |= {f'{name} alone': (MODERN, STEPS | bare | part) for name, (_, part) in PARTS.items()}
    found |= {'all': (MODERN, STEPS)}
    found |= {f'all but {name}': (MODERN, STEPS | part) for name, (part, _) in PARTS.items()}
    found |= {f'all, {name}': (MODERN, STEPS | keys) for name, keys in OTHERS.items()}
    found['all, 100 steps'] = MODERN, dict.fromkeys(STEPS, 100)
    return found | {'all, 1000 steps': (MODERN, {'eval_interval': 100})}


def run(config, **keys):
    """[(step, seconds, validation loss), …] of the evaluations of a run."""
    with tempfile.TemporaryDirectory() as out_dir:
        command = [sys.executable, os.path.join(ROOT, 'train.py'), os.path.join(ROOT, 'config', config), '--device=cpu',
                   f'--out_dir={out_dir}', *(f'--{key}={value}' for key, value in keys.items())]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        with open(os.path.join(out_dir, 'metrics.jsonl'), encoding='utf-8') as file:
            lines = [json.loads(line) for line in file]
    return [(line['step'], line['elapsed'], line['val_loss']) for line in lines if 'val_loss' in line]


def row(name, runs):
    """A line of the table: where the target is first met, and the last loss; means over runs, and from lowest to
    highest."""
    def spread(values, form):
        return f'{statistics.mean(values):{form}} ({min(values):{form}} to {max(values):{form}})'
    met = [next(((step, seconds) for step, seconds, loss in run if loss <= TARGET), None) for run in runs]
    steps, seconds = ([each[i] for each in met] if all(met) else None for i in (0, 1))
    return (f"| {name} | {spread(steps, '.0f') if steps else '–'} | {spread(seconds, '.1f') if seconds else '–'} | "
            f"{spread([run[-1][2] for run in runs], '.3f')} | {statistics.mean(run[-1][1] for run in runs):.0f} |")


def main():
    parser = argparse.ArgumentParser('python experiments/ablations.py', description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--seeds', type=int, nargs='+', default=[1, 2, 3])
    parser.add_argument('--only', nargs='+', choices=variants(), default=variants(), metavar='NAME')
    chosen = parser.parse_args()
    runs = {name: [] for name in chosen.only}
    for seed, name in itertools.product(chosen.seeds, chosen.only):
        config, keys = variants()[name]
        runs[name].append(run(config, seed=seed, **keys))
        print(f'seed {seed}, {name}: {runs[name][-1][-1]}', file=sys.stderr)
    print(f'| run | steps to {TARGET} | seconds to {TARGET} | last validation loss | seconds in all |')
    print('|---|---|---|---|---|')
    for name in runs:
        print(row(name, runs[name]))


if __name__ == '__main__':
    main()
