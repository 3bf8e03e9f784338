"""The server's optimisers as pure functions, run at every bank on the opened average: all reach the same bits.

    state = step(state, average)      state: {"vector": float64[n], moments...}, average: float64[n]
Formulas (Reddi et al. 2021, Algorithm 2, without bias correction), d the average update, elementwise:
    FedAvg   w += d
    FedAdam  m = b1 m + (1 - b1) d;  v = b2 v + (1 - b2) d^2;                    w += rate m / (sqrt(v) + tau)
    FedYogi  m as above;             v = v - (1 - b2) d^2 sign(v - d^2);         w += rate m / (sqrt(v) + tau)
with m = 0 and v = tau^2 at the start. An average of zeros (no bank trained) leaves the state as it is.
Only +, *, sqrt and sign of IEEE 754 are used: each is correctly rounded, so banks with different CPUs agree.
"""

from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt

Float64 = npt.NDArray[np.float64]
State = Mapping[str, Float64]
Step = Callable[[State, Float64], State]

RATE = 0.01
FIRST_DECAY = 0.9
SECOND_DECAY = 0.99
TAU = 1e-3


def fed_avg(state: State, average: Float64) -> State:
    """The average is added; also the server's part of FedProx."""
    return {**state, "vector": state["vector"] + average}


def fed_adam(state: State, average: Float64) -> State:
    """Adam on the average update."""
    return _adaptive(state, average, lambda second, square: SECOND_DECAY * second + (1 - SECOND_DECAY) * square)


def fed_yogi(state: State, average: Float64) -> State:
    """Yogi on the average update: v moves by a bounded step, so it forgets large updates slowly."""
    return _adaptive(
        state, average, lambda second, square: second - (1 - SECOND_DECAY) * square * np.sign(second - square)
    )


def _adaptive(state: State, average: Float64, next_second: Callable[[Float64, Float64], Float64]) -> State:
    if not average.any():
        return state
    first = state.get("first", np.zeros_like(average))
    second = state.get("second", np.full_like(average, TAU * TAU))
    first = FIRST_DECAY * first + (1 - FIRST_DECAY) * average
    second = next_second(second, average * average)
    moved = state["vector"] + RATE * first / (np.sqrt(second) + TAU)
    return {"vector": moved, "first": first, "second": second}
