"""The run folder: settings, log, sample grids, and checkpoints that are whole or absent.

    config.json  tokenizer.json  log.jsonl  status.json  tensorboard/  wandb/  samples/<step>.png, <step>/
    checkpoints/<step>/{model,ema,optimizer}.safetensors, state.json
"""
from __future__ import annotations

import json
import shutil
import signal
import sys
import time
from contextlib import contextmanager, suppress
from functools import cached_property

import torch
from filelock import FileLock, Timeout
from torch import nn
from tqdm import tqdm

from ...models_impl.files import write_whole
from ..config import rules
from ..config.load import as_dict, differences, stored
from ..config.schema import Config
from ..data import loader, sets
from ..data.pictures import Pictures
from ..files import entries, line_of_log
from ..memory.measured import Footprint
from . import control, samples, sinks, validation
from .checkpoints import (
    STATE,
    UNFINISHED,
    checkpoints,
    module_tensors,
    newest_good,
    put_aside_after,
    read_log,
    read_tensors,
    restore_module,
    rotate,
    write_checkpoint,
)
from .control import LOCK, STATUS
from .divergence import Divergence

MAY_CHANGE = {"name", "out", "resume", "resume_from", "init_from", "device", "threads", "compile",
              "checkpoint_activations", "micro_batch_size", "save_every", "save_minutes", "save_epochs", "keep",
              "log_every", "divergence", "log", "samples", "validation", "data.path", "data.held_out_path",
              "data.prior_path", "data.cache", "data.index", "data.workers", "data.sets.path",
              "data.sets.held_out_path", "data.sets.name", "text.cache", "text.tokenizer", "text.ahead", "cache",
              "memory.swap_blocks", "memory.fused_backward", "memory.shard", "model.previewer", "model.stage_a",
              "model.stage_b"}
"""Settings that a continued run may have otherwise, because they do not shape its result (or only move its files)."""
WAIT = 0.5  # seconds between two looks at a pause

