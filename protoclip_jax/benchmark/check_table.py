"""The numbers of `check` for people: a section a subject, then goals, and what went wrong."""

from typing import Any

from protoclip_jax.benchmark import machine, trace
from protoclip_jax.benchmark.report import RULE, Report, number

_STEPS = ("step-RN50", "step-ViT-B-32", "step-ViT-B-16")
_QUICKSTARTS = ("quickstart-float32", "quickstart-bfloat16")
_TOP = 6  # operations of a profile that are shown


def text(numbers: dict[str, Any]) -> str:
    """Everything, sections apart from each other by empty lines.

    A part that did not come so far that its section could be shown is told of in the end.
    """
    parts = numbers["parts"]
    found = {name: part["numbers"] for name, part in parts.items()}
    sections = [
        _devices(found.get("devices", {}), numbers["small"]),
        _tests(found.get("tests", {})),
        _phases({name: found[name] for name in _QUICKSTARTS if found.get(name, {}).get("phases")}),
        _kmeans(found.get("kmeans", {})),
        _steps({name: found[name] for name in _STEPS if "step_ms" in found.get(name, {})}),
        _episode(found.get("episode", {})),
        *(
            _profile(name, one["profile"])
            for name, one in found.items()
            if one.get("profile") is not None
        ),
        _goals(numbers["goals"], numbers["small"]),
        _parts(parts),
        _verdict(numbers),
    ]
    return "\n\n".join(section for section in sections if section)


def percent(share: float | None) -> str:
    """A share; "-" where there is none."""
    return "-" if share is None else f"{share:.1%}"


def _devices(found: dict[str, Any], small: bool) -> str:
    if "kinds" not in found:
        return ""
    kinds = ", ".join(f"{count} x {kind}" for kind, count in found["kinds"].items())
    memory = "memory not told" if found["device_gb"] is None else f"{found['device_gb']:.1f} GB"
    versions = ", ".join(
        f"{name} {version}" for name, version in found["versions"].items() if version
    )
    lines = [
        machine.line(found),
        f"Devices   {kinds}; {memory} for JAX on each",
        f"Driver    {'; '.join(found['driver'] or ['not told'])}",
        f"Runtime   {found['runtime']}",
        f"Versions  {versions}",
        f"Commit    {found['commit'] or 'not told'}",
    ]
    if found["missing"]:
        lines.append(f"Missing   {', '.join(found['missing'])}")
    if small:
        lines.append("Small sizes: that everything runs is shown, not how fast it is.")
    return "\n".join(lines)


def _tests(found: dict[str, Any]) -> str:
    if "passed" not in found:
        return ""
    line = f"Tests     {found['passed']} passed, {len(found['failed'])} failed"
    return line + (f", {found['skipped']} skipped" if found["skipped"] else "")


def _phases(found: dict[str, dict]) -> str:
    """Deviations of each compute type."""
    if not found:
        return ""
    ones = list(found.values())
    rows = [
        (f"losses of phase {phase}", [f"{one['phases'][phase]:.1e}" for one in ones])
        for phase in ones[0]["phases"]
    ]
    rows.append(RULE)
    for name in ones[0]["deviations"]:
        cells = [one["deviations"][name] for one in ones]
        rows.append((name, [f"{cell['deviation']:.1e}" for cell in cells]))
        rows.append(("  may be", [f"{cell['bound']:.0e}" for cell in cells]))
    title = "Quickstart: largest relative deviation from a CPU's float32 run"
    return Report([title], [one["dtype"] for one in ones], rows, [], None).text()


def _kmeans(found: dict[str, Any]) -> str:
    if "wall_seconds" not in found:
        return ""
    rows = [
        ("wall ms", [number(1e3 * found["wall_seconds"])]),
        ("updates", [number(found["iterations"])]),
        ("compilation, wall s", [number(found["compile_seconds"])]),
        ("share of a matmul's rate", [percent(found["matmul_share"])]),
        ("that matmul, TFLOP/s", [number(found["matmul_gflops"] / 1e3)]),
        ("share of the memory's rate", [percent(found["bandwidth_share"])]),
        ("that memory, GB/s", [number(found["copy_gb_per_second"])]),
    ]
    title = f"k-means of one modality: {found['n']:,} x {found['d']}, K {found['k']:,}"
    return Report([title], [found["precision"]], rows, [], None).text()


