"""Networks for tables, as vectors: logistic regression, a perceptron of two layers, a small residual network.

A network is a function logit PD = net(numbers, codes); categories go through embeddings. Its parameters are one vector,
the last `head_size` of which are the last layer, so that banks may share all but that. There is no normalisation over a
batch: it would carry statistics of rows outside the vector. The same seed gives the same bits on one machine.
Sources: He et al. 2016 and Gorishniy et al. 2021 (residual network for tables, here without dropout).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from models.binning import ColumnSpec
from models.errors import DataError
from models.fixed_point import SCORE_BITS
from models.standardising import Inputs, code_size

Float32 = npt.NDArray[np.float32]
Int64 = npt.NDArray[np.int64]
NetKind = Literal["logistic", "mlp", "resnet"]

WIDTHS = (64, 32)
RESIDUAL_WIDTH = 64
RESIDUAL_BLOCKS = 2


@dataclass(frozen=True, kw_only=True)
class NetSpec:
    """Shape of a network. `numbers`: float inputs; `code_sizes`: values of each categorical input."""

    kind: NetKind
    numbers: int
    code_sizes: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.numbers < 0 or min(self.code_sizes, default=1) < 1 or not (self.numbers or self.code_sizes):
            raise DataError(f"a network of {self.numbers} numbers and codes of sizes {self.code_sizes}; give it inputs")


def net_spec(kind: NetKind, specs: tuple[ColumnSpec, ...]) -> NetSpec:
    """The shape for the inputs that `models.standardising` makes of these columns."""
    numbers = sum(3 + len(spec.codes) for spec in specs if spec.kind == "numeric")
    sizes = tuple(code_size(spec) for spec in specs if spec.kind == "categorical")
    return NetSpec(kind=kind, numbers=numbers, code_sizes=sizes)


class Net(nn.Module):
    """Embeddings, then `body`, then `head`; parameters in this order."""

    def __init__(self, spec: NetSpec) -> None:
        super().__init__()
        dimensions = [1 if spec.kind == "logistic" else min(8, (size + 1) // 2) for size in spec.code_sizes]
        self.embeddings = nn.ModuleList(
            nn.Embedding(size, dimension) for size, dimension in zip(spec.code_sizes, dimensions, strict=True)
        )
        width = spec.numbers + sum(dimensions)
        self.body: nn.Module
        match spec.kind:
            case "logistic":
                self.body = nn.Identity()
            case "mlp":
                self.body = nn.Sequential(
                    nn.Linear(width, WIDTHS[0]), nn.ReLU(), nn.Linear(WIDTHS[0], WIDTHS[1]), nn.ReLU()
                )
                width = WIDTHS[1]
            case "resnet":
                blocks = [_Residual(RESIDUAL_WIDTH) for _ in range(RESIDUAL_BLOCKS)]
                last = nn.Sequential(nn.LayerNorm(RESIDUAL_WIDTH), nn.ReLU())
                self.body = nn.Sequential(nn.Linear(width, RESIDUAL_WIDTH), *blocks, last)
                width = RESIDUAL_WIDTH
        self.head = nn.Linear(width, 1)

    def forward(self, numbers: Tensor, codes: Tensor) -> Tensor:
        """Logits of PD, float32[n]."""
        embedded = [embedding(codes[:, place]) for place, embedding in enumerate(self.embeddings)]
        logits: Tensor = self.head(self.body(torch.cat([numbers, *embedded], dim=1)))
        return logits[:, 0]


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))

    def forward(self, x: Tensor) -> Tensor:
        """x + inner(x)."""
        changed: Tensor = x + self.inner(x)
        return changed


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch on one thread: the order of additions, so the bits, do not depend on the machine's load or settings; for
    networks this small more threads are slower."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def initial_vector(spec: NetSpec, seed: int) -> Float32:
    """Parameters of a fresh network, float32[parameters]; the global generator of torch is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return to_vector(Net(spec))


def to_vector(net: Net) -> Float32:
    """All parameters, float32[parameters], embeddings first, head last."""
    with torch.no_grad():
        return torch.cat([part.reshape(-1) for part in net.parameters()]).numpy().copy()


def from_vector(spec: NetSpec, vector: Float32) -> Net:
    """The network with these parameters; `DataError` for another length or values that are not finite."""
    with torch.random.fork_rng(devices=[]):
        net = Net(spec)
    expected = sum(part.numel() for part in net.parameters())
    if vector.shape != (expected,) or not np.isfinite(vector).all():
        raise DataError(f"a vector of shape {vector.shape} for a network of {expected} parameters, all finite")
    place = 0
    with torch.no_grad():
        for part in net.parameters():
            piece = torch.from_numpy(vector[place : place + part.numel()].astype(np.float32))
            part.copy_(piece.reshape(part.shape))
            place += part.numel()
    return net


def head_size(spec: NetSpec) -> int:
    """Parameters of the last layer: the end of the vector."""
    return sum(part.numel() for part in Net(spec).head.parameters())


def scores(spec: NetSpec, vector: Float32, inputs: Inputs) -> Int64:
    """Fixed-point logits of PD, int64[n], in units of 2^-16, clipped to +-1024 logits."""
    net = from_vector(spec, vector)
    with one_thread(), torch.no_grad():
        logits = net(torch.from_numpy(inputs.numbers), torch.from_numpy(inputs.codes)).double().numpy()
    fixed: Int64 = np.rint(np.clip(logits, -1024.0, 1024.0) * (1 << SCORE_BITS)).astype(np.int64)
    return fixed
