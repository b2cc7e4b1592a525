"""
What bench.py compares training and preparation with: a GPT that is trained and fed with data as
nanoGPT does it, transformers' GPT-2, and a machine that another program shares.

The functions for training make the random weights of a GPTConfig on a device, and return a function
that takes a training step. The caller waits for the device.
"""
import contextlib
import subprocess
import sys
from dataclasses import replace

import torch

from model import GPT
from plaingpt.system.devices import precision
from plaingpt.system.messages import UserError


# ---- training: each function returns step(number), which trains on batch(number) ----

def nanogpt_step(config, batch, device, dtype, compiled):
    """A step as nanoGPT takes it, by torch's own operations.

    batch: a function from a step's number to x and y; dtype: 'float32', 'bfloat16' or 'float16';
    compiled: whether torch.compile compiles the whole model."""
    net = nanogpt(config, device)
    if compiled:
        net.compile()
    return _training_step(net, net, batch, device, dtype)


def transformers_step(config, batch, device, dtype, compiled):
    """A step of transformers' GPT-2; arguments as in nanogpt_step()."""
    net = transformers_gpt2(config, device).train()
    if compiled:
        net.compile()

    def forward(x, y):
        output = net(input_ids=x, labels=x, use_cache=False)  # it shifts the labels by itself
        return output.logits, output.loss

    return _training_step(net, forward, batch, device, dtype)


def _training_step(net, forward, batch, device, dtype):
    """step(number) in nanoGPT's order of events; forward(x, y) returns (logits, loss)."""
    _, autocast, scaler = precision(device, dtype, net.config.n_embd)
    matrices = [parameter for parameter in net.parameters() if parameter.dim() >= 2]
    vectors = [parameter for parameter in net.parameters() if parameter.dim() < 2]
    groups = [
        {'params': matrices, 'weight_decay': 0.1},
        {'params': vectors, 'weight_decay': 0.0},
    ]
    fused = device.type == 'cuda'
    optimizer = torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.95), fused=fused)

    def step(number):
        x, y = batch(number)
        with autocast():
            logits, loss = forward(x, y)  # the logits stay in memory to the end of the step
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

    return step


# ---- other load ----

@contextlib.contextmanager
def busy_program():
    """A context in which another program keeps one core busy."""
    program = subprocess.Popen([sys.executable, '-c', 'while True: pass'])
    try:
        yield
    finally:
        program.kill()
        program.wait()


# ---- the models ----

def nanogpt(config, device):
    """Our GPT with nanoGPT's GELU, and without the kernels that place() would give it."""
    return GPT(replace(config, gelu='exact')).to(device)


def transformers_gpt2(config, device):
    """transformers' GPT-2 of the same shape, with the same GELU."""
    from transformers import GPT2Config, GPT2LMHeadModel
    their_config = GPT2Config(
        activation_function='gelu' if config.gelu == 'exact' else 'gelu_new',
        vocab_size=config.vocab_size, n_positions=config.block_size, n_embd=config.n_embd,
        n_layer=config.n_layer, n_head=config.n_head, bos_token_id=0, eos_token_id=0,
        resid_pdrop=config.dropout, embd_pdrop=config.dropout, attn_pdrop=config.dropout)
    return GPT2LMHeadModel(their_config).to(device)


# ---- preparation ----

def nanogpt_preparation(files):
    """Tokenizes Parquet files into token files in nanoGPT's way; returns the number of tokens.

    datasets maps documents to lists of ids on disk, which then become token files."""
    return int(run_python('-c', NANOGPT_PREPARATION, *files, name='the baseline'))


NANOGPT_PREPARATION = '''
import os, sys, tempfile
import datasets, numpy, tiktoken

bpe = tiktoken.get_encoding("gpt2")
tokens = 0

def encode(document):
    return {"encoded": [*bpe.encode_ordinary(document["text"]), bpe.eot_token]}

with tempfile.TemporaryDirectory() as folder:
    texts = datasets.load_dataset("parquet", data_files=sys.argv[1:], split="train",
                                  cache_dir=folder)
    texts = texts.train_test_split(test_size=0.0005, seed=1)
    columns = texts["train"].column_names
    encoded = texts.map(encode, num_proc=os.cpu_count(), remove_columns=columns)
    for name, part in encoded.items():
        with open(os.path.join(folder, name), "wb") as file:
            for documents in part.with_format("numpy").iter(batch_size=len(part) // 1024 + 1):
                numpy.concatenate(documents["encoded"]).astype("uint16").tofile(file)
            tokens += file.tell() // 2
print(tokens)
'''


def run_python(*arguments, name, env=None):
    """stdout of python with these arguments. UserError, with this name, if it fails."""
    ended = subprocess.run([sys.executable, *arguments], capture_output=True, text=True,
                           encoding='utf-8', env=env)
    if ended.returncode != 0:
        raise UserError(f'{name} failed: {ended.stderr.strip()[-500:]}')
    return ended.stdout
