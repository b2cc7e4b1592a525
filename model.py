"""
A GPT in one file: configuration, attention, blocks, loss, optimizer groups, text generation.

The defaults are GPT-2 [1]. Everything newer is an option of GPTConfig that is off by default, so a
reader of GPT-2 can skip each line that asks for one. docs/modern.md measures what each is worth.

This file needs torch alone: copied into an empty folder, it trains and generates. Beside plaingpt/
it also loads published weights, generates with a key-value cache, and knows the peak speed of GPUs.

Shapes: B batch, T time (positions), C channels (n_embd), V vocabulary, nh heads of queries, nkv
heads of keys and values, hs head size.

References:
[1] Radford et al. 2019, Language Models are Unsupervised Multitask Learners (GPT-2)
[2] Chowdhery et al. 2022, PaLM, arXiv 2204.02311, appendix B: FLOPs per token and MFU
[3] Su et al. 2021, RoFormer, arXiv 2104.09864, equation 34 (rope)
[4] Press et al. 2021, ALiBi, arXiv 2108.12409
[5] Zhang and Sennrich 2019, RMSNorm, arXiv 1910.07467
[6] So et al. 2021, Primer, arXiv 2109.08668 (squared ReLU)
[7] Shazeer 2020, GLU Variants Improve Transformer, arXiv 2002.05202 (SwiGLU)
[8] Henry et al. 2020, Query-Key Normalization for Transformers, arXiv 2010.04245
[9] Ainslie et al. 2023, GQA, arXiv 2305.13245 (grouped-query attention)
[10] Gemma Team 2024, Gemma 2, arXiv 2408.00118, section 2 (soft-capped logits)
[11] Grattafiori et al. 2024, The Llama 3 Herd of Models, arXiv 2407.21783 (scaled rope)
"""
import importlib.util
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

LOGITS_AT_ONCE = 2 ** 26  # logits that exist at a time where the loss is computed in parts
ROPE_SCALING = ('factor', 'low_freq_factor', 'high_freq_factor', 'original_context')


@dataclass
class GPTConfig:
    """Architecture of a GPT. ValueError, with all problems in one sentence, if a field is wrong."""
    block_size: int = 1024   # longest sequence, in tokens
    vocab_size: int = 50304  # GPT-2's 50257, padded to a multiple of 64 for the matrix units
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True        # in linear layers and layer norms, as GPT-2 has it
    gelu: str = 'tanh'       # 'tanh': the form of GPT-2's weights; 'exact' (erf): that of nanoGPT's
    # Options that GPT-2 does not have
    position: str = 'learned'      # 'learned', 'rope' [3], 'alibi' [4] or 'none'
    rope_theta: float = 10000.0    # the slowest pair of channels turns once in 2 pi theta positions
    rope_scaling: dict | None = None  # Llama 3's: slower turns for a longer context; rope_stretch()
    norm: str = 'layernorm'        # 'layernorm' or 'rmsnorm' [5], which has no bias
    norm_eps: float = 1e-5         # what norms add to the variance, or to the mean square
    mlp: str = 'gelu'              # 'gelu', 'relu2' [6] or 'swiglu' [7]
    mlp_width: int | None = None   # hidden channels; None: 4 C, and about 8/3 C for SwiGLU [7]
    qk_norm: bool = False          # scales each query and key to a root mean square of 1 [8]
    qk_norm_weight: bool = False   # with learned weights after it, as Qwen3 has them
    qkv_bias: bool = False         # biases of queries, keys and values alone, as Qwen2 has them
    head_size: int | None = None   # channels of a head; None: n_embd / n_head
    n_kv_head: int | None = None   # heads of keys and values, shared by queries [9]; None: n_head
    logit_softcap: float = 0.0     # bounds logits: cap * tanh(logits / cap) [10]; 0: no bound
    tied: bool = True              # one matrix is both token embedding and head
    zero_init: bool = False        # residual projections start at 0, each block as the identity

    def __post_init__(self):
        """Fills in the sizes that are None, and checks all fields."""
        problems = []

        def check(condition, message):
            if not condition:
                problems.append(message)

        def check_sizes(*names):
            for name in names:
                size = getattr(self, name)
                check(1 <= size < 2 ** 31, f'{name}={size} must be at least 1 and below 2**31')

        def check_choice(name, *choices):
            choice = getattr(self, name)
            check(choice in choices, f'{name}={choice!r} must be {" or ".join(map(repr, choices))}')

        check_sizes('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd')
        if not problems:  # the rules below divide by these sizes
            self.fill_in_sizes(check)
            check_sizes('n_kv_head', 'head_size', 'mlp_width')
        if not problems:
            check(self.n_head % self.n_kv_head == 0,
                  f'n_head={self.n_head} must be a multiple of n_kv_head={self.n_kv_head}')
            check(self.position != 'rope' or self.head_size % 2 == 0,
                  f"position='rope' turns pairs of channels, but a head has {self.head_size}")
        check(0 <= self.dropout < 1, f'dropout={self.dropout} must be at least 0 and below 1')
        check(0 < self.rope_theta <= 1e30, f'rope_theta={self.rope_theta} must be in (0, 1e30]')
        check(0 <= self.norm_eps <= 1, f'norm_eps={self.norm_eps} must be in [0, 1]')
        check(self.qk_norm or not self.qk_norm_weight, 'qk_norm_weight=True needs qk_norm=True')
        check(self.rope_scaling is None or set(self.rope_scaling) == set(ROPE_SCALING),
              f'rope_scaling={self.rope_scaling} must have the keys {", ".join(ROPE_SCALING)}')
        check(0 <= self.logit_softcap <= 1e30,
              f'logit_softcap={self.logit_softcap} must be in [0, 1e30]')
        check_choice('gelu', 'tanh', 'exact')
        check_choice('position', 'learned', 'rope', 'alibi', 'none')
        check_choice('norm', 'layernorm', 'rmsnorm')
        check_choice('mlp', 'gelu', 'relu2', 'swiglu')
        if problems:
            raise ValueError('; '.join(problems))

    def fill_in_sizes(self, check):
        if self.n_kv_head is None:
            self.n_kv_head = self.n_head
        if self.head_size is None:
            check(self.n_embd % self.n_head == 0,
                  f'n_embd={self.n_embd} must be a multiple of n_head={self.n_head}')
            self.head_size = self.n_embd // self.n_head
        if self.mlp_width is None:
            self.mlp_width = 4 * self.n_embd
            if self.mlp == 'swiglu':  # which has a third matrix
                self.mlp_width = round_up(8 * self.n_embd / 3, 64)

    @property
    def longest(self):
        """Most tokens the model can read at once: only a table of learned positions has an end."""
        if self.position == 'learned':
            return self.block_size
        return math.inf


