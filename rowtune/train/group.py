"""The group of processes that train one model, and a new one where the old had to be given up.

A rank that runs out of memory where others wait for it (statistics of norms that all share, the mean of
gradients) cannot tell them by a call of the group: the next one they wait for is another. So it writes that
down in the store that the group was made from, and aborts its part of the group. The others' calls fail then
(gloo: connections close), or their own threads, which look at the store, abort theirs (NCCL: a kernel waits
for ever). All form a new group from the same store and take the step up where they were.

Nobody can be ahead of the others meanwhile: what is guarded begins and ends with a call of all, so a rank is
in the middle of it only once all others have left what was before, and none leaves it before all are done.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

from rowtune.errors import RanksError, RowtuneError
from rowtune.torch_private import abort_groups, default_store, groups, under
from rowtune.train import ranks
from rowtune.tune.measurement import first_line, out_of_memory

LOOK = 0.2
"""Seconds between two looks at the store."""


class OutOfMemory(Exception):
    """What was tried took more memory than there is, here or on another rank."""


class Group:
    """Torch's default group, for one rank's training on `device`.

    `lasting` says that something else holds on to the group (weights that are sharded in it), so that no
    other can take its place.
    """

    def __init__(self, device: str, lasting: bool = False) -> None:
        self.device, self.lasting = device, lasting
        self._watch: _Watch | None = None

    @contextmanager
    def guarded(self, waits: bool) -> Iterator[None]:
        """What runs out of memory inside is OutOfMemory, on every rank where it is on one. `waits` says that
        ranks wait for each other inside.

        Raises:
            InfeasibleError: it ran out where ranks wait for each other, and the group cannot be formed anew.
            RanksError: it was given up, and not all ranks came to form a new one.
        """
        waits = waits and ranks.several()
        reason, failed = "", False
        try:
            if waits:
                self._begin()
            yield
            if waits:
                self._all_here()
        except Exception as error:
            failed = not isinstance(error, RowtuneError) and out_of_memory(error)
            if not failed and not self.given_up():
                raise
            reason = (first_line(error) or type(error).__name__) if failed else ""
        # Outside of the handler: the error holds the frames, and those the tensors, of what failed.
        if waits and (failed or self.given_up()):
            self._form_anew(reason)
            raise OutOfMemory(reason or "on another rank")
        if not waits and ranks.any_of(failed, self.device):
            raise OutOfMemory(reason or "on another rank")

    def given_up(self) -> bool:
        """Whether a rank has said so: calls fail then, or what they return means nothing."""
        return self._watch is not None and self._watch.seen()

    def _begin(self) -> None:
        if self._watch is None:
            self._watch = _Watch(default_store(), 0)
        self._all_here()

    def _all_here(self) -> None:
        ranks.any_of(False, self.device)

    def _form_anew(self, reason: str) -> None:
        """Give up this rank's part of the group, and meet the others in a new one."""
        if self.lasting or len(groups()) > 1:
            raise ranks.give_up(reason)
        watch, rank, size = self._watch, dist.get_rank(), dist.get_world_size()
        assert watch is not None, "what is guarded has begun"
        kinds = dist.get_backend_config()
        if reason:
            watch.say(reason)  # before connections close: those who see that ask why
        watch.end()
        abort_groups()
        number = watch.number + 1
        try:
            store = under(f"rowtune/group/{number}", watch.store)
            dist.init_process_group(kinds, store=store, rank=rank, world_size=size)
        except Exception as error:
            raise RanksError(
                f"rank {rank} of {size} gave up the process group, since a rank ran out of memory, and could "
                f"not form a new one ({first_line(error)}): start all of them again; with --checkpoint DIR "
                "--resume they go on from the last checkpoint"
            ) from error
        self._watch = _Watch(watch.store, number)


class _Watch:
    """Group number `number` in the store that all groups are made from: whether it was given up. A thread
    looks for it, since a rank that waits in a call cannot. (The group itself is not held: gloo's connections
    close when it is let go of.)"""

    def __init__(self, store: Any, number: int) -> None:
        self.store, self.number = store, number
        self._key = f"rowtune/given up/{number}"
        self._looks = store.clone()  # a connection of its own: one that waits for a key lets nobody else ask
        self._seen, self._ended = threading.Event(), threading.Event()
        threading.Thread(target=self._look, daemon=True, name="rowtune-group").start()

    def say(self, reason: str) -> None:
        self.store.set(self._key, reason)
        self._seen.set()

    def seen(self) -> bool:
        return self._seen.is_set() or self._asked(self.store)

    def end(self) -> None:
        self._ended.set()

    def _asked(self, store: Any) -> bool:
        try:
            return bool(store.check([self._key]))
        except Exception:  # whoever kept the store is gone: that is another error
            return False

    def _look(self) -> None:
        while not self._ended.wait(LOOK):
            if self._asked(self._looks):
                self._seen.set()
                if (group := dist.group.WORLD) is not None and not self._ended.is_set():
                    group.abort()
                return
