"""
Compares tokenizers: the net of config/train_shakespeare_char.py learns tiny Shakespeare in tokens
of four kinds, with the same compute and the best of four learning rates for each. Prints the table
of docs/tokenizers.md, in about 20 minutes on two cores.

    python experiments/tokenizer_quality.py
    python experiments/tokenizer_quality.py --tokenizers char,bpe:512 --rates 4e-3
"""
import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from model import GPTConfig
from plaingpt.planning.counts import flops, parameters
from plaingpt.text.data_sets import read_meta, rounded_vocab_size
from plaingpt.text.publishing import write_data_set
from plaingpt.text.shakespeare import read_text, split_text
from plaingpt.text.tokenizer_choice import choose

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / 'config' / 'train_shakespeare_char.py'
CHAR_STEPS = 2000  # of the config; the other tokenizers get as many as take the same FLOPs
SHAPE = {'block_size': 64, 'n_layer': 4, 'n_head': 4, 'n_embd': 128, 'bias': False}  # as there
TOKENS_PER_STEP = 12 * 64


class Measured(NamedTuple):
    """The outcome of a run."""
    rate: float           # learning rate
    loss: float           # of the whole val split, nats a token
    bits_per_byte: float  # of the same


def prepare(folder, texts, spec):
    """Writes the data set of a tokenizer into a folder. Returns {split: number of tokens}.

    texts: {'train': text, 'val': text}. What is trained sees the training text alone, except that
    the characters are those of the whole text."""
    choice = choose(spec)
    if spec == 'char':
        tokenizer = choice.train(texts.values())
    elif choice.needs_text:
        tokenizer = choice.train([texts['train']])
    else:
        tokenizer = choice.tokenizer()
    ids = {split: tokenizer.encode_corpus([text])[0] for split, text in texts.items()}
    write_data_set(str(folder), tokenizer, ids, 'tiny shakespeare', None)
    return {split: len(ids[split]) for split in ids}


def config_for(data):
    """The GPTConfig of a new model for a data set."""
    return GPTConfig(**SHAPE, vocab_size=rounded_vocab_size(read_meta(str(data))))


def run(script, *arguments):
    command = [sys.executable, ROOT / script, *arguments, '--device=cpu']
    finished = subprocess.run(command, capture_output=True, text=True, encoding='utf-8')
    if finished.returncode != 0:
        raise SystemExit(f'{command} failed:\n{finished.stderr}')


def measure(out_dir, data, steps, rate):
    """Trains a model, and measures it on the whole val split."""
    run('train.py', CONFIG, f'--out_dir={out_dir}', f'--dataset={data}', '--prepare=False',
        f'--max_iters={steps}', f'--lr_decay_iters={steps}', f'--warmup_iters={steps // 20}',
        f'--learning_rate={rate}', f'--min_lr={rate / 10}', f'--eval_interval={steps}',
        '--always_save_checkpoint=True')
    figures = out_dir / 'figures.json'
    run('evaluate.py', f'--out_dir={out_dir}', f'--dataset={data}', f'--output={figures}')
    found = json.loads(figures.read_text(encoding='utf-8'))[0]
    return Measured(rate, found['loss'], found['bits_per_byte'])


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--tokenizers', default='char,bpe:1024,bpe:4096,gpt2')
    parser.add_argument('--rates', default='1e-3,2e-3,4e-3,8e-3')
    options = parser.parse_args()

    text, _, _ = read_text(str(ROOT / 'data' / 'shakespeare_char'))
    texts = split_text(text)
    val_bytes = len(texts['val'].encode())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder / 'char', texts, 'char')
        char_flops = sum(flops(config_for(folder / 'char')).values())

        rows = []
        for spec in options.tokenizers.split(','):
            data = folder / spec.replace(':', '-')
            tokens = prepare(data, texts, spec)
            config = config_for(data)
            steps = round(CHAR_STEPS * char_flops / sum(flops(config).values()))
            runs = []
            for rate in options.rates.split(','):
                measured = measure(folder / f'{data.name} {rate}', data, steps, float(rate))
                print(f'{spec}, learning rate {rate}: {measured.bits_per_byte:.3f} bits per byte',
                      flush=True)
                runs.append(measured)
            best = min(runs, key=lambda measured: measured.bits_per_byte)
            epochs = steps * TOKENS_PER_STEP / tokens['train']
            rows.append(f'| {spec} | {val_bytes / tokens["val"]:.2f} '
                        f'| {sum(parameters(config).values()):,} | {steps:,} | {epochs:.2f} '
                        f'| {best.rate:g} | {best.loss:.3f} | {best.bits_per_byte:.3f} |')
    print('| tokenizer | bytes a token | parameters | steps | epochs | learning rate '
          '| loss a token | bits per byte |\n|---|---|---|---|---|---|---|---|')
    print('\n'.join(rows))


if __name__ == '__main__':
    main()
