"""
Prints fingerprints of what training and sampling compute, to show that a change of the code changes
no result. Run it on both versions and compare the lines:

    python experiments/fingerprints.py
    python experiments/fingerprints.py --repository=OTHER_CLONE

A training run takes 20 steps in float32 on one thread without dropout, and its line is the sha256
of the weights. A text is 200 greedy tokens, and its line is the sha256 of what sample.py prints. On
the same machine with the same torch, the lines are the same each time.
"""
import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
TWENTY_STEPS = ['--device=cpu', '--dtype=float32', '--dropout=0.0', '--max_iters=20',
                '--lr_decay_iters=20', '--eval_interval=20', '--eval_iters=2', '--warmup_iters=5']
PLAIN = 'config/train_shakespeare_char.py'
MODERN = 'config/train_shakespeare_char_modern.py'
GREEDY = ['--device=cpu', '--dtype=float32', '--temperature=0', '--num_samples=1',
          '--max_new_tokens=200']
TWO_RANKS = ['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2']


def run(repository, script, *arguments, launcher=()):
    """Runs a script of the repository and returns what it prints, as bytes; exits if it fails."""
    command = [sys.executable, *launcher, str(repository / script), *arguments]
    environment = {**os.environ, 'OMP_NUM_THREADS': '1'}
    finished = subprocess.run(command, cwd=repository, env=environment, capture_output=True)
    if finished.returncode != 0:
        raise SystemExit(f'{command} failed:\n{finished.stderr.decode()}')
    return finished.stdout


def digest_of_weights(out_dir):
    """sha256 of a run's weights in last.pt: names and bytes, sorted by name."""
    weights = torch.load(out_dir / 'last.pt', map_location='cpu', weights_only=True)['model']
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(name.encode())
        digest.update(weights[name].contiguous().numpy().tobytes())
    return digest.hexdigest()


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--repository', type=Path, default=ROOT)
    repository = parser.parse_args().repository.resolve()
    folder = Path(tempfile.mkdtemp())

    def train(name, *arguments, launcher=()):
        out_dir = folder / name
        run(repository, 'train.py', *arguments, *TWENTY_STEPS, f'--out_dir={out_dir}',
            launcher=launcher)
        print(f'{name:<24} {digest_of_weights(out_dir)}', flush=True)

    def sample(name):
        text = run(repository, 'sample.py', f'--out_dir={folder / name}', *GREEDY)
        title = f'{name}, text'
        print(f'{title:<24} {hashlib.sha256(text).hexdigest()}', flush=True)

    train('plain', PLAIN)
    sample('plain')
    train('modern', MODERN)
    sample('modern')
    # The next three start from the weights of the first run.
    base = f'--init_from={folder / "plain"}'
    train('lora', PLAIN, base, '--lora_rank=4', '--lora_targets=c_attn,c_proj,c_fc')
    train('frozen', PLAIN, base, '--trainable=last:1')
    train('unfrozen', PLAIN, base, "--unfreeze={0: 'head', 10: 'last:2'}")
    # Two ranks first take half the rows of each micro-batch, then whole micro-batches.
    train('ranks share rows', PLAIN, launcher=TWO_RANKS)
    train('ranks share batches', PLAIN, '--gradient_accumulation_steps=2', launcher=TWO_RANKS)
    train('modern, two ranks', MODERN, launcher=TWO_RANKS)
    shutil.rmtree(folder)


if __name__ == '__main__':
    main()
