"""
CUDA graphs of decoding steps: the kernels of a step are recorded once, and later launched together.

A step of GPT-2 has about 200 kernels. Launching them one by one takes the host several times as
long as a GPU needs to run them, while a graph takes a single launch. It repeats exactly the
recorded kernels on the same memory: all that differs from step to step must lie in tensors that
stay in place, and whatever Python computes is frozen.
"""
import functools

import torch

from plaingpt.system.messages import warn

# Each number of positions needs a graph of its own, so a graph serves this many steps. Fused
# attention takes masks of such lengths without copying them.
LENGTH_MULTIPLE = 128

# A graph costs more than a step: its recording waits for the device, and gives cached memory back
# to the driver. For fewer steps than these it may not pay; not measured on a GPU yet. The host
# alone takes 1.5 ms to record GPT-2's, 1.2 for a step without it, 0.01 to replay it (AMD EPYC).
WORTH_RECORDING = 8


def are_used_on(device):
    """Whether decoding on a torch.device records graphs, and so sees only rounded lengths."""
    return device.type == 'cuda'


class DecodingGraphs:
    """Runs decoding steps, as graphs where that pays: one graph for each number of positions.

    step: a function of `visible`, how many positions it sees. Whatever else it needs and changes
    lies in tensors on the device, and stays in place."""
    failed = False  # whether a recording has failed in this process; then none is tried again

    def __init__(self, step, device):
        self.step = step
        self.device = device
        self.pool = None   # the memory that all graphs share; only one of them runs at a time
        self.graphs = {}   # by visible
        self.warm = False  # whether a step has run: libraries set themselves up in the first one

    def run(self, visible, steps):
        """Runs one step; steps: how many will see this many positions, with this one."""
        graph = self.graphs.get(visible)
        can_record = self.warm and not self.failed
        if graph is None and can_record and steps >= WORTH_RECORDING:
            graph = self._record(visible)
        if graph is None:
            self.step(visible)
            self.warm = True
        else:
            graph.replay()

    def _record(self, visible):
        """The graph of a step, or, after a warning, None if it can't be recorded."""
        if self.pool is None:
            self.pool = torch.cuda.graph_pool_handle()
        try:
            graph = record(functools.partial(self.step, visible), self.pool, self.device)
        except RuntimeError as error:
            cause = error.__context__ or error  # ending a failed recording raises an error, too
            if isinstance(cause, torch.OutOfMemoryError):
                raise cause from None
            # A changed model may do what a graph can't hold, such as printing a value. If the step
            # itself is wrong, it raises its error again when it runs without a graph.
            DecodingGraphs.failed = True
            reason = ' '.join(str(cause).split())[:200]
            warn(f'no CUDA graph can be recorded, so decoding is slower ({reason})')
            return None
        self.graphs[visible] = graph
        return graph


def record(function, pool, device):
    """The kernels that a function would run on a device, as a graph that holds memory of a pool."""
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.current_stream(device)
    try:
        with torch.cuda.graph(graph, pool=pool, stream=recording_stream(device)):
            function()
    finally:
        torch.cuda.set_stream(stream)  # if the recording fails, torch does not
    return graph


@functools.cache
def recording_stream(device):
    """The CUDA stream for recording; one for all, since cuBLAS keeps memory for each stream."""
    return torch.cuda.Stream(device)
