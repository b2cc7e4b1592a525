"""
What one device holds at the moments of a training step at which its memory can be at its peak,
besides the weights and the optimizer state; activations.py says what a block keeps.

In the comments: T positions, C channels (n_embd), V vocabulary, nh heads.
"""
from dataclasses import dataclass

from model import LOGITS_AT_ONCE
from plaingpt.planning.activations import FLASH, WRITTEN_OUT, Activations
from plaingpt.planning.counts import head_size, multiplied_parameters
from plaingpt.system.cpu_kernels import WEIGHTS_AT_ONCE

NORMS = 'activations: residual stream, norms'
ATTENTION = 'activations: attention'
MLP = 'activations: MLP'
ENDS = 'activations: embedding, last norm, head'


@dataclass(frozen=True)
class TrainingStep:
    """A step of the eager model, or of one whose blocks are compiled one by one.

    The methods named after moments return {part: bytes} of what exists then."""
    activations: Activations
    tokens: int          # in a micro-batch
    accumulating: bool
    checkpointing: bool
    distributed: bool
    trainable: int       # parameters that have gradients
    update_memory: int   # bytes that the optimizer's step takes until it ends
    float32_buffers: bool

    @property
    def config(self):
        return self.activations.config

    def peak(self):
        """{part: bytes} at the moment of the step that needs the most."""
        # For most models it is the loss or the last block; with many parameters and few tokens, or
        # with checkpointing, it comes later.
        moments = [self.at_the_loss(), self.in_the_last_block(), self.in_the_first_block(),
                   self.after_the_backward_pass(), self.in_the_update()]
        return max(moments, key=total)

    # ---- moments ----

    def at_the_loss(self):
        """When the forward pass is over, and the logits have their gradient."""
        config = self.config
        C = config.n_embd
        block = self.block()
        if self.checkpointing:
            block = {NORMS: self.block_input()}
        parts = {part: self.tokens * config.n_layer * size for part, size in block.items()}

        # The head keeps its input: 16-bit copies, or, where it works in parts, the float32 result
        # of the last norm.
        head_input = 4 * C if self.logits_in_parts() else self.activations.number_size * C
        last_norm = self.activations.norm()
        parts[ENDS] = self.embedding() + self.tokens * (last_norm + head_input)

        logits = self.logit_rows() * config.vocab_size
        parts['logits and their gradient'] = logits * self.logit_size()

        # Autocast's copies of the weights, which the backward pass still needs. Checkpointing
        # makes them again in each block.
        copied = 0
        if self.activations.in_16_bits:
            copied = head_size(config) if self.checkpointing else multiplied_parameters(config)
        parts['weights in 16 bits'] = 2 * copied

        parts['gradients'] = self.gradients_before() + self.head_gradient_at_the_loss()
        return parts

    def in_the_last_block(self):
        """When the backward pass is in the last block: no other block has freed anything yet."""
        config = self.config
        parts = {}
        for part, size in self.block().items():
            blocks = 1 if self.checkpointing else config.n_layer
            parts[part] = self.tokens * blocks * size
        if self.checkpointing:
            parts[NORMS] += self.tokens * config.n_layer * self.block_input()
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
            gradients += self.second_gradient()
        return {'gradients': gradients}

    def in_the_update(self):
        """When the optimizer changes the weights."""
        return {'gradients': self.gradients_left(), 'update of the weights': self.update_memory}

    # ---- activations and logits ----

    def block(self):
        """{part: bytes a token} that one block keeps."""
        return {NORMS: 2 * self.activations.norm(),
                ATTENTION: self.activations.attention(),
                MLP: self.activations.mlp()}

    def block_input(self):
        """Bytes a token of the input of a block, which is all that it keeps with checkpointing."""
        return self.activations.residual_size * self.config.n_embd

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

    def logit_size(self):
        """Bytes for each logit, at most.

        In float32: the logits, their log-probabilities and the gradient; tanh keeps its result."""
        return 16 if self.config.logit_softcap > 0 else 12

    def gradients_of_activations(self):
        """Bytes of the gradients within a block, less the activations that are freed by then.

        Attention is done after the MLP; the larger of the two counts."""
        if self.activations.compiled:
            # Inductor reuses the activations' memory. What it adds is the gradient of the stream,
            # and that of a layer's output.
            size = self.activations.residual_size + self.activations.number_size
            return self.tokens * size * self.config.n_embd
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
        gradients = {'gelu': 1, 'relu2': 3, 'swiglu': 2}[self.config.mlp]
        hidden_size = size * gradients
        if self.activations.squares_in_float32:
            gradients_in_float32 = 4
            float32_size = 4
            # Less the square in 16 bits.
            hidden_size = gradients_in_float32 * float32_size - size
        around_the_activation = size * C + hidden_size * width
        if not self.float32_buffers:
            return self.tokens * around_the_activation
        # The widest product: it makes the gradient of the hidden layer.
        in_the_product = size * (C + width) + 4 * width
        return self.tokens * max(around_the_activation, in_the_product)

    def gradients_in_attention(self):
        """The gradients of attention weights, where attention holds those."""
        config = self.config
        weights = self.tokens * config.n_head * config.block_size
        incoming = self.tokens * self.activations.number_size * self.activations.q_channels
        freed = self.tokens * self.activations.mlp()
        if self.activations.attention_form == WRITTEN_OUT:
            a_sequence = config.n_head * config.block_size ** 2
            weights = min(weights, max(a_sequence, WEIGHTS_AT_ONCE))
            # Those of the weights and those of the scores; with dropout also the dropped weights.
            copies = 3 if config.dropout > 0 else 2
            # A contiguous copy of the incoming one, and those of queries, keys and values.
            incoming *= 5
        else:
            # With dropout, the freed product of weights and mask makes room for one of the two.
            copies = 1 if config.dropout > 0 else 2
        gradients = copies * self.activations.attention_weight_size * weights
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

    def gradients_left(self):
        """Bytes of gradients after that backward pass.

        DDP's buckets are the gradients, unless earlier micro-batches have made others."""
        copies = 2 if self.accumulating and self.distributed else 1
        return copies * 4 * self.trainable

    def gradients_after(self):
        """Bytes of gradients just before that backward pass ends."""
        return self.gradients_left()

    def second_gradient(self):
        """Bytes that a tied matrix adds at the end, since it gets a gradient twice.

        It is head and embedding. In float32 the sum of the two gradients is a third tensor."""
        more = 1 if self.activations.in_16_bits else 2
        return more * self.head_gradient()

    def head_gradient_at_the_loss(self):
        """Bytes of the head's gradient while the logits exist: each part of them adds to it."""
        return self.head_gradient() if self.logits_in_parts() else 0

    def head_gradient(self):
        """Bytes of the head's gradient, which is the first to exist."""
        return 4 * min(head_size(self.config), self.trainable)