def _steps(found: dict[str, dict]) -> str:
    if not found:
        return ""
    ones = list(found.values())

    def row(label: str, name: str, scale: float = 1.0):
        values = (one[name] for one in ones)
        return label, [number(value if value is None else scale * value) for value in values]

    rows = [
        ("batch", [number(one["batch"]) for one in ones]),
        row("pairs a second", "pairs_per_second"),
        row("  a device", "pairs_per_second_per_device"),
        row("wall ms a step", "step_ms"),
        row("host ms a step", "host_ms"),
        row("GFLOP a step", "gflop"),
        row("TFLOP/s", "gflops", 1e-3),
        ("share of the peak", [percent(one["peak_use"]) for one in ones]),
        ("share of a matmul's rate", [percent(one["flop_use"]) for one in ones]),
        row("that matmul, TFLOP/s", "matmul_gflops", 1e-3),
        row("GB a device, as compiled", "memory_gb"),
        row("compilation, wall s", "compile_seconds"),
    ]
    notes = [f"{one['model']}, pairs a device: {one['search']['larger']}." for one in ones]
    title = f"A training step with {ones[0]['prototypes']:,} prototypes, in {ones[0]['dtype']}"
    return Report([title], [one["model"] for one in ones], rows, notes, None).text()


def _episode(found: dict[str, Any]) -> str:
    if "seconds" not in found:
        return ""
    rows = [
        ("extracted pairs a second", [number(found["extracted_per_second"])]),
        ("trained pairs a second", [number(found["trained_per_second"])]),
        ("waiting for input, of training", [percent(found["input_wait_share"])]),
        ("peak GB of a device", [number(found["device_gb"])]),
        ("peak GB of the host process", [number(found["host_gb"])]),
        RULE,
        *((f"{name}, s", [number(value)]) for name, value in found["seconds"].items()),
    ]
    title = (
        f"Episode {found['episodes']} of {found['pairs']:,} pairs from JPEG files, "
        f"{found['prototypes']:,} prototypes, batch {found['batch']:,}, {found['workers']} workers"
    )
    return Report([title], [found["model"]], rows, [], None).text()


def _profile(name: str, found: dict[str, Any]) -> str:
    rows = [
        (one["name"], [number(one["ms"]), number(one["count"]), percent(one["share"]), one["kind"]])
        for one in found["top"][:_TOP]
    ]
    title = f"Profile of {name}: {trace.cause(found)}"
    if not rows:
        return title
    notes = [f"{one['name']}: {one['scope']}" for one in found["top"][:_TOP] if one["scope"]]
    columns = ["ms", "times", "share", "kind"]
    return Report([title], columns, rows, notes, None).text()


def _goals(goals: list[dict[str, Any]], small: bool) -> str:
    rows = []
    for goal in goals:
        verdict = "-"
        if goal["reached"] is not None:
            verdict = f"{goal['reached']:.0%}" + (", MISSED" if goal["missed"] else "")
        rows.append((goal["what"], [number(goal["value"]), number(goal["goal"]), verdict]))
    title = "Goals on an H100" + (", which small sizes say nothing of" if small else "")
    return Report([title], ["here", "goal", "reached"], rows, [], None).text()


def _parts(parts: dict[str, dict]) -> str:
    rows = [(name, [part["status"], number(part["seconds"])]) for name, part in parts.items()]
    return Report(["Parts"], ["", "s"], rows, [], None).text()


def _verdict(numbers: dict[str, Any]) -> str:
    lines = []
    for name in (*numbers["failed"], *numbers["skipped"]):
        part = numbers["parts"][name]
        lines.append(f"{name} {part['status']}: {part['reason']}")
        lines += [f"  | {line}" for line in part["log"]]
    lines += [_missed(goal, numbers["parts"]) for goal in numbers["goals"] if goal["missed"]]
    total = f"{numbers['seconds']:.0f} s of at most {60 * numbers['minutes']:.0f}"
    if numbers["failed"]:
        return "\n".join([*lines, f"FAILED: {', '.join(numbers['failed'])}; {total}"])
    end = "All that ran is right" if numbers["skipped"] else "All is right"
    return "\n".join([*lines, f"{end}; {total}"])


def _missed(goal: dict[str, Any], parts: dict[str, dict]) -> str:
    """A goal that is missed, and what its profile says of the cause."""
    profile = parts[goal["part"]]["numbers"].get("profile")
    cause = trace.cause(profile) if profile else "there is no profile of it"
    here, wanted = number(goal["value"]), number(goal["goal"])
    return f"Missed goal: {goal['what']}: {here}, not {wanted}\n  {cause}"