def round_up(number, multiple):
    """The smallest multiple of `multiple` that is not below number."""
    return math.ceil(number / multiple) * multiple


# ---- the seam for hardware ----

class Kernels:
    """Operations that some hardware can compute faster; these are torch's own.

    GPT.use_kernels() replaces them: place(), in plaingpt/system/devices.py, chooses CpuKernels on a
    CPU and CudaKernels on a GPU. In decoding, the cache computes attention."""
    prefers_loss_in_parts = False  # whether to compute the loss without ever holding all logits

    def linear(self, x, weight, bias):
        """x (…, in) times the transposed weight (out, in), plus the bias (out,) if there is one."""
        return F.linear(x, weight, bias)

    def dropout(self, x, p):
        """Sets each element of x to 0 with probability p, and scales the others by 1 / (1 - p)."""
        return F.dropout(x, p)

    def causal_attention(self, q, k, v, p, bias=None, grouped=False):
        """Attention of each position to itself and the earlier ones, with dropout p of its weights.

        q and the result: (B, nh, T, hs); k and v: (B, nkv, T, hs), where nkv < nh if grouped.
        bias: added to the scores, (1, nh, T, T), -inf for positions that lie ahead; or None."""
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=p,
                                              is_causal=bias is None, enable_gqa=grouped)


class Linear(nn.Linear):
    """A linear layer, by the kernels of the device."""
    kernels = Kernels()

    def forward(self, x):
        return self.kernels.linear(x, self.weight, self.bias)


class Dropout(nn.Module):
    """Dropout in training, by the kernels of the device."""
    kernels = Kernels()

    def __init__(self, p):
        super().__init__()
        self.p = p

    def forward(self, x):
        if self.training and self.p > 0:
            return self.kernels.dropout(x, self.p)
        return x


# ---- positions ----

def rope_angles(config, positions):
    """(cosines, sines) by which rope [3] turns pairs of channels, each (1 or B, T, 1, hs/2).

    positions: int64 (1 or B, T)."""
    channels = torch.arange(0, config.head_size, 2, device=positions.device)
    periods = config.rope_theta ** (channels / config.head_size)  # (hs/2,)
    if config.rope_scaling is not None:
        periods = periods * rope_stretch(periods, **config.rope_scaling)
    angles = positions[..., None] / periods  # (1 or B, T, hs/2)
    angles = angles[..., None, :]  # the same for all heads
    return angles.cos(), angles.sin()


