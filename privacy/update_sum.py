"""Model updates in a secure sum: weighted, quantised, noised, packed; their average at the banks, exactly as in clear.

Guarantee (semi-honest): that of `privacy.secure_sum`; what a bank opens is the sum over the participants of
weight x update (quantised, with all banks' noise shares) and of the weights and counts. Nobody sees one bank's part.
Overflow is refused beforehand: `choose_update` fits `banks` additions and 12 standard deviations of noise into t.
    grid = clip largest_weight / largest_value           (real units of weight x update, of one step)
    q_b  = floor(weight_b update_b / grid + u), u uniform in [0, 1)      (stochastic rounding, unbiased)
    average = grid sum_b(q_b + noise_b) / sum_b weight_b
Rounding error of the average, a coordinate: standard deviation at most grid sqrt(banks) / (2 sum of weights).
Noise shares (one step of FedSGD, per-record clipping to L2 norm C): one record moves the sum by at most
C / grid + sqrt(length) grid units, since rounding with the same u moves each coordinate by less than 1 more.
Source: stochastic rounding as in Gupta et al. 2015; distributed discrete Gaussian of Kairouz, Liu, Steinke 2021 (with
the worst-case rounding term in place of their conditional rounding); packing as BatchCrypt (Zhang et al. 2020), exact.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from privacy import secure_sum
from privacy.errors import Refused
from privacy.masks import stream
from privacy.noise import LEAST_SHARE_STD, share_std
from privacy.parameters import BFVParameters, choose_sum

Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]
UInt64 = npt.NDArray[np.uint64]

LEAST_LARGEST_VALUE = 63
"""Grid steps from 0 to the clip that a single update must keep (7 bits with sign); with fewer the sum is `Refused`."""

NOISE_TAIL = 12


@dataclass(frozen=True, kw_only=True)
class NoiseShares:
    """Distributed noise of one-step FedSGD. `record_l2_clip`: L2 norm to which each record's gradient was clipped, in
    units of the update; `noise_multiplier`: std over L2 sensitivity, of what remains when `colluding` banks take
    theirs off; `least_banks`: fewest participants that the noise must fit for."""

    record_l2_clip: float
    noise_multiplier: float
    colluding: int
    least_banks: int

    def __post_init__(self) -> None:
        if not (0 < self.record_l2_clip < math.inf and 0 < self.noise_multiplier < math.inf):
            raise Refused(
                f"noise shares with record_l2_clip={self.record_l2_clip:g} and "
                f"noise_multiplier={self.noise_multiplier:g}; both must be finite and above 0"
            )
        share_std(1.0, self.least_banks, self.colluding)


@dataclass(frozen=True, kw_only=True)
class UpdatePlan:
    """What all banks of a job must agree on to add their updates. Made by `choose_update` only.

    `length`: values of an update (0: counts only); `largest_value`: of one bank's quantised value; `largest_sum`: of
    their sum with noise; `counts`: integers that are summed beside the update, each at most `largest_count` a bank.
    """

    banks: int
    length: int
    clip: float
    largest_weight: int
    counts: int
    largest_count: int
    largest_value: int
    largest_sum: int
    noise: NoiseShares | None
    parameters: BFVParameters

    @property
    def grid(self) -> float:
        """Units of weight x update, of one step of the integers."""
        return self.clip * self.largest_weight / self.largest_value

    @property
    def largest_side_sum(self) -> int:
        """Bound of the sums of weights and counts."""
        return self.banks * max(self.largest_weight, self.largest_count)

    @property
    def coefficients(self) -> int:
        """Residues modulo t of one contribution: the length of its mask, without a check value."""
        return secure_sum.packed_length(self.length, self.largest_sum, self.parameters) + secure_sum.packed_length(
            1 + self.counts, self.largest_side_sum, self.parameters
        )

    @property
    def sensitivity(self) -> float:
        """Grid units: most that one record moves the sum, in L2 norm, worst-case rounding included."""
        if self.noise is None:
            raise Refused("this plan has no noise shares, so no sensitivity is known; the claim is each bank's own")
        return self.noise.record_l2_clip / self.grid + math.sqrt(self.length)

    def share_std(self, participants: int) -> float:
        """Grid units: standard deviation of one bank's noise share among `participants` banks."""
        noise = self.noise
        if noise is None:
            raise Refused("this plan has no noise shares")
        if participants < noise.least_banks:
            raise Refused(f"{participants} banks share the noise, the plan was made for {noise.least_banks} or more")
        return share_std(noise.noise_multiplier * self.sensitivity, participants, noise.colluding)


