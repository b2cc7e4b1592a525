"""
GPT-2 in one file: configuration, blocks, loss, import of published weights, optimizer, FLOP arithmetic.

What has come since is there as options of GPTConfig, all off: a reader of GPT-2 can pass over every line that asks for
one. docs/modern.md measures what each is worth.

Shapes at the ends of lines: B batch, T time (positions), C channels (n_embd), V vocabulary, nh heads, hs head size.

References:
[1] Radford et al. 2019, Language Models are Unsupervised Multitask Learners (GPT-2)
[2] Chowdhery et al. 2022, PaLM, arXiv 2204.02311, appendix B: FLOPs per token and MFU
[3] Su et al. 2021, RoFormer, arXiv 2104.09864, equation 34 (rope) [4] Press et al. 2021, ALiBi, arXiv 2108.12409
[5] Zhang and Sennrich 2019, RMSNorm, arXiv 1910.07467 [6] So et al. 2021, Primer, arXiv 2109.08668 (squared ReLU)
[7] Shazeer 2020, GLU Variants, arXiv 2002.05202 [8] Henry et al. 2020, Query-Key Normalization, arXiv 2010.04245
[9] Ainslie et al. 2023, GQA, arXiv 2305.13245 [10] Gemma Team 2024, Gemma 2, arXiv 2408.00118, section 2 (soft cap)
"""
import math
import os
from dataclasses import dataclass

import torch
import torch.nn as nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

GPT2_NAMES = ('gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl')
HUGGING_FACE_KEYS = ('n_layer', 'n_head', 'n_embd', 'n_positions', 'vocab_size', 'activation_function', 'n_inner',
                     'layer_norm_epsilon', 'scale_attn_weights', 'scale_attn_by_inverse_layer_idx',
                     'tie_word_embeddings')  # of a GPT-2's config.json: what decides its logits

CHOICES = {'gelu': ('tanh', 'exact'), 'position': ('learned', 'rope', 'alibi', 'none'),
           'norm': ('layernorm', 'rmsnorm'), 'mlp': ('gelu', 'relu2', 'swiglu')}  # of fields of GPTConfig
SIZES = ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd', 'n_kv_head')
LOGITS_AT_ONCE = 2 ** 26  # of a loss that is computed in parts