def rope_stretch(periods, factor, low_freq_factor, high_freq_factor, original_context):
    """By how much Llama 3 [11] slows each pair of channels down, (hs/2,).

    Pairs that turn often within the original context keep their pace, those that do not finish a
    turn are slowed down by the factor, and those between by something between."""
    turns = original_context / (2 * math.pi * periods)
    kept = ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0, 1)
    return 1 / (kept + (1 - kept) / factor)


def rotate(x, angles):
    """Rotates channels i and i + hs/2 of each head of x, (B, T, heads, hs), as a point in a plane.

    Afterwards the product of a query and a key depends on the distance of their positions [3]."""
    cos, sin = angles
    a, b = x.chunk(2, dim=-1)
    turned = torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)
    return turned.to(x.dtype)


def alibi_bias(config, positions, visible):
    """ALiBi's [4] bias of the scores, (1 or B, nh, T, visible): minus distance times a slope.

    Each head has its own slope. Later positions get -inf, so it is the causal mask as well."""
    distances = positions[..., None] - torch.arange(visible, device=positions.device)
    distances = distances[:, None]  # (1 or B, 1, T, visible)
    heads = torch.arange(1, config.n_head + 1, device=positions.device)
    slopes = 2 ** (-8 / config.n_head * heads)
    return torch.where(distances < 0, -math.inf, -slopes[:, None, None] * distances)


# ---- blocks ----

def rms_norm(x, eps, weight=None):
    """RMSNorm [5] over the channels of x, (…, C) to (…, C), in the precision of x."""
    if weight is not None:
        weight = weight.to(x.dtype)  # torch's fast kernel wants one precision for both
    y = F.rms_norm(x, x.shape[-1:], weight, eps)
    return y.to(x.dtype)  # on CUDA, autocast returns float32 from torch 2.13 on


class RMSNorm(nn.RMSNorm):
    def forward(self, x):
        return rms_norm(x, self.eps, self.weight)


def make_norm(config):
    if config.norm == 'rmsnorm':
        return RMSNorm(config.n_embd, eps=config.norm_eps)
    return nn.LayerNorm(config.n_embd, eps=config.norm_eps, bias=config.bias)


class CausalSelfAttention(nn.Module):
    """Each position attends to itself and to the positions before it: (B, T, C) to (B, T, C)."""
    kernels = Kernels()

    def __init__(self, config):
        super().__init__()
        self.config = config
        # One matrix makes the queries, keys and values of all heads, in this order.
        # With grouped heads, such as n_head = 4 and n_kv_head = 2, its output holds
        #     q0 q1 q2 q3  k0 k1  v0 v1
        # where q0 and q1 attend to k0 and v0, and q2 and q3 to k1 and v1.
        heads = config.n_head + 2 * config.n_kv_head
        has_bias = config.bias or config.qkv_bias
        self.c_attn = Linear(config.n_embd, heads * config.head_size, bias=has_bias)
        self.c_proj = Linear(config.n_head * config.head_size, config.n_embd, bias=config.bias)
        self.resid_dropout = Dropout(config.dropout)
        if config.qk_norm_weight:
            self.q_scale = nn.Parameter(torch.ones(config.head_size))
            self.k_scale = nn.Parameter(torch.ones(config.head_size))

    def forward(self, x, angles=None, mask=None, cache=None):
        """angles: rope's, or None. mask: ALiBi's bias, or None.

        cache: in generation, the keys and values of this block; see plaingpt/inference/cache.py."""
        y = self.attend(self.c_attn(x), angles, mask, cache)
        return self.resid_dropout(self.c_proj(y))

    def attend(self, qkv, angles, mask, cache):
        """Attention alone, (B, T, (nh + 2 nkv) hs) to (B, T, nh hs); arguments as in forward()."""
        B, T, _ = qkv.shape
        nh = self.config.n_head
        nkv = self.config.n_kv_head

        # Queries and keys stay together until both are normalised and turned, in one pass each.
        qkv = qkv.view(B, T, nh + 2 * nkv, self.config.head_size)
        qk, v = qkv.split([nh + nkv, nkv], dim=2)
        if self.config.qk_norm:
            qk = rms_norm(qk, self.config.norm_eps)
        if self.config.qk_norm_weight:
            scales = torch.cat([self.q_scale.expand(nh, -1), self.k_scale.expand(nkv, -1)])
            qk = qk * scales.to(qk.dtype)
        if angles is not None:
            qk = rotate(qk, angles)
        q, k = qk.split([nh, nkv], dim=2)  # (B, T, nh, hs), (B, T, nkv, hs)

        # In decoding, the cache returns the keys and values of all positions so far.
        decoding = cache is not None and cache.decoding
        if cache is not None:
            k, v = cache.update(k, v)

        # Each head attends by itself, so heads come before positions.
        q = q.transpose(1, 2)  # (B, nh, T, hs)
        k = k.transpose(1, 2)  # (B, nkv, positions, hs)
        v = v.transpose(1, 2)  # (B, nkv, positions, hs)
        if decoding:
            y = cache.attention(q, k, v).to(qkv.dtype)  # the cache may be more precise
        else:
            if mask is not None:
                mask = mask.to(k.dtype)
            p = self.config.dropout if self.training else 0.0  # of the attention weights
            y = self.kernels.causal_attention(q, k, v, p, mask, nkv < nh)  # (B, nh, T, hs)

        # Put the heads side by side again.
        return y.transpose(1, 2).flatten(2)  # (B, T, nh hs)


