"""Calls whose results nobody reads. What backward need not compute is known from no table: it is not read."""

from __future__ import annotations

from rowtune.runtime.lists.listing import Listing, is_pure, written


def rewrite(listing: Listing) -> Listing:
    """Keeps calls that make what is read later, or write to memory that is read later or is others'."""
    wanted = set(listing.results)
    read = set(listing.outside())
    kept = []
    for call in reversed(listing.calls):
        made = [v for v in call.makes if v >= 0]
        writes = any(listing.buffer(v) in read for v in written(call))
        if writes or any(v in wanted for v in made) or (not made and is_pure(call.op)):
            kept.append(call)
            wanted.difference_update(made)
            wanted.update(call.reads)
            read.update(listing.buffer(v) for v in call.reads)
    return listing.with_calls(reversed(kept))
