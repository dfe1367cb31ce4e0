"""The training loop: random crops of four streams, one cosine schedule, best checkpoint by validation."""

import math
import os
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from embedded_model.export import save_model
from embedded_model.llama import Llama, LlamaShape
from embedded_model.records import write_record

# Tests are two thirds of the sources; weighing the library up keeps `self.assertEqual` out of most samples.
MIXTURE = {"library": 0.40, "tests": 0.33, "chat": 0.18, "snippets": 0.09}
# A crop that starts where a document does teaches what may follow an empty context.
STARTS_AT_DOCUMENT = 0.25
EVALUATE_EVERY = 250
MAX_GRADIENT_NORM = 1.0


@dataclass(frozen=True, slots=True)
class Recipe:
    """How to train. The run ends after `steps` steps or `minutes` minutes, whichever comes first."""

    seed: int
    steps: int
    minutes: float
    batch: int
    learning_rate: float
    dropout: float
    optimizer: str
    device: str
    compiled: bool
    warmup: float = 0.03
    weight_decay: float = 0.1
    mixture: dict[str, float] = field(default_factory=lambda: dict(MIXTURE))


def train(shape: LlamaShape, recipe: Recipe, build: Path, out: Path) -> None:
    """Trains; writes the checkpoint with the lowest validation loss into `out` and `training.json` into `build`."""
    torch.manual_seed(recipe.seed)
    torch.set_float32_matmul_precision("high")
    streams = {name: load_stream(build, name).to(recipe.device) for name in (*recipe.mixture, "validation")}
    model = Llama(shape, recipe.dropout).to(recipe.device)
    run = Run(model, recipe, streams, shape.max_position_embeddings)
    started = time.monotonic()
    steps = run.fit(started)
    seconds = time.monotonic() - started
    out.mkdir(parents=True, exist_ok=True)
    save_model(run.best, shape, build, out)
    tokens = steps * recipe.batch * shape.max_position_embeddings
    facts = {
        "hardware": hardware(recipe.device),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "recipe": asdict(recipe),
        "steps": steps,
        "tokens": tokens,
        "minutes": round(seconds / 60, 2),
        "best_step": run.best_step,
        "validation_nats_per_token": run.best_loss,
    }
    write_record(build / "training.json", facts)


def load_stream(build: Path, name: str) -> Tensor:
    """One stream's ids, [tokens] int64."""
    return torch.from_numpy(np.fromfile(build / f"{name}.bin", np.uint16).astype(np.int64))


