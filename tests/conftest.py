"""Settings that all tests share."""

from __future__ import annotations

import logging
import os
import signal
import tempfile

os.environ.setdefault(
    "GOMP_SPINCOUNT", "10000"
)  # before torch: tests run side by side, threads need not spin

os.environ.setdefault("ROWTUNE_CACHE", tempfile.mkdtemp(prefix="rowtune-cache-"))  # not the user's own

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


@pytest.fixture(autouse=True)
def one_thread():
    """Tests run side by side, and bits must not depend on the number of cores."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
