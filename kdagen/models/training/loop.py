"""The training loop: steps of AdamW on batches that are functions of the step, checkpoints, going on after a kill.

On a CPU with one thread a run that was killed and went on has the losses, bit for bit, of one that was not. What is
trained on is the caller's: see kdagen.models.training.tasks and examples/train_bytes.py.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from kdagen.errors import TrainingError
from kdagen.models.training.display import Display, usual
from kdagen.models.training.folder import Folder
from kdagen.models.training.parallel import Processes
from kdagen.models.training.settings import Settings
from kdagen.models.training.tasks import IGNORED

WINDOW = 20  # steps over which accuracy is averaged, before the best is taken


@dataclass(frozen=True)
class Run:
    """A run that has ended: its figures step by step, and its model (on the first process; None on others)."""

    curve: list[dict]
    model: nn.Module | None
    folder: Path

    @property
    def best(self) -> float:
        """The best accuracy, as a mean over WINDOW steps."""
        return max(means([line["accuracy"] for line in self.curve]))

    @property
    def ms(self) -> float:
        """Of a step, the median."""
        return statistics.median(line["ms"] for line in self.curve)


def means(numbers: list[float], over: int = WINDOW) -> list[float]:
    """Moving means; of fewer numbers, that of all."""
    over = min(over, len(numbers))
    sums = [0.0, *accumulate(numbers)]
    return [(b - a) / over for a, b in zip(sums, sums[over:])]


def train(
    model,
    data: Callable[[int], tuple],
    settings: Settings,
    folder,
    about: dict | None = None,
    held_out: Sequence[tuple] = (),
    evaluate_every: int = 100,
    save_every: int = 100,
    processes: Processes | None = None,
    show: bool = True,
    say: Callable[[dict], str] = usual,
    title: str = "training",
) -> Run:
    """Trains a model, or goes on where a run in this folder was.

    Args:
        model: its parameters in float32 (autocast is the caller's choice), the same on all processes.
        data: tokens and targets [batch, T] of a step, IGNORED where there is no loss; the same on all processes.
        about: what of the data and the caller's options decides the numbers; it must be the same to go on.
        held_out: tokens and targets to evaluate on, at every `evaluate_every` steps and at the end.
        say: the words that are shown of a step's figures.

    Raises:
        TrainingError: the folder is of another run or damaged, a batch cannot be divided, or the loss is not finite.
    """
    trainer = Trainer(model, data, settings, Folder(folder), held_out, evaluate_every, processes or Processes())
    trainer.begin({"settings": asdict(settings), "model": model.config.json(), "about": about or {}})
    try:
        with Display(title, settings.steps, show and trainer.processes.first, say) as display:
            for line in trainer.curve[-1:]:
                display.show(line, "went on")
            while not trainer.ended:
                display.show(trainer.advance())
                if trainer.done % save_every == 0 or trainer.ended:
                    trainer.save()
        return trainer.end()
    finally:
        trainer.folder.close()


class Trainer:
    """A run on one of its processes."""

    def __init__(self, model, data, settings: Settings, folder: Folder, held_out, evaluate_every: int, processes):
        _trainable(model)
        self.model, self.data, self.settings, self.folder = model.to(processes.device), data, settings, folder
        self.held_out, self.evaluate_every, self.processes = held_out, evaluate_every, processes
        processes.share(model)
        self.optimizer = adamw(model, settings)
        self.curve: list[dict] = []  # of all steps so far, the same on all processes

    def begin(self, said: dict) -> None:
        """The run's first state, or that of its checkpoint."""
        found: list = [None]  # on the first process the checkpoint, which is large

        def opened():
            found[0] = self.folder.open(said)
            return None if found[0] is None else (self.folder.curve(), found[0]["rng"])

        agreed = self.processes.agreed(opened)
        if agreed is not None:
            self.curve, rng = agreed
            self.processes.restore(self.model, self.optimizer, found[0] and (found[0]["model"], found[0]["optimizer"]))
            torch.set_rng_state(rng)
        self.model.train()

    @property
    def done(self) -> int:
        """Steps so far: the next one's number, which says all about its batch."""
        return len(self.curve)

    @property
    def ended(self) -> bool:
        """Whether all steps are done, or the accuracy is high enough."""
        until, last = self.settings.until, [line["accuracy"] for line in self.curve[-WINDOW:]]
        return self.done >= self.settings.steps or bool(
            until is not None and len(last) == WINDOW and sum(last) / WINDOW >= until
        )

    def advance(self) -> dict:
        """A step, and its figures."""
        start = time.perf_counter()
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.lr_at(self.done)
        ids, targets = self.data(self.done)
        loss, hits, count = self.measured(ids, targets)
        (loss * (self.processes.count / count)).backward()  # gradients of processes are averaged
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip)
        loss, hits = self.processes.total(loss.detach(), hits)
        figures = {"step": self.done + 1, "loss": loss / count, "accuracy": hits / count}
        figures |= {"lr": self.settings.lr_at(self.done), "gradient": float(whole(norm))}
        self._finite(figures)
        self.optimizer.step()
        self.optimizer.zero_grad()
        figures["ms"] = round((time.perf_counter() - start) * 1e3, 3)
        return self._noted(figures)

    def measured(self, ids, targets) -> tuple:
        """Of this process's sequences the sum of losses and of right tokens; of all, how many targets there are."""
        rows, device = self.processes.rows(len(ids)), self.processes.device
        logits, wanted = self.model(ids[rows].to(device)).flatten(0, 1), targets[rows].to(device).flatten()
        loss = F.cross_entropy(logits, wanted, ignore_index=IGNORED, reduction="sum")
        return loss, (logits.argmax(-1) == wanted).sum(), max(1, int((targets != IGNORED).sum()))

    def _finite(self, figures: dict) -> None:
        if not math.isfinite(figures["loss"]) or not math.isfinite(figures["gradient"]):
            raise TrainingError(
                f"step {figures['step']}: the loss is {figures['loss']} and the norm of the gradients "
                f"{figures['gradient']}: expected numbers; train with a lower lr than {self.settings.lr:g}, a longer "
                f"warmup than {self.settings.warmup}, or stronger clipping than {self.settings.clip:g}"
            )

    def _noted(self, figures: dict) -> dict:
        self.curve.append(figures)
        if self.held_out and (self.done % self.evaluate_every == 0 or self.ended):
            figures |= self.evaluate()
        if self.processes.first:
            self.folder.note(figures)
        return figures

    @torch.no_grad()
    def evaluate(self) -> dict:
        """Loss and accuracy on what is held out."""
        self.model.eval()
        found = [self.measured(*batch) for batch in self.held_out]
        self.model.train()
        loss, hits = self.processes.total(sum(x[0] for x in found), sum(x[1] for x in found))
        count = sum(x[2] for x in found)
        return {"held_out_loss": loss / count, "held_out_accuracy": hits / count}

    def save(self) -> None:
        """A checkpoint of all that the next step depends on."""
        own, of_optimizer = self.processes.state(self.model, self.optimizer)
        if self.processes.first:
            state = {"step": self.done, "model": own, "optimizer": of_optimizer, "rng": torch.get_rng_state()}
            self.folder.save(state)

    def end(self) -> Run:
        """The run as a whole."""
        model = self.processes.whole(self.model)
        return Run(self.curve, model and model.eval(), self.folder.path)


def _trainable(model) -> None:
    wrong = {str(x.dtype) if not x.is_meta else "meta" for x in model.parameters()} - {"torch.float32"}
    if wrong:
        raise TrainingError(
            f"the model has parameters of {', '.join(sorted(wrong))}: expected all in float32, such as model.float(), "
            f"with values; torch.autocast computes in bfloat16"
        )


def whole(x):
    """A tensor that processes share, whole."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def adamw(model, settings: Settings):
    """AdamW; the weights of linear maps decay, not embeddings, norms, convolutions and parameters of heads."""
    maps = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
    groups = [
        {"params": [x for x in model.parameters() if id(x) in maps], "weight_decay": settings.weight_decay},
        {"params": [x for x in model.parameters() if id(x) not in maps], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=settings.lr, betas=settings.betas, fused=True)
