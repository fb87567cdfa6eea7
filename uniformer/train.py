"""Training: one readable loop on Hugging Face accelerate, which brings devices, processes,
mixed precision, checkpoints with the state of every random generator, and trackers.

Run the same command again after a kill and it goes on from its last checkpoint, to the numbers an
uninterrupted run would have reached.
"""

import math
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader
from tqdm import tqdm

from uniformer.checkpoint import save_checkpoint
from uniformer.data import (
    Batch,
    Shuffled,
    TestClips,
    TrainClips,
    make_loader,
    worker_count,
)
from uniformer.decoder import Decoder
from uniformer.evaluate import Evaluation, FileReport, evaluate, make_accelerator
from uniformer.optim import cosine_with_warmup, make_optimizer
from uniformer.recipe import (
    FREE,
    TrainConfig,
    fingerprint,
    make_model,
    precision,
    read_data,
    settings_of,
)
from uniformer.run_folder import RunFolder

__all__ = ["TrainConfig", "train"]

LOSS_EVERY = 20  # steps between looks at the loss: each one waits for the device


@dataclass
class Progress:
    """How far training has come; saved in, and restored from, every checkpoint."""

    epoch: int = 0
    batch: int = 0  # within the epoch
    step: int = 0  # of the optimizer, in all
    sums: tuple[float, float, float] = (0.0, 0.0, 0.0)  # loss, right, seen; over the epoch
    seconds: float = 0.0  # spent in the epoch
    history: list[dict[str, Any]] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


def train(cfg: TrainConfig) -> Path:
    """Train, validate after each epoch, and keep the best weights.

    Args:
        cfg: the settings.

    Returns:
        `best.safetensors` in `cfg.out`; `last.safetensors`, `metrics.json` and `settings.json`
        lie beside it.

    Raises:
        ValueError: settings or data are unusable, or `cfg.out` holds a run with other settings.
        FloatingPointError: the loss is no longer finite.
    """
    accelerator = make_accelerator(
        mixed_precision=precision(cfg.mixed_precision),
        gradient_accumulation_steps=cfg.accumulate,
        log_with=cfg.trackers or None,
        project_dir=cfg.out,
    )
    videos, val_videos = read_data(cfg)
    set_seed(cfg.seed)
    model = make_model(cfg, videos)
    decoder, workers = Decoder(cfg.decoder, cfg.timeout), worker_count(cfg.workers)
    loader = make_loader(
        TrainClips(videos.samples, cfg.input, cfg.augment, decoder),
        cfg.batch_size, workers, cfg.seed,
    )  # fmt: skip
    val_loader = make_loader(
        TestClips(val_videos.samples, cfg.input, decoder), cfg.batch_size, workers
    )
    shuffled = cast(Shuffled, loader.sampler)

    lr = cfg.lr
    if lr is None:
        lr = 1e-4 * cfg.batch_size * cfg.accumulate * accelerator.num_processes / 32
    adamw = make_optimizer(model, lr, cfg.weight_decay)
    model, optimizer, loader, val_loader = accelerator.prepare(model, adamw, loader, val_loader)
    steps = cfg.epochs * math.ceil(len(loader) / cfg.accumulate)
    scheduler = cosine_with_warmup(adamw, steps, int(cfg.warmup * steps))

    trainer = Trainer(cfg, accelerator, model, optimizer, scheduler)
    trainer.say(
        f"training on {accelerator.device}, mixed precision {accelerator.mixed_precision}: "
        f"{len(videos.samples)} videos to train on and {len(val_videos.samples)} to validate on, "
        f"{videos.num_classes} classes, {cfg.epochs} epochs, {steps} steps, peak learning rate "
        f"{lr:.3g}, clips mirrored with probability {cfg.augment.flip:g}"
    )
    trainer.resume(settings_of(cfg, lr), fingerprint(accelerator.num_processes, videos, val_videos))
    trainer.pace = Pace(
        (cfg.epochs - trainer.progress.epoch) * len(loader) - trainer.progress.batch
    )
    while trainer.progress.epoch < cfg.epochs:
        shuffled.epoch = trainer.progress.epoch
        trainer.train_epoch(loader)
        trainer.finish_epoch(evaluate(model, val_loader, accelerator, "validate", trainer.report))
    accelerator.end_training()
    return trainer.say_best()