def hardware(device: str) -> str:
    """The device's name, for the record."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name()
    return f"{platform.machine()} CPU, {os.cpu_count()} cores"


class Crops:
    """Random windows of `length` tokens from several streams, reproducible by seed."""

    def __init__(self, streams: dict[str, Tensor], recipe: Recipe, length: int) -> None:
        self._streams = streams
        self._batch = recipe.batch
        self._length = length
        self._device = recipe.device
        self._names = list(recipe.mixture)
        self._weights = torch.tensor([recipe.mixture[name] for name in self._names])
        self._generator = torch.Generator().manual_seed(recipe.seed)
        self._begins = {name: self._document_starts(streams[name]) for name in self._names}

    def draw(self) -> Tensor:
        """One batch, [batch, length] on the device."""
        picks = torch.multinomial(self._weights, self._batch, replacement=True, generator=self._generator)
        counts = torch.bincount(picks, minlength=len(self._names)).tolist()
        return torch.cat([self._crops(name, n) for name, n in zip(self._names, counts, strict=True)])

    def _document_starts(self, stream: Tensor) -> Tensor:
        starts = torch.nonzero(stream[: -self._length] == stream[0]).flatten().cpu()
        return starts if len(starts) else torch.zeros(1, dtype=torch.int64)

    def _crops(self, name: str, count: int) -> Tensor:
        stream, begins = self._streams[name], self._begins[name]
        anywhere = torch.randint(len(stream) - self._length, (count,), generator=self._generator)
        at_begin = begins[torch.randint(len(begins), (count,), generator=self._generator)]
        chosen = torch.rand(count, generator=self._generator) < STARTS_AT_DOCUMENT
        starts = torch.where(chosen, at_begin, anywhere).to(self._device)
        return stream[starts[:, None] + torch.arange(self._length, device=self._device)]


class Run:
    """One fit of a model; `best` holds the parameters with the lowest validation loss so far, on the CPU."""

    def __init__(self, model: Llama, recipe: Recipe, streams: dict[str, Tensor], context: int) -> None:
        self.best: dict[str, Tensor] = {}
        self.best_loss = math.inf
        self.best_step = 0
        self._model = model
        self._forward: Callable[[Tensor], Tensor] = torch.compile(model) if recipe.compiled else model
        self._recipe = recipe
        self._context = context
        self._crops = Crops(streams, recipe, context + 1)
        self._validation = streams["validation"]
        self._optimizers = list(make_optimizers(model, recipe))

    def fit(self, started: float) -> int:
        """Runs to the end of the schedule; returns the steps taken. `started` is on the monotonic clock."""
        step, progress = 0, 0.0
        while progress < 1.0:
            elapsed_minutes = (time.monotonic() - started) / 60
            progress = max((step + 1) / self._recipe.steps, elapsed_minutes / self._recipe.minutes)
            loss = self._step(schedule(progress, self._recipe.warmup))
            step += 1
            if step % EVALUATE_EVERY == 0 or progress >= 1.0:
                self._keep_if_best(step)
                print(
                    f"step {step}  {elapsed_minutes:.2f} min  train {float(loss):.4f}  "
                    f"best validation {self.best_loss:.4f} at {self.best_step}",
                    flush=True,
                )
        return step

    def _step(self, rate: float) -> Tensor:
        crop = self._crops.draw()
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self._recipe.learning_rate * rate
        self._model.train()
        loss = self._loss(crop, self._forward)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self._model.parameters(), MAX_GRADIENT_NORM)
        for optimizer in self._optimizers:
            optimizer.step()
            optimizer.zero_grad()
        return loss.detach()

    def _loss(self, crop: Tensor, forward: Callable[[Tensor], Tensor]) -> Tensor:
        with torch.autocast(self._recipe.device.split(":")[0], torch.bfloat16):
            logits = forward(crop[:, :-1])
        return nn.functional.cross_entropy(logits.flatten(0, 1).float(), crop[:, 1:].flatten())

    @torch.no_grad()
    def _keep_if_best(self, step: int) -> None:
        self._model.eval()
        losses = [float(self._loss(crop, self._model)) for crop in self._validation_crops()]
        loss = sum(losses) / len(losses)
        if loss < self.best_loss:
            self.best_loss, self.best_step = loss, step
            self.best = {name: value.detach().cpu().clone() for name, value in self._model.state_dict().items()}

    def _validation_crops(self) -> Iterator[Tensor]:
        """The validation stream in whole windows, as many to a batch as in training."""
        windows = self._validation.unfold(0, self._context + 1, self._context)
        full = len(windows) - len(windows) % self._recipe.batch or len(windows)
        return iter(torch.split(windows[:full], self._recipe.batch))


def schedule(progress: float, warmup: float) -> float:
    """The learning rate's factor at `progress` in 0 … 1: linear warm-up, then a cosine to 2 % of the peak."""
    if progress < warmup:
        return progress / warmup
    fall = (min(progress, 1.0) - warmup) / (1.0 - warmup)
    return 0.02 + 0.98 * 0.5 * (1.0 + math.cos(math.pi * fall))


def make_optimizers(model: Llama, recipe: Recipe) -> Iterator[torch.optim.Optimizer]:
    """AdamW for everything, or Muon (Jordan et al., 2024) for the layers' matrices and AdamW for the rest.

    Muon's updates are scaled to AdamW's typical size (Liu et al., "Muon is scalable for LLM training", 2025),
    so that one learning rate and one weight decay serve both. Norm weights are not decayed.
    """
    by_name = dict(model.named_parameters())
    norms = [p for p in by_name.values() if p.ndim == 1]
    embedding = [p for name, p in by_name.items() if "embed_tokens" in name]
    matrices = [p for name, p in by_name.items() if p.ndim == 2 and "embed_tokens" not in name]
    decay = recipe.weight_decay
    groups = [{"params": embedding, "weight_decay": decay}, {"params": norms, "weight_decay": 0.0}]
    if recipe.optimizer == "muon":
        yield torch.optim.Muon(matrices, weight_decay=decay, adjust_lr_fn="match_rms_adamw")
    else:
        groups.append({"params": matrices, "weight_decay": decay})
    fused = recipe.device.startswith("cuda")
    yield torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=fused)
