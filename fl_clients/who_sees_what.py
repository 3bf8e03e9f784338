"""The who-sees-what table (DESIGN section 4) as it holds for one contract, and what becomes visible with few parties.

Every cell is tested on the transcript of a whole run (tests/test_transcript.py); docs/threat-model.md says the rest.
"""

from fl_clients.contract import Contract


def table(contract: Contract) -> tuple[dict[str, str], ...]:
    """Rows of what / coordinator / label holder / feature owner / others."""
    noised = "noised" if contract.privacy.epsilon is not None else "EXACT (no epsilon: simulation only)"
    rounds = contract.model.rounds
    several = len(contract.owners) > 1
    scores = "noised sum over owners of each round's direction" if several else "the ONE owner's noised direction"
    return (
        _row("raw rows of another party", "no", "no", "no", "no"),
        _row(
            "labels, residuals of a bank",
            "no",
            "own",
            f"sums over banks in own bins, {noised}; step sizes, base rate, row counts",
            f"other banks: pooled bin counts and sums of the bank columns, step-size sums, {noised}",
        ),
        _row("an owner's features, bins, weights", "no", "number of bins, known rows", "own", "no"),
        _row(
            "scores",
            "no",
            f"{scores}, own customers, {rounds} rounds; exact sum at scoring",
            "own part",
            "no",
        ),
        _row("bank tower", "no", "yes, shared by the banks", "no", "no"),
        _row(
            "customer lists",
            "counts only",
            "own, and which are known to an owner",
            "which of its enterprises are a bank's customers",
            "no",
        ),
        _row("metrics", f"pooled score histogram, {noised}", "same", "no", "what the parties publish"),
    )


def _row(what: str, coordinator: str, label_holder: str, feature_owner: str, others: str) -> dict[str, str]:
    return {
        "what": what,
        "coordinator": coordinator,
        "label holder": label_holder,
        "feature owner": feature_owner,
        "others": others,
    }


def warnings(contract: Contract) -> tuple[str, ...]:
    """What becomes visible because of few parties or of no epsilon; one line each."""
    lines = []
    if len(contract.owners) == 1:
        lines.append("one feature owner: banks see that owner's scores up to a constant; a second owner hides them")
    if len(contract.banks) == 1:
        lines.append("one bank: every sum over banks is that bank's own")
    if len(contract.banks) == 2:
        lines.append("two banks: each can subtract itself from a sum and learn the other's; secrecy needs three")
    if contract.privacy.epsilon is None:
        lines.append("no epsilon: sums are exact and a bin whose rows have one label reveals it; simulation only")
    return tuple(lines)
