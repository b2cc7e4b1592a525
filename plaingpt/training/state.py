"""
The state of a run: the plain values that a checkpoint holds beside weights and moments.

With them, the seed and the data, a resumed run continues exactly. What happens at a step before its
update (log, evaluation, save) can be repeated without harm, so a resumed run simply does it again.
"""
import math
import secrets
from dataclasses import dataclass, field
from typing import NamedTuple


class Best(NamedTuple):
    """The lowest validation loss so far, and the step at which it was measured."""
    loss: float
    step: int


@dataclass
class RunState:
    """Where a run stands: the counts of all its sessions together."""
    step: int = 0                      # optimizer steps done
    tokens: int = 0                    # tokens trained on
    best: Best = Best(math.inf, 0)     # of the weights that are saved
    elapsed: float = 0.0               # seconds
    unlogged: int = 0                  # steps since the last line of the log
    clipped: int = 0                   # of these, the steps whose gradient was clipped
    skipped: int = 0                   # steps lost to float16's overflow that no line has named yet
    figures: dict = field(default_factory=dict)  # what metrics.jsonl says of this step's training
    run_id: str = field(default_factory=lambda: secrets.token_hex(4))  # names the run at wandb

    @classmethod
    def from_checkpoint(cls, saved):
        """The state that a loaded checkpoint holds; the defaults if it is {}."""
        fresh = cls()
        return cls(
            step=saved.get('iter_num', fresh.step),
            tokens=saved.get('tokens_seen', fresh.tokens),
            best=Best(saved.get('best_val_loss', fresh.best.loss),
                      saved.get('best_step', fresh.best.step)),
            elapsed=saved.get('elapsed', fresh.elapsed),
            unlogged=saved.get('unlogged', fresh.unlogged),
            clipped=saved.get('clipped', fresh.clipped),
            skipped=saved.get('skipped', fresh.skipped),
            figures=saved.get('figures', fresh.figures),
            run_id=saved.get('run_id') or fresh.run_id,
        )

    def to_checkpoint(self):
        """The same as entries of a checkpoint; iter_num and best_val_loss are nanoGPT's names."""
        return {
            'iter_num': self.step,
            'best_val_loss': self.best.loss,
            'best_step': self.best.step,
            'tokens_seen': self.tokens,
            'elapsed': self.elapsed,
            'unlogged': self.unlogged,
            'clipped': self.clipped,
            'skipped': self.skipped,
            'figures': self.figures,
            'run_id': self.run_id,
        }

    def evaluations_since_best(self, eval_interval):
        """How many evaluations have come after the one with the best loss, this step's included."""
        return self.step // eval_interval - self.best.step // eval_interval

    def count(self, report):
        """Adds the counts of a guard.StepReport."""
        self.unlogged += report.steps
        self.clipped += report.clipped
        self.skipped += report.skipped

    def close_line(self, report):
        """Figures for a line of the log, from the report of its step; starts new counts."""
        grad_norm = report.grad_norm if math.isfinite(report.grad_norm) else None
        figures = {
            'loss': report.loss,
            'grad_norm': grad_norm,  # None: infinite in float16, so that step was skipped
            'clipped': self.clipped / max(1, self.unlogged),
        }
        self.clipped = 0
        self.unlogged = 0
        return figures
