"""Profiles of devices that were measured before, in the user's cache folder."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from rowtune.cost.profile import Profile, load
from rowtune.errors import PlanError, UsageError
from rowtune.plan.file import write_text
from rowtune.runtime.blank import Signature
from rowtune.tune.device import device_name
from rowtune.tune.space import Calibrate

Measure = Callable[[Mapping[Signature, float], Profile | None, float], Profile | None]


def folder() -> Path:
    """Where profiles are kept: $ROWTUNE_CACHE, or rowtune/ in the system's cache folder for this user."""
    own = os.environ.get("ROWTUNE_CACHE")
    system = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(own) if own else system / "rowtune"


def profile_path(device: str) -> Path:
    """One file for each device, number of threads and version of torch: times of others do not hold."""
    name = device_name(device)
    key = f"{name} {torch.get_num_threads() if device == 'cpu' else 0} {torch.__version__}"
    return folder() / f"profile-{hashlib.sha256(key.encode()).hexdigest()[:12]}.json"


def known(device: str) -> Profile | None:
    """What was measured of this device before."""
    with contextlib.suppress(PlanError, OSError):
        return load(profile_path(device))
    return None


def shipped() -> dict[str, Path]:
    """Profiles that come with rowtune, by the name of their file: those of its repository."""
    place = Path(__file__).resolve().parents[2] / "profiles"
    return {path.stem: path for path in sorted(place.glob("*.json"))}


def chosen(text: str) -> Profile:
    """By file, or by name of one that comes with rowtune.

    Raises:
        UsageError: there is none.
        PlanError: the file is no profile.
    """
    here = shipped()
    path = here.get(text, Path(text))
    if not path.exists():
        names = ", ".join(here) or "none"
        raise UsageError(f"--device-profile {text}: no such file, and of those shipped ({names}) none")
    return load(path)


def remember(device: str, profile: Profile) -> None:
    """Keep a profile for the next search; a cache that cannot be written is none."""
    with contextlib.suppress(OSError):
        path = profile_path(device)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(profile.to_dict()) + "\n")


def calibration(device: str, measure: Measure) -> Calibrate:
    """Times calls that the cache does not know, and keeps them there."""

    def calibrate(work: Mapping[Signature, float], seconds: float) -> Profile:
        before = known(device)
        made = measure(work, before, seconds)
        if made is not None:
            remember(device, made)
        return made or before or Profile()

    return calibrate
