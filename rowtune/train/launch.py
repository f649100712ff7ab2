"""`torchrun --nproc-per-node N -m rowtune run plan.json`: one process of several, from its environment on.

Nothing here imports torch before a process turns out to be one of several.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import FrameType
from typing import TYPE_CHECKING, Any

from rowtune.errors import RanksError, RowtuneError, UsageError

if TYPE_CHECKING:
    from rowtune.tune.step import Workload

_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun says to each process that it starts."""


@dataclass(frozen=True)
class Team:
    """Which of `size` processes this is, and which of the `here` on this machine."""

    rank: int = 0
    size: int = 1
    local: int = 0
    here: int = 1

    def device(self, text: str, planned: str) -> str:
        """What --device says (`text`), and in a team of a plan for cards this process's own card.

        Raises:
            UsageError: a single card was named for all, or there are fewer than processes.
        """
        if self.size == 1 or text == "cpu" or not planned.startswith("cuda"):
            return text
        if text not in ("auto", "cuda"):
            raise UsageError(
                f"--device {text}: {self.size} processes take a card each; give --device cuda, and choose "
                "cards by CUDA_VISIBLE_DEVICES"
            )
        import torch

        if (cards := torch.cuda.device_count()) < self.here:
            raise UsageError(
                f"--nproc-per-node {self.here}: this torch sees {cards} card(s), and a process takes one"
            )
        return f"cuda:{self.local}"


def launched() -> Team:
    """The team this process was started in; a team of one where nobody did so."""
    try:
        number = {name: int(os.environ[name]) for name in _VARIABLES if name != "MASTER_ADDR"}
    except (KeyError, ValueError):
        return Team()
    if "MASTER_ADDR" not in os.environ or number["WORLD_SIZE"] < 2:
        return Team()
    return Team(number["RANK"], number["WORLD_SIZE"], number["LOCAL_RANK"], number["LOCAL_WORLD_SIZE"])


@contextmanager
def joined(team: Team) -> Iterator[None]:
    """In the team's process group. Of what fails inside, one line is said: by the rank that failed first.

    Raises:
        RanksError: another rank ended.
    """
    if team.size == 1:
        yield
        return
    import torch.distributed as dist

    from rowtune.train import ranks

    store = _join(team)
    before = _on_end(_ended)
    try:
        yield
    except KeyboardInterrupt:
        _on_end(signal.SIG_IGN)
        if _first(store):
            raise
        raise SystemExit(130) from None
    except Exception as error:
        _on_end(signal.SIG_IGN)
        said = _gone(team, error) if ranks.lost(error) else _named(team, error)
        if _first(store):
            raise said from error
        raise SystemExit(getattr(said, "exit_code", 1)) from None
    _on_end(before)
    if dist.is_initialized():
        dist.destroy_process_group()


def _join(team: Team) -> Any:
    import torch
    import torch.distributed as dist
    from torch.distributed.rendezvous import rendezvous

    cards = torch.cuda.device_count() if torch.cuda.is_available() else 0
    mine = team.local < cards
    if mine:
        torch.cuda.set_device(team.local)
    store, _, _ = next(rendezvous("env://"))
    kinds = "cpu:gloo,cuda:nccl" if mine else "gloo"
    # Calls that fail are errors of this process, which may go on in another group, and not its end.
    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "2")
    dist.init_process_group(kinds, store=store, rank=team.rank, world_size=team.size)
    return store


def _on_end(handler: Any) -> Any:
    """What happens on SIGTERM, and what did. torchrun ends all ranks as soon as one has failed: what there is
    to say of that comes first."""
    if threading.current_thread() is threading.main_thread():
        return signal.signal(signal.SIGTERM, signal.SIG_DFL if handler is None else handler)
    return None


def _ended(number: int, frame: FrameType | None) -> None:
    """While nothing trains, as Ctrl-C does; and not while an error is on its way to where it is said."""
    if sys.exc_info()[0] is None:
        raise KeyboardInterrupt


def _first(store: Any) -> bool:
    """Whether no other rank has failed yet."""
    try:
        return int(store.add("rowtune/failed", 1)) == 1
    except Exception:  # whoever kept the store is gone
        return True


def _named(team: Team, error: Exception) -> Exception:
    """The same error, saying whose it is where it may be one rank's alone."""
    if team.rank == 0:
        return error
    who = f"rank {team.rank} of {team.size}"
    if isinstance(error, RowtuneError):
        return type(error)(f"{who}: {error}")
    return RuntimeError(f"{who}: {type(error).__name__}: {error}")


def _gone(team: Team, error: Exception) -> RanksError:
    said = (str(error).strip().splitlines() or [type(error).__name__])[0]
    said = re.sub(r"^\[[^\]]*\]\s*", "", said).partition(". ")[0][:200]  # without the place in gloo's source
    return RanksError(
        f"rank {team.rank} of {team.size} lost another one, which ended or cannot be reached ({said}): start "
        "all of them again; with --checkpoint DIR --resume they go on from the last checkpoint"
    )


def together(work: Workload) -> Workload:
    """The workload as the team trains it: batch norms with the statistics of all ranks' images."""
    from rowtune.graph.training import with_loss
    from rowtune.importers.synced import has_statistics, share_statistics
    from rowtune.train import ranks
    from rowtune.tune.step import plain_graph

    if not ranks.several() or not has_statistics(work.traced):
        return work
    share_statistics(work.module)
    graph = replace(plain_graph(work.module, work.problem.inputs), device=work.graph.device)
    return replace(work, traced=graph, graph=with_loss(graph, work.loss))
