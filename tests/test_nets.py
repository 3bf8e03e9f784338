"""Networks as vectors, local training, server optimisers, and inputs from summed statistics."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models import standardising
from models.binning import ColumnSpec
from models.errors import DataError
from models.local_training import LocalSettings, train
from models.nets import NetKind, NetSpec, from_vector, head_size, initial_vector, net_spec, scores, to_vector
from models.server_optimisers import RATE, TAU, State, Step, fed_adam, fed_avg, fed_yogi
from models.standardising import CELLS, Inputs, first_pass, prepare, second_pass

KINDS: tuple[NetKind, ...] = ("logistic", "mlp", "resnet")
SPECS = (
    ColumnSpec(name="amount", kind="numeric", codes=(-99.0,)),
    ColumnSpec(name="sector", kind="categorical", categories=("a", "b")),
    ColumnSpec(name="year", kind="numeric"),
)


def table(n: int = 600, seed: int = 1) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    amount = np.exp(rng.normal(size=n) * 2 + 9)
    amount[:20] = -99.0
    amount[20:50] = np.nan
    sector = rng.choice(np.array(["a", "b", "unheard of", None], dtype=object), n)
    return {"amount": amount, "sector": sector, "year": rng.integers(1990, 2012, n).astype(np.float64)}


def learnable(n: int = 1500, seed: int = 3) -> tuple[NetSpec, Inputs, np.ndarray]:
    rng = np.random.default_rng(seed)
    numbers, codes = rng.normal(size=(n, 4)).astype(np.float32), rng.integers(0, 3, (n, 1))
    logit = 1.5 * numbers[:, 0] - numbers[:, 1] + np.array([-1.0, 0.0, 1.0])[codes[:, 0]]
    label = (rng.random(n) < 1 / (1 + np.exp(-logit))).astype(np.int8)
    return NetSpec(kind="mlp", numbers=4, code_sizes=(3,)), Inputs(numbers=numbers, codes=codes), label


@pytest.mark.parametrize("kind", KINDS)
def test_a_network_goes_through_its_vector_unchanged_and_its_head_is_the_end(kind: NetKind) -> None:
    _, inputs, _ = learnable()
    spec = NetSpec(kind=kind, numbers=4, code_sizes=(3,))
    vector = initial_vector(spec, 5)
    net = from_vector(spec, vector)
    assert np.array_equal(to_vector(net), vector)
    head = torch.cat([part.reshape(-1) for part in net.head.parameters()]).detach().numpy()
    assert np.array_equal(vector[-head_size(spec) :], head)
    changed = vector.copy()
    changed[-1] += 1.0  # the bias of the head: every logit moves by one
    moved = scores(spec, changed, inputs) - scores(spec, vector, inputs)
    assert np.abs(moved - (1 << 16)).max() <= 1


def test_seeds_decide_and_the_global_generator_is_left_alone() -> None:
    spec = NetSpec(kind="resnet", numbers=4, code_sizes=(3,))
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    first = initial_vector(spec, 5)
    from_vector(spec, first)
    assert torch.equal(torch.rand(3), expected)
    assert np.array_equal(first, initial_vector(spec, 5))
    assert not np.array_equal(first, initial_vector(spec, 6))


@pytest.mark.parametrize("kind", KINDS)
def test_training_learns_and_repeats_to_the_bit(kind: NetKind) -> None:
    _, inputs, label = learnable()
    spec = NetSpec(kind=kind, numbers=4, code_sizes=(3,))
    vector = initial_vector(spec, 5)
    chosen = LocalSettings(passes=10, learning_rate=0.03)
    trained = train(spec, vector, inputs, label, chosen, seed=2)
    assert np.array_equal(trained, train(spec, vector, inputs, label, chosen, seed=2))
    assert not np.array_equal(trained, train(spec, vector, inputs, label, chosen, seed=3))

    def loss(of: np.ndarray) -> float:
        logit = scores(spec, of, inputs) / 65536
        return float(np.mean(np.logaddexp(0, logit) - label * logit))

    assert loss(trained) < 0.55 < loss(vector)


def test_the_number_of_threads_changes_no_bit_and_is_put_back() -> None:
    spec, inputs, label = learnable(6000)
    vector, chosen = initial_vector(spec, 5), LocalSettings(batch_rows=6000, passes=2)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(train(spec, vector, inputs, label, chosen, seed=2))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert np.array_equal(found[0], found[1])


def test_fedprox_holds_the_shared_parameters_back_and_only_those() -> None:
    spec, inputs, label = learnable()
    vector = initial_vector(spec, 5)
    shared = len(vector) - head_size(spec)
    free, held = (
        train(spec, vector, inputs, label, LocalSettings(passes=3, proximal=mu), seed=2, shared=shared) - vector
        for mu in (0.0, 100.0)
    )
    assert np.linalg.norm(held[:shared]) < 0.3 * np.linalg.norm(free[:shared])
    assert np.linalg.norm(held[shared:]) > 0.5 * np.linalg.norm(free[shared:])


def test_bad_rows_vectors_and_settings_are_refused() -> None:
    spec, inputs, label = learnable()
    vector = initial_vector(spec, 5)
    with pytest.raises(DataError, match="all finite"):
        from_vector(spec, vector[:-1])
    with pytest.raises(DataError, match="all finite"):
        from_vector(spec, np.where(np.arange(len(vector)) == 3, np.float32("nan"), vector))
    with pytest.raises(DataError, match="needs rows"):
        train(spec, vector, inputs.take(np.zeros(0, int)), label[:0], LocalSettings(), seed=1)
    with pytest.raises(DataError, match="0 and 1"):
        train(spec, vector, inputs, label + 1, LocalSettings(), seed=1)
    with pytest.raises(ValueError, match="learning_rate"):
        LocalSettings(learning_rate=0.0)
    with pytest.raises(DataError, match="give it inputs"):
        NetSpec(kind="mlp", numbers=0, code_sizes=())


# --- the server's optimisers ------------------------------------------------------------------------------------------


def test_the_optimisers_are_the_formulas() -> None:
    start: State = {"vector": np.array([1.0, -2.0])}
    d = np.array([0.1, -0.2])
    assert fed_avg(start, d)["vector"].tolist() == [1.1, -2.2]
    adam = fed_adam(start, d)
    second = 0.99 * TAU**2 + 0.01 * d**2
    assert np.allclose(adam["vector"], start["vector"] + RATE * 0.1 * d / (np.sqrt(second) + TAU), rtol=1e-14)
    yogi = fed_yogi(fed_yogi(start, d), d)
    v = TAU**2 + 0.01 * d**2
    v = v + 0.01 * d**2  # v is below d^2 in both steps
    assert np.allclose(yogi["second"], v, rtol=1e-14)
    assert np.allclose(yogi["first"], 0.19 * d, rtol=1e-14)


@pytest.mark.parametrize("step", [fed_avg, fed_adam, fed_yogi])
def test_the_optimisers_are_pure_and_stand_still_without_an_update(step: Step) -> None:
    start: State = {"vector": np.array([1.0, -2.0])}
    once = step(start, np.array([0.1, -0.2]))
    assert start["vector"].tolist() == [1.0, -2.0]
    again = step(once, np.zeros(2))
    assert set(again) == set(once)
    assert all(np.array_equal(again[key], once[key]) for key in once)


@pytest.mark.parametrize("step", [fed_adam, fed_yogi])
def test_adaptive_steps_reach_the_minimum_of_a_badly_scaled_bowl(step: Step) -> None:
    scale = np.array([1.0, 0.01])
    state: State = {"vector": np.array([1.0, 1.0])}
    for _ in range(600):
        state = step(state, -0.1 * scale * state["vector"])
    assert np.abs(state["vector"]).max() < 0.3


# --- inputs from sums -------------------------------------------------------------------------------------------------


@settings(derandomize=True, max_examples=10, deadline=None)
@given(cut=st.integers(1, 598))
def test_the_preparation_does_not_depend_on_how_rows_lie_at_banks(cut: int) -> None:
    whole = table()
    parts = [{k: v[:cut] for k, v in whole.items()}, {k: v[cut:] for k, v in whole.items()}]
    first = np.sum([first_pass(SPECS, part) for part in parts], axis=0)
    second = np.sum([second_pass(SPECS, part, first) for part in parts], axis=0)
    pooled_first = first_pass(SPECS, whole)
    assert np.array_equal(first, pooled_first)
    assert np.array_equal(second, second_pass(SPECS, whole, pooled_first))


def test_inputs_are_standard_and_special_values_have_places_of_their_own() -> None:
    whole = table()
    first = first_pass(SPECS, whole)
    preparation = prepare(SPECS, first, second_pass(SPECS, whole, first))
    inputs = preparation.inputs(whole)
    spec = net_spec("mlp", SPECS)
    assert inputs.numbers.shape == (600, spec.numbers)
    assert spec.code_sizes == (4,)
    rank, scaled, code, missing = inputs.numbers[50:, :4].T
    assert abs(rank.mean()) < 0.02
    assert abs(rank.std() - 1) < 0.03
    assert abs(scaled.std() - 1) < 0.1
    assert not code.any()
    assert not missing.any()
    assert inputs.numbers[:20, :4].tolist() == [[0, 0, 1, 0]] * 20
    assert inputs.numbers[20:50, :4].tolist() == [[0, 0, 0, 1]] * 30
    order = np.argsort(whole["amount"][50:])
    assert (np.diff(rank[order]) >= 0).all()
    assert len(np.unique(inputs.numbers[:, 4])) == 22, "every year keeps a rank of its own"
    assert set(inputs.codes[:, 0]) == {0, 1, 2, 3}


def test_sums_of_other_rows_or_columns_are_refused() -> None:
    whole = table()
    first = first_pass(SPECS, whole)
    second = second_pass(SPECS, whole, first)
    assert len(second) == standardising.counts_length(SPECS) == 2 * CELLS
    assert np.abs(first).max() <= standardising.largest_count(600)
    with pytest.raises(DataError, match="changed its rows"):
        prepare(SPECS, first, second + np.eye(1, len(second), dtype=np.int64)[0])
    with pytest.raises(DataError, match="numeric columns"):
        prepare(SPECS[:2], first, second)
    with pytest.raises(DataError, match="holds text"):
        first_pass(SPECS, whole | {"year": np.array(["x"] * 600, dtype=object)})


def test_no_repr_shows_a_row() -> None:
    _, inputs, _ = learnable()
    assert repr(inputs) == "Inputs(1500 rows)"
