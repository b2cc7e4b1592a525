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

# Fewer steps are not worth a graph. On the host, recording GPT-2's takes 1.5 ms, a step without
# one 1.2 and a replay 0.01 (AMD EPYC, without the driver's share, such as building the graph).
WORTH_RECORDING = 8


def are_used_on(device):
    """Whether decoding on a torch.device records graphs, and so sees only rounded lengths."""
    return device.type == 'cuda'


class DecodingGraphs:
    """Runs decoding steps, as graphs where that pays: one graph for each number of positions.

    step: a function of `visible`, how many positions it sees. Whatever else it needs and changes
    lies in tensors on the device, and stays in place."""

    def __init__(self, step, device):
        self.step = step
        self.device = device
        self.pool = None   # the memory that all graphs share; only one of them runs at a time
        self.graphs = {}   # by visible
        self.warm = False  # whether a step has run: libraries set themselves up in the first one
        self.failed = False

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
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            # A changed model may do what a graph can't hold, such as printing a value. If the step
            # itself is wrong, it raises its error again when it runs without a graph.
            self.failed = True
            reason = ' '.join(str(error).split())[:200]
            warn(f'no CUDA graph can be recorded, so decoding is slower ({reason})')
            return None
        self.graphs[visible] = graph
        return graph


def record(function, pool, device):
    """The kernels that a function would run on a device, as a graph that holds memory of a pool."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, stream=recording_stream(device)):
        function()
    return graph


@functools.cache
def recording_stream(device):
    """The CUDA stream for recording; one for all, since cuBLAS keeps memory for each stream."""
    return torch.cuda.Stream(device)
