"""
The size of a run: how much it computes and keeps, apart from its model and its hardware.
"""
from dataclasses import dataclass

from plaingpt.text.mixtures import Part
from plaingpt.training import freezing
from plaingpt.training.optimizers import muon_matrices, temporary_memory


@dataclass(frozen=True)
class RunSize:
    """What a plan must know of a run. The defaults are those of a single step."""
    batch_size: int                 # sequences in a micro-batch
    micro_batches: int = 1          # in a step, over all devices together
    max_steps: int = 1              # in all
    steps_done: int = 0             # by earlier sessions
    eval_interval: int = 1          # steps from one evaluation to the next
    eval_batches: int = 0           # of each split, in one evaluation
    data: tuple[Part, ...] = ()     # its data sets
    checkpointing: bool = False     # train.py's activation_checkpointing
    compiled: bool = False          # by torch.compile, which keeps other activations
    trained: int | None = None      # parameters with a gradient and optimizer state; None: all
    moments: float = 2.0            # numbers of optimizer state for each of them, on average
    update_memory: int = 0          # bytes that the optimizer's step takes until it ends
    adapter_only: bool = False      # whether a checkpoint holds only what is trained

    @property
    def eval_splits(self):
        """How many splits an evaluation reads: one of training, and one for each data set."""
        return 1 + max(1, len(self.data))

    @classmethod
    def of_run(cls, gpt, run, data, steps_done, compiled):
        """That of a run with this config of train.py, on these Parts of its data.

        UserError if the config wants to train parameters that the model does not have."""
        names = freezing.most_trained(gpt, run)
        trained = {parameter for name, parameter in gpt.named_parameters() if name in names}
        trained_numbers = sum(parameter.numel() for parameter in trained)

        # AdamW keeps two numbers for each parameter, Muon one.
        moments = 2 * trained_numbers
        update_memory = 0
        if run['optimizer'] == 'muon':
            update_memory = temporary_memory(gpt)
            for matrix in muon_matrices(gpt):
                if matrix in trained:
                    moments -= matrix.numel()
        return cls(
            batch_size=run['batch_size'],
            micro_batches=run['gradient_accumulation_steps'],
            max_steps=run['max_iters'],
            steps_done=steps_done,
            eval_interval=run['eval_interval'],
            eval_batches=run['eval_iters'],
            data=tuple(data),
            checkpointing=run['activation_checkpointing'],
            compiled=compiled,
            trained=trained_numbers,
            moments=moments / max(1, trained_numbers),
            update_memory=update_memory,
            adapter_only=run['lora_rank'] > 0,
        )
