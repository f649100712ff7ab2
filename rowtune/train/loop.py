"""A training run: epochs of steps, validations and checkpoints, from the beginning or from where it was."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rowtune.errors import UsageError
from rowtune.plan.file import PlanFile
from rowtune.train import checkpoint, ranks, sharded
from rowtune.train.data import guarded as read
from rowtune.train.data import open_data
from rowtune.train.group import OutOfMemory
from rowtune.train.launch import launched
from rowtune.train.learner import Learner
from rowtune.train.log import Log
from rowtune.train.options import Changed, Options, Report, Stopping, Trained, ValReport
from rowtune.train.random_state import begin, capture, restore, seed_of
from rowtune.train.setup import check, check_host, feed_of, open_checkpoints, settings
from rowtune.train.stop import Stop
from rowtune.train.validate import Validator
from rowtune.train.weights import writer_for
from rowtune.tune.device import cap_memory, keep_freed_memory, warm_up
from rowtune.tune.optimizers import OptimizerSpec, parse_optimizer
from rowtune.tune.output import ROOM, check_writable, keep
from rowtune.tune.step import Workload


def train(
    file: PlanFile, work: Workload, options: Options, watch: Callable[[Report], None] = lambda _: None
) -> Trained:
    """Train, validate and save. Ctrl-C and SIGTERM end the training after the step at hand, which is then in
    the checkpoint and in the weights; a second one ends it at once.

    Where memory runs out, the step at hand is undone and made again with the next smaller plan of the file's
    front, and so are all after it: no step is lost.

    Raises:
        InfeasibleError: memory ran out, and there is no smaller plan; or the plan keeps more on the host than
            it may.
        UsageError: a flag, a file or a folder makes no sense; found before the first step where possible.
        DivergedError: the loss is not finite any more; nothing is saved, checkpoints stay.
        EnginesDifferError: `verify_every` found the two engines to differ; nothing is saved.
        GradientError: stores that round cost more than the plan allows, and the front has no exact plan that
            fits; nothing is saved, checkpoints stay.
    """
    check(options)
    check_host(file, work, options)
    if ranks.rank():  # one process writes for all
        options = replace(options, save=None, metrics=None, tensorboard=None)
    device = work.problem.device
    spec = parse_optimizer(options.optimizer) if options.optimizer else work.optimizer
    spec = spec if options.lr is None else spec.with_lr(options.lr)
    if file.threads and device == "cpu":
        torch.set_num_threads(max(1, file.threads // launched().here))
    weights = sum(t.numel() * t.itemsize for t in work.module.state_dict().values())
    write = None
    if options.save is not None:
        write = writer_for(options.save, work)
        check_writable(options.save, "--save", weights + ROOM)
    found = open_checkpoints(options, int(weights * (2 + spec.slots)))
    begin(seed_of(work.problem.seed, ranks.rank()) if ranks.rank() else work.problem.seed)
    limit = file.budget_bytes - file.reserve_bytes
    warm_up(device)
    if device == "cpu":
        keep_freed_memory()
    cap_memory(device, limit)
    run = _Run(file, work, options, spec, found)
    with Stop(lambda: watch(Stopping(run.learner.done + 1)), patient=ranks.several()) as stop:
        status = "interrupted" if run.train(watch, stop) else "ok"
    learner = run.learner
    if options.fsdp:
        sharded.make_whole(learner.model)
    saved = None
    if options.save is not None and write is not None and learner.done:
        saved = keep(options.save, lambda path: write(learner.saved, path), "the weights")
    val_peak = run.validator.peak if run.validator is not None else None
    if status == "ok" and ranks.most(max(learner.peak or 0, val_peak or 0), device) > limit:
        status = "over_budget"
    last = run.validated
    return Trained(
        status, learner.done, learner.loss, learner.peak, file.budget_bytes, learner.seconds(), saved,
        None if last is None else {"loss": last.loss, **last.metrics}, val_peak, run.saved, run.notes(),
    )  # fmt: skip


class _Run:
    """The learner and where it is in its data."""

    def __init__(
        self,
        file: PlanFile,
        work: Workload,
        options: Options,
        spec: OptimizerSpec,
        found: checkpoint.Checkpoint | None,
    ) -> None:
        self.work, self.options = work, options
        self.limit = file.budget_bytes - file.reserve_bytes
        self.device = work.problem.device
        self.feed, self.epochs, total = feed_of(work, options)
        self.validator: Validator | None = None
        if options.val:
            feed, _ = open_data(options.val, work, fit=options.fit, workers=options.workers, flag="--val")
            self.validator = Validator(work, feed, options.val)
        self.learner = Learner(file, work, options, spec, total)
        self.steps = options.steps if options.data else total
        if self.validator is not None:
            self.validator.check(self.learner.averaged)
        self.settings = settings(file, work, options, spec, self.feed)
        self.epoch = self.batch = 0
        self.validated: ValReport | None = None
        self.saved: Path | None = None
        self.unsaved = ""
        self.saved_step = 0
        self.random: Any = None
        self.interrupted = False
        self.changes: list[str] = []
        if found is not None:
            self._resume(found)
        self.log = Log(options, self.learner.done, again=self.batch > 0)

    def train(self, watch: Callable[[Report], None], stop: Stop) -> bool:
        """All epochs; whether they were interrupted."""
        try:
            while self.epoch < self.epochs and not self._finished():
                ended = self._steps(watch, stop)
                if self.batch == 0 and not self.interrupted:
                    break
                if self.interrupted or not self._validate(watch, stop):
                    self._save()
                    return True
                if ended:
                    self.epoch, self.batch = self.epoch + 1, 0
                if not self.options.checkpoint_every or self._finished() or self.epoch == self.epochs:
                    self._save()
        finally:
            self.log.close()
        if self.learner.done == 0:
            raise UsageError(f"--data {self.options.data} gave no batch")
        return False

    def _steps(self, watch: Callable[[Report], None], stop: Stop) -> bool:
        """Steps until the epoch, the run or the patience of its user ends; whether the epoch did."""
        if self.random is not None and not self.batch:
            restore(self.random, self.device)
        batches = read(self.feed, self.epoch, self.batch, f"--data {self.options.data}")
        if self.random is not None:  # after the batches before were drawn again
            restore(self.random, self.device)
            self.random = None
        every = self.options.checkpoint_every
        while not (self._asked(stop) or self._finished()):
            made = self.learner.step(batches, self.epoch + 1, lambda now: self._changed(now, watch))
            if made is None:
                return True
            report, count = made
            self.batch += count
            self.log.add(report)
            watch(report)
            if self.learner.since == 1:  # the plan's own kernels are loaded now, and part of the context
                cap_memory(self.device, self.limit)
            self.learner.check_loss(f"; {self.saved} is the last checkpoint" if self.saved else "")
            if every and self.learner.done % every == 0:
                self._save()
        return self.feed.batches == self.batch

    def _asked(self, stop: Stop) -> bool:
        """Whether a signal came, to any rank: all of them ask at the same places."""
        self.interrupted = ranks.any_of(stop.asked, self.device)
        return self.interrupted

    def _finished(self) -> bool:
        return self.steps is not None and self.learner.done >= self.steps

    def _validate(self, watch: Callable[[Report], None], stop: Stop) -> bool:
        """False where it was interrupted."""
        if self.validator is None:
            return True
        report = self._validated(self.validator, watch, stop)
        if report is None:
            return False
        self.validated = report
        self.log.add(report)
        watch(report)
        return True

    def _validated(
        self, validator: Validator, watch: Callable[[Report], None], stop: Stop
    ) -> ValReport | None:
        """A validation changes nothing, so one that runs out of memory begins anew under a smaller plan."""
        learner = self.learner
        learner.gradients.release()  # whose memory is not a validation's
        while True:
            try:
                with learner.group.guarded(waits=True):  # it asks for signals, in all ranks
                    return validator.run(
                        learner.averaged, learner.optimizer, learner.kept, learner.done, self.epoch + 1,
                        lambda: self._asked(stop),
                    )  # fmt: skip
            except OutOfMemory as error:
                reason = str(error)
            validator.peak = None
            self._changed(learner.step_down(reason, learner.done), watch)

    def _changed(self, now: Changed, watch: Callable[[Report], None]) -> None:
        self.changes.append(str(now))
        cap_memory(self.device, self.limit)  # what was cached is free now
        watch(now)

    # -- checkpoints ---------------------------------------------------------------------------------------

    def _save(self) -> None:
        """A checkpoint, once a step; a disk that is full costs this one, and the one before it stays."""
        folder, learner = self.options.checkpoint, self.learner
        if folder is None or learner.done in (0, self.saved_step):
            return
        here = {"random": capture(self.device), "began": self.feed.began}
        everywhere = ranks.gathered(here)
        weights = sharded.whole(learner.model.state_dict())
        slots = sharded.whole(learner.optimizer.state_dict())
        wrote = self._written(folder, everywhere, weights, slots) if ranks.rank() == 0 else None
        written = ranks.from_first(wrote)
        if written is not None:
            self.saved, self.saved_step, self.unsaved = written, learner.done, ""

    def _written(
        self,
        folder: Path,
        everywhere: Sequence[Mapping[str, Any]],
        weights: Mapping[str, Tensor],
        slots: Mapping[str, Any],
    ) -> Path | None:
        """The checkpoint; None where it could not be written. `everywhere` are the ranks' random states."""
        learner, average = self.learner, self.learner.average
        state = checkpoint.State(
            learner.done, self.epoch, self.batch, learner.loss,
            slots, learner.schedule.state_dict(),
            0 if average is None else int(average.n_averaged),
            everywhere[0]["random"], everywhere[0]["began"], self.settings, others=everywhere[1:],
        )  # fmt: skip
        ema = None if average is None else average.module.state_dict()
        try:
            return checkpoint.save(folder, state, weights, ema)
        except OSError as error:
            self.unsaved = (
                f"the checkpoint of step {learner.done} could not be written to {folder}: "
                f"{error.strerror or error}"
            )
            return None

    def _resume(self, found: checkpoint.Checkpoint) -> None:
        """Be where the run was that wrote this."""
        learner, state = self.learner, found.state
        checkpoint.check_same(state.settings, self.settings, found.path)
        sharded.load_weights(learner.model, found.weights)
        sharded.load_optimizer(learner.optimizer, state.optimizer)
        learner.schedule.load_state_dict(dict(state.schedule))
        if learner.average is not None and found.ema is not None:
            learner.average.module.load_state_dict(found.ema)
            learner.average.n_averaged.fill_(state.averaged)
        learner.done, learner.loss = state.step, state.loss
        self.epoch, self.batch = state.epoch, state.batch
        first: Mapping[str, Any] = {"began": state.began, "random": state.random}
        own = state.others[ranks.rank() - 1] if ranks.rank() else first
        self.feed.began, self.random = own["began"], own["random"]
        self.saved, self.saved_step = found.path, state.step

    def notes(self) -> tuple[str, ...]:
        """What went wrong without ending the run."""
        return tuple(text for text in (*self.changes, self.unsaved, self.log.unwritten) if text)
