"""
How much memory a training step takes on one device, by part.

Only tensors count, not the program itself: weights, optimizer state, gradients, activations. A step
holds the most at one of four moments, and each has a function here; activations.py says what a
block keeps. transformer_sizing.ipynb derives the figures and compares them with real steps, as
tests/planning/test_memory.py does, both on a CPU. On GPUs nothing has been measured.

In the comments: T positions, C channels (n_embd), nh heads.
"""
from dataclasses import dataclass

from model import LOGITS_AT_ONCE
from plaingpt.planning.activations import FLASH, WRITTEN_OUT, Activations
from plaingpt.planning.counts import parameters
from plaingpt.system.cpu_kernels import WEIGHTS_AT_ONCE

# Bytes of a large GPU that CUDA's context, workspaces and fragmentation take from a run.
RESERVED = 5e9

NORMS = 'activations: residual stream, norms'
ATTENTION = 'activations: attention'
MLP = 'activations: MLP'
ENDS = 'activations: embedding, last norm, head'


def usable(memory):
    """Bytes for the tensors of a run, on a GPU that has so many bytes of memory."""
    return memory - min(RESERVED, memory / 8)


def step_memory(config, batch_size, precision, device_type, accumulating=False,
                checkpointing=False, distributed=False, trainable=None, moments=2.0,
                float32_buffers=False):
    """Memory at the peak of a training step on one device, as {part: bytes}.

    config: the GPTConfig.
    batch_size: sequences of block_size tokens in a micro-batch.
    precision: 'float32', 'bfloat16' or 'float16'.
    device_type: 'cuda', 'mps' or 'cpu'.
    accumulating: whether earlier micro-batches have left gradients.
    checkpointing: train.py's activation_checkpointing.
    distributed: whether DDP averages the gradients.
    trainable: how many parameters are trained; None: all. Activations are counted as if all were,
        so they are an upper bound.
    moments: numbers of optimizer state for each of them, on average.
    float32_buffers: whether each bfloat16 product takes a float32 buffer of its own size; see
        hardware.has_float32_buffers()."""
    number = sum(parameters(config).values())
    if trainable is None:
        trainable = number
    activations = Activations(config, precision, device_type)
    step = _Step(activations, batch_size * config.block_size, accumulating, checkpointing,
                 distributed, trainable, float32_buffers)
    # Which moment is the peak depends on the shape. For most models it is the loss or the last
    # block; with many parameters and few tokens, or with checkpointing, it comes later.
    candidates = [step.at_the_loss(), step.in_the_last_block(), step.in_the_first_block(),
                  step.after_the_backward_pass()]
    peak = max(candidates, key=lambda parts: sum(parts.values()))
    always = {'weights': 4 * number, 'optimizer state': round(4 * moments * trainable)}
    return {**always, **peak}


def resident_memory(parts, program):
    """What a process on a CPU holds besides the tensors of step_memory(), as {part: bytes}.

    program: bytes that it held before the run. The rest are estimates: with them, the resident
    memory of seven different steps on Linux came out within 14% (docs/benchmarks.md)."""
    activations = sum(size for part, size in parts.items() if part.startswith('activations'))
    return {'Python and torch': program + 100e6,  # kernels and threads come with the first step
            'gaps left by malloc': 0.5 * activations}


