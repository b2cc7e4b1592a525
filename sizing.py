"""
How big and how long: the arithmetic of a GPT's parameters, FLOPs and memory, and what this machine does in what time,
which plan.py and the two notebooks share. The notebooks derive it, and hold it against measurements.

References:
[1] Chowdhery et al. 2022, PaLM, arXiv 2204.02311, appendix B: FLOPs per token and MFU
[2] Korthikanti et al. 2022, Reducing Activation Recomputation in Large Transformer Models, arXiv 2205.05198, section 4
"""

import math
import statistics
import time
from dataclasses import replace

import torch

from model import GPT, LOGITS_AT_ONCE
from optimization import Guard
from runtime import Process, compile_or_warn, precision, synchronize

# ---- parameters and FLOPs, by part ----

def parameters(config):
    """{part: number of parameters} of a GPT with this GPTConfig; the sum is GPT(config).get_num_params(False)."""
    c, C, bias = config, config.n_embd, int(config.bias)
    up = c.mlp_width * (2 if c.mlp == 'swiglu' else 1)
    return {
        'token embedding and head': c.vocab_size * C * (1 if c.tied else 2),
        'position embedding': (c.position == 'learned') * c.block_size * C,
        'attention: query, key, value': c.n_layer * (C + 2 * c.n_kv_head * c.head_size) * (C + bias),
        'attention: projection': c.n_layer * C * (C + bias),
        'MLP: up': c.n_layer * up * (C + bias),
        'MLP: down': c.n_layer * C * (c.mlp_width + bias),
        'layer norms': (2 * c.n_layer + 1) * C * (1 + (c.norm == 'layernorm') * bias),
    }


def flops(config, tokens=None):
    """{part: FLOPs} of the forward pass over one sequence of so many tokens (block_size unless told), a product of
    (n, m) and (m, k) being 2 n m k. All T x T scores count, as in [1]; what is no matrix product does not. The backward
    pass takes twice as many."""
    c, C, T = config, config.n_embd, tokens or config.block_size
    up = c.mlp_width * (2 if c.mlp == 'swiglu' else 1)
    return {
        'attention: query, key, value': c.n_layer * 2 * T * C * (C + 2 * c.n_kv_head * c.head_size),
        'attention: scores': c.n_layer * 2 * T * T * C,
        'attention: weighted sum': c.n_layer * 2 * T * T * C,
        'attention: projection': c.n_layer * 2 * T * C * C,
        'MLP: up': c.n_layer * 2 * T * C * up,
        'MLP: down': c.n_layer * 2 * T * C * c.mlp_width,
        'head': 2 * T * C * c.vocab_size,
    }


# ---- memory ----

RESERVED = 5e9  # bytes of a large GPU that the tensors of a run leave to CUDA's context, workspaces and fragments


def usable(memory):
    """Bytes for the tensors of a run on a GPU of so many: seven eighths, of a large one all but RESERVED."""
    return memory - min(RESERVED, memory / 8)