@dataclass(frozen=True)
class CompiledStep(TrainingStep):
    """A step of a model on CUDA that torch.compile has compiled as a whole.

    Inductor never writes the logits in float32: in one pass it reads them, in the precision of the
    products, and writes their gradient over them. All gradients of the weights leave the compiled
    backward pass together, so until its end the head's may stay in that precision too."""

    def logit_size(self):
        # In float32, the gradient of capped logits takes memory of its own.
        has_gradient_apart = self.config.logit_softcap > 0 and not self.activations.in_16_bits
        copies = 2 if has_gradient_apart else 1
        return copies * self.activations.number_size

    def alibi_bias(self):
        if self.config.position != 'alibi':
            return 0
        numbers = self.config.n_head * self.config.block_size * self.config.block_size
        return self.activations.number_size * numbers  # one copy for all blocks

    def gradients_of_activations(self):
        # The last norm, whose input is kept, comes before the blocks.
        last_norm = self.tokens * self.activations.norm()
        return last_norm + super().gradients_of_activations()

    def head_gradient(self):
        """Bytes of the head's gradient, in the precision of the products."""
        numbers = min(head_size(self.config), self.trainable)
        return self.activations.number_size * numbers

    def head_gradient_at_the_loss(self):
        return self.head_gradient()

    def gradients_after(self):
        # The new gradients exist before they are added to those of earlier micro-batches, or
        # copied into DDP's buckets.
        copies = 2 if self.accumulating or self.distributed else 1
        return copies * 4 * self.trainable

    def second_gradient(self):
        # The embedding's gradient in float32, and in 16 bits the head's before it is converted.
        converted = self.head_gradient() if self.activations.in_16_bits else 0
        return 4 * min(head_size(self.config), self.trainable) + converted


def total(parts):
    return sum(parts.values())