@dataclass
class GPTConfig:
    """Shape of a GPT. ValueError, with every problem in one sentence, if the fields do not fit together."""
    block_size: int = 1024   # longest sequence, in tokens
    vocab_size: int = 50304  # GPT-2's 50257 rounded up to a multiple of 64, which matrix units like
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True        # in the linear layers and layer norms, as GPT-2 has it
    gelu: str = 'tanh'       # 'tanh': the form that GPT-2's weights were trained with, so theirs are exact in it;
                             # 'exact' (erf): what nanoGPT trained with, set for its checkpoints
    # what GPT-2 has not
    position: str = 'learned'      # or 'rope' [3], 'alibi' [4], 'none'
    rope_theta: float = 10000.0    # its slowest pair of channels turns once in about 2 pi theta positions
    norm: str = 'layernorm'        # or 'rmsnorm' [5], which has no bias
    mlp: str = 'gelu'              # or 'relu2' [6], 'swiglu' [7]
    qk_norm: bool = False          # queries and keys of each head to root mean square 1, before rope [8]
    n_kv_head: int | None = None   # heads of keys and values, each shared by n_head / n_kv_head [9]; None: n_head
    logit_softcap: float = 0.0     # logits to cap * tanh(logits / cap) [10]; 0: as they are
    tied: bool = True              # one matrix reads tokens and writes logits
    zero_init: bool = False        # residual projections begin at 0, so each block as the identity

    def __post_init__(self):
        self.n_kv_head = self.n_head if self.n_kv_head is None else self.n_kv_head
        wrong = [f'{name}={getattr(self, name)} must be at least 1 and below 2**31' for name in SIZES
                 if not 1 <= getattr(self, name) < 2 ** 31]
        if not wrong:
            wrong = [f'{name}={getattr(self, name)} must be a multiple of {other}={getattr(self, other)}'
                     for name, other in (('n_embd', 'n_head'), ('n_head', 'n_kv_head'))
                     if getattr(self, name) % getattr(self, other)]
        if not wrong and self.position == 'rope' and self.head_size % 2:
            wrong = [f"position='rope' turns pairs of channels, and a head has {self.head_size}"]
        if not 0 <= self.dropout < 1:
            wrong.append(f'dropout={self.dropout} must be at least 0 and below 1')
        if not (0 < self.rope_theta <= 1e30 and 0 <= self.logit_softcap <= 1e30):  # of which float32 can compute
            wrong.append(f'rope_theta={self.rope_theta} must be in (0, 1e30], logit_softcap={self.logit_softcap} in '
                         '[0, 1e30]')
        wrong += [f'{name}={getattr(self, name)!r} must be {" or ".join(map(repr, choices))}'
                  for name, choices in CHOICES.items() if getattr(self, name) not in choices]
        if wrong:
            raise ValueError('; '.join(wrong))

    @property
    def head_size(self):
        return self.n_embd // self.n_head

    @property
    def longest(self):
        """Most tokens that the model can see at once: only a table of positions has an end."""
        return self.block_size if self.position == 'learned' else math.inf

    @property
    def mlp_width(self):
        """4 n_embd; of SwiGLU, which has a third matrix, 2/3 of that [7], rounded up to a multiple of 64."""
        return -(-8 * self.n_embd // (3 * 64)) * 64 if self.mlp == 'swiglu' else 4 * self.n_embd


# ---- what a CPU computes faster in another way; times are of 2 cores with AVX512-BF16, forward and backward ----

def _on_cpu(x):
    return x.device.type == 'cpu' and not torch.compiler.is_compiling()


def _kept(shape, p, dtype):
    """Tensor of this shape, 0 with probability p (in steps of 2**-16) and else 1, drawn from torch's CPU generator."""
    count = math.prod(shape)
    threshold = min(round(p * 2 ** 16) - 2 ** 15, 2 ** 15 - 1)  # of an int16
    drawn = torch.empty(-(-count // 4), dtype=torch.int64).random_(-2 ** 63, None)  # all 64 bits of each draw are used
    return drawn.view(torch.int16)[:count].view(shape).ge_(threshold).to(dtype)


def dropout(x, p):
    """x with each element zeroed with probability p, and the others scaled by 1 / (1 - p)."""
    if p and _on_cpu(x):  # 16 x 256 x 384 elements in 3 ms, against 11 of F.dropout
        return x * _kept(x.shape, p, x.dtype).mul_(1 / (1 - p))
    return F.dropout(x, p)


def causal_attention(q, k, v, p, bias=None, grouped=False):
    """Attention of each position to itself and those before it, with dropout p of its weights.

    q and the result: (B, nh, T, hs); k and v: the same, or, grouped, of fewer heads, which divide nh; bias: to be added
    to the scores, (1, nh, T, T), -inf where a position lies ahead, or None."""
    B, nh, T, hs = q.shape
    if not _on_cpu(q) or not (p or (q.dtype == torch.bfloat16 and T <= 512 and torch.is_grad_enabled())):
        return F.scaled_dot_product_attention(q, k, v, bias, p, bias is None, enable_gqa=grouped)
    if grouped:
        k, v = (heads.repeat_interleave(nh // k.size(1), dim=1) for heads in (k, v))
    # Written out, as many sequences at a time as have their weights in the cache. B = 16, nh = 6, T = 256, hs = 64 in
    # bfloat16: 34 ms against 51, with dropout 38 against 147 (float32 78 against 124; experiments/what_pays.py). Without it
    # torch's own is as fast at T = 1024 in bfloat16, at any T in float32, and keeps no T x T weights; and it rounds
    # scores less, for which it serves where nothing is learnt.
    later = torch.full((T, T), -math.inf, dtype=q.dtype).triu(1) if bias is None else bias
    rows, parts = max(1, 2 ** 21 // (nh * T * T)), []
    for some in zip((q * hs ** -0.5).split(rows), k.split(rows), (v / (1 - p)).split(rows), strict=True):
        weights = (some[0] @ some[1].transpose(2, 3) + later).softmax(dim=-1)  # (rows, nh, T, T)
        parts.append((weights * _kept(weights.shape, p, weights.dtype) if p else weights) @ some[2])
    return torch.cat(parts)


def make_norm(c):
    return nn.LayerNorm(c.n_embd, bias=c.bias) if c.norm == 'layernorm' else nn.RMSNorm(c.n_embd, eps=1e-5)


def rotated(x, turns):
    """x, (B, T, nh, hs), with channels i and i + hs/2 of each head, as a point of a plane, turned by the angle whose
    cosine and sine turns has, each (1 or B, T, 1, hs/2): products of two then depend on their distance [3]."""
    (a, b), (cos, sin) = x.chunk(2, dim=-1), turns
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1).to(x.dtype)


class CausalSelfAttention(nn.Module):
    """Every position attends to itself and those before it: (B, T, C) to (B, T, C).

    turns and mask: what GPT.surroundings() has of the positions. past, in generation: keys and values
    (B', S, n_kv_head, hs) to keep those of x in, `where` being their (sequence, position) indices, and n: None, or x is
    one new position a row, which sees of the first n kept those that the mask shows."""

    def __init__(self, config):
        super().__init__()
        self.n_head, self.n_kv_head, self.head_size = config.n_head, config.n_kv_head, config.head_size
        self.c_attn = nn.Linear(config.n_embd, (self.n_head + 2 * self.n_kv_head) * self.head_size, config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.dropout, self.qk_norm = config.dropout, config.qk_norm

    def forward(self, x, turns=None, mask=None, past=None):
        B, T, C = x.shape
        q_heads, kv_heads, n, grouped = self.n_head, self.n_kv_head, None, self.n_kv_head < self.n_head
        qk, v = self.c_attn(x).view(B, T, -1, self.head_size).split([q_heads + kv_heads, kv_heads], dim=2)
        if self.qk_norm:
            qk = F.rms_norm(qk, (self.head_size,), eps=1e-5)
        if turns is not None:
            qk = rotated(qk, turns)
        q, k = qk.split([q_heads, kv_heads], dim=2)  # (B, T, heads, hs)
        if past is not None:
            keys, values, where, n = past
            keys[where], values[where] = k[:, None].to(keys.dtype), v[:, None].to(keys.dtype)
            if n is not None:
                k, v = keys[:, :n], values[:, :n]
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))  # (B, heads, T, hs)
        mask = mask.to(k.dtype) if mask is not None and mask.is_floating_point() else mask
        if n is None:
            y = causal_attention(q, k, v, self.dropout if self.training else 0.0, mask, grouped)
        else:
            y = F.scaled_dot_product_attention(q.to(k.dtype), k, v, mask, enable_gqa=grouped).to(x.dtype)
        y = self.c_proj(y.transpose(1, 2).reshape(B, T, C))
        return dropout(y, self.dropout) if self.training else y


class MLP(nn.Module):
    """Each position for itself, through a wider layer: (B, T, C) to (B, T, C)."""

    def __init__(self, config):
        super().__init__()
        self.kind, self.gelu = config.mlp, config.gelu.replace('exact', 'none')  # as F.gelu names it
        gates = config.mlp_width if config.mlp == 'swiglu' else 0
        self.c_fc = nn.Linear(config.n_embd, gates + config.mlp_width, bias=config.bias)  # gates first
        self.c_proj = nn.Linear(config.mlp_width, config.n_embd, bias=config.bias)
        self.dropout = config.dropout

    def forward(self, x):
        y = self.c_fc(x)
        if self.kind == 'swiglu':
            gate, y = y.chunk(2, dim=-1)
            y = F.silu(gate) * y
        else:
            y = F.relu(y).square() if self.kind == 'relu2' else F.gelu(y, approximate=self.gelu)
        y = self.c_proj(y)
        return dropout(y, self.dropout) if self.training else y


class Block(nn.Module):
    """Attention and MLP, each on normalised input and added to the residual stream: (B, T, C) to (B, T, C)."""

    def __init__(self, config):
        super().__init__()
        self.ln_1 = make_norm(config)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = make_norm(config)
        self.mlp = MLP(config)

    def forward(self, x, turns=None, mask=None, past=None):
        x = x + self.attn(self.ln_1(x), turns, mask, past)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """The model of a GPTConfig: token ids to logits over the next token."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.checkpointing = False  # True: keep only what enters each block, and compute it again on the way back
        self.transformer = nn.ModuleDict({
            'wte': nn.Embedding(config.vocab_size, config.n_embd),
            'wpe': nn.Embedding(config.block_size, config.n_embd) if config.position == 'learned' else None,
            'h': nn.ModuleList(Block(config) for _ in range(config.n_layer)),
            'ln_f': make_norm(config),
        })
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tied:
            self.transformer.wte.weight = self.lm_head.weight
        self._init_weights()

    @torch.no_grad()
    def _init_weights(self):
        # Normal with deviation 0.02; each block adds two projections to the residual stream, so theirs are scaled by
        # 1/sqrt(2 n_layer) to keep its variance at depth ([1] section 2.3). Biases 0, norms 1.
        at_depth = 0.0 if self.config.zero_init else 0.02 / math.sqrt(2 * self.config.n_layer)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=at_depth if name.endswith('c_proj.weight') else 0.02)
            elif name.endswith('bias'):
                nn.init.zeros_(parameter)

    def forward(self, idx, targets=None, with_logits=True, positions=None, pasts=None):
        """idx: int64 (B, T), T <= block_size; targets: int64 (B, T), -1 where a position does not count, or None.

        Returns (logits, loss): with targets, logits (B, T, V) and the mean cross-entropy in nats; without, logits
        (B, 1, V) of the last position and None. with_logits=False with targets: (None, loss), in which not all logits
        need exist at once. positions and pasts, in generation: where idx stands, int64 (T,) or (B, T), and for each
        block the past of its attention. ValueError if T is 0 or, where positions are learned, above block_size."""
        T = idx.size(1)
        if not 0 < T <= self.config.longest:
            raise ValueError(f'a sequence of {T} tokens: this model takes 1 to {self.config.longest} (block_size)')
        if positions is None:
            positions = torch.arange(T, device=idx.device)
        x = self.residuals(idx, positions, pasts)  # (B, T, C)
        if targets is None:
            return self.logits(x[:, -1:]), None
        if not with_logits and (self.checkpointing or _on_cpu(x)):
            return None, self._loss_in_parts(x.flatten(0, 1), targets.flatten())
        logits = self.logits(x)  # (B, T, V)
        loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-1)
        return logits if with_logits else None, loss

    def residuals(self, idx, positions, pasts=None):
        """The residual stream (B, T, C) after the last norm; arguments as in forward()."""
        x = self.transformer.wte(idx)
        if self.transformer.wpe is not None:
            x = x + self.transformer.wpe(positions)
        if self.training:
            x = dropout(x, self.config.dropout)
        turns, mask = self.surroundings(positions, pasts[0][-1] if pasts else None)
        for block, past in zip(self.transformer.h, pasts or [None] * self.config.n_layer, strict=True):
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, turns, mask, use_reentrant=False)
            else:
                x = block(x, turns, mask, past)
        return self.transformer.ln_f(x)

    def surroundings(self, positions, n=None):
        """(turns, mask) for tokens at these positions, (T,) or, in generation, (B, 1): rope's cosines and sines, or
        None; and None where each sees those before it, else what the first n positions are to each: whether it sees
        them, (B, 1, 1, n), or alibi's bias of the scores, (1 or B, nh, T, n)."""
        c, turns, positions = self.config, None, positions.view(-1, positions.size(-1))  # (1 or B, T)
        if c.position == 'rope':
            periods = c.rope_theta ** (torch.arange(0, c.head_size, 2, device=positions.device) / c.head_size)
            angles = (positions[..., None] / periods)[..., None, :]  # (1 or B, T, 1, hs/2)
            turns = angles.cos(), angles.sin()
        if n is None and c.position != 'alibi':
            return turns, None
        others = torch.arange(n or positions.size(-1), device=positions.device)
        distances = (positions[..., None] - others)[:, None]  # (1 or B, 1, T, n)
        if c.position != 'alibi':
            return turns, distances >= 0
        slopes = 2 ** (-8 / c.n_head * torch.arange(1, c.n_head + 1, device=positions.device))[:, None, None]
        return turns, torch.where(distances < 0, -math.inf, -slopes * distances)

    def logits(self, x):
        """Logits (..., V) of the residual stream (..., C) after the last norm."""
        logits, cap = self.lm_head(x), self.config.logit_softcap
        return cap * torch.tanh(logits.float() / cap) if cap else logits

    def _loss_in_parts(self, x, targets):
        """Mean cross-entropy of x (N, C), of which only LOGITS_AT_ONCE exist at a time, here and on the way back.

        N = 4096, V = 50304, forward and backward on a CPU in bfloat16: 7.2 s, against 7.0 s and three times the memory
        at once, and 19 s of F.linear_cross_entropy (torch 2.13), whose loss is off by 1% (experiments/what_pays.py)."""
        def part(x, targets):
            return F.cross_entropy(self.logits(x).float(), targets, ignore_index=-1, reduction='sum')
        rows = max(1, LOGITS_AT_ONCE // self.config.vocab_size)
        if len(x) <= rows:
            total = part(x, targets)
        else:
            total = sum(checkpoint(part, *some, use_reentrant=False)
                        for some in zip(x.split(rows), targets.split(rows), strict=True))
        return total / (targets != -1).sum()

    def get_num_params(self, non_embedding=True):
        """Number of parameters. A tied matrix counts once; what is only looked up, position embeddings and untied token
        embeddings, only with non_embedding=False."""
        c, total = self.config, sum(parameter.numel() for parameter in self.parameters())
        looked_up = (c.position == 'learned') * c.block_size + (not c.tied) * c.vocab_size  # rows of n_embd
        return total - non_embedding * looked_up * c.n_embd

    def crop_block_size(self, block_size):
        """Sets the context to block_size positions, in place. ValueError if it is not 1 to `longest`."""
        if not 1 <= block_size <= self.config.longest:
            raise ValueError(f'block_size={block_size}: this model takes 1 to {self.config.block_size} positions')
        self.config.block_size = block_size
        if (wpe := self.transformer.wpe) is not None:
            wpe.weight = nn.Parameter(wpe.weight.detach()[:block_size].clone())  # a view would keep and save the whole
            wpe.num_embeddings = block_size

    # ---- published weights ----

    @classmethod
    def from_pretrained(cls, model_type, override_args=None, weights=True):
        """GPT with the weights of a published GPT-2, in float32.

        model_type: 'gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl', the Hugging Face hub id of any model of the same
        architecture ('distilgpt2'), or a directory written by save_pretrained. Only safetensors files are read.
        override_args: {'dropout': float} or None. weights=False: random ones in its shape, for which its config.json is
        enough. ValueError, in one sentence, for anything that can't be loaded."""
        overrides = dict(override_args or {})
        if set(overrides) - {'dropout'}:
            raise ValueError(f'only dropout may be overridden in a pretrained model, not {sorted(overrides)}')
        try:
            if not (os.path.isdir(model_type) or '/' in model_type or model_type in (*GPT2_NAMES, 'distilgpt2')):
                raise ValueError('it is no directory, and the hub writes its ids owner/name')
            from huggingface_hub.utils import logging
            from transformers import GPT2Config, GPT2LMHeadModel  # takes seconds, so not for a mistake in the name
            logging.set_verbosity_error()  # or its retries without a network would stand before our sentence
            described, _ = GPT2Config.get_config_dict(model_type)
            architecture = described.get('model_type') if isinstance(described, dict) else None
            if architecture != 'gpt2':
                raise ValueError(f"its architecture is {architecture!r}, not 'gpt2'")
            # No other entry is believed: some make transformers fetch and run code.
            source = GPT2Config(**{key: described[key] for key in HUGGING_FACE_KEYS if key in described})
            config = cls._config_from_hugging_face(source, overrides)
            if not weights:
                return cls(config)
            theirs, loading = GPT2LMHeadModel.from_pretrained(model_type, config=source, dtype=torch.float32,
                                                              use_safetensors=True, output_loading_info=True)
            if loading['missing_keys']:
                raise ValueError(f"its file lacks {len(loading['missing_keys'])} tensors of the model in its config")
        except Exception as error:  # what a broken file or a missing network raises has no class in common
            reason = str(error).strip().split('\n')[0]
            raise ValueError(f'{model_type} cannot be loaded as a GPT-2 ({reason}): give {", ".join(GPT2_NAMES)}, the '
                             'hub id of a model of that architecture, or a directory with config.json and '
                             'model.safetensors; offline, only directories and downloaded models work') from error
        model = cls(config)
        model._copy_from_hugging_face(theirs.state_dict())
        return model

    @staticmethod
    def _config_from_hugging_face(source, overrides):
        gelu = {'gelu_new': 'tanh', 'gelu_pytorch_tanh': 'tanh', 'gelu': 'exact'}.get(source.activation_function)
        unlike = [f'{name} is {value!r}' for name, value, fine in (
            ('activation_function', source.activation_function, gelu is not None),
            ('n_inner', source.n_inner, source.n_inner in (None, 4 * source.n_embd)),
            ('layer_norm_epsilon', source.layer_norm_epsilon, source.layer_norm_epsilon == 1e-5),
            ('scale_attn_weights', source.scale_attn_weights, source.scale_attn_weights),
            ('scale_attn_by_inverse_layer_idx', True, not source.scale_attn_by_inverse_layer_idx),
            ('tie_word_embeddings', False, source.tie_word_embeddings),
            ('n_layer', source.n_layer, source.n_layer in range(1, 1001)),
        ) if not fine]
        if unlike:
            raise ValueError(f"its config differs from GPT-2's: {', '.join(unlike)}")
        return GPTConfig(block_size=source.n_positions, vocab_size=source.vocab_size, n_layer=source.n_layer,
                         n_head=source.n_head, n_embd=source.n_embd, bias=True, gelu=gelu,
                         dropout=overrides.get('dropout', 0.0))

    @torch.no_grad()
    def _copy_from_hugging_face(self, weights):
        for name, parameter in self.named_parameters():
            weight = weights[name]
            if name.endswith(('c_attn.weight', 'c_proj.weight', 'c_fc.weight')):
                weight = weight.t()  # their Conv1D keeps (in, out), nn.Linear (out, in)
            parameter.copy_(weight)

    # ---- optimizer and arithmetic ----

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        """AdamW in which matrices and embeddings decay, biases and norms do not; fused where torch has the kernel."""
        parameters = [parameter for parameter in self.parameters() if parameter.requires_grad]
        groups = [{'params': [p for p in parameters if p.dim() >= 2], 'weight_decay': weight_decay},
                  {'params': [p for p in parameters if p.dim() < 2], 'weight_decay': 0.0}]
        return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=device_type in ('cpu', 'cuda', 'mps'))

    def flops_per_token(self):
        """Floating-point operations of a forward and backward pass per token: 6 N + 12 L nh hs T ([2] appendix B)."""
        c = self.config
        return 6 * self.get_num_params() + 12 * c.n_layer * c.n_embd * c.block_size

    def estimate_mfu(self, fwdbwd_per_iter, dt):
        """Model FLOPs utilisation ([2] appendix B): the share, 0 to 1, of its peak that this model's device reaches if
        it takes dt seconds for fwdbwd_per_iter sequences of block_size. None where the peak is unknown."""
        from plaingpt.planning.data_sheets import data_sheet
        device = self.lm_head.weight.device
        figures = data_sheet(torch.cuda.get_device_name(device)) if device.type == 'cuda' else None
        return figures and self.flops_per_token() * self.config.block_size * fwdbwd_per_iter / dt / figures[0]

    # ---- generation ----

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, **options):
        """Continues each row of idx, int64 (B, T), by max_new_tokens ids; returns int64 (B, T + new). The arguments are
        those of engine.stream(), which itself is for rows of different lengths. Fewer are added only when every row
        has met a stop token."""
        from plaingpt.inference.engine import stream
        new = stream(self, idx, max_new_tokens, temperature, top_k, **options)
        return torch.cat([idx.repeat_interleave(options.get('num_samples', 1), dim=0), *new], dim=1)
