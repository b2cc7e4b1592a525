"""
torch.compile: which parts of a GPT it compiles, in which mode, and what happens if it fails.
"""
import warnings

import torch

from plaingpt.system.messages import warn

# A GPU runs the kernels of a smaller model faster than the host launches them one by one, so they
# are recorded once as a CUDA graph, which then takes one launch.
SMALL_MODEL = 50e6  # parameters
MODES = ('auto', 'default', 'reduce-overhead', 'max-autotune', 'max-autotune-no-cudagraphs')


def problems(run):
    """Yields a sentence for each problem with the keys of a script about torch.compile."""
    if run['compile_mode'] not in MODES:
        yield f"compile_mode={run['compile_mode']!r} must be one of {', '.join(MODES)}"


def choose_mode(gpt, device, compile_mode, processes=1):
    """The mode of torch.compile for training a GPT: compile_mode, unless that is 'auto'.

    device: a torch.device; processes: how many train together."""
    if compile_mode != 'auto':
        return compile_mode
    is_small = gpt.get_num_params() < SMALL_MODEL
    runs_alone = device.type == 'cuda' and processes == 1
    if is_small and runs_alone and not gpt.checkpointing:
        return 'reduce-overhead'
    return 'default'


def uses_cuda_graphs(mode, device):
    """Whether a mode of torch.compile records CUDA graphs on a torch.device."""
    return device.type == 'cuda' and mode in ('reduce-overhead', 'max-autotune')


def compile_or_warn(gpt, trial, parts=None, **options):
    """Compiles a GPT in place and runs trial(), which must call it; returns whether that worked.

    parts: the modules to compile, None to choose. options: those of torch.compile. The names in the
    model's state dict do not change. If compiling fails, the model stays eager and one warning says
    why."""
    if parts is None:
        parts = _compiled_parts(gpt)
    for part in parts:
        part.compile(**options)
    # torch.compile does its work at the first call of the model, so errors appear in the trial: no
    # C++ compiler, no Triton, a card that is not supported.
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            trial()
        return True
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        # Errors of the compilers below torch.compile share no class, hence the catch-all. It hides
        # no bug of the model: the eager trial below raises that again.
        reason = ' '.join(f'{type(error).__name__}: {error}'.split())[:200]
    for part in parts:
        part.compile(disable=True)
    trial()
    warn(f'torch.compile failed, continuing without it ({reason})')
    return False


def _compiled_parts(gpt):
    """The modules to compile one by one: the whole GPT, or its blocks if it checkpoints them.

    Compiled as a whole, a model that checkpoints would keep activations that Inductor finds cheap
    to keep, and unroll the loss part by part."""
    if gpt.checkpointing:
        return list(gpt.transformer.h)
    return [gpt]


def keep_gradients(gpt):
    """Gives each trained parameter of a GPT a gradient of zeros, and frozen ones none.

    A CUDA graph reuses the memory of what it returns. Gradients that exist already are added to,
    and so stay in memory of their own."""
    for parameter in gpt.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
