"""The fixed choices of options, for help texts. --help must not import the modules that define them; tests/cli/test_help.py compares."""

from __future__ import annotations

ENGINES = ("vllm", "sglang")
POLICIES = ("lru", "fifo", "lfu", "sieve", "s3fifo", "arc", "lirs", "2q", "gdsf", "predictive")
BOUND = "belady"  # only a simulator can replay it
WINDOWS = ("all", "last-half")
ROUTINGS = ("round-robin", "prefix")
APIS = ("completions", "chat")
WRITE_MODES = ("through", "back", "around")
FORMATS = (
    "lmc",
    "lmcache",
    "bailian",
    "ragpulse",
    "mooncake",
    "kv-cache-tester",
    "vllm-events",
    "prompts",
    "azure",
    "burstgpt",
)


def listed(choices: tuple[str, ...]) -> str:
    """ "a, b or c"."""
    return f"{', '.join(choices[:-1])} or {choices[-1]}"


def metavar(choices: tuple[str, ...]) -> str:
    """ "[a|b|c]"."""
    return f"[{'|'.join(choices)}]"
