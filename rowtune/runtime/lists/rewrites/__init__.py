"""Listing -> listing: one short file each, in this order. All of them keep every bit."""

from __future__ import annotations

from collections.abc import Callable

from rowtune.runtime.lists.listing import Listing, check
from rowtune.runtime.lists.rewrites import dead, shared

REWRITES: tuple[Callable[[Listing], Listing], ...] = (shared.rewrite, dead.rewrite)


def rewritten(listing: Listing) -> Listing:
    """The listing after all of them."""
    for rewrite in REWRITES:
        listing = check(rewrite(listing))
    return listing