def memory(config, batch_size, precision, device_type, accumulating=False, checkpointing=False, distributed=False,
           trainable=None, moments=2.0):
    """{part: bytes} at the peak of a training step on one device, the sum being the peak, without the program itself.

    batch_size: sequences of block_size tokens in a micro-batch; precision: 'float32', 'bfloat16' or 'float16';
    accumulating: gradients are there already when a backward pass begins; checkpointing: train.py's
    activation_checkpointing; distributed: DDP has its buckets, which the gradients of the last micro-batch move into;
    trainable: how many parameters have gradients and optimizer state, None: all (activations are counted as if all had,
    which is a bound); moments: numbers of that state for each of them, on average.
    What is counted is what autograd keeps for the eager model, as [2] does for another one, on Metal unverified. The
    peak is at the loss or in the last block, or, with many parameters and few tokens or with checkpointing, at the end
    of the backward."""
    c, C, T, tokens = config, config.n_embd, config.block_size, batch_size * config.block_size
    size = 4 if precision == 'float32' else 2                # bytes of what a matrix product takes and gives
    on_cpu, drops, kv = device_type == 'cpu', c.dropout > 0, c.n_kv_head * c.head_size
    mask = drops * (size if on_cpu else 1) * C               # of a dropout of (B, T, C)
    alibi, grouped = c.position == 'alibi', c.n_kv_head < c.n_head
    written_out = on_cpu and (drops or (precision == 'bfloat16' and T <= 512))  # by model.py
    in_float32 = not on_cpu and grouped and (alibi or size == 4)  # torch has no kernel for it
    if written_out or in_float32:  # q, k and v of all heads; T x T weights, and with dropout its mask and the product
        wide = 4 if in_float32 else size
        attention = 3 * wide * C + wide * c.n_head * T * (3 if drops else 1)
    else:  # flash attention keeps what it gets, v as a view of q, k and v, and a logarithm for each row
        attention = size * (C + 2 * kv + (c.position == 'rope' or c.qk_norm) * (C + kv)) + 4 * c.n_head
    if c.qk_norm:  # its input, in float32, and a deviation for each head
        attention += 4 * ((C + kv) if size == 2 else (written_out or in_float32) * (C + 2 * kv))
        attention += 4 * (c.n_head + c.n_kv_head)
    norm = 4 * C + 8                                         # its input, in float32, mean and deviation
    if c.norm == 'rmsnorm':                                  # no mean; on a CPU its result before the weights, too
        norm = 4 * C * (1 + on_cpu) + 4
    inner = c.mlp_width * (4 if c.mlp == 'swiglu' else 2)    # a gate, its SiLU, what it is for and the product
    block = {'activations: residual stream, norms': 2 * norm, 'activations: attention': 2 * size * C + attention + mask,
             'activations: MLP': size * (C + inner) + mask}
    kept = {'activations: residual stream, norms': 4 * C} if checkpointing else block
    # On the way back through an MLP, what goes into and out of its activation, less what is not needed any more.
    passing = tokens * size * (C + c.mlp_width * {'gelu': 1, 'relu2': 3, 'swiglu': 2}[c.mlp])
    if written_out or in_float32:  # or through T x T weights, when the MLP is done with
        at_once = min(tokens * c.n_head * T, 2 ** 21 if written_out else math.inf)
        passing = max(passing, (1 if drops else 2) * wide * at_once + tokens * (size * C - block['activations: MLP']))
    biases = 4 + 2 * c.n_layer * (size == 2 and not written_out)  # bytes of ALiBi's, of which blocks have 16-bit copies
    embedded = drops * (4 if on_cpu else 1) * tokens * C + alibi * biases * c.n_head * T * T
    logits = min(tokens, max(1, LOGITS_AT_ONCE // c.vocab_size)) if on_cpu or checkpointing else tokens
    in_parts = logits < tokens
    number, head, parts = sum(parameters(c).values()), c.vocab_size * C, parameters(c)
    matrices = number - parts['position embedding'] - parts['layer norms'] - (not c.tied) * head
    trainable = number if trainable is None else trainable
    learnt = min(head, trainable)

    always = {'weights': 4 * number, 'optimizer state': round(4 * moments * trainable)}
    at_loss = {**{part: tokens * c.n_layer * bytes for part, bytes in kept.items()},
               'activations: embedding, last norm, head': embedded + tokens * (norm + (4 if in_parts else size) * C),
               'logits and their gradient': (16 if c.logit_softcap else 12) * logits * c.vocab_size,
               'weights in 16 bits': 2 * (head if checkpointing else matrices) if size == 2 else 0,
               'gradients': 4 * trainable * (accumulating + distributed) + 4 * learnt * in_parts}
    at_last_block = {**{part: tokens * (c.n_layer * kept.get(part, 0) + checkpointing * block[part]) for part in block},
                     'activations: embedding, last norm, head': embedded,
                     'gradients of activations': passing,
                     'weights in 16 bits': 2 * (matrices - head) * (size == 2 and not checkpointing),
                     'gradients': 4 * trainable * (accumulating + distributed) + 4 * learnt}
    gradients = 4 * trainable * (2 if accumulating and distributed else 1)
    at_first_block = {**{part: tokens * bytes for part, bytes in block.items()},
                      'gradients of activations': passing, 'gradients': gradients}
    at_end = {'gradients': gradients + c.tied * 4 * learnt * (2 if size == 4 else 1)}  # a tied matrix: one for each use
    return always | max(at_loss, at_last_block, at_first_block, at_end, key=lambda parts: sum(parts.values()))


# ---- what this machine does ----

def measured_peak(device, dtype):
    """FLOP/s of the fastest of some products of two square matrices of this torch.dtype on a torch.device."""
    n = 8192 if device.type == 'cuda' else 2048
    a, b = torch.randn(2, n, n, device=device).to(dtype)
    return 2 * n ** 3 / min(_seconds(lambda: a @ b, device))


def measured_bandwidth(device):
    """Bytes/s that the fastest of some copies of an array too large for any cache reads and writes on a device."""
    source = torch.ones(2 ** 28 if device.type == 'cuda' else 2 ** 26, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / min(_seconds(lambda: target.copy_(source), device))


def _seconds(work, device, least=3, enough=0.5):
    """Seconds of each repetition of work(), after one that does not count: at least so many, until enough seconds."""
    times = []
    work()
    while len(times) < least or sum(times) < enough:
        synchronize(device)
        start = time.perf_counter()
        work()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return times


def measured_step(config, batch_size, device, dtype, compiled, checkpointing, optimizer_of=None):
    """(seconds, seconds): a micro-batch forward and backward, and the update of the weights, of random tokens on a
    device, as train.py does them. optimizer_of: a function from a GPT to its optimizer; None: AdamW.

    As much is computed as takes some seconds and little memory: of a large model some sequences, at two depths, from
    which follows what a block takes and what the rest."""
    depth = min(config.n_layer, max(2, 2 * 10 ** 8 // (12 * config.n_embd ** 2)))
    _, autocast, scaler = precision(device, dtype, config.n_embd)

    def of_depth(n_layer):
        gpt = GPT(replace(config, n_layer=n_layer)).to(device)
        gpt.checkpointing = checkpointing
        return gpt

    def micro_batch(gpt, rows):
        tokens = torch.randint(config.vocab_size, (rows, config.block_size), device=device)
        with autocast():
            loss = gpt(tokens, tokens, with_logits=False)[1]
        scaler.scale(loss).backward()

    def timed(gpt, rows):
        if compiled:
            compile_or_warn(gpt, lambda: micro_batch(gpt, rows))
        return statistics.median(_seconds(lambda: micro_batch(gpt, rows), device, enough=3)) * batch_size / rows

    deep = of_depth(depth)
    rows = int(2 / min(_seconds(lambda: micro_batch(deep, 1), device, least=1, enough=0)))
    rows = max(1, min(batch_size, rows))
    seconds = timed(deep, rows)
    optimizer = optimizer_of(deep) if optimizer_of else deep.configure_optimizers(0.1, 0.0, (0.9, 0.95), device.type)
    guard = Guard(Process(device), optimizer, scaler)

    def update():
        scaler.unscale_(optimizer)
        guard.step(1, torch.ones((), device=device), torch.nn.utils.clip_grad_norm_(deep.parameters(), 1.0))

    share = sum(parameters(deep.config).values()) / sum(parameters(config).values())
    update_seconds = statistics.median(_seconds(update, device)) / share
    if depth < config.n_layer:
        block = (seconds - timed(of_depth(1), rows)) / (depth - 1)
        seconds += (config.n_layer - depth) * block
    return seconds, update_seconds
