"""Settings that all tests share."""

from __future__ import annotations

import gc
import logging
import os
import shutil
import signal
import tempfile
from collections.abc import Callable

os.environ.setdefault(
    "GOMP_SPINCOUNT", "10000"
)  # before torch: tests run side by side, threads need not spin

import hypothesis
import pytest
import torch

# Shrinking a failing network takes minutes and CI's log of torch's tracer megabytes; a failing example is
# small enough as drawn.
phases = [hypothesis.Phase.explicit, hypothesis.Phase.reuse, hypothesis.Phase.generate]
hypothesis.settings.register_profile("default", phases=phases, deadline=None, derandomize="CI" in os.environ)
hypothesis.settings.load_profile("default")
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a shell's background job, and in all it starts
    signal.signal(signal.SIGINT, signal.default_int_handler)
logging.getLogger("torch").setLevel(logging.WARNING)
logging.getLogger("torch.__trace").setLevel(logging.WARNING)


def _own_folder() -> Callable[[], None]:
    """Temporary files of the tests and of all that they start (killed workers, torchrun's logs) go into one
    folder, and so does rowtune's cache, which is not to be the user's own. Returns what removes it: in the
    first process that comes here, nothing in those that it starts. pytest's tmp_path stays where it was."""
    if "ROWTUNE_TESTS" in os.environ:
        return lambda: None
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", tempfile.gettempdir())
    folder = tempfile.mkdtemp(prefix="rowtune-tests-")
    os.chmod(folder, 0o711)  # PostgreSQL's server, which runs as somebody else, goes through it
    os.environ |= {"ROWTUNE_TESTS": folder, "TMPDIR": folder}
    os.environ.setdefault("ROWTUNE_CACHE", os.path.join(folder, "cache"))
    tempfile.tempdir = None  # look at TMPDIR again
    return lambda: shutil.rmtree(folder, ignore_errors=True)


_clean = _own_folder()


def pytest_unconfigure() -> None:
    _clean()


@pytest.fixture(autouse=True, scope="module")
def small_heap():
    """What earlier tests left alive is not looked through again by every collection that a measurement asks
    for: late in a run that took seconds each."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def one_thread():
    """Tests run side by side, and bits must not depend on the number of cores."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
