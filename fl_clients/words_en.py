"""The English words of a job (plain_words.py)."""

from fl_clients.contract import Receiver, ReleaseName, Role
from fl_clients.job_facts import JobFacts, Side, epsilon_text, short_fingerprint
from fl_clients.policy import Objection

_ROLE: dict[Role, str] = {"bank": "bank, label holder", "pboc": "PBOC, feature owner", "public_credit": "public credit"}
_WHO: dict[Receiver, str] = {"coordinator": "the coordinator", "banks": "the banks", "owners": "the feature owners"}


def lines(facts: JobFacts) -> tuple[str, ...]:
    """Everything about the job, line by line."""
    return (*_who(facts), *_columns(facts), *_flows(facts), *_cost(facts), *_terms(facts), *_leaks(facts))


def objections(found: tuple[Objection, ...]) -> tuple[str, ...]:
    if not found:
        return ("Your policy has no objection.",)
    return (f"Your policy objects ({len(found)}); it cannot be approved so:", *(f"  - {item}" for item in found))


def _who(facts: JobFacts) -> list[str]:
    contract = facts.contract
    kind = "a SIMULATION" if contract.simulation else "a deployed job"
    out = [
        f"Job {contract.job}, contract {contract.hash.hex()[:16]}: {kind}.",
        f"Asked by the coordinator with the key {short_fingerprint(contract.coordinator_identity)}; compare it by "
        "telephone.",
        f"Purpose: {contract.purpose}. Scenario: {contract.scenario}.",
        f"What the model predicts: {contract.label.definition} (SHA-256 {contract.label.hash[:16]}).",
        f"Parties ({len(contract.parties)}):",
    ]
    for party in contract.parties:
        you = ", that is you" if party == facts.terms else ""
        out.append(f"  - {party.name} ({_ROLE[party.role]}{you}), key {short_fingerprint(party.identity)}")
    return out


def _columns(facts: JobFacts) -> list[str]:
    out = [f"Of your data {len(facts.columns)} columns are used, row by row inside your own vault only:"]
    for column in facts.columns:
        level = "NO LEVEL" if column.level is None else f"level {column.level}"
        personal = ", PERSONAL INFORMATION" if column.personal else ""
        out.append(f"  - {column.name}{' ' + column.zh if column.zh else ''} ({column.kind}, {level}{personal})")
    if facts.side == "bank":
        out.append("Also used: the label of each of your customers, as above.")
    out.append(
        "Only enterprises with a live consent for this purpose take part, at most "
        f"{facts.terms.most_enterprises} of yours."
    )
    return out


def _flows(facts: JobFacts) -> list[str]:
    out = ["What leaves your institution:"]
    for release, receivers in facts.leaves():
        out.append(f"  - to {', '.join(_WHO[one] for one in receivers)}: {_leaving(facts, release)}")
    out.append("  - to whoever carries the messages, the coordinator too: their sizes and times; contents are sealed")
    out.append("What you receive:")
    out.extend(f"  - {_arriving(facts, release)}" for release in facts.arrives())
    out.append("Raw rows, labels and features never leave; no message of the protocol can carry them.")
    return out


def _noised(facts: JobFacts) -> str:
    return "EXACT, without noise" if facts.contract.privacy.epsilon is None else "with noise for epsilon"


def _leaving(facts: JobFacts, release: ReleaseName) -> str:
    contract, noised = facts.contract, _noised(facts)
    both: dict[ReleaseName, str] = {
        "row_counts": "your number of rows or the rounded size of your list, and your public keys of this job",
        "model_digest": "a salted hash of your part of the model",
    }
    own: dict[Side, dict[ReleaseName, str]] = {
        "bank": {
            "alignment": "which of their own enterprises are your customers; the size of your list, rounded up to a "
            f"multiple of {contract.alignment.bucket}",
            "bank_sums": f"counts and sums of the bank columns and of the line search, over all banks, {noised}",
            "owner_sums": "sums of the residuals in each owner's own bins, over all banks, "
            f"{noised}; step sizes, base rate",
            "score_histogram": f"histogram of scores by label, over all banks, {noised}",
        },
        "owner": {
            "alignment": "which of their own customers you know; the size of your list, rounded up to a multiple of "
            f"{contract.alignment.bucket}",
            "directions": f"in each of {contract.model.rounds} rounds, for their own customers, the sum over all "
            f"owners of the change of score, with noise of {contract.model.forward_noise:g} standard deviations; your "
            "number of bins",
            "scores": "for their own customers that are scored, the EXACT sum over all owners of the score parts",
        },
    }
    return both.get(release) or own[facts.side][release]


def _arriving(facts: JobFacts, release: ReleaseName) -> str:
    contract, noised = facts.contract, _noised(facts)
    mates = "your customers an owner knows" if facts.side == "bank" else "your enterprises are a bank's customers"
    texts: dict[ReleaseName, str] = {
        "row_counts": "everybody's row counts and public keys",
        "alignment": f"which of {mates}",
        "bank_sums": f"the bank columns' counts and sums over all banks, {noised}, and the bank part of the model",
        "owner_sums": f"sums of residuals in your own bins over all banks, {noised}; step sizes, base rate",
        "directions": f"noised sums over all owners of the change of score of your customers, {contract.model.rounds} "
        "rounds",
        "scores": "the exact score of your scored customers, summed over all owners",
        "score_histogram": f"the histogram of scores over all banks, {noised}",
    }
    return texts[release]


