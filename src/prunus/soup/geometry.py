"""What lies between networks of one shape: distances and angles, and the loss along a line or over a plane.

    line:   theta(t) = (1 - t) a + t b
    plane:  theta(x, y) = a + x u + y v,   u along b - a, v along what c - a adds to it (Gram-Schmidt), |u| = |v| = 1

Members that share a basin have no barrier on the line between them. Members are plain state dicts, as in `soup`;
pictures are in `report.landscape`. Sums are float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from prunus.soup.average import check_alike, mix

State = Mapping[str, Tensor]
Array = np.ndarray

_CHUNK = 1 << 22  # entries of all members held in float64 at once: 32 MiB
_STATISTICS = ("running_mean", "running_var")


@dataclass(frozen=True)
class Distances:
    """How far m members are apart.

    l2: (m, m) float64, ||theta_i - theta_j||. angle: (m, m) float64, degrees between theta_i and theta_j, nan beside a
    zero vector. barycentre: (m,) float64, ||theta_i - mean||. norm: (m,) float64, ||theta_i||.
    """

    l2: Array
    angle: Array
    barycentre: Array
    norm: Array

    def summary(self) -> dict[str, float]:
        """Least, mean and greatest of each over the pairs (l2, angle) and over the members (barycentre)."""
        pairs = np.triu_indices(len(self.norm), 1)
        rows = {"l2": self.l2[pairs], "angle": self.angle[pairs], "barycentre": self.barycentre}
        ways = {"min": np.min, "mean": np.mean, "max": np.max}
        return {f"{name}_{way}": float(of(row)) for name, row in rows.items() if row.size for way, of in ways.items()}


def weight_names(state: State) -> list[str]:
    """The floating-point tensors of a state but BatchNorm's statistics, whose scale would drown the weights.

    >>> weight_names(nn.BatchNorm1d(2).state_dict())
    ['weight', 'bias']
    """
    return [name for name, tensor in state.items() if tensor.is_floating_point() and not name.endswith(_STATISTICS)]


@torch.no_grad()
def distances(states: Sequence[State], names: Iterable[str] | None = None) -> Distances:
    """Pairwise distances and angles of the members, and their distances to the mean.

    names: the tensors that count as one vector; None: `weight_names` (prunable ones: [view.parameter for view in
    find_layers(model)]). Tensors are read in pieces; nothing of the model's size is made.
    Raises ValueError for members that do not fit, or a name they lack.

    >>> distances([{"w": torch.zeros(2)}, {"w": torch.tensor([3.0, 4.0])}]).barycentre.tolist()
    [2.5, 2.5]
    """
    check_alike(states)
    chosen = weight_names(states[0]) if names is None else list(names)
    for name in chosen:
        if name not in states[0]:
            raise ValueError(f"the members have no tensor {name!r}")
    count = len(states)
    plain, centred = torch.zeros(count, count, dtype=torch.float64), torch.zeros(count, count, dtype=torch.float64)
    apart = torch.zeros(count, count, dtype=torch.float64)
    for name in chosen:
        for rows in _pieces([state[name] for state in states]):  # (members, entries)
            around = rows - rows.mean(0)
            plain += (rows @ rows.T).cpu()
            centred += (around @ around.T).cpu()
            apart += torch.stack([(rows - row).square().sum(1) for row in rows]).cpu()
    norm = plain.diagonal().sqrt()
    return Distances(apart.sqrt().numpy(), _angles(norm, apart), centred.diagonal().sqrt().numpy(), norm.numpy())


@dataclass(frozen=True)
class Line:
    """A score along the line from member a (share 0) to b (share 1). shares, values: (points,) float64."""

    shares: Array
    values: Array

    def barrier(self) -> float:
        """How far a loss rises above the chord between its ends at worst; 0 where it stays below.

        max_t L(t) - ((1 - t) L(0) + t L(1)),  0 <= t <= 1     (after Frankle et al. 2020, who compare with the mean)

        Raises ValueError for a line without both ends.
        """
        if 0 not in self.shares or 1 not in self.shares:
            raise ValueError("the barrier is measured from end to end: take shares 0 and 1 into the line")
        inside = (self.shares >= 0) & (self.shares <= 1)
        t, values = self.shares[inside], self.values[inside]
        chord = (1 - t) * values[t == 0][0] + t * values[t == 1][0]
        return float(np.max(values - chord))  # 0 at the ends, so never less


def loss_line(a: State, b: State, score: Callable[[dict[str, Tensor]], float], shares: Sequence[float]) -> Line:
    """`score` of (1 - t) a + t b for each share t; shares outside [0, 1] go beyond the members.

    score: is given a state of its own (integer tensors are a's), in which it may recalibrate BatchNorm.
    Raises ValueError for members that do not fit.

    >>> loss_line({"w": torch.zeros(1)}, {"w": torch.ones(1)}, lambda state: float(state["w"]), [0, 0.5]).values
    array([0. , 0.5])
    """
    check_alike([a, b])
    values = [float(score(_combined([a, b], [1 - share, share]))) for share in shares]
    return Line(np.asarray(shares, dtype=np.float64), np.asarray(values, dtype=np.float64))


@dataclass(frozen=True)
class Plane:
    """A score over the plane through three members.

    x: (columns,), y: (rows,), values: (rows, columns), all float64, in units of distance between weights.
    members: (3, 2) float64, the coordinates of a, b and c; a is the origin and b lies on the x-axis.
    """

    x: Array
    y: Array
    values: Array
    members: Array


def loss_plane(
    a: State,
    b: State,
    c: State,
    score: Callable[[dict[str, Tensor]], float],
    *,
    points: tuple[int, int] = (9, 9),
    margin: float = 0.25,
    names: Iterable[str] | None = None,
) -> Plane:
    """`score` over the plane through three members, on a grid that encloses them.

    points: columns and rows of the grid. margin: what it extends beyond the members, as a share of their extent.
    names: the tensors that span the plane's coordinates, as in `distances`; all floating ones move.
    Raises ValueError for members that do not fit, or lie on one line.

    >>> plane = loss_plane(a, b, c, score, points=(5, 5))
    """
    check_alike([a, b, c])
    apart = distances([a, b, c], names).l2
    members = _coordinates(apart)
    low, high = members.min(0), members.max(0)
    reach = margin * (high - low)
    x, y = (np.linspace(low[i] - reach[i], high[i] + reach[i], points[i]) for i in range(2))
    values = [[float(score(_combined([a, b, c], _shares(members, px, py)))) for px in x] for py in y]
    return Plane(x, y, np.asarray(values, dtype=np.float64), members)


def _pieces(tensors: Sequence[Tensor]) -> Iterable[Tensor]:
    """The tensors as (members, entries) float64, a piece at a time, on the first one's device."""
    flat = [tensor.detach().reshape(-1) for tensor in tensors]
    step = max(1, _CHUNK // len(flat))
    for start in range(0, flat[0].numel(), step):
        yield torch.stack([each[start : start + step].to(flat[0].device, torch.float64) for each in flat])


def _angles(norm: Tensor, apart: Tensor) -> Array:
    """Degrees, from norms and squared distances: exact for small angles too, where acos of the cosine is not."""
    product = norm[:, None] * norm[None, :]
    chord = ((apart - (norm[:, None] - norm[None, :]).square()).clamp(min=0) / product).clamp(max=4)  # |u_i - u_j|^2
    angle = torch.rad2deg(2 * torch.atan2(chord.sqrt(), (4 - chord).sqrt()))
    return angle.masked_fill_(product == 0, torch.nan).numpy()


def _coordinates(apart: Array) -> Array:
    """(3, 2) coordinates of three members in their plane, from their distances."""
    ab, ac, bc = float(apart[0, 1]), float(apart[0, 2]), float(apart[1, 2])
    x = (ab**2 + ac**2 - bc**2) / (2 * ab) if ab > 0 else 0.0
    height = math.sqrt(max(0.0, ac**2 - x**2))
    if ab == 0 or height <= 1e-6 * max(ab, ac):
        raise ValueError(f"the three members lie on one line (distances {ab:.4g}, {ac:.4g}, {bc:.4g}): no plane")
    return np.array([[0.0, 0.0], [ab, 0.0], [x, height]])


def _shares(members: Array, x: float, y: float) -> list[float]:
    """Barycentric weights of a, b and c that give the point (x, y)."""
    of_c = float(y / members[2, 1])
    of_b = float((x - of_c * members[2, 0]) / members[1, 0])
    return [1 - of_b - of_c, of_b, of_c]


@torch.no_grad()
def _combined(states: Sequence[State], shares: Sequence[float]) -> dict[str, Tensor]:
    """sum_i shares_i * states_i for shares that add up to 1; integer tensors are the first state's."""
    return {
        name: mix([state[name] for state in states], shares) if tensor.is_floating_point() else tensor.clone()
        for name, tensor in states[0].items()
    }
