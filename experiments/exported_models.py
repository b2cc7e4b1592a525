"""
Compares models that export.py writes with what transformers and llama.cpp compute from them.
Prints the first table of docs/models.md, in about a minute on two cores.

    python experiments/exported_models.py

Each family is a model of 4 blocks, 256 channels and 95 tokens, with random weights, norms and
biases. SmolLM2-135M-Instruct, which is fetched if need be, and a model of GPT-2's size come last.
"""
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from model import GPT, GPTConfig
from plaingpt.formats import export_check
from plaingpt.formats.families import family_for
from plaingpt.formats.gguf_reading import load_gguf
from plaingpt.formats.gguf_writing import FILE_TYPES, write_gguf
from plaingpt.formats.hugging_face_export import export_hugging_face, logits_by_transformers
from plaingpt.formats.smollm2 import fetch_smollm2
from plaingpt.training.trained_model import open_trained

ROOT = Path(__file__).resolve().parents[1]
LLAMA = dict(position='rope', norm='rmsnorm', mlp='swiglu', tied=False, bias=False)
LLAMA_3 = {'factor': 8.0, 'low_freq_factor': 1.0, 'high_freq_factor': 4.0, 'original_context': 64}
SHAPES = {
    'GPT-2, with biases': {},
    'GPT-2, without biases': dict(bias=False),
    'GPT-2, exact GELU, untied': dict(gelu='exact', tied=False),
    'Llama, 2 heads of keys': LLAMA | dict(n_kv_head=2),
    'Llama 3.1, scaled rope, tied': LLAMA | dict(rope_scaling=LLAMA_3, tied=True),
    'Llama, biases everywhere': LLAMA | dict(bias=True),
    'Qwen2, biases of queries, keys, values': LLAMA | dict(qkv_bias=True, n_kv_head=2),
    'Qwen3, learned query-key norm, wide heads': LLAMA | dict(
        qk_norm=True, qk_norm_weight=True, head_size=128, norm_eps=1e-6),
    'Qwen3, our query-key norm': LLAMA | dict(qk_norm=True),
    'Arcee, squared ReLU': LLAMA | dict(mlp='relu2'),
}
TOKENS = {'kind': 'char', 'chars': [chr(i) for i in range(32, 127)]}  # only the ids count


def random_gpt(config):
    """A GPT all of whose parameters are random, norms and biases too."""
    torch.manual_seed(0)
    gpt = GPT(config).eval()
    for parameter in gpt.parameters():
        mean = 1.0 if parameter.dim() == 1 else 0.0
        torch.nn.init.normal_(parameter, mean=mean, std=0.1)
    return gpt


def row(name, gpt, tokenizer, folder):
    """A line of the table: differences from transformers, and from llama.cpp for each type."""
    vocab_size = gpt.config.vocab_size
    ids = export_check.probe(gpt.config)
    ours = export_check.logits_of(gpt, ids, vocab_size)
    there = folder / 'there'
    there.mkdir()
    export_hugging_face(there, gpt, tokenizer)
    difference = (logits_by_transformers(there, ids) - ours).abs().max()
    cells = [name, family_for(gpt.config).architecture,
             f'{difference:.1e} of {ours.abs().max():.0f}']
    for type in FILE_TYPES:
        path = str(folder / f'there-{type}.gguf')
        write_gguf(path, gpt, tokenizer, type)
        stored = export_check.logits_of(load_gguf(path), ids, vocab_size)
        cells.append(f'{export_check.difference_from_llama_cpp(path, ids, stored):.1e}')
    return f'| {" | ".join(cells)} |'


def main():
    print(f'| model | class | transformers, logits | llama.cpp, {" | ".join(FILE_TYPES)} |')
    print('|---|---|---|' + '---|' * len(FILE_TYPES))

    def print_row(name, gpt, tokenizer):
        with TemporaryDirectory() as folder:
            print(row(name, gpt, tokenizer, Path(folder)), flush=True)

    for name, options in SHAPES.items():
        print_row(name, random_gpt(GPTConfig(128, 95, 4, 4, 256, **options)), TOKENS)
    print_row("GPT-2's size, random", GPT(GPTConfig(vocab_size=50257)).eval(), {'kind': 'gpt2'})
    path, _ = fetch_smollm2(str(ROOT / 'data' / 'smollm2'))
    smollm2 = open_trained(path)
    print_row('SmolLM2-135M-Instruct', smollm2.gpt, smollm2.tokenizer)


main()