def _cost(facts: JobFacts) -> list[str]:
    privacy, uses = facts.contract.privacy, facts.contract.uses
    limit = "no limit (simulation)" if facts.limit is None else f"{facts.limit:g}"
    if facts.side == "owner":
        epsilon = "no epsilon" if privacy.epsilon is None else f"epsilon {privacy.epsilon:g}"
        return [
            f"Epsilon: the banks' records have {epsilon} in each use. YOUR FEATURES HAVE NO EPSILON: what is counted "
            "is how often an enterprise's score is opened.",
            f"Score openings of one enterprise: up to {facts.openings} in this job, at most {facts.most_openings} over "
            "all jobs.",
        ]
    if privacy.epsilon is None:
        return ["Epsilon: NONE. The sums are exact; a bin whose rows have one label reveals it. Simulation only."]
    left = limit if facts.left is None else f"{facts.left:.3g}"
    return [
        f"Epsilon asked: {privacy.epsilon:g} in each of {uses} uses, {epsilon_text(facts.asked, 'infinite')} together "
        f"at your delta {facts.delta:.3g}; the unit is one enterprise at up to {privacy.banks_per_enterprise} banks.",
        f"Epsilon already spent: {epsilon_text(facts.spent, 'infinite')}; left: {left} of {limit}; after this job "
        f"about {epsilon_text(facts.after, 'infinite')} (the ledger composes exactly when a use begins).",
    ]


def _terms(facts: JobFacts) -> list[str]:
    contract = facts.contract
    model, he = contract.model, contract.he
    return [
        f"May be run {contract.uses} times, from {contract.not_before:%Y-%m-%d %H:%M} to "
        f"{contract.expires:%Y-%m-%d %H:%M} UTC; models may be kept {contract.retention_days} days after that. Keys, "
        "pads and alignments are destroyed at the end of each use.",
        f"Model: additive scorecard, {model.rounds} rounds, at most {model.max_bins_bank} bins of a bank column and "
        f"{model.max_bins_owner} of an owner's; categories under {model.least_count} rows are merged.",
        f"Encryption: at least {he.security_bits} bits of security, {he.flooding_bits} bits of flooding; weaker is "
        "refused.",
        f"If a bank drops out: goes on with {contract.least_banks} banks or more, {contract.privacy.spare_attempts} "
        "repetitions paid for in advance.",
    ]


def _leaks(facts: JobFacts) -> list[str]:
    leaks = [*_leaks_of_numbers(facts), *(_leaks_of_bank(facts) if facts.side == "bank" else _leaks_of_owner(facts))]
    leaks += [
        "Membership: alignment itself tells both sides which enterprises they have in common.",
        "All parties are assumed to follow the protocol. The coordinator can shift a sum for all banks alike and is "
        "not found: the model is then wrong.",
        "Encrypted or noised results are not anonymous data; they fall under the consent and the purpose.",
    ]
    if facts.contract.alignment.one_sided:
        leaks.append(
            "One-sided alignment is allowed: an owner publishes keyed values of its list, the same to several banks, "
            "which can compare them."
        )
    if any(column.personal for column in facts.columns):
        leaks.append("Columns with personal information: separate consent of the person is needed (PIPL art. 23).")
    return [f"Known leaks ({len(leaks)}):", *(f"  - {leak}" for leak in leaks)]


def _leaks_of_numbers(facts: JobFacts) -> list[str]:
    banks, leaks = len(facts.contract.banks), []
    if banks == 1:
        leaks.append("One bank: every sum over banks is that bank's own.")
    if banks == 2:
        leaks.append("Two banks: each can subtract itself from a sum and sees the other's; secrecy needs three.")
    if facts.only_owner:
        leaks.append("One feature owner: the banks see its score up to a constant; a second owner would hide it.")
    return leaks


def _leaks_of_bank(facts: JobFacts) -> list[str]:
    banks, colluding = len(facts.contract.banks), facts.colluding
    leaks = [
        "Collusion: all other banks together can subtract themselves; the noise holds against "
        f"{colluding} of {banks} banks.",
        "A bin, or an owner, whose customers are all yours shows your own sum, with the noise of all.",
        "A malicious owner that computes with other numbers than 0 and 1 can read single residuals through the noise, "
        "or use you as a decryption oracle for your key of this job.",
        "Replacing an enterprise, instead of leaving it out, costs twice the epsilon.",
    ]
    if facts.contract.privacy.epsilon is None:
        leaks.append("No epsilon: with small data an owner learns many of your labels for certain.")
    return leaks


def _leaks_of_owner(facts: JobFacts) -> list[str]:
    return [
        "The final score is exact: it tells a bank something about every enterprise it scores, and a bank with many "
        "customers can regress it on what it knows. That is its purpose; consent, purpose and few scorings bound it.",
        "An enterprise that no other owner knows: the bank gets your score of it up to a constant.",
        f"Noise in training is a heuristic: {facts.contract.model.rounds} rounds each show a noised sum, and banks can "
        "average over customers.",
        "A malicious bank with a false key, or too much noise in its ciphertext, reads where your bins have ones.",
        "The banks learn how many bins you have and which of their customers have no file with you.",
    ]
