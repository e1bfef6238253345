"""Names of points in a picture, near them and without overlap."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.text import Text


def label_points(ax: Axes, names: Sequence[str], xy: np.ndarray, dots: np.ndarray) -> None:
    """Write names near their points, with a thin line to each; no two names overlap.

    A name that finds no free place near its point is left out. The limits of ``ax`` must be final, and all positions
    finite.

    Parameters
    ----------
    ax
        Where to write.
    names, xy
        The names and their points, (n, 2), in data coordinates; the first get the best places.
    dots
        All dots, (m, 2), which names and lines cover only where they must.
    """
    line = {"arrowstyle": "-", "color": "0.4", "linewidth": 0.5, "shrinkA": 0, "shrinkB": 1}
    how = {"fontsize": 7, "ha": "center", "va": "center", "arrowprops": line, "annotation_clip": False}
    texts = [
        ax.annotate(name, at, (0, 0), textcoords="offset points", **how) for name, at in zip(names, xy, strict=True)
    ]
    for text in texts:
        text.set_in_layout(False)
        text.set_parse_math(False)  # a name may have dollar signs
    figure = ax.figure.figure
    figure.draw_without_rendering()  # lays the axes out
    extents = [Text.get_window_extent(text) for text in texts]  # an annotation's own would include the line
    sizes = np.array([(extent.width, extent.height) for extent in extents]).reshape(-1, 2)
    places = _Places(ax.get_window_extent(), ax.transData.transform(xy), sizes, ax.transData.transform(dots))
    for text, shift in zip(texts, places.best(figure.dpi / 72), strict=True):
        if shift is None:
            text.remove()
        else:
            text.set_position(shift)


class _Places:
    """Places for texts on a panel. Lengths are in pixels.

    Each text in turn moves to the place that costs least while the others stay, until none moves. A place that overlaps
    another text or line costs much, but a text may move there. Were it forbidden, the first texts would block the later
    ones.
    """

    #: Lines and boxes are looked at in so many steps; texts move in at most so many rounds.
    STEPS, ROUNDS = 10, 12

    def __init__(self, frame, points: np.ndarray, sizes: np.ndarray, dots: np.ndarray):
        self.frame, self.points, self.sizes, self.dots = frame, points, sizes, dots

    def best(self, unit: float) -> list[np.ndarray | None]:
        """Return the ways from the points to their texts, in points of typography of so many pixels.

        None stands for a text that has no place of its own.
        """
        shape = np.maximum(np.ceil((self.frame.max - self.frame.min) / (2 * unit)).astype(int), 1)
        occupied = np.zeros(shape, bool)  # squares of the panel, of two points each
        occupied[self._squares(self.dots, shape, unit)] = True
        grid = np.meshgrid(np.arange(-108, 109, 9) * unit, np.arange(-78, 79, 6) * unit)
        shifts = np.stack(grid, -1).reshape(-1, 2)
        options = [self._options(i, shifts, occupied, unit) for i in range(len(self.points))]
        chosen = [None] * len(options)  # rows of shifts
        # A round takes longer the more texts there are, squared.
        for _ in range(int(np.clip(4000 / max(len(options), 1) ** 2, 2, self.ROUNDS))):
            before = list(chosen)
            for i, (lower, upper, lines, cost) in enumerate(options):
                cost = cost.copy()
                for j, other in enumerate(chosen):
                    if j != i and other is not None:
                        other_lower, other_upper, other_line = (of[other] for of in options[j][:3])
                        cost += 100 * _overlap(lower, upper, other_lower, other_upper)
                        cost += 50 * ((lines > other_lower) & (lines < other_upper)).all(2).any(1)
                        cost += 50 * _holds(lower, upper, other_line).any(1)
                        cost += 30 * _cross(lines[:, 0], lines[:, -1], other_line[0], other_line[-1])
                chosen[i] = int(np.argmin(cost)) if np.isfinite(cost).any() else None
            if chosen == before:
                break
        kept: list[tuple[np.ndarray, np.ndarray]] = []
        for i, (lower, upper, *_) in enumerate(options):
            k = chosen[i]
            if k is not None and any(_overlap(lower[[k]], upper[[k]], *other)[0] for other in kept):
                chosen[i] = None
            elif k is not None:
                kept.append((lower[k], upper[k]))
        return [None if k is None else shifts[k] / unit for k in chosen]

    def _options(self, i: int, shifts: np.ndarray, occupied: np.ndarray, unit: float) -> tuple[np.ndarray, ...]:
        """Return lower and upper corners and lines of a text that is shifted by each of these, and what each costs."""
        point, half = self.points[i], self.sizes[i] / 2 + 2 * unit
        lower, upper = point + shifts - half, point + shifts + half
        # The line goes from the point to the edge of the box, towards its centre.
        inside = (half / np.maximum(np.abs(shifts), 1e-9)).min(1)
        steps = np.linspace(0, 1, self.STEPS)[:, None]
        lines = point + shifts[:, None] * np.maximum(1 - inside, 0)[:, None, None] * steps
        lengths = np.linalg.norm(lines[:, -1] - point, axis=1) / unit
        x, y = np.meshgrid(steps, steps[:: self.STEPS // 3])
        boxes = lower[:, None] + 2 * half * np.stack([x.ravel(), y.ravel()], -1)
        on_dots = [occupied[self._squares(of, occupied.shape, unit)].mean(1) for of in (boxes, lines)]
        # Names stand rather above their points, and rather far away than on many dots.
        cost = lengths + 2 * (shifts[:, 1] < 0) + 400 * on_dots[0] + 10 * lengths * on_dots[1]
        cost += 50 * _holds(lower, upper, self.points).sum(1)
        outside = (lower < self.frame.min).any(1) | (upper > self.frame.max).any(1)
        return lower, upper, lines, np.where(outside, np.inf, cost)

    def _squares(self, xy: np.ndarray, shape: Sequence[int], unit: float) -> tuple[np.ndarray, np.ndarray]:
        """Return the squares of positions, (..., 2); the nearest one of those outside of the panel."""
        squares = np.clip(((xy - self.frame.min) / (2 * unit)).astype(int), 0, np.array(shape) - 1)
        return squares[..., 0], squares[..., 1]


def _overlap(lower: np.ndarray, upper: np.ndarray, other_lower: np.ndarray, other_upper: np.ndarray) -> np.ndarray:
    """Say of each box, with corners (n, 2), whether it overlaps the other one, with corners (2,)."""
    return ((lower < other_upper) & (upper > other_lower)).all(1)


def _holds(lower: np.ndarray, upper: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Say of each box, with corners (n, 2), and each of the points, (m, 2), whether it is in the box, (n, m)."""
    return ((points > lower[:, None]) & (points < upper[:, None])).all(2)


def _cross(start: np.ndarray, end: np.ndarray, other_start: np.ndarray, other_end: np.ndarray) -> np.ndarray:
    """Say of each segment, from start to end, (n, 2), whether it crosses the other one, (2,)."""

    def side(of: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        along, to = b - a, of - a
        return np.sign(along[..., 0] * to[..., 1] - along[..., 1] * to[..., 0])

    apart = side(start, other_start, other_end) * side(end, other_start, other_end) < 0
    return apart & (side(other_start, start, end) * side(other_end, start, end) < 0)
