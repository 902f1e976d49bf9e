"""`kmeans`: clustering an episode of projected features, against faiss from the same start."""

import argparse
import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from protoclip_jax.benchmark import faiss_peer, machine, timing
from protoclip_jax.benchmark.arguments import above_zero
from protoclip_jax.benchmark.report import RULE, Report, number, say
from protoclip_jax.episodes import kmeans_assignment
from protoclip_jax.episodes.kmeans import Clusters, fast_bfloat16, kmeans

Size = tuple[int, int, int]

SIZES: list[Size] = [(20_000, 128, 2_000), (50_000, 128, 5_000)]
LARGE: Size = (200_000, 128, 20_000)  # the paper's episode

_TILE_VALUES = 8_000_000
# Bytes of a copy that stands for the memory: many times what any cache holds.
_COPY_CPU, _COPY = 2**28, 2**31
_COPIES = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `kmeans`."""
    parser.add_argument(
        "--sizes",
        type=parse_sizes,
        default=SIZES,
        metavar="N:D:K,...",
        help="points, width, clusters; default: 20000:128:2000,50000:128:5000",
    )
    parser.add_argument(
        "--large",
        action="store_true",
        help="also the paper's 200000:128:20000, where faiss takes minutes: use --repeats=1",
    )
    parser.add_argument("--iterations", type=above_zero, default=20, help="default: 20")
    parser.add_argument("--repeats", type=above_zero, default=3, help="default: 3")
    parser.add_argument(
        "--precision",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="of the products while iterating; default: auto, what the hardware is built for",
    )


def parse_sizes(text: str) -> list[Size]:
    """Sizes of the form n:d:k, with commas between them."""
    sizes = []
    for part in text.split(","):
        try:
            n, d, k = (int(value) for value in part.split(":"))
        except ValueError:
            raise argparse.ArgumentTypeError(f"{part}: write points:width:clusters") from None
        if min(n, d, k) < 1 or k > n:
            raise argparse.ArgumentTypeError(f"{part}: {n} points cannot form {k} clusters")
        sizes.append((n, d, k))
    return sizes


def run(options: argparse.Namespace) -> Report:
    """Measures every size."""
    found = machine.describe()
    precision = options.precision
    if precision == "auto":
        precision = "bfloat16" if fast_bfloat16(found["platform"]) else "float32"
    faiss = faiss_peer.load(found["cores"])
    sizes = options.sizes + ([LARGE] if options.large else [])
    cases = []
    for size in sizes:
        say(f"k-means {_name(size)}")
        case = measure(size, precision, options.iterations, options.repeats, faiss)
        cases.append(case | {"machine": found})
    return _report(found, sizes, cases, faiss is not None, options)


def measure(
    size: Size, precision: str, iterations: int, repeats: int, faiss, *, judged: bool = True
) -> dict[str, Any]:
    """Numbers of one size; those of the peer are None without it.

    Args:
      size: points, width, clusters.
      precision: "float32" or "bfloat16".
      iterations: most updates.
      repeats: of every contender.
      faiss: the peer's module, or None.
      judged: compute the objective in float64 too, which takes minutes for large sizes; a peer
        needs it.
    """
    n, d, k = size
    points, start = problem(size)
    on_device = jnp.asarray(points)
    ours = timing.Timed(
        functools.partial(
            kmeans,
            on_device,
            k,
            seed=0,
            iterations=iterations,
            initial=jnp.asarray(start),
            precision=precision,
        )
    )
    first = time.perf_counter()
    ours()
    first = time.perf_counter() - first
    platform = jax.default_backend()
    low = precision == "bfloat16"
    rows = kmeans_assignment.plan(k, platform=platform, low_precision=low, active=False).rows
    tiles = -(-n // rows)
    copied = _COPY_CPU if platform == "cpu" else _COPY
    contenders = {
        "ours": ours,
        "matmul": timing.matmul(rows, d, k, precision, tiles),
        "copy": timing.copy(copied, _COPIES),
    }
    if faiss is not None:
        peer = timing.Timed(lambda: faiss_peer.train(faiss, points, start, iterations))
        contenders["faiss"] = peer
    times = timing.alternating(contenders, repeats)
    clusters: Clusters = ours.result
    made = int(clusters.iterations)
    # The last assignment belongs to the labels, so there is one more than there are updates.
    products = times["matmul"].of(platform) * (n / (rows * tiles)) * (made + 1)
    moved = 2 * copied * _COPIES / times["copy"].wall  # read and written
    scores = 2 * 4 * n * k * (made + 1)
    numbers = {
        "n": n,
        "d": d,
        "k": k,
        "precision": precision,
        "iterations": made,
        "repeats": repeats,
        "cpu_seconds": times["ours"].cpu,
        "wall_seconds": times["ours"].wall,
        "compile_seconds": max(0.0, first - times["ours"].wall),
        "objective": objective(points, np.asarray(clusters.centroids)) if judged else None,
        "matmul_share": products / times["ours"].of(platform),
        "matmul_gflops": 2e-9 * rows * tiles * d * k / times["matmul"].wall,
        "bandwidth_share": scores / times["ours"].wall / moved,
        "copy_gb_per_second": moved / 1e9,
    }
    return numbers | _against_faiss(times, numbers, contenders, points, iterations)


def _against_faiss(times, numbers, contenders, points, iterations: int) -> dict[str, Any]:
    names = ("cpu_seconds", "wall_seconds", "objective", "iterations")
    if "faiss" not in times:
        absent = dict.fromkeys(f"faiss_{name}" for name in names)
        ratios = ("speedup_cpu_seconds", "speedup_wall_seconds", "objective_ratio")
        return absent | dict.fromkeys(ratios)
    peer, reached = times["faiss"], objective(points, contenders["faiss"].result)
    values = (peer.cpu, peer.wall, reached, iterations)
    return {
        **{f"faiss_{name}": value for name, value in zip(names, values, strict=True)},
        "speedup_cpu_seconds": peer.cpu / numbers["cpu_seconds"],
        "speedup_wall_seconds": peer.wall / numbers["wall_seconds"],
        # Where every point is its own centroid both are 0.
        "objective_ratio": numbers["objective"] / reached if reached else None,
    }


def problem(size: Size, seed: int = 0) -> tuple[Float[np.ndarray, "n d"], Float[np.ndarray, "k d"]]:
    """Points (n, d) like an episode's projected features, and k of them as the start.

    A mixture of n / 10 components with Zipf weights, some concepts being far more common than
    others; rows of length 1, float32.
    """
    n, d, k = size
    rng = np.random.default_rng(seed)
    components = max(1, n // 10)
    centres = rng.normal(size=(components, d))
    weights = 1 / np.arange(1, components + 1) ** 0.8
    chosen = rng.choice(components, n, p=weights / weights.sum())
    points = centres[chosen] + 0.7 * rng.normal(size=(n, d))
    points = (points / np.linalg.norm(points, axis=1, keepdims=True)).astype(np.float32)
    return points, points[rng.choice(n, k, replace=False)]


def objective(points_nd: Float[np.ndarray, "n d"], centroids_kd: Float[np.ndarray, "k d"]) -> float:
    """Sum of squared distances to the nearest centroid, in float64.

    The same plain code judges both contenders: each one's own number is that of its last
    assignment, which for faiss comes before its last update.
    """
    centroids = np.asarray(centroids_kd, np.float64)
    half_squares = 0.5 * np.sum(centroids * centroids, axis=1)
    rows = max(1, _TILE_VALUES // len(centroids))
    total = 0.0
    for first in range(0, len(points_nd), rows):
        tile = np.asarray(points_nd[first : first + rows], np.float64)
        nearest = np.argmax(tile @ centroids.T - half_squares, axis=1)
        # By differences, since the expanded square cancels where a point is its centroid.
        total += float(np.sum((tile - centroids[nearest]) ** 2))
    return total


def _name(size: Size) -> str:
    n, d, k = size
    return f"{n:,} x {d}, K {k:,}"


def _report(found, sizes, cases, has_peer: bool, options) -> Report:
    def row(label: str, name: str, unit: str = "", digits: int = 3):
        return label, [number(case[name], unit, digits) for case in cases]

    rows = [
        ("products in", [case["precision"] for case in cases]),
        row("updates until nothing moved", "iterations"),
        row("compilation, wall s", "compile_seconds"),
        RULE,
        row("CPU s", "cpu_seconds"),
        row("wall s", "wall_seconds"),
        ("share of a matmul", [f"{case['matmul_share']:.0%}" for case in cases]),
        row("that matmul, GFLOP/s", "matmul_gflops"),
        ("share of the memory's rate", [f"{case['bandwidth_share']:.0%}" for case in cases]),
        row("that memory, GB/s", "copy_gb_per_second"),
    ]
    notes = [
        "Shares: time of products (tile rows x d) by (d x K) for every comparison of plain Lloyd,",
        "and of writing and reading each of its scores once at a copy's rate, over our time.",
        "Skipped comparisons and a score tile that stays in cache can pass 100 %.",
    ]
    if has_peer:
        rows += [
            RULE,
            row("faiss, updates", "faiss_iterations"),
            row("faiss, CPU s", "faiss_cpu_seconds"),
            row("faiss, wall s", "faiss_wall_seconds"),
            row("times faster, CPU s", "speedup_cpu_seconds"),
            row("times faster, wall", "speedup_wall_seconds"),
            row("objective / faiss's", "objective_ratio", digits=6),
        ]
        notes.append("Objectives: both sets of centroids, judged by the same float64 code.")
    else:
        notes.append(f"No ratio to faiss: it is not installed ({faiss_peer.INSTALL}).")
    title = [
        f"k-means, {options.repeats} alternating repeats, medians; same given start",
        machine.line(found),
    ]
    return Report(title, [_name(size) for size in sizes], rows, notes, cases)