class Run:
    def __init__(self, config: Config, accelerator, held_out: list[loader.Item] = ()):
        """`load` may be replaced before the first validation: what loads held-out pictures (`cache.loader`)."""
        self.config, self.accelerator, self.folder = config, accelerator, config.folder
        self.main = accelerator.is_main_process
        self.measures = self.main or rules.way(config) != rules.DDP
        self.items, self.load = sets.taken(held_out, config.validation.items), Pictures
        self.stop, self.saved_at, self.bar = False, None, None
        self.sinks: list[sinks.Sink] = []
        self.stopped_by: int | None = None
        """The signal by which a person or the system ended the run."""
        self.ended_by_file = False
        self.lock: FileLock | None = None
        self.losses, self.clock = [], None
        self.past = Divergence(config.divergence)
        self.footprint = Footprint(accelerator.device)
        self.pictures = 0
        """How many there are in an epoch; the loop says so."""
        self.saved_when = self.told_when = 0.0
        self.status: dict = {}

    @cached_property
    def held_out_sets(self) -> dict[str, list[loader.Batch]]:
        """The batches of a validation, by the data sets' names: only in the main process, or in all where they need
        each other for it."""
        if not (self.config.validation.every and self.measures):
            return {}
        found, first = {}, 0
        for number in sorted({item.set for item in self.items}):
            own = [item for item in self.items if item.set == number]
            name = self.config.data.each[number].name or f"set{number + 1}"
            found[name] = loader.fixed(own, self.config.data, self.config.micro_batch_size or 64, self.load, first)
            first += len(own)
        return found

    @property
    def held_out(self) -> list[loader.Batch]:
        return [batch for some in self.held_out_sets.values() for batch in some]

    def validated(self, recipe) -> dict[str, float]:
        """What a recipe says of the held-out pictures, and its loss of each data set where there are several."""
        found = recipe.validate(self.held_out)
        if len(self.held_out_sets) > 1:
            found |= {f"loss_{name}": recipe.validate(some)["loss"] for name, some in self.held_out_sets.items()}
        return found

    def open(self):
        """Makes the folder, or checks that the run in it is this one, which no other process may be doing."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.main:
            lock = FileLock(self.folder / LOCK)
            try:
                lock.acquire(timeout=1)  # a monitor that looks whether it is held holds it for a moment
            except Timeout:
                raise ValueError(f"Another process trains in {self.folder}. Wait until it has ended, or choose another "
                                 "folder: out=...") from None
            self.lock = lock  # only what this run holds may be taken away when it closes
            for leftover in (self.folder / "checkpoints").glob(f"*{UNFINISHED}"):
                shutil.rmtree(leftover)
            for name in control.given(self.folder):
                control.take(self.folder, name)
                print(f"{self.folder / name} was left from before the start: removed, not obeyed.", file=sys.stderr)
        path, settings = self.folder / "config.json", as_dict(self.config)
        if path.exists() and checkpoints(self.folder):
            if self.config.resume == "never":
                raise ValueError(f"{self.folder} holds a run already. Choose another folder (out=...), or resume=auto.")
            changed = differences(stored(self.folder), self.config, MAY_CHANGE)
            if changed and self.config.resume != "changed":
                raise ValueError(f"{self.folder} holds a run with other settings:\n  " + "\n  ".join(changed)
                                 + "\nChoose another folder (out=...), or go on with the new ones: resume=changed.")
        if self.main:
            if not checkpoints(self.folder):  # what an attempt left that learned nothing is not of this run
                (self.folder / "tokenizer.json").unlink(missing_ok=True)
            write_whole(path, json.dumps(settings, indent=2))

    def restore(self, recipe: nn.Module, ema, optimizer) -> int:
        newest, step = newest_good(self.folder, self.config.resume_from), 0
        if newest:
            restore_module(recipe, read_tensors(newest / "model.safetensors"))
            if ema.weights:
                ema.load_state_dict(read_tensors(newest / "ema.safetensors"))
            optimizer.load(read_tensors(newest / "optimizer.safetensors"))
            step = self.saved_at = entries(newest / STATE)["step"]
        self.past.remember([entry for entry in read_log(self.folder) if entry["step"] <= step])
        if self.main:
            self.forget_after(step)
            if self.config.resume_from:
                put_aside_after(self.folder, step)
            self.start(step)
        self.listen()
        return step

    def forget_after(self, step: int):
        """The log keeps only what led to this step, without lines that a disk has damaged."""
        path = self.folder / "log.jsonl"
        if path.exists():
            # What a killed process was writing has no end of line.
            *lines, cut = path.read_text(encoding="utf-8", errors="replace").split("\n")
            kept = (line for line in lines if (entry := line_of_log(line)) and entry["step"] <= step)
            write_whole(path, "".join(line + "\n" for line in kept))

    def start(self, step: int):
        self.sinks = sinks.opened(self.config, self.folder, step)
        self.announce(step, f"begins at step {step:,} of {self.config.steps:,}.")
        self.bar = tqdm(total=self.config.steps, initial=step, unit="step", dynamic_ncols=True, smoothing=0.05,
                        mininterval=0.1 if sys.stderr.isatty() else 60)  # a log file needs no line a step
        self.clock, self.saved_when = (time.perf_counter(), step), time.monotonic()

    def listen(self):
        """Ctrl-C and SIGTERM end the run after the step in work, in every process; a later second Ctrl-C at once."""
        asked = None

        def stop(number, frame):
            nonlocal asked
            now = time.monotonic()
            if number == signal.SIGINT and asked and now > asked + 1:  # launchers send each signal several times
                raise KeyboardInterrupt
            asked, self.stop, self.stopped_by = asked or now, True, number
            if self.main:
                self.bar.write("Stopping after this step; a checkpoint will be written. Once more to stop at once.")

        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, stop)

    def orders(self) -> control.Orders:
        """What is wanted before the next step, the same in all processes: files and the clock are the main one's to
        look at, a signal may reach any of them."""
        minutes, given = self.config.save_minutes, control.given(self.folder) if self.main else ()
        due = self.main and minutes > 0 and time.monotonic() >= self.saved_when + 60 * minutes
        own = control.Orders(signal=self.stop, save=due, **dict.fromkeys(given, True))
        if self.accelerator.num_processes == 1:
            return own
        flags = torch.tensor([float(one) for one in own], device=self.accelerator.device)
        return control.Orders(*(self.accelerator.reduce(flags, "sum") > 0).tolist())

    def goes_on(self, step: int, recipe, ema, optimizer) -> bool:
        """Obeys what is ordered between two steps. Whether another step is wanted. The clock of images/s stands
        still."""
        begin, waiting = time.perf_counter(), False
        while (order := self.orders()).any:
            if order.signal or order.stop:
                self.stop, self.ended_by_file = True, not order.signal
                self.take(control.STOP)
                return False
            if order.sample:
                self.take(control.SAMPLE)
                self.sample_as_ordered(step, recipe, ema, optimizer)
            if order.save and self.saved_at != step:
                self.save(step, recipe, ema, optimizer)
            if order.pause:
                if self.main and not waiting:
                    self.bar.write(f"Paused after step {step}; goes on when {self.folder / control.PAUSE} is removed.")
                    self.tell(step, "paused")
                waiting = True
                time.sleep(WAIT)
        if self.main:
            if waiting:
                self.bar.write("Going on.")
                self.tell(step, "training")
            self.clock = (self.clock[0] + time.perf_counter() - begin, self.clock[1])
        return True

    def take(self, name: str):
        if self.main:
            control.take(self.folder, name)

    def sample_as_ordered(self, step: int, recipe, ema, optimizer):
        """Samples that no setting asked for: where they cannot be drawn, the run goes on and says why."""
        try:
            if self.measures:
                with optimizer.averaged(), ema.applied():
                    self.sample(step, recipe)
        except ValueError as error:
            if self.main:
                self.bar.write(f"No samples were drawn: {error}")

    def tell(self, step: int, state: str, **more):
        """Writes what the run is doing for those who watch; a reader on Windows who has it open makes that fail, and
        the next time is soon."""
        self.told_when = time.monotonic()
        self.status |= {"step": step, "steps": self.config.steps, "state": state, "time": time.time(), **more}
        with suppress(OSError):
            write_whole(self.folder / STATUS, json.dumps(self.status))

    def log(self, step: int, loss: torch.Tensor, grad_norm: torch.Tensor, learning_rate: float):
        self.losses.append(loss)
        if self.main:
            self.bar.update()
        if self.main and (said := self.footprint.complaint(step)):
            self.bar.write(said)
        if step % self.config.log_every:
            return
        mean = torch.stack(self.losses).mean()
        if self.accelerator.num_processes > 1:
            mean = self.accelerator.reduce(mean, "mean")
        self.losses.clear()
        if self.main:
            then, since = self.clock
            now = time.perf_counter()
            speed = (step - since) * self.config.batch_size / (now - then)
            self.clock = (now, step)
            self.bar.set_postfix(loss=f"{mean.item():.4f}", images_s=f"{speed:.3g}")
            self.write(step, loss=mean.item(), grad_norm=grad_norm.item(), learning_rate=learning_rate,
                       images_per_second=float(f"{speed:.3g}"), memory=self.footprint.peak(),
                       memory_estimated=self.footprint.estimated)
            if time.monotonic() > self.told_when + 1 or step == self.config.steps:
                self.tell(step, "training", memory=self.footprint.peak(),
                          seconds_left=round((self.config.steps - step) * self.config.batch_size / speed))
        if diverged := self.past.see(step, mean.item(), grad_norm.item()):
            raise FloatingPointError(self.diverged(step, diverged))

    def diverged(self, step: int, words: str) -> str:
        before = [int(one.name) for one in checkpoints(self.folder) if int(one.name) <= self.past.calm]
        how = "with a lower optimizer.learning_rate, or a longer optimizer.warm_up"
        go_on = f"Go on from step {before[-1]}, {how}: resume_from={before[-1]} resume=changed ..." if before else \
            f"No checkpoint is from before: begin again {how}."
        return f"step {step}: {words}; since step {self.past.calm} the run diverges. {go_on} (divergence=0 lets it.)"

    def write(self, step: int, **values):
        values = {name: value for name, value in values.items() if value is not None}
        with open(self.folder / "log.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        for sink in self.sinks:
            sink.numbers(step, {name.replace("validation_", "validation/"): v for name, v in values.items()})

    def announce(self, step: int, words: str):
        for sink in self.sinks:
            sink.event(step, words)

    def after(self, step: int, recipe, ema, optimizer):
        """What is due after this step: validation, samples, a checkpoint. The clock of images/s stands still."""
        config, begin = self.config, time.perf_counter()
        if self.held_out and step % config.validation.every == 0:
            with optimizer.averaged(), ema.applied():
                found = self.validated(recipe)
            if self.main:
                self.write(step, **{f"validation_{k}": v for k, v in found.items()})
                count = sum(len(batch.positions) for batch in self.held_out)
                self.bar.write(f"Step {step}: {validation.in_words(found, count)}.")
                self.announce(step, f"step {step:,}: {validation.in_words(found, count)}.")
        if self.measures and config.samples.every and step % config.samples.every == 0:
            with optimizer.averaged(), ema.applied():
                self.sample(step, recipe)
        if self.saves_after(step) and step < config.steps:
            self.save(step, recipe, ema, optimizer)
        if self.main:
            self.clock = (self.clock[0] + time.perf_counter() - begin, self.clock[1])

    def saves_after(self, step: int) -> bool:
        """Whether save_every or save_epochs asks for a checkpoint."""
        config, per_epoch = self.config, self.config.save_epochs * self.pictures
        whole = per_epoch and step * config.batch_size // per_epoch > (step - 1) * config.batch_size // per_epoch
        return bool(whole or config.save_every and step % config.save_every == 0)

    def baseline(self, step: int, recipe, ema, optimizer):
        """Samples before the first step, which show what training changes."""
        if step == 0 and self.measures and self.config.samples.every and self.config.samples.baseline:
            with optimizer.averaged(), ema.applied():
                self.sample(0, recipe, base=True)

    def sample(self, step: int, recipe, base: bool = False):
        """base: without the adapter, if one is trained."""
        found = samples.draw(recipe, self.config, base)
        if not self.main:
            return
        page = samples.write(self.folder, step, found, files=self.config.needs == "pictures")
        for sink in self.sinks:
            sink.picture(step, page)

    def save(self, step: int, recipe, ema, optimizer):
        with optimizer.averaged():
            self.gather_and_write(step, recipe, ema, optimizer)
        self.saved_at, self.saved_when = step, time.monotonic()
        self.accelerator.wait_for_everyone()

    def gather_and_write(self, step: int, recipe, ema, optimizer):
        tensors = {}
        if self.measures:  # those of all processes are needed where each has a part
            tensors["model"] = module_tensors(recipe)
            if ema.weights:
                tensors["ema"] = ema.state_dict()
            tensors["optimizer"] = optimizer.tensors()
        if self.main:
            write_checkpoint(self.folder, step, tensors)
            rotate(self.folder, self.config.keep, self.past.calm if self.past.far else None)

    @contextmanager
    def rescuing(self, step: int, recipe, ema, optimizer, *errors: type[Exception]):
        """Block that, where it ends in one of these errors, lets the step before it be saved first: nothing of the run
        has changed then, unless weights learn in the backward pass, and some have. Of several processes the others
        would wait for a save that they do not know of, so then there is none either."""
        try:
            yield
        except errors:
            if step and self.saved_at != step and self.accelerator.num_processes == 1 and not optimizer.midway:
                try:
                    self.save(step, recipe, ema, optimizer)
                    print(f"\nStep {step} was saved before the run ends by an error.", file=sys.stderr)
                except OSError as error:
                    print(f"\nStep {step} could not be saved: {error}", file=sys.stderr)
            raise

    def finish(self, step: int, recipe, ema, optimizer):
        if self.saved_at != step:
            self.save(step, recipe, ema, optimizer)
        if self.main:
            for name in control.given(self.folder):
                control.take(self.folder, name)
                self.bar.write(f"{self.folder / name} came too late: the run has ended.")
            self.tell(step, "ended", seconds_left=None)
            self.announce(step, f"ended at step {step:,} of {self.config.steps:,}.")
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def close(self):
        """Ends the line of the progress bar, so that what is said next, an error perhaps, has its own, and lets other
        processes into the folder."""
        if isinstance(error := sys.exc_info()[1], Exception):  # which ends the `with` that closes this
            self.announce(self.status.get("step", 0), f"failed: {error}")
        for one in filter(None, (self.bar, *self.sinks)):
            one.close()
        if self.lock is not None:
            self.lock.release()
            (self.folder / LOCK).unlink(missing_ok=True)
