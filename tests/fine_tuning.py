"""What the tests of fine-tuning share: small models of ours and of Hugging Face, and adapters."""
from dataclasses import asdict

import pytest
import torch
from torch.nn import functional as F

from model import GPT
from plaingpt.system.messages import UserError
from plaingpt.training import checkpoints, lora

ABC = {'kind': 'char', 'chars': list('\nabcdefghijklmnopqrstuvwxyzABCD')}  # a tokenizer's dict

# The two matrices of one layer's adapter.
A = 'transformer.h.1.attn.c_attn.lora_A.weight'
B = 'transformer.h.1.attn.c_attn.lora_B.weight'


def save_gpt2(folder, seed=0, std=0.2, **config):
    """Saves a random GPT-2 of Hugging Face in a folder, biases and norms too; returns it."""
    from transformers import GPT2Config, GPT2LMHeadModel
    torch.manual_seed(seed)
    shape = {'n_layer': 2, 'n_head': 2, 'n_embd': 16, 'n_positions': 16, 'vocab_size': 31}
    without_dropout = {'resid_pdrop': 0.0, 'embd_pdrop': 0.0, 'attn_pdrop': 0.0}
    settings = {'bos_token_id': 0, 'eos_token_id': 0, **shape, **without_dropout, **config}
    model = GPT2LMHeadModel(GPT2Config(**settings)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=std)
    model.save_pretrained(folder)
    return model


def save_run(folder, gpt, name='ckpt', **entries):
    """Saves a checkpoint of gpt in a folder, as a run does; returns the folder's path."""
    checkpoint = {
        'model': gpt.state_dict(), 'optimizer': {}, 'model_args': asdict(gpt.config),
        'iter_num': 7, 'best_val_loss': 1.0, 'config': {}, 'tokenizer': ABC, **entries,
    }
    checkpoints.save(str(folder), checkpoint, [name])
    return str(folder)


def add_adapter(gpt, rank=3, alpha=12, dropout=0.0, targets='c_attn', trained=True):
    """Adds an adapter; trained: with B no longer 0, as after some training."""
    lora.add_lora(gpt, rank, alpha, dropout, targets)
    generator = torch.Generator().manual_seed(5)
    for name, tensor in lora.adapter_state(gpt).items():
        if trained and 'lora_B' in name:
            tensor.copy_(torch.randn(tensor.shape, generator=generator) / 10)
    return gpt


@torch.no_grad()
def logits(model, idx):
    """Logits at all positions, of a GPT or of Hugging Face's model."""
    if isinstance(model, GPT):
        return model(idx, targets=idx)[0]
    return model(idx).logits


def loss(model, idx):
    """Loss of predicting each next id, of a GPT or of Hugging Face's model."""
    inputs = idx[:, :-1]
    targets = idx[:, 1:]
    if isinstance(model, GPT):
        return model(inputs, targets)[1]
    return F.cross_entropy(model(inputs).logits.flatten(0, 1), targets.flatten())


def refusal(kind=UserError):
    """Expects an error whose message is one line."""
    return pytest.raises(kind, match=r'^[^\n]+$')