@dataclass(frozen=True)
class _Step:
    """One training step. The methods named after moments return {part: bytes} of what exists then,
    without the weights and the optimizer state."""
    activations: Activations
    tokens: int          # in a micro-batch
    accumulating: bool
    checkpointing: bool
    distributed: bool
    trainable: int       # parameters that have gradients
    float32_buffers: bool

    @property
    def config(self):
        return self.activations.config

    # ---- moments ----

    def at_the_loss(self):
        """When the forward pass is over, and the logits have their gradient."""
        config = self.config
        C = config.n_embd
        block = self.block()
        if self.checkpointing:
            block = {NORMS: 4 * C}  # a block keeps only its input, in float32
        parts = {part: self.tokens * config.n_layer * size for part, size in block.items()}

        # The head keeps its input: 16-bit copies, or, where it works in parts, the float32 result
        # of the last norm.
        head_input = 4 * C if self.logits_in_parts() else self.activations.number_size * C
        last_norm = self.activations.norm()
        parts[ENDS] = self.embedding() + self.tokens * (last_norm + head_input)

        # In float32: the logits, their log-probabilities and the gradient; tanh keeps its result.
        logit_size = 16 if config.logit_softcap > 0 else 12
        parts['logits and their gradient'] = logit_size * self.logit_rows() * config.vocab_size

        # Autocast's copies of the weights, which the backward pass still needs. Checkpointing
        # makes them again in each block.
        copied = 0
        if self.activations.in_16_bits:
            copied = head_size(config) if self.checkpointing else multiplied_parameters(config)
        parts['weights in 16 bits'] = 2 * copied

        parts['gradients'] = self.gradients_before()
        if self.logits_in_parts():
            parts['gradients'] += self.head_gradient()  # each part adds to it
        return parts

    def in_the_last_block(self):
        """When the backward pass is in the last block: no other block has freed anything yet."""
        config = self.config
        parts = {}
        for part, size in self.block().items():
            blocks = 1 if self.checkpointing else config.n_layer
            parts[part] = self.tokens * blocks * size
        if self.checkpointing:
            parts[NORMS] += self.tokens * config.n_layer * 4 * config.n_embd  # the blocks' inputs
        parts[ENDS] = self.embedding()
        parts['gradients of activations'] = self.gradients_of_activations()

        copied = 0
        if self.activations.in_16_bits and not self.checkpointing:
            copied = multiplied_parameters(config) - head_size(config)  # the head's copy is gone
        parts['weights in 16 bits'] = 2 * copied
        parts['gradients'] = self.gradients_before() + self.head_gradient()
        return parts

    def in_the_first_block(self):
        """When the backward pass is in the first block: nearly all gradients exist."""
        parts = {part: self.tokens * size for part, size in self.block().items()}
        parts['gradients of activations'] = self.gradients_of_activations()
        parts['gradients'] = self.gradients_after()
        return parts

    def after_the_backward_pass(self):
        """When only the gradients are left."""
        gradients = self.gradients_after()
        if self.config.tied:
            # A tied matrix gets two gradients, as head and as embedding. In float32 their sum is a
            # third tensor.
            more = 1 if self.activations.in_16_bits else 2
            gradients += more * self.head_gradient()
        return {'gradients': gradients}

    # ---- activations and logits ----

    def block(self):
        """{part: bytes a token} that one block keeps."""
        return {NORMS: 2 * self.activations.norm(),
                ATTENTION: self.activations.attention(),
                MLP: self.activations.mlp()}

    def embedding(self):
        """Bytes that the embedding keeps, dropout's mask and ALiBi's bias."""
        kept = self.alibi_bias()
        if self.config.dropout > 0:
            # Autocast leaves the embedding in float32.
            mask_size = 4 if self.activations.device_type == 'cpu' else 1
            kept += mask_size * self.tokens * self.config.n_embd
        return kept

    def alibi_bias(self):
        """Bytes of the bias that ALiBi adds to the scores, nh x T x T numbers for all blocks."""
        config = self.config
        if config.position != 'alibi':
            return 0
        numbers = config.n_head * config.block_size * config.block_size
        kept = 4 * numbers
        if self.activations.in_16_bits and self.activations.attention_form != WRITTEN_OUT:
            # The kernel keeps a copy in 16 bits for each block whose activations exist.
            copies = 1 if self.checkpointing else config.n_layer
            kept += copies * 2 * numbers
        return kept

    def logit_rows(self):
        """For how many tokens the logits exist at a time; see GPT.loss_in_parts()."""
        on_cpu = self.activations.device_type == 'cpu'
        if not on_cpu and not self.checkpointing:
            return self.tokens
        at_once = max(1, LOGITS_AT_ONCE // self.config.vocab_size)
        return min(self.tokens, at_once)

    def logits_in_parts(self):
        return self.logit_rows() < self.tokens

    def gradients_of_activations(self):
        """Bytes of the gradients within a block, less the activations that are freed by then.

        Attention is done after the MLP; the larger of the two counts."""
        in_the_mlp = self.gradients_in_the_mlp()
        if self.activations.attention_form == FLASH:
            return in_the_mlp
        return max(in_the_mlp, self.gradients_in_attention())

    def gradients_in_the_mlp(self):
        """The incoming gradient, C numbers, and those around the MLP's activation function."""
        C = self.config.n_embd
        width = self.config.mlp_width
        size = self.activations.number_size
        # How many gradients as wide as the hidden layer there are, less what is freed meanwhile.
        hidden = {'gelu': 1, 'relu2': 3, 'swiglu': 2}[self.config.mlp]
        around_the_activation = size * (C + hidden * width)
        if not self.float32_buffers:
            return self.tokens * around_the_activation
        # The widest product: it makes the gradient of the hidden layer.
        in_the_product = size * (C + width) + 4 * width
        return self.tokens * max(around_the_activation, in_the_product)

    def gradients_in_attention(self):
        """The gradients of attention weights, where attention holds those."""
        config = self.config
        weights = self.tokens * config.n_head * config.block_size
        if self.activations.attention_form == WRITTEN_OUT:
            weights = min(weights, WEIGHTS_AT_ONCE)
        # Those of the weights and those of the scores; with dropout, the freed product of weights
        # and mask makes room for one of them.
        copies = 1 if config.dropout > 0 else 2
        gradients = copies * self.activations.attention_weight_size * weights
        incoming = self.tokens * self.activations.number_size * config.n_embd
        freed = self.tokens * self.activations.mlp()
        return gradients + incoming - freed

    # ---- gradients of the weights, in float32 ----

    def gradients_before(self):
        """Bytes of gradients that exist before the last backward pass of a step begins."""
        copies = 0
        if self.accumulating:
            copies += 1  # those of earlier micro-batches
        if self.distributed:
            copies += 1  # DDP's buckets
        return copies * 4 * self.trainable

    def gradients_after(self):
        """Bytes of gradients when that backward pass ends.

        DDP's buckets are the gradients, unless earlier micro-batches have made others."""
        copies = 2 if self.accumulating and self.distributed else 1
        return copies * 4 * self.trainable

    def head_gradient(self):
        """Bytes of the head's gradient, which is the first to exist."""
        return 4 * min(head_size(self.config), self.trainable)


def head_size(config):
    return config.vocab_size * config.n_embd


def multiplied_parameters(config):
    """Parameters of all linear layers, which autocast copies; the head is one of them."""
    parts = parameters(config)
    number = sum(parts.values()) - parts['position embedding'] - parts['layer norms']
    if not config.tied:
        number -= head_size(config)  # the token embedding, which is only looked up
    return number
