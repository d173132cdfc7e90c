"""The ledger: what became of each step that was sent.

Every step is in exactly one bucket, or under way: at any instant, of any slot and any farm,
sent == sum of all buckets + under way.
"""

from __future__ import annotations

from collections.abc import Iterable

#: What a farm may say of a step that has no result. The last is also the host's own word, when the farm is gone.
LOST_BUCKETS = ("crashed", "timed out", "invalid", "lost with its farm")
#: What becomes of a step.
BUCKETS = ("done", *LOST_BUCKETS, "abandoned")


def total(ledgers: Iterable[dict[str, int]]) -> dict[str, int]:
    """The sum of ledgers, bucket by bucket."""
    found = dict.fromkeys(("sent", *BUCKETS, "under way"), 0)
    for ledger in ledgers:
        for name, count in ledger.items():
            found[name] += count
    return found
