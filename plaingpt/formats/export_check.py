"""
Whether another program computes with an exported model what ours does.

export.py reports success only after one of these checks. They compare on the CPU, with random
tokens: a model that is wrong somewhere is wrong there too.
"""
import torch

from plaingpt.formats import llama_cpp
from plaingpt.formats.gguf_reading import load_gguf
from plaingpt.formats.hugging_face_export import logits_by_transformers
from plaingpt.system.cpu_runtime import release_freed_memory
from plaingpt.system.messages import UserError, warn

LENGTH = 64  # tokens of the sequence that is compared, if the model's context is that long

# How far logits may lie from those of transformers, as a share of the largest: SmolLM2's are 2e-6
# apart, and a part of a matrix in the wrong place changes them by much more than that.
TOLERANCE = 1e-4

# How far the log-probabilities of the likeliest tokens may lie from those of llama.cpp, in nats.
# In float32 they are 2e-4 apart for SmolLM2, and 0.002 for a GPT-2, whose GELU comes from a table.
LLAMA_CPP_TOLERANCE = 0.01
# Where the weights are in another type, llama.cpp rounds the activations too: to the same type, or
# to 8 bits where the weights have 8 or 4. Then the differences grow with the logits, and this share
# of the largest is allowed. SmolLM2, whose largest is 34, is 0.005, 0.04, 0.22, 0.25 and 0.20 off;
# of models with random weights, the worst is 0.036 of its largest off, in q4_0.
LLAMA_CPP_SHARES = {'f32': 0.0, 'f16': 0.01, 'bf16': 0.03, 'q8_0': 0.05, 'q4_0': 0.05, 'q4_1': 0.05}
LIKELIEST = 4


# ---- logits ----

def probe(config):
    """Random ids, int64 (1, T), for a model of this GPTConfig to read."""
    length = min(LENGTH, config.block_size)
    generator = torch.Generator().manual_seed(0)
    return torch.randint(config.vocab_size, (1, length), generator=generator)


@torch.no_grad()
def logits_of(gpt, ids, vocab_size):
    """float32 logits of a GPT, (1, T, vocab_size), without those that only pad its vocabulary."""
    logits, _ = gpt(ids, ids)
    return logits[..., :vocab_size].float()


def difference_from_llama_cpp(path, ids, logits):
    """The largest difference from llama.cpp's log-probabilities of its likeliest tokens, in nats.

    path: a GGUF file. ids: int64 (1, T). logits: ours after each of them, (1, T, V).
    UserError if llama.cpp refuses the file."""
    ids = ids[0].tolist()
    model = llama_cpp.LlamaCpp(path, context=len(ids) + 1)
    largest = 0.0
    for length in sorted({1, max(1, len(ids) // 2), max(1, len(ids) - 1)}):
        ours = logits[0, length - 1].log_softmax(dim=-1)
        theirs = model.top_log_probabilities(ids[:length], LIKELIEST)
        for token, value in theirs.items():
            largest = max(largest, abs(ours[token].item() - value))
    return largest


# ---- checks ----

def check_hugging_face(folder, ids, ours):
    """Compares an exported folder with our logits, and returns a sentence about the difference.

    UserError if transformers computes something else."""
    return _close_logits(ours, logits_by_transformers(folder, ids), 'transformers')


def check_adapter(folder, base_folder, ids, ours):
    """Compares an exported adapter, on its exported base, with our logits; returns a sentence.

    UserError if peft computes something else."""
    return _close_logits(ours, logits_by_transformers(base_folder, ids, folder), 'peft')


def _close_logits(ours, theirs, program):
    difference = (ours - theirs).abs().max().item()
    largest = ours.abs().max().item()
    if not difference <= TOLERANCE * largest:
        raise UserError(f'the logits of {program} differ by {difference:.2g} from ours, the '
                        f'largest of which is {largest:.3g}, so nothing was written: please '
                        'report this')
    return f'the logits of {program} differ from ours by at most {difference:.1e} of {largest:.1f}'


def check_gguf(path, type, ids, ours):
    """Compares a GGUF file with our logits, and returns a sentence about the differences.

    The file is read back, and llama.cpp computes with it if xllamacpp is installed. What the
    rounding of the weights changes is said, not judged: in 4 bits that may be much. UserError if
    the file does not hold the model, or if llama.cpp computes something else from the weights in
    it."""
    read_back = load_gguf(path)
    stored = logits_of(read_back, ids, ours.size(-1))
    del read_back  # llama.cpp needs its memory
    release_freed_memory()
    largest = ours.abs().max().item()
    change = (stored - ours).abs().max().item()
    if type == 'f32' and not change <= TOLERANCE * largest:
        raise UserError(f'the logits of the file, read back, differ by {change:.2g} from ours, so '
                        'nothing was written: please report this')
    sentence = f'{type} changes the logits by at most {change:.1e} of {largest:.1f}'
    if type != 'f32':
        changed = (stored.argmax(dim=-1) != ours.argmax(dim=-1)).sum().item()
        sentence += f', and the likeliest token at {changed} of {ids.numel()} positions'
    if not llama_cpp.is_installed():
        warn('the file was not compared with llama.cpp: pip install xllamacpp')
        return sentence
    difference = difference_from_llama_cpp(path, ids, stored)
    if not difference <= max(LLAMA_CPP_TOLERANCE, LLAMA_CPP_SHARES[type] * largest):
        raise UserError(f"llama.cpp's log-probabilities differ by {difference:.2g} from ours, "
                        'so nothing was written: please report this')
    return f"{sentence}; llama.cpp's log-probabilities differ by at most {difference:.1e}"
