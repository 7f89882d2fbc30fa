"""What the columns, the states and the keys of ``dpshm top`` mean; ``?`` shows it."""

from __future__ import annotations

from rich.text import Text

from dpshm.ops.screen.table import STATES
from dpshm.ops.screen.text import Glyphs

COLUMNS = (
    ("wait, run", "requests in the rank's queue, and in its batch"),
    ("flight", "requests sent to the rank that it has not received"),
    ("backlog", "prompt tokens to compute, those in flight too"),
    ("KV", "share of the KV cache in use"),
    ("hit, index", "share of prompt tokens cached, of KV blocks indexed"),
    ("req/s, tok/s", "requests finished, tokens generated"),
    ("ttft, p99", "time to first token, of the last minute: p50, p99"),
    ("queue, tpot", "p50 of the time in the queue, per output token"),
    ("preempt", "requests that lost their place in the batch"),
    ("step", "mean step, or how long the present one lasts"),
    ("age", "time since the rank's last report"),
    ("history", "requests; one scale for all ranks, its top is named"),
)
MEANINGS = {
    "waking": "START was sent, no rank runs yet",
    "paused": "by the user",
    "drained": "an operator took it out of routing",
    "silent": "has work, no report for many steps",
    "stalled": "has work, no report: gets no requests",
    "stuck": "reports, no progress: gets no requests",
    "unknown": "its node is silent: gets no requests",
    "dead": "its process is gone",
    "absent": "never attached, or left",
}
KEYS = "s sort  r reverse  / filter  Tab ranks or front-ends  Space pause\nd drain  u undrain  q quit"


def help_text(glyphs: Glyphs) -> Text:
    """The explanation, 60 columns wide."""
    text = Text()
    for names, meaning in COLUMNS:
        text.append(f"{names:<13}", "bold").append(meaning + "\n")
    for state, meaning in MEANINGS.items():
        sign, plain, style = STATES[state]
        text.append(f"{sign if glyphs.unicode else plain} {state:<11}", style).append(meaning + "\n")
    return text.append("\n" + KEYS)
