"""Bands that are like others are not recorded. What they would leave behind is counted all the same.

A shortened program (rowtune/plan/repeat.py) says which bands stand for others. Here its steps are marked, so
that the recorder is told when such a band begins and ends: what one leaves behind, the others leave as well,
and it lives as long as the last of what is left behind by the band that stands for them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from rowtune.plan.homes import homes_of
from rowtune.plan.program import Back, Banded, Repeat, Replay, Run, SegmentProgram, Stash, Step
from rowtune.runtime.recording import Buffer
from rowtune.runtime.stores.host import HostPool
from rowtune.runtime.writer import Lives


class LeftOut:
    """What the bands that a program leaves out would leave behind: on the device, and on the `host`."""

    def __init__(self, recorder: Lives, host: HostPool) -> None:
        self.recorder, self.host = recorder, host
        self.groups: list[_Group] = []
        self.more_on_host = 0

    @property
    def host_bytes(self) -> int:
        """With what the bands that were left out would have put there."""
        return self.host.bytes + self.more_on_host

    def marked(self, segment: SegmentProgram) -> SegmentProgram:
        """The same segment, telling when it leaves bands out, and without the bands of images that are like
        the second."""
        if isinstance(segment.how, Banded):
            return replace(segment, how=self._marked(segment.how))
        return segment.with_parts(map(self.marked, segment.parts))

    def _marked(self, banded: Banded) -> Banded:
        images, more = banded.image_ranges, 0
        if banded.sketch and len(images) > 3 and not _by_images(banded):
            images, more = (*images[:2], images[-1]), len(images) - 3
        stashes = banded.repeat.stashes if banded.repeat else None
        if not more and banded.repeat is None:
            return banded
        after = {} if stashes is None or banded.repeat is None else {stashes: banded.repeat.more}

        homes = homes_of(banded)  # goes through the steps as well: now, and not when they run

        def steps(those: Sequence[Step]) -> tuple[Step, ...]:
            return _Marked(those, lambda: _Pass(self, len(images), more), after, self, banded.repeat)

        made = replace(
            banded, image_ranges=images, forward=steps(banded.forward), backward=steps(banded.backward)
        )
        made.__dict__["_homes"] = homes
        return made

    def mark(self) -> _Mark:
        return _Mark(self.recorder.live, self.recorder.buffers, len(self.groups), self.host_bytes)

    def since(self, mark: _Mark, more: int) -> None:
        """What is alive now and was not at `mark` is there `more` times more."""
        now = self.recorder
        inside = self.groups[mark.groups :]
        self.more_on_host += more * (self.host_bytes - mark.host_bytes)
        self.groups.append(_Group(now.live - mark.live, now.alive(mark.buffers), inside, more, now.calls - 1))

    def buffers(self, made: Sequence[Buffer]) -> tuple[Buffer, ...]:
        """Of a finished recording."""
        found = (group.buffer(made) for group in self.groups)
        return tuple(b for b in found if b is not None)


class _Mark(NamedTuple):
    """What there was at one time: bytes alive, the numbers of buffers and groups, bytes on the host."""

    live: int
    buffers: int
    groups: int
    host_bytes: int


class _Group(NamedTuple):
    """Bytes that were left behind between two times, the buffers that they may lie in, and other such groups
    in between."""

    growth: int
    alive: list[int]
    inside: list[_Group]
    more: int
    born: int

    def buffer(self, made: Sequence[Buffer]) -> Buffer | None:
        own = [b for n in self.alive if (b := made[n]).role == "activation" and b.died is not None]
        more = [found for group in self.inside if (found := group.buffer(made)) is not None]
        growth, own = self.growth + sum(b.bytes for b in more), own + more
        if growth <= 0 or not own:
            return None
        died = max(b.died for b in own if b.died is not None)
        return Buffer("rows of bands like others", self.more * growth, "activation", self.born, died)


def _by_images(banded: Banded) -> bool:
    """Whether reductions are put together from those of all images."""
    return any(banded.images.dims.get(name) is not None for name in banded.sums)


class _Pass:
    """One time through all bands of images: the second stands for `more` others."""

    def __init__(self, left_out: LeftOut, images: int, more: int) -> None:
        self.left_out, self.images, self.more = left_out, images, more
        self.at = 0
        self.second = left_out.mark()

    def begin(self) -> None:
        if self.at == 1:
            self.second = self.left_out.mark()
        elif self.more and self.at == 2:
            self.left_out.since(self.second, self.more)
        self.at += 1

    @property
    def done(self) -> bool:
        return self.at == self.images

    @property
    def times(self) -> int:
        """How many bands of images the one at work stands for."""
        return 1 + self.more if self.at == 2 else 1


class _Marked(tuple[Step, ...]):
    """Steps that say how far they have been run, each time they are gone through."""

    _begin: Callable[[], _Pass]
    _after: dict[tuple[int, int], int]
    _left_out: LeftOut
    _repeat: Repeat | None
    _pass: _Pass | None

    def __new__(
        cls,
        steps: Sequence[Step],
        begin: Callable[[], _Pass],
        after: dict[tuple[int, int], int],
        left_out: LeftOut,
        repeat: Repeat | None,
    ) -> _Marked:
        made = super().__new__(cls, steps)
        made._begin, made._after, made._left_out, made._pass = begin, after, left_out, None
        made._repeat = repeat
        return made

    def __iter__(self) -> Iterator[Step]:
        if self._pass is None or self._pass.done:
            self._pass = self._begin()
        self._pass.begin()
        return self._steps(self._pass.times)

    def _steps(self, times: int) -> Iterator[Step]:
        """What is stashed between two bands is stashed as often again as bands between are left out, and each
        call of such a band counts as often."""
        mark, recorder = self._left_out.mark(), self._left_out.recorder
        pieces = self._repeat.pieces if self._repeat else frozenset()
        often = times * (1 + self._repeat.more) if self._repeat else times
        for step in super().__iter__():
            recorder.times = (
                often if isinstance(step, Run | Replay | Back) and step.piece in pieces else times
            )
            yield step
            recorder.times = 1
            if type(step) is Stash:
                for (first, last), more in self._after.items():
                    if step.band == first:
                        mark = self._left_out.mark()
                    elif step.band == last:
                        self._left_out.since(mark, more)
