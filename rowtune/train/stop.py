"""Ctrl-C and SIGTERM end a run between two steps: half an optimizer step is in no checkpoint."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stop:
    """`asked` once a signal came while entered, which `tell` is told. A second one does not wait: it is a
    KeyboardInterrupt. But one of several ranks gets the terminal's and torchrun's: it is `patient`."""

    def __init__(self, tell: Callable[[], None], *, patient: bool = False) -> None:
        self.asked, self.tell, self.patient = False, tell, patient
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._ask) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            if self.patient:
                return
            raise KeyboardInterrupt
        self.asked = True
        self.tell()
