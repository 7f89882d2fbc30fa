"""The charts: drawn from a result of `bench.comparison`, small enough for a README."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench import style

Result = dict[str, Any]

NAMES = {
    "board": "dpshm",
    "board_without_bookings": "dpshm, no bookings",
    "flock": "file + flock",
    "pub_unlimited": "PUB, no rate limit",
    "pub_10ms": "PUB, 10 ms",
    "pub_100ms": "PUB, 100 ms",
    "vllm": "vLLM 0.32",
}
COLOURS = {
    "board": style.GREEN,
    "board_without_bookings": style.TEAL,
    "flock": style.GREY,
    "pub_unlimited": style.ORANGE,
    "pub_10ms": style.ORANGE,
    "pub_100ms": style.RED,
    "vllm": style.PURPLE,
}
WIDTH, HEIGHT = 6.4, 3.2


def plot(result: Result, folder: Path) -> list[Path]:
    """Draws every chart into a folder; gives the files."""
    drawings = {
        "freshness": _freshness,
        "decide": _decide,
        "cpu_per_update": _cpu,
        "frontends": _frontends,
        "accuracy": _accuracy,
    }
    return [_save(draw, result, folder / f"{name}.png") for name, draw in drawings.items()]


def _save(draw: Any, result: Result, path: Path) -> Path:
    with style.chart(path, WIDTH, HEIGHT) as axes:
        draw(axes, result)
    return path


def _peers(section: Result) -> list[str]:
    return [name for name in NAMES if name in section]


def _time(us: float) -> str:
    """A time in words."""
    return f"{us / 1000:.3g} ms" if us >= 1000 else f"{us:.2g} us" if us < 10 else f"{us:.0f} us"


def _bars(axes: Any, section: Result, keys: dict[str, str]) -> None:
    """Horizontal bars on a log axis: a peer a row, the keys' bars in it, each with its value, a time."""
    peers = _peers(section)[::-1]
    height = 0.8 / len(keys)
    for k, (key, label) in enumerate(keys.items()):
        values = [section[peer][key] for peer in peers]
        at = [i + 0.4 - height * (k + 0.5) for i in range(len(peers))]
        colours = [COLOURS[peer] for peer in peers]
        bars = axes.barh(at, values, height=height * 0.9, color=colours, alpha=1 - 0.5 * k / max(1, len(keys) - 1))
        axes.bar_label(bars, [f" {label} {_time(v)}" for v in values], fontsize=7)
    axes.set_xscale("log")
    axes.set_yticks(range(len(peers)), [NAMES[peer] for peer in peers])
    axes.set_xlim(0.1, axes.get_xlim()[1] * 12)


def _freshness(axes: Any, result: Result) -> None:
    _bars(axes, result["freshness"], {"p50": "p50", "p99": "p99"})
    axes.axvline(result["limit"]["p50"], color=style.INK, linewidth=0.8, linestyle=":")
    axes.set_xlabel("us until another process knows (dotted: the limit)")
    axes.set_title("Freshness of an update, 8 engines, 800 updates/s", loc="left")


def _decide(axes: Any, result: Result) -> None:
    section = result["decide"]
    for peer in _peers(section):
        points = sorted((int(n), record["us"]) for n, record in section[peer].items())
        label = NAMES[peer] + (" (our code, same formula)" if peer == "pub_100ms" else "")
        axes.plot(*zip(*points, strict=True), marker="o", markersize=3, color=COLOURS[peer], label=label)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("engines (4 front-ends, one request of each in flight)")
    axes.set_ylabel("us a decision")
    axes.set_title("A decision, by number of engines", loc="left")
    axes.legend(fontsize=7, frameon=False)


def _cpu(axes: Any, result: Result) -> None:
    section = result["cpu_per_update"]
    peers = _peers(section)[::-1]
    left = [0.0] * len(peers)
    for key, label, colour in (
        ("engines", "engines", style.GREEN),
        ("middle", "coordinator", style.PURPLE),
        ("frontends", "4 front-ends", style.ORANGE),
    ):
        values = [section[peer][key] for peer in peers]
        axes.barh(peers, values, left=left, label=label, color=colour)
        left = [a + b for a, b in zip(left, values, strict=True)]
    for i, total in enumerate(left):
        axes.text(total, i, f" {total:.3g}", va="center", fontsize=8)
    axes.set_yticks(range(len(peers)), [NAMES[peer] for peer in peers])
    axes.set_xlabel("us")
    axes.set_title("CPU per update, all processes, full speed", loc="left")
    axes.legend(fontsize=7, frameon=False)


def _frontends(axes: Any, result: Result) -> None:
    by_count = result["freshness_by_frontends"]
    counts = sorted(by_count, key=int)
    for peer in _peers(by_count[counts[0]]):
        p50 = [by_count[n][peer]["p50"] for n in counts]
        p99 = [by_count[n][peer]["p99"] for n in counts]
        x = [int(n) for n in counts]
        axes.plot(x, p50, marker="o", markersize=3, color=COLOURS[peer], label=NAMES[peer])
        axes.plot(x, p99, marker="o", markersize=3, color=COLOURS[peer], linestyle=":")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks([int(n) for n in counts], counts)
    axes.set_xlabel("front-ends")
    axes.set_ylabel("us, p50 and p99 (dotted)")
    axes.set_title("Freshness as front-ends grow", loc="left")
    axes.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))


def _accuracy(axes: Any, result: Result) -> None:
    section = result["accuracy"]
    peers = _peers(section)[::-1]
    values = [section[peer]["requests_mean"] for peer in peers]
    bars = axes.barh(peers, values, color=[COLOURS[peer] for peer in peers])
    labels = [
        f" {section[peer]['requests_mean']:.2g} (p99 {section[peer]['requests_p99']:.0f}), "
        f"{section[peer]['ms_mean']:.2g} ms old"
        for peer in peers
    ]
    axes.bar_label(bars, labels, fontsize=8)
    axes.set_yticks(range(len(peers)), [NAMES[peer] for peer in peers])
    axes.set_xlim(0, max(values) * 1.7)
    axes.set_xlabel("requests, of one engine, at a decision: mean error")
    axes.set_title("Belief against the schedulers' queues", loc="left")
