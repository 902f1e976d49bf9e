"""The table at the end of a run: what was measured before, after, and what chance gives."""

from collections.abc import Mapping

# Label and unit of the metrics we know. Anything else appears under its own name.
ROWS = {
    "zero_shot/top1": ("zero-shot, unseen artist, top 1", "%"),
    "zero_shot/top5": ("zero-shot, unseen artist, top 5", "%"),
    "zero_shot_unseen/top1": ("zero-shot, unseen concepts, top 1", "%"),
    "zero_shot_unseen/top5": ("zero-shot, unseen concepts, top 5", "%"),
    "linear_probe/top1": ("linear probe, top 1", "%"),
    "retrieval/image_to_text_r1": ("image to text, recall at 1", "%"),
    "retrieval/image_to_text_r5": ("image to text, recall at 5", "%"),
    "retrieval/image_to_text_r10": ("image to text, recall at 10", "%"),
    "retrieval/text_to_image_r1": ("text to image, recall at 1", "%"),
    "retrieval/text_to_image_r5": ("text to image, recall at 5", "%"),
    "retrieval/text_to_image_r10": ("text to image, recall at 10", "%"),
    "retrieval/mean_recall": ("mean of the six recalls", "%"),
    "clustering/ari": ("adjusted Rand index", ""),
    "clustering/ami": ("adjusted mutual information", ""),
}
# All that the suite measures: what the best checkpoint can be chosen by.
SUITE_METRICS = (
    *ROWS,
    "geometry/modality_gap",
    "geometry/alignment",
    *(
        f"geometry/{kind}_{name}"
        for kind in ("image", "text")
        for name in ("std", "self_similarity", "self_similarity_positive")
    ),
)
TITLES = {
    "zero_shot": "Zero-shot classification",
    "linear_probe": "Linear probe",
    "retrieval": "Retrieval",
    "clustering": "Clusters against classes",
    "geometry": "Geometry of the features",
}
WIDTH = 80
MIN_COLUMN = 9


def comparison_table(
    columns: Mapping[str, Mapping[str, float]], chance: Mapping[str, float] | None = None
) -> str:
    """Metrics side by side as plain text, at most 80 wide for up to four columns.

    Args:
        columns: metrics by column title, for example "untrained" and "trained".
        chance: chance levels, shown in a last column.

    Returns:
        The table; a value that is missing or NaN shows as "-".
    """
    shown = dict(columns) | ({"chance": chance} if chance else {})
    names = _ordered({name for metrics in columns.values() for name in metrics})
    cells = {name: [_cell(name, metrics.get(name)) for metrics in shown.values()] for name in names}
    widths = [
        max(MIN_COLUMN, len(title), *(len(row[i]) for row in cells.values()), 0)
        for i, title in enumerate(shown)
    ]
    label_width = max([len(_label(name)) for name in names], default=0)
    label_width = max(8, min(label_width, WIDTH - sum(widths) - 2 * len(widths)))
    lines = [
        _line("", shown, label_width, widths),
        "-" * (label_width + sum(widths) + 2 * len(widths)),
    ]
    room = None
    for name in names:
        if _room(name) != room:
            room = _room(name)
            lines.append(TITLES.get(room, room))
        lines.append(_line(_label(name), cells[name], label_width, widths))
    return "\n".join(lines)


def _line(label, cells, label_width: int, widths: list[int]) -> str:
    right = "".join(f"  {cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
    return f"{label[:label_width]:<{label_width}}{right}".rstrip()


def _label(name: str) -> str:
    return "  " + ROWS.get(name, (name.split("/", 1)[-1].replace("_", " "), ""))[0]


def _room(name: str) -> str:
    room = name.split("/", 1)[0] if "/" in name else "other"
    return "zero_shot" if room.startswith("zero_shot") else room


def _ordered(names: set[str]) -> list[str]:
    """Known rows in the order of `ROWS`, then the rest by name; rooms stay together."""
    rooms, known = list(TITLES), list(ROWS)

    def key(name: str):
        room = _room(name)
        return (
            rooms.index(room) if room in rooms else len(rooms),
            room,
            known.index(name) if name in known else len(known),
            name,
        )

    return sorted(names, key=key)


def _cell(name: str, value: float | None) -> str:
    if value is None or value != value:
        return "-"
    unit = ROWS.get(name, ("", ""))[1]
    return f"{value:.2f} %" if unit == "%" else f"{value:.3f}"
