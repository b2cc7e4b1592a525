"""
How much memory a training step takes on one device, by part.

Only tensors count, not the program itself: weights, optimizer state, gradients, activations. A step
holds the most at one of five moments, which training_step.py describes. transformer_sizing.ipynb
derives the figures and compares them with real steps on a CPU, as tests/planning/test_memory.py
does. docs/planning.md compares them with what torch's allocator counts on CUDA.
"""
from plaingpt.planning.activations import Activations
from plaingpt.planning.counts import parameters
from plaingpt.planning.training_step import CompiledStep, TrainingStep

# Bytes of a large GPU that CUDA's context, workspaces and fragmentation take from a run.
RESERVED = 5e9


def usable(memory):
    """Bytes for the tensors of a run, on a GPU that has so many bytes of memory."""
    return memory - min(RESERVED, memory / 8)


def step_memory(config, batch_size, precision, device_type, accumulating=False,
                checkpointing=False, distributed=False, trainable=None, moments=2.0,
                update_memory=0, float32_buffers=False, compiled=False, bf16_residual=False,
                has_flash=True):
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
    update_memory: bytes that the optimizer's step takes until it ends.
    float32_buffers: whether each bfloat16 product takes a float32 buffer of its own size; see
        hardware.has_float32_buffers().
    compiled: by torch.compile. It is counted on CUDA only, as nothing else has been measured.
    bf16_residual: train.py's bf16_residual.
    has_flash: see hardware.Hardware."""
    number = sum(parameters(config).values())
    if trainable is None:
        trainable = number
    compiled = compiled and device_type == 'cuda'
    activations = Activations(config, precision, device_type, compiled, bf16_residual, has_flash)
    # With checkpointing, the blocks are compiled one by one, and the loss stays eager.
    kind = CompiledStep if compiled and not checkpointing else TrainingStep
    step = kind(activations, batch_size * config.block_size, accumulating, checkpointing,
                distributed, trainable, update_memory, float32_buffers)
    always = {'weights': 4 * number, 'optimizer state': round(4 * moments * trainable)}
    return {**always, **step.peak()}


def resident_memory(parts, program):
    """What a process on a CPU holds besides the tensors of step_memory(), as {part: bytes}.

    program: bytes that it held before the run. The rest are estimates: with them, the resident
    memory of seven different steps on Linux came out within 14% (docs/benchmarks.md)."""
    activations = sum(size for part, size in parts.items() if part.startswith('activations'))
    return {'Python and torch': program + 100e6,  # kernels and threads come with the first step
            'gaps left by malloc': 0.5 * activations}
