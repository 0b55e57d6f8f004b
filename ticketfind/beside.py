"""What two runs say that one cannot, as a recipe has one dropout rate: the paper's claim 11. No files, no torch."""

from ticketfind import claims
from ticketfind.claims import Claim, Findings, Part

RATES = ("dropout", "drop_rate")
"""Arguments of networks that are dropout rates: ours, timm's."""


def dropout_adds_up(dropped: Findings, plain: Findings, rate: float) -> Claim:
    """Claim 11 (arXiv 1803.03635, section 3): dropout helps the dense network, pruning helps on top of that, and both
    together do better than pruning alone.

    dropped, plain: the same search with dropout at `rate` and without. The two best rounds are compared with a
    correction for having been chosen (Bonferroni).
    """
    runs = (dropped, plain)
    if any(len(found.rounds) < 2 for found in runs):
        return claims.claim_of(11, "one of the two runs has no finished pruned round: ticketfind search goes on")
    if min(r.stats.replicates for found in runs for r in found.rounds) < 2:
        return claims.claim_of(11, claims.ONE)
    (top, rises), (other, _) = claims.hill(dropped), claims.hill(plain)
    helps = claims.compared(dropped.rounds[0].stats, plain.rounds[0].stats, plain)
    level = 1 - 0.05 / sum(len(found.rounds) - 1 for found in runs)
    both = claims.compared(top.stats, other.stats, plain, level=level)
    assert helps is not None and both is not None
    return claims.claim_of(
        11,
        [
            Part(claims.above(helps), f"dropout of {rate:g} changes the dense network by {claims.points(helps)}"),
            Part(rises.shown, f"pruned with dropout, {rises.figures}"),
            Part(
                claims.above(both),
                f"that is {claims.points(both)} from the highest without dropout, at {claims.share(other.remaining)},"
                " corrected too",
            ),
        ],
    )
