"""How a smaller network is shown: units, parameters, multiply-adds, time, before and after; and as JSON. No torch."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ticketfind.terminal import Screen, percent, plural, table

if TYPE_CHECKING:
    from ticketfind.shrink import Shrunk
    from ticketfind.speed import Comparison, Latency


def show(screen: Screen, path: Path, small: "Shrunk", found: "Comparison", device: str) -> None:
    """The table, what is gained (or that nothing is), and the JSON object."""
    rows: list[tuple[str, ...]] = [
        (name, f"{size:,}", f"{len(small.kept.get(name, range(size))):,}") for name, size in small.before.items()
    ]
    rows.append(("parameters", *(f"{n:,}" for n in found.parameters)))
    rows.append(("multiply-adds", *(f"{n:,}" for n in found.multiply_adds)))
    rows += [
        (f"ms on {device}, batch {size}", *(f"{one.median:.3f} ({one.low:.3f} to {one.high:.3f})" for one in pair))
        for size, pair in found.latency.items()
    ]
    screen.print(table(("units", "before", "after"), rows, left=1))
    for note in small.notes:
        screen.message(note)
    screen.result(
        f"{path}: {_gain(small, found)}",
        {
            "file": str(path),
            "format": "shrunk",
            "layers": {
                name: {"before": size, "after": len(small.kept.get(name, range(size)))}
                for name, size in small.before.items()
            },
            "parameters": _pair(found.parameters),
            "multiply_adds": _pair(found.multiply_adds),
            "device": device,
            "latency": {
                str(size): {"before": _ms(before), "after": _ms(after)}
                for size, (before, after) in found.latency.items()
            },
            "notes": small.notes,
            "bytes": path.stat().st_size,
        },
    )


def _gain(small: "Shrunk", found: "Comparison") -> str:
    removed = sum(size - len(small.kept.get(name, range(size))) for name, size in small.before.items())
    if not removed:
        return (
            "no empty unit was found that can go, so nothing was removed and nothing is gained: it is the dense network"
            " with zeros in it"
        )
    faster = [
        f"{before.median / after.median:.2f} times as fast with a batch of {size}"
        for size, (before, after) in found.latency.items()
        if after.is_below(before)
    ]
    slow = [str(size) for size, (before, after) in found.latency.items() if not after.is_below(before)]
    none = f"no faster with a batch of {' or '.join(slow)}" if slow else ""
    gone = 1 - found.multiply_adds[1] / found.multiply_adds[0]
    told = ", ".join(filter(None, [*faster, none]))
    return f"{plural(removed, 'unit')} removed, {percent(gone)} of the multiply-adds; {told}"


def _pair(values: tuple[int, int]) -> dict[str, int]:
    return {"before": values[0], "after": values[1]}


def _ms(latency: "Latency") -> dict[str, Any]:
    return {"ms_median": latency.median, "ms_quartiles": [latency.low, latency.high]}
