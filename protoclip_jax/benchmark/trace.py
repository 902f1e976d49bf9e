"""Where the time of a device went, from a trace that JAX's own profiler wrote and reads."""

import collections
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.profiler import ProfileData

# What an operation is, by the first pattern found in the names of its kernel and instruction, or
# else in that of the function it comes from.
_KINDS = (
    ("communication", r"nccl|all-?reduce|all-?gather|reduce-?scatter|all-?to-?all|collective"),
    ("convolutions", r"conv(?!ert)|cudnn|fprop|wgrad|dgrad|winograd"),
    ("products", r"gemm|dot|nvjet|cutlass|xmma|cublas|matmul"),
    ("copies", r"memcpy|memset|copy|transpose|nchw|nhwc"),
    ("reductions", r"reduce|softmax|norm"),
    ("sorting, gathering", r"sort|gather|scatter|top-?k"),
)
_OTHER = "element by element"
_NUMBER = re.compile(r"([._]\d+)+$")
_INSTRUCTION = re.compile(
    r'^\s*(?:ROOT )?%?([\w.\-]+) = .*?metadata=\{[^}]*?op_name="([^"]+)"', re.MULTILINE
)
_LONGEST_NAME = 56


class Operation(NamedTuple):
    """One execution on a device.

    Attributes:
      name: of the kernel, or of the instruction where there are no kernels.
      instruction: of the compiled program; "" where the trace does not tell.
      start: ns.
      end: ns.
      alone: ns without what ran inside it, as the body of a loop does.
    """

    name: str
    instruction: str
    start: float
    end: float
    alone: float


def profiled(call: Callable[[], Any], program: str = "") -> dict[str, Any]:
    """The summary of a call, which is made once, to its end on the devices.

    Args:
      call: compiled and warm.
      program: text of the compiled program (`jax.stages.Compiled.as_text`), which knows from
        which part of the model an instruction comes.
    """
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # every call in Python would be in the trace
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            jax.block_until_ready(call())
        files = [str(path) for path in Path(folder).rglob("*.xplane.pb")]
        return summary([ProfileData.from_file(file) for file in files], scopes(program))


def scopes(program: str) -> dict[str, str]:
    """From which part of the model each instruction of a compiled program comes."""
    return dict(_INSTRUCTION.findall(program))


def summary(
    traces: Iterable[ProfileData], scopes: Mapping[str, str] | None = None, most: int = 8
) -> dict[str, Any]:
    """Shares of the time, over all devices.

    Args:
      traces: what the profiler wrote.
      scopes: part of the model by instruction.
      most: operations that are listed.

    Returns:
      ms: from the first operation to the last, of the device that took longest.
      idle: share of it in which a device did nothing, mean of the devices.
      kinds: share of the operations' time by kind, largest first.
      top: the operations that took longest, those that differ by a number only taken together:
        "name", "kind", "ms", "count", "share" and "scope" (of the longest one of them, or None).
    """
    devices = [found for trace in traces for found in _devices(trace) if found]
    if not devices:
        return {"ms": None, "idle": None, "kinds": {}, "top": []}
    windows = [max(op.end for op in ops) - min(op.start for op in ops) for ops in devices]
    idle = [
        1 - _busy(ops) / window if window else 0.0
        for ops, window in zip(devices, windows, strict=True)
    ]
    groups = collections.defaultdict(list)
    kinds: dict[str, float] = collections.defaultdict(float)
    scopes = scopes or {}
    for op in (op for ops in devices for op in ops):
        groups[_NUMBER.sub("", op.name)].append(op)
        kinds[kind_of(op, scopes)] += op.alone
    total = sum(kinds.values()) or 1.0
    ordered = sorted(groups.items(), key=lambda item: -_alone(item[1]))
    return {
        "ms": max(windows) / 1e6,
        "idle": sum(idle) / len(idle),
        "kinds": {
            kind: time / total for kind, time in sorted(kinds.items(), key=lambda item: -item[1])
        },
        "top": [_row(name, ops, total, scopes) for name, ops in ordered[:most]],
    }


def kind_of(op: Operation, scopes: Mapping[str, str]) -> str:
    """What an operation does."""
    function = (_scope(op, scopes) or "").rpartition("/")[2]
    for names in (f"{op.name} {op.instruction}".lower(), function):
        for kind, pattern in _KINDS:
            if re.search(pattern, names):
                return kind
    return _OTHER


def _scope(op: Operation, scopes: Mapping[str, str]) -> str | None:
    return scopes.get(op.instruction or op.name)


def cause(found: dict[str, Any]) -> str:
    """What took the time, in a line."""
    if found["ms"] is None:
        return "the trace holds no operation of a device"
    shares = [f"{kind} {share:.0%}" for kind, share in list(found["kinds"].items())[:3]]
    return f"idle {found['idle']:.0%} of the time; of the work {', '.join(shares)}"


def _row(name: str, ops: list[Operation], total: float, scopes: Mapping[str, str]) -> dict:
    longest = max(ops, key=lambda op: op.alone)
    return {
        "name": name[:_LONGEST_NAME],
        "kind": kind_of(longest, scopes),
        "ms": _alone(ops) / 1e6,
        "count": len(ops),
        "share": _alone(ops) / total,
        "scope": _scope(longest, scopes),
    }


def _alone(ops: list[Operation]) -> float:
    return sum(op.alone for op in ops)


def _busy(ops: list[Operation]) -> float:
    """ns in which at least one of the operations ran."""
    busy, until = 0.0, float("-inf")
    for op in sorted(ops, key=lambda op: op.start):
        busy += max(0.0, op.end - max(op.start, until))
        until = max(until, op.end)
    return busy


def _devices(trace: ProfileData) -> list[list[Operation]]:
    """The operations of each device; those of the host where it is the only device."""
    planes = {plane.name: plane for plane in trace.planes}
    devices = [_of_device(plane) for name, plane in planes.items() if name.startswith("/device:")]
    if any(devices) or "/host:CPU" not in planes:
        return devices
    lines = [list(line.events) for line in planes["/host:CPU"].lines]
    return [[op for events in lines for op in _operations(events, of_program=True)]]


def _of_device(plane: Any) -> list[Operation]:
    """From the streams of a GPU, or the line of operations of a TPU.

    Other lines tell the same time again, by step, program or module.
    """
    lines = {line.name: line for line in plane.lines}
    chosen = [line for name, line in lines.items() if name.startswith("Stream")]
    chosen = chosen or [line for name, line in lines.items() if name == "XLA Ops"]
    return [
        op
        for line in chosen or lines.values()
        for op in _operations(list(line.events), of_program=False)
    ]


def _operations(events: list[Any], *, of_program: bool) -> list[Operation]:
    """Events of a line with their own time; `of_program`: only instructions of a program."""
    found, open_ones = [], []
    for event in sorted(events, key=lambda event: (event.start_ns, -event.duration_ns)):
        stats = dict(event.stats)
        instruction = str(stats.get("hlo_op", ""))
        if of_program and (not instruction or not event.duration_ns):
            continue
        start, end = event.start_ns, event.start_ns + event.duration_ns
        while open_ones and found[open_ones[-1]].end <= start:
            open_ones.pop()
        if open_ones:
            around = found[open_ones[-1]]
            found[open_ones[-1]] = around._replace(alone=max(0.0, around.alone - event.duration_ns))
        open_ones.append(len(found))
        found.append(Operation(event.name, instruction, start, end, event.duration_ns))
    return found
