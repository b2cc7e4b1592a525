"""What the tests of generation share: models whose text varies, fixed seeds, running sample.py."""
import torch
from conftest import run_here, succeeded, tiny_gpt

# ---- models ----


def lively_gpt(**changes):
    """A GPT whose text varies: with initial weights, the likeliest token is mostly the last one."""
    gpt = tiny_gpt(**changes)
    for parameter in gpt.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.5)
    return gpt


def generate(gpt, idx, new_tokens, seed=0, **options):
    """gpt.generate() with the seeds `seed`, `seed + 1`, … of the rows that it returns."""
    rows = len(idx) * options.get('num_samples', 1)
    return gpt.generate(idx, new_tokens, seeds=range(seed, seed + rows), **options)


def greedy_without_cache(gpt, prompt, new_tokens, stride=1, context_size=None):
    """The prompt and its likeliest continuation, a list, from reading the window at each token.

    prompt: a list of ids. context_size: of the window; None: block_size."""
    if context_size is None:
        context_size = gpt.config.block_size
    device = gpt.lm_head.weight.device
    tokens = list(prompt)
    begin = max(0, len(tokens) - context_size)
    for _ in range(new_tokens):
        if len(tokens) - begin > context_size:
            begin = len(tokens) - (context_size - stride + 1)
        with torch.no_grad():
            logits, _ = gpt(torch.tensor([tokens[begin:]], device=device))
        tokens.append(logits.argmax().item())
    return tokens


class ConstantHead(torch.nn.Module):
    """A head that gives these logits at every position."""

    def __init__(self, logits):
        super().__init__()
        self.weight = torch.tensor(logits)

    def forward(self, x):
        return self.weight.expand(*x.shape[:-1], -1)


def gpt_with_logits(logits):
    """A GPT whose next token has these logits, whatever the prompt."""
    gpt = tiny_gpt(vocab_size=len(logits), n_embd=2, n_head=1)
    gpt.lm_head = ConstantHead(logits)
    return gpt


def shares(drawn, vocab_size):
    """The share of each id among drawn ones, a list."""
    return (torch.bincount(drawn, minlength=vocab_size) / len(drawn)).tolist()


# ---- sample.py ----

# The tokenizer and the shape of the models that sample.py runs with: the model has 20 tokens more
# than the tokenizer.
CHARS = '\n abcdefgh'
TOKENIZER = {'kind': 'char', 'chars': list(CHARS)}
SHAPE = dict(block_size=8, vocab_size=30, n_layer=1, n_head=1, n_embd=8)


def sample(folder, **keys):
    """Runs sample.py in this process: three samples of 40 tokens, unless the keys say otherwise."""
    defaults = {'out_dir': folder, 'device': 'cpu', 'max_new_tokens': 40, 'num_samples': 3}
    return run_here('sample.py', **{**defaults, **keys})


def samples(folder, **keys):
    """The texts, prompts included, that sample.py prints."""
    return split_samples(succeeded(sample(folder, **keys)))


def split_samples(stdout):
    """The texts in what sample.py has printed."""
    *texts, rest = stdout.split('\n---------------\n')
    assert rest == ''
    return texts