class Pace:
    """How long a training will take: told once it shows, then by the minute.

    Args:
        batches: still to come.
    """

    EARLY, EVERY = 10.0, 60.0  # seconds

    def __init__(self, batches: int) -> None:
        self.batches, self.done = batches, 0
        self.started = time.perf_counter()
        self.due = self.started + self.EARLY

    def step(self, once: bool) -> str | None:
        """After each batch: the time left, where it is time to tell it; only once if `once`."""
        self.done += 1
        now = time.perf_counter()
        if now < self.due or self.done < 3:
            return None
        self.due = math.inf if once else now + self.EVERY
        left = (now - self.started) / self.done * (self.batches - self.done)
        return f"about {tqdm.format_interval(left)} (h:m:s) of training left"


class Trainer:
    """What a training carries from step to step, and the steps."""

    def __init__(
        self,
        cfg: TrainConfig,
        accelerator: Accelerator,
        model: nn.Module,
        optimizer: Optimizer,
        scheduler: LRScheduler,
    ) -> None:
        self.cfg, self.accelerator, self.model = cfg, accelerator, model
        self.optimizer, self.scheduler = optimizer, scheduler
        self.folder, self.progress, self.report = RunFolder(cfg.out), Progress(), FileReport()
        self.pace = Pace(0)
        accelerator.register_for_checkpointing(scheduler, self.progress)

    def say(self, text: str) -> None:
        if self.accelerator.is_main_process:
            tqdm.write(text)

    def resume(self, settings: dict[str, Any], fingerprint: dict[str, Any]) -> None:
        """Go on from the last checkpoint in the run's folder, if there is one."""
        self.folder.check({"settings.json": settings, "fingerprint.json": fingerprint}, FREE)
        checkpoint = self.folder.last_checkpoint()
        if checkpoint is not None:
            self.folder.check_files(checkpoint)
            self.accelerator.load_state(str(checkpoint))
            p = self.progress
            self.report.said.update(p.failures)
            at = f"epoch {p.epoch + 1}, batch {p.batch + 1}"
            done = p.epoch == self.cfg.epochs
            self.say(f"{checkpoint}: " + ("finished already" if done else f"going on at {at}"))
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            self.folder.write_json("settings.json", settings)
            self.folder.write_json("fingerprint.json", fingerprint)
            self.folder.write_json("metrics.json", self.progress.history)
        self.accelerator.init_trackers("uniformer", config={k: str(v) for k, v in settings.items()})

    def train_epoch(self, loader: DataLoader) -> None:
        """Train on what is left of the current epoch."""
        p, accelerator = self.progress, self.accelerator
        sums = torch.zeros(3, dtype=torch.float64, device=accelerator.device)
        if accelerator.is_main_process:
            sums += torch.tensor(p.sums, dtype=torch.float64, device=accelerator.device)
        batches = accelerator.skip_first_batches(loader, p.batch) if p.batch else loader
        bar = tqdm(
            batches, f"epoch {p.epoch + 1}/{self.cfg.epochs}", len(loader), initial=p.batch,
            unit="batch", leave=False, disable=None if accelerator.is_main_process else True,
        )  # fmt: skip
        self.model.train()
        started = time.perf_counter() - p.seconds
        for batch in bar:
            self.report.add(batch)
            p.failures |= dict(batch.failures)
            with accelerator.accumulate(self.model):
                loss = self.train_step(batch, sums)
            p.batch += 1
            if pace := self.pace.step(once=not bar.disable):
                at = f"epoch {p.epoch + 1}, batch {p.batch} of {len(loader)}"
                self.say(f"{at}: loss {float(loss):.3f}, {pace}")
            last = p.batch == len(loader)
            every = self.cfg.checkpoint_every
            due = every and accelerator.sync_gradients and p.step % every == 0
            if last or due or p.batch % LOSS_EVERY == 0:
                self.check_loss(float(loss))
                bar.set_postfix(loss=f"{float(loss):.3f}")
            if last or due:
                p.sums = tuple(accelerator.reduce(sums, "sum").tolist())
                p.seconds = time.perf_counter() - started
            if due and not last:
                self.save_state()

    def train_step(self, batch: Batch, sums: Tensor) -> Tensor:
        """A batch forward and backward, and a step of the optimizer once enough have gathered."""
        accelerator = self.accelerator
        with accelerator.autocast():
            logits = self.model(batch.views.flatten(0, 1))
            loss = F.cross_entropy(logits, batch.labels, label_smoothing=self.cfg.label_smoothing)
        accelerator.backward(loss)
        if accelerator.sync_gradients:
            accelerator.clip_grad_norm_(self.model.parameters(), self.cfg.clip_grad)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if accelerator.sync_gradients:
            self.progress.step += 1
            if not accelerator.optimizer_step_was_skipped:
                self.scheduler.step()
        seen = len(batch.labels)
        right = (logits.detach().argmax(1) == batch.labels).sum()
        sums += torch.stack([loss.detach().double() * seen, right, right.new_tensor(seen)])
        return loss.detach()

    def check_loss(self, loss: float) -> None:
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"the loss is {loss} at step {self.progress.step}: lower the learning rate, or set "
                f"mixed_precision to bf16 or no. The last checkpoint is safe in {self.folder.path}"
            )

    def finish_epoch(self, result: Evaluation) -> None:
        """Log the epoch; save weights, the best ones apart, and a checkpoint."""
        p = self.progress
        if self.accelerator.num_processes > 1:
            p.failures = dict(gather_object(list(p.failures.items())))
        loss, right, seen = p.sums
        row = {
            "epoch": p.epoch + 1,
            "step": p.step,
            "lr": self.scheduler.get_last_lr()[0],
            "train_loss": loss / seen,
            "train_top1": 100 * right / seen,
            "val_top1": result.top1 if result.videos else None,
            "val_top5": result.top5 if result.videos else None,
            "unreadable": len(p.failures | result.unreadable),
        }
        before = [r["val_top1"] for r in p.history if r["val_top1"] is not None]
        lost = not (self.folder.path / "best.safetensors").is_file()
        best = lost or not before or result.top1 > max(before)
        p.history.append(row)
        self.say(
            f"epoch {row['epoch']:>3}/{self.cfg.epochs}  loss {row['train_loss']:.3f}  top-1 "
            f"{row['train_top1']:5.1f}%  validation top-1 {result.top1:5.1f}%  "
            f"{seen / p.seconds:.1f} clips/s"
        )
        self.accelerator.log(row, step=p.step)
        self.save_weights(["last", "best"] if best else ["last"])
        p.epoch, p.batch, p.sums, p.seconds = p.epoch + 1, 0, (0.0, 0.0, 0.0), 0.0
        self.save_state()
        if self.accelerator.is_main_process:
            self.folder.write_json("metrics.json", p.history)
            if unreadable := p.failures | result.unreadable:
                self.folder.write_json("unreadable.json", unreadable)

    def say_best(self) -> Path:
        """The best weights, and what to do with them."""
        path = self.folder.path / "best.safetensors"
        if self.accelerator.is_main_process and not path.is_file():
            raise ValueError(f"{path} is gone; the weights of the last epoch are beside it")
        rows = [row for row in self.progress.history if row["val_top1"] is not None]
        if rows:
            best = max(rows, key=lambda row: row["val_top1"])  # the first, if several are as good
            self.say(f"best: epoch {best['epoch']}, top-1 {best['val_top1']:.1f}%, {path}")
            self.say(f"  uniformer predict VIDEO --checkpoint {path}")
        return path

    def save_weights(self, names: list[str]) -> None:
        weights = self.accelerator.get_state_dict(self.model)
        if self.accelerator.is_main_process:
            model = self.accelerator.unwrap_model(self.model)
            for name in names:
                save_checkpoint(self.folder.path / f"{name}.safetensors", model, weights)

    def save_state(self) -> None:
        accelerator = self.accelerator
        self.folder.save_checkpoint(
            self.progress.step, accelerator.save_state, self.cfg.keep,
            accelerator.is_main_process, accelerator.wait_for_everyone,
        )  # fmt: skip