def choose_update(
    *,
    banks: int,
    length: int,
    clip: float,
    largest_weight: int,
    values_per_coefficient: int = 2,
    noise: NoiseShares | None = None,
    counts: int = 0,
    largest_count: int = 0,
) -> UpdatePlan:
    """The finest grid on which `banks` updates and their noise add up without overflow.

    `length`: values of an update, 0 or more; `clip`: largest magnitude of one; `largest_weight`: of a bank (rows);
    `values_per_coefficient`: 1 to 3 (2: sums of 24 bits, 4.1 bytes a value; 3: sums of 16 bits, 2.7 bytes; up to 520
    banks, some bits fewer above). `Refused`: anything that would overflow after `banks` additions, or leave a single
    update fewer than LEAST_LARGEST_VALUE steps, or a noise share below LEAST_SHARE_STD.
    """
    if banks < 2 or length < 0 or not 0 < clip < math.inf or largest_weight < 1 or min(counts, largest_count) < 0:
        raise Refused(
            f"no sum of updates for {banks=} {length=} {clip=} {largest_weight=} {counts=} {largest_count=}; at least "
            "2 banks, a finite clip above 0 and a weight of 1 or more are needed"
        )
    if length == 0 and counts == 0:
        raise Refused("neither an update nor counts to be summed; give a length or a number of counts")
    if not 1 <= values_per_coefficient <= 3:
        raise Refused(f"{values_per_coefficient} values in a coefficient; 1, 2 or 3 are supported")
    parameters = choose_sum(parties=banks)
    # 53 bits: quantised values stay exact in floating point
    width = min(parameters.log_t // values_per_coefficient, 52)
    largest_sum = (1 << (width - 1)) - 1
    if noise is None:
        largest_value = largest_sum // banks
    else:
        # all shares together exceed the total by sqrt(m / (m - c)), most at the fewest participants
        tail = NOISE_TAIL * noise.noise_multiplier * math.sqrt(noise.least_banks)
        tail /= math.sqrt(noise.least_banks - noise.colluding)
        per_value = tail * noise.record_l2_clip / (clip * largest_weight)
        largest_value = math.floor((largest_sum - tail * math.sqrt(length) - 1) / (banks + per_value))
    if largest_value < LEAST_LARGEST_VALUE:
        raise Refused(
            f"{banks} updates{' with their noise' if noise else ''} in sums of {width} bits leave {largest_value} "
            f"steps for one value, the limit is {LEAST_LARGEST_VALUE}: they would overflow; put fewer values into a "
            f"coefficient than {values_per_coefficient}, or lower the noise"
        )
    plan = UpdatePlan(
        banks=banks,
        length=length,
        clip=clip,
        largest_weight=largest_weight,
        counts=counts,
        largest_count=largest_count,
        largest_value=largest_value,
        largest_sum=largest_sum,
        noise=noise,
        parameters=parameters,
    )
    secure_sum.packed_length(1 + counts, plan.largest_side_sum, parameters)  # refuses weights or counts too large
    if noise is not None and plan.share_std(banks) < LEAST_SHARE_STD:
        raise Refused(
            f"noise shares of {plan.share_std(banks):.2g} grid units are below {LEAST_SHARE_STD:g}; put fewer values "
            "into a coefficient, or raise the noise multiplier"
        )
    return plan


def clip_l2(update: Float64, l2_clip: float) -> Float64:
    """The update scaled down to L2 norm `l2_clip` where it is longer. float64[any], same units. NaN passes through."""
    norm = float(np.linalg.norm(update))
    return update * (l2_clip / norm) if norm > l2_clip else update


def quantise(update: Float64, weight: int, plan: UpdatePlan, rounding_key: bytes) -> Int64:
    """weight x update in grid steps, stochastically rounded: int64[length], magnitude at most `plan.largest_value`.

    `rounding_key`: 32 bytes, one for each bank and round; the same key gives the same integers on every machine (so a
    rerun of a round sums the same values). `Refused`, before anything is encrypted: another shape, NaN or infinite
    values, a value beyond `plan.clip`, a weight outside 1..`plan.largest_weight`. Messages hold no value.
    """
    if update.shape != (plan.length,):
        raise Refused(f"an update of shape {update.shape}, the job's model has {plan.length} values; check the model")
    if not 1 <= weight <= plan.largest_weight:
        raise Refused(f"a weight outside 1..{plan.largest_weight}; the terms bound the rows of a bank")
    high, low = float(update.max(initial=0.0)), float(update.min(initial=0.0))  # NaN if any is
    if not (math.isfinite(high) and math.isfinite(low)):
        places = int(np.count_nonzero(~np.isfinite(update)))
        raise Refused(f"{places} of {plan.length} values of the update are not finite; lower the learning rate")
    if max(high, -low) > plan.clip:
        places = int(np.count_nonzero(np.abs(update) > plan.clip))
        raise Refused(
            f"{places} of {plan.length} values of the update are beyond the clip {plan.clip:g}; give l2_clip, or agree "
            "on a larger clip"
        )
    # in place: a million values are bound by memory
    rounded = stream(rounding_key, -(-plan.length // 2)).view(np.uint32)[: plan.length] * 2.0**-32
    rounded += update * (weight / plan.grid)
    np.floor(rounded, out=rounded)
    # weight x clip / grid may be a last bit above largest_value
    np.clip(rounded, -plan.largest_value, plan.largest_value, out=rounded)
    return rounded.astype(np.int64)


@dataclass(frozen=True, kw_only=True)
class Contribution:
    """SECRET. One bank's integers: `values` int64[length] (quantised, noise share added), weight, int64[counts]."""

    values: Int64
    weight: int
    counts: Int64

    def __repr__(self) -> str:
        return f"Contribution({len(self.values)} values, {len(self.counts)} counts, secret)"


@dataclass(frozen=True, kw_only=True)
class OpenedSum:
    """The sum over the participants: `values` int64[length] in grid steps, their `weight`, `counts` int64[counts]."""

    values: Int64
    weight: int
    counts: Int64

    def average(self, plan: UpdatePlan) -> Float64:
        """The weighted average of the updates, float64[length]; bit-equal at every bank and in the plaintext twin."""
        if self.weight < 1:
            raise Refused("the weights of the participants add up to nothing; no average can be taken")
        average: Float64 = self.values.astype(np.float64) * (plan.grid / self.weight)
        return average


def packed(contribution: Contribution, plan: UpdatePlan) -> UInt64:
    """Residues modulo t, uint64[plan.coefficients], ready for the mask. Out-of-bound counts or shapes: `Refused`."""
    counts = contribution.counts
    if contribution.values.shape != (plan.length,) or counts.shape != (plan.counts,):
        raise Refused(
            f"a contribution of {contribution.values.shape} values and {counts.shape} counts, the plan has "
            f"{plan.length} and {plan.counts}"
        )
    if counts.size and (int(counts.max()) > plan.largest_count or int(counts.min()) < -plan.largest_count):
        raise Refused(f"a count is beyond the bound {plan.largest_count} of the terms; the terms must allow more")
    side = np.concatenate([np.array([contribution.weight], np.int64), counts])
    return np.concatenate(
        [
            secure_sum.pack(contribution.values, plan.largest_sum, plan.parameters),
            secure_sum.pack(side, plan.largest_side_sum, plan.parameters),
        ]
    )


def unpacked(opened: UInt64, plan: UpdatePlan) -> OpenedSum:
    """The sums back from the opened residues, uint64[plan.coefficients]; out of their bounds: `Refused`."""
    middle = secure_sum.packed_length(plan.length, plan.largest_sum, plan.parameters)
    values = secure_sum.unpack(opened[:middle], plan.length, plan.largest_sum, plan.parameters)
    side = secure_sum.unpack(opened[middle:], 1 + plan.counts, plan.largest_side_sum, plan.parameters)
    return OpenedSum(values=values, weight=int(side[0]), counts=side[1:])


def sum_updates(contributions: Sequence[Contribution], masks: Sequence[UInt64], plan: UpdatePlan) -> OpenedSum:
    """The whole primitive among banks in one process; `masks` (uint64[plan.coefficients] each) cancel modulo t.

    Same signature as its plaintext twin `sum_updates_in_the_clear`, same integers.
    """
    key = secure_sum.ConsortiumKey(plan.parameters)
    modulus = np.uint64(plan.parameters.mask)
    encrypted = [
        key.encrypt((packed(contribution, plan) + mask) & modulus)
        for contribution, mask in zip(contributions, masks, strict=True)
    ]
    return unpacked(key.open(secure_sum.add_ciphertexts(encrypted, plan.parameters), plan.coefficients), plan)


def sum_updates_in_the_clear(
    contributions: Sequence[Contribution], masks: Sequence[UInt64], plan: UpdatePlan
) -> OpenedSum:
    """Plaintext twin of `sum_updates`; the masks are not used."""
    del masks, plan
    if not contributions:
        raise Refused("no bank contributes anything")
    return OpenedSum(
        values=np.sum([part.values for part in contributions], axis=0, dtype=np.int64),
        weight=sum(part.weight for part in contributions),
        counts=np.sum([part.counts for part in contributions], axis=0, dtype=np.int64),
    )
