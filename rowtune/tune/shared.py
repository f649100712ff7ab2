"""One study that any number of processes and machines work on, through Optuna's own storages.

What was measured of a plan is an attribute of its trial, so whoever opens the study knows all of it. A plan
that is being measured is claimed by its trial's other attributes, and left alone by everyone else.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import platform
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import optuna
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from rowtune.errors import UsageError
from rowtune.tune.records import PLAIN, Record

TRIES = 10
"""To open a database whose tables another process is making."""
CLAIM_HOURS = 6
"""A claim of another machine that is older is of a process that died."""
KINDS = "journal:FILE, grpc://HOST:PORT, sqlite:///FILE or postgresql://USER@HOST/DATABASE"
"""Storages that an address may name."""


def open_storage(url: str) -> optuna.storages.BaseStorage:
    """Optuna's storage at an address.

    Raises:
        UsageError: there is no such storage, or its driver is not installed.
    """
    kind, _, rest = url.partition(":")
    try:
        if kind == "journal":
            backend = JournalFileBackend(rest.removeprefix("//"))
            return optuna.storages.JournalStorage(backend)
        if kind == "grpc":
            at = urlsplit(url)
            with warnings.catch_warnings():  # Optuna calls it experimental
                warnings.simplefilter("ignore")
                return optuna.storages.GrpcStorageProxy(
                    host=at.hostname or "localhost", port=at.port or 13000
                )
        if "://" in url:
            return _database(url.replace("postgresql://", "postgresql+psycopg://", 1))
    except ImportError as error:
        raise UsageError(
            f"--storage {_shown(url)} needs a driver that is not installed ({error}): pip install "
            "'rowtune[storage]'"
        ) from error
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UsageError(f"--storage {_shown(url)} cannot be opened: {reason}") from error
    raise UsageError(f"--storage is {KINDS}, not {url!r}")


def _database(url: str) -> optuna.storages.BaseStorage:
    """Two processes that come to an empty database at once both make its tables; the later looks again."""
    for _ in range(TRIES - 1):
        try:
            return optuna.storages.RDBStorage(url)
        except Exception as error:
            if "already exists" not in str(error):
                raise
        time.sleep(0.5)
    return optuna.storages.RDBStorage(url)


def _shown(url: str) -> str:
    """Without a password."""
    password = urlsplit(url).password if "://" in url else None
    return url.replace(f":{password}@", ":***@") if password else url


class Shared:
    """A study by its name at an address, made where there is none.

    Args:
        identity: what must be equal for measurements to be compared: the device's kind, torch's version.

    Raises:
        UsageError: it cannot be opened, or was measured on another kind of device.
    """

    def __init__(self, url: str, name: str, identity: Mapping[str, Any]) -> None:
        self.storage = open_storage(url)
        with _reached(url):
            self.study = optuna.create_study(
                storage=self.storage, study_name=name, direction="minimize", load_if_exists=True,
                sampler=optuna.samplers.TPESampler(),
            )  # fmt: skip
            if "identity" not in self.study.user_attrs:
                self.study.set_user_attr("identity", dict(identity))
            theirs = self.study.user_attrs["identity"]
        for key, ours in identity.items():
            if theirs.get(key) != ours:
                raise UsageError(
                    f"the study at --storage {_shown(url)} is measured with {key} {theirs.get(key)}, and "
                    f"this is {ours}: their times cannot be compared; give machines of another kind another "
                    "--storage, or take part from one like that"
                )
        self.me = f"{platform.node()}:{os.getpid()}"
        self._heard: set[int | str] = set()

    def news(self) -> Iterator[tuple[Record, bool]]:
        """Records of all processes, this one's too, that were not seen yet, and whether they were measured
        in another study."""
        attributes = self.study.user_attrs
        for key in [k for k in attributes if k.startswith("record ") and k not in self._heard]:
            self._heard.add(key)
            yield Record(**json.loads(attributes[key])), False
        for trial in self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
            if trial.number not in self._heard:
                self._heard.add(trial.number)
                if "record" in trial.user_attrs:
                    yield Record(**json.loads(trial.user_attrs["record"])), "inherited" in trial.user_attrs

    def claim(self, trial: optuna.Trial, digest: str) -> bool:
        """Take a plan for this process; False where another one measures it, or has since `news`. Where two
        want it at once neither may get it, never both."""
        trial.set_user_attr("worker", self.me)
        trial.set_user_attr("digest", digest)
        others = self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING, TrialState.COMPLETE))
        return not any(
            self._alive(t) if t.state == TrialState.RUNNING else t.number not in self._heard
            for t in others
            if t.number != trial.number and t.user_attrs.get("digest") == digest
        )

    def publish(self, trial: optuna.Trial, record: Record) -> None:
        """What a trial gave; before it is told how it ended."""
        for key, value in as_attribute(record).items():
            trial.set_user_attr(key, value)
        self._heard.add(trial.number)

    def announce(self, record: Record) -> None:
        """What was measured outside of trials: plain PyTorch, finalists."""
        name = record.digest if record.digest == PLAIN else f"{record.digest} {record.effort} {self.me}"
        self._heard.add(key := f"record {name}")
        self.study.set_user_attr(key, json.dumps(asdict(record)))

    def _alive(self, trial: FrozenTrial) -> bool:
        """Whether the process that claims a plan is still at it, as far as this one can know."""
        worker = str(trial.user_attrs.get("worker", ""))
        host, _, number = worker.rpartition(":")
        if host == platform.node():
            return worker != self.me and _runs(int(number))
        started = trial.datetime_start
        day = datetime.timedelta(hours=CLAIM_HOURS)
        return started is not None and datetime.datetime.now() - started < day


def as_attribute(record: Record) -> dict[str, str]:
    """A record as a trial holds it, with what a person looks at in a dashboard."""
    shown = {"status": record.status, "reason": record.reason} if not record.ok else {"status": "ok"}
    return {**shown, "record": json.dumps(asdict(record))}


def _runs(process: int) -> bool:
    with contextlib.suppress(ProcessLookupError):
        try:
            os.kill(process, 0)
        except PermissionError:
            pass
        return True
    return False


@contextlib.contextmanager
def _reached(url: str) -> Iterator[None]:
    """A storage may be opened and still not be there."""
    try:
        yield
    except UsageError:
        raise
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UsageError(f"--storage {_shown(url)} cannot be used: {reason}") from error


def journal_beside(out: Path) -> Path:
    """The journal of a search whose workers are all here."""
    return out.with_name(f"{out.stem}.journal")