class MLP(nn.Module):
    """A wider hidden layer, at each position by itself: (B, T, C) to (B, T, C)."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        width = config.mlp_width
        if config.mlp == 'swiglu':
            width = 2 * width  # one matrix makes the gates, then the values
        self.c_fc = Linear(config.n_embd, width, bias=config.bias)
        self.c_proj = Linear(config.mlp_width, config.n_embd, bias=config.bias)
        self.dropout = Dropout(config.dropout)

    def forward(self, x):
        y = self.c_fc(x)  # (B, T, width), for SwiGLU (B, T, 2 width)
        if self.config.mlp == 'swiglu':
            gate, y = y.chunk(2, dim=-1)
            y = F.silu(gate) * y  # (B, T, width)
        elif self.config.mlp == 'relu2':
            y = F.relu(y).square()
        else:
            y = F.gelu(y, approximate='tanh' if self.config.gelu == 'tanh' else 'none')
        return self.dropout(self.c_proj(y))


class Block(nn.Module):
    """Attention, then an MLP, each added to the residual stream: (B, T, C) to (B, T, C)."""

    def __init__(self, config):
        super().__init__()
        self.ln_1 = make_norm(config)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = make_norm(config)
        self.mlp = MLP(config)

    def forward(self, x, angles=None, mask=None, cache=None):
        # Norms come before the layers, so that the residual stream itself is never normalised [1].
        x = x + self.attn(self.ln_1(x), angles, mask, cache)
        x = x + self.mlp(self.ln_2(x))
        return x


class GPT(nn.Module):
    """The model of a GPTConfig: from token ids to logits of the next token."""
    kernels = Kernels()

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.checkpointing = False  # True: keep only each block's input, and recompute the rest
        self.residual_dtype = None  # torch.bfloat16 keeps the residual stream in it; None: as it is
        has_table = config.position == 'learned'  # a vector for each position
        # The names are those of GPT-2's published weights.
        self.transformer = nn.ModuleDict({
            'wte': nn.Embedding(config.vocab_size, config.n_embd),  # tokens
            'wpe': nn.Embedding(config.block_size, config.n_embd) if has_table else None,
            'h': nn.ModuleList(Block(config) for _ in range(config.n_layer)),
            'ln_f': make_norm(config),  # the last norm, before the head
        })
        self.embedding_dropout = Dropout(config.dropout)
        self.lm_head = Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tied:
            self.transformer.wte.weight = self.lm_head.weight
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """Draws all matrices with standard deviation 0.02, and sets biases to 0.

        Each block adds two projections to the residual stream. Theirs are scaled down by
        sqrt(2 n_layer), so that its variance does not grow with depth ([1] section 2.3)."""
        projection_std = 0.02 / math.sqrt(2 * self.config.n_layer)
        for name, parameter in self.named_parameters():
            if name.endswith('c_proj.weight'):
                nn.init.normal_(parameter, std=0 if self.config.zero_init else projection_std)
            elif parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)
            elif name.endswith('bias'):
                nn.init.zeros_(parameter)

    def use_kernels(self, kernels):
        """Makes all modules use these Kernels; returns the model."""
        for module in self.modules():
            if hasattr(module, 'kernels'):
                module.kernels = kernels
        return self

    def forward(self, idx, targets=None, with_logits=True, positions=None, caches=None):
        """Logits and, with targets, the loss: the mean cross-entropy in nats.

        idx: int64 (B, T), T <= block_size where positions are learned.
        targets: int64 (B, T), -1 where a position does not count; or None.
        with_logits: False, with targets, returns (None, loss) and may use less memory.
        positions: int64 (T,) or (B, T), where the tokens stand; None: from 0 on.
        caches: in generation, one cache a block.

        Returns (logits, loss): logits (B, T, V); without targets those of the last position alone,
        (B, 1, V), and loss None. ValueError for a sequence that is empty or too long."""
        self.check_length(idx.size(1))
        if positions is None:
            positions = torch.arange(idx.size(1), device=idx.device)
        x = self.residuals(idx, positions, caches)  # (B, T, C)

        # In generation only the next token matters.
        if targets is None:
            return self.logits(x[:, -1:]), None

        # All logits at once are (B, T, V): for GPT-2 often the largest tensor of a step.
        in_parts = self.checkpointing or self.kernels.prefers_loss_in_parts
        if in_parts and not with_logits:
            return None, self.loss_in_parts(x.flatten(0, 1), targets.flatten())
        logits = self.logits(x)
        loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-1)
        return (logits if with_logits else None), loss

    def check_length(self, tokens):
        """ValueError unless the model can read a sequence of this length."""
        if tokens < 1:
            raise ValueError('the sequence is empty: this model needs at least one token')
        if tokens > self.config.longest:
            raise ValueError(f'a sequence of {tokens} tokens is too long: this model takes at most '
                             f'{self.config.longest} (block_size)')

    def residuals(self, idx, positions, caches=None):
        """The residual stream (B, T, C) after the last norm; arguments as in forward()."""
        x = self.transformer.wte(idx)  # (B, T, C)
        if self.transformer.wpe is not None:
            x = x + self.transformer.wpe(positions)
        x = self.embedding_dropout(x)
        if self.residual_dtype is not None:
            x = x.to(self.residual_dtype)

        # What all blocks share: rope's angles, or ALiBi's bias.
        angles = None
        mask = None
        positions = positions.view(-1, positions.size(-1))  # (1 or B, T)
        decoding = caches is not None and caches[0].decoding
        if self.config.position == 'rope':
            angles = rope_angles(self.config, positions)
        if self.config.position == 'alibi' and not decoding:
            mask = alibi_bias(self.config, positions, positions.size(-1))

        # Through the blocks; with checkpointing, what happens inside is computed again later.
        for i, block in enumerate(self.transformer.h):
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, angles, mask, use_reentrant=False)
            else:
                x = block(x, angles, mask, None if caches is None else caches[i])
        return self.transformer.ln_f(x)

    def logits(self, x):
        """Logits (..., V) of the residual stream (..., C) after the last norm."""
        logits = self.lm_head(x)
        cap = self.config.logit_softcap
        if cap > 0:
            logits = cap * torch.tanh(logits.float() / cap)
        return logits

    def loss_in_parts(self, x, targets):
        """Mean cross-entropy of x (N, C) and targets (N,), LOGITS_AT_ONCE logits at a time.

        The backward pass computes each part of the logits again: a third more work for a fraction
        of the memory. torch 2.13's F.linear_cross_entropy is off by 1% in bfloat16."""
        def summed_loss(x, targets):
            logits = self.logits(x).float()
            return F.cross_entropy(logits, targets, ignore_index=-1, reduction='sum')

        counted = (targets != -1).sum()
        rows = max(1, LOGITS_AT_ONCE // self.config.vocab_size)
        if len(x) <= rows:
            return summed_loss(x, targets) / counted  # one part, which needs no recomputing
        total = 0
        for x_part, targets_part in zip(x.split(rows), targets.split(rows), strict=True):
            total = total + checkpoint(summed_loss, x_part, targets_part, use_reentrant=False)
        return total / counted

    # ---- size and context ----

    def get_num_params(self, non_embedding=True):
        """Number of parameters; a tied matrix counts once.

        Tables that are only looked up, position embeddings and an untied token embedding, cost no
        arithmetic: they count only with non_embedding=False."""
        total = sum(parameter.numel() for parameter in self.parameters())
        if non_embedding and self.transformer.wpe is not None:
            total -= self.transformer.wpe.weight.numel()
        if non_embedding and not self.config.tied:
            total -= self.transformer.wte.weight.numel()
        return total

    def crop_block_size(self, block_size):
        """Sets the context to block_size positions, in place.

        Learned positions can only shrink; other models may grow too. ValueError otherwise."""
        if not 1 <= block_size <= self.config.longest:
            raise ValueError(f'block_size={block_size}: this model takes at most '
                             f'{self.config.block_size} positions, and at least 1')
        self.config.block_size = block_size
        wpe = self.transformer.wpe
        if wpe is not None:
            # A copy: a view would keep the whole table in memory and in each checkpoint.
            wpe.weight = nn.Parameter(wpe.weight.detach()[:block_size].clone())
            wpe.num_embeddings = block_size

    # ---- optimizer and speed ----

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        """AdamW that decays matrices and embeddings, but not biases and norms."""
        # Frozen parameters need no optimizer state.
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        matrices = [parameter for parameter in trained if parameter.dim() >= 2]
        vectors = [parameter for parameter in trained if parameter.dim() < 2]
        groups = [
            {'params': matrices, 'weight_decay': weight_decay},
            {'params': vectors, 'weight_decay': 0.0},
        ]
        fused = device_type in ('cpu', 'cuda', 'mps')  # one kernel updates all parameters
        return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=fused)

    def flops_per_token(self):
        """FLOPs a token, forward and backward: 6 N + 12 L nh hs T ([2] appendix B)."""
        width = self.config.n_layer * self.config.n_head * self.config.head_size
        return 6 * self.get_num_params() + 12 * width * self.config.block_size

    def estimate_mfu(self, fwdbwd_per_iter, dt):
        """Model FLOPs utilisation ([2] appendix B): the share, 0 to 1, of the GPU's peak in use.

        dt: seconds that fwdbwd_per_iter sequences of block_size tokens take, forward and backward.
        None if the peak of the device is unknown."""
        device = self.lm_head.weight.device
        if device.type != 'cuda' or not has_package():
            return None
        from plaingpt.planning.data_sheets import data_sheet
        sheet = data_sheet(torch.cuda.get_device_name(device))
        if sheet is None:
            return None
        return self.flops_per_token() * self.config.block_size * fwdbwd_per_iter / dt / sheet.flops

    # ---- published weights and text ----

    @classmethod
    def from_pretrained(cls, model_type, override_args=None):
        """GPT in float32 with published weights.

        model_type: 'gpt2' to 'gpt2-xl', or a hub id, a folder or a .gguf file as in docs/models.md.
        override_args: {'dropout': float} or None. ValueError if they can't be loaded."""
        from plaingpt.formats.foreign_models import load_foreign
        return load_foreign(model_type, override_args)

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, **options):
        """Continues each row of idx, int64 (B, T), by max_new_tokens ids; int64 (B, T + new).

        temperature: 0 takes the likeliest token, 1 samples from the model's distribution.
        top_k: samples from the k likeliest tokens only; None or 0: from all.
        options: those of plaingpt.inference.engine.stream(), which has a key-value cache. Without
            the folder plaingpt/ there are none, and a plain loop generates."""
        if has_package():
            from plaingpt.inference.engine import stream
            new = stream(self, idx, max_new_tokens, temperature, top_k, **options)
            prompts = idx.repeat_interleave(options.get('num_samples', 1), dim=0)
            return torch.cat([prompts, *new], dim=1)
        if options:
            raise ValueError(f'{", ".join(options)}: these options need the folder plaingpt/')
        for _ in range(max_new_tokens):
            # The model reads at most the last block_size tokens, and predicts the next one.
            logits, _ = self(idx[:, -self.config.block_size:])
            next_tokens = sample_next(logits[:, -1].float(), temperature, top_k)
            idx = torch.cat([idx, next_tokens], dim=1)
        return idx


def sample_next(logits, temperature, top_k):
    """One id for each row of logits (B, V), int64 (B, 1)."""
    if temperature < 1e-6:  # dividing by less would overflow
        return logits.argmax(dim=-1, keepdim=True)
    logits = logits / temperature
    if top_k:
        logits, candidates = logits.topk(min(top_k, logits.size(-1)))
        chosen = torch.multinomial(F.softmax(logits, dim=-1), num_samples=1)
        return candidates.gather(1, chosen)
    return torch.multinomial(F.softmax(logits, dim=-1), num_samples=1)


def has_package():
    """Whether the folder plaingpt/ is importable, or this file stands alone."""
    return importlib.util.find_spec('plaingpt') is not None
