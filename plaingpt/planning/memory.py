"""
How big and how long: the arithmetic of a GPT's parameters, FLOPs and memory, and what this machine does in what time,
which plan.py and the two notebooks share. The notebooks derive it, and hold it against measurements.

References:
[1] Chowdhery et al. 2022, PaLM, arXiv 2204.02311, appendix B: FLOPs per token and MFU
[2] Korthikanti et al. 2022, Reducing Activation Recomputation in Large Transformer Models, arXiv 2205.05198, section 4
"""
import math

from model import LOGITS_AT_ONCE
from plaingpt.planning.counts import parameters

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
