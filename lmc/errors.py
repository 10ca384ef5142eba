"""Every error that lmc raises on purpose.

LmcError
 ├─ ConfigError      a setting or an argument is wrong            exit 2
 ├─ WorkloadError    a workload file is wrong                     exit 2
 ├─ TraceError       a trace file is wrong (file and line)        exit 2
 ├─ ModelError       a model cannot be found or read              exit 2
 ├─ LayoutError      an engine's KV layout is not supported       exit 2
 ├─ EngineError      an engine is missing, or failed              exit 1
 ├─ RunError         a benchmark or a replay failed               exit 1
 ├─ NodeError        the node process or its wire failed          becomes a miss
 │   └─ NodeAbsent   nobody serves the socket                     tried again
 ├─ TierError        a tier failed to put, get or delete          becomes a miss
 │   ├─ TierFull     no room left
 │   └─ Corrupt      stored bytes do not match their footer
 │       └─ Forged   the footer is not one of this cache's auth_key
 └─ TransferError    a copy between engine and cache failed       becomes a miss
     └─ CaptureError a CUDA graph is being captured               tried again

A message is one line: what is wrong, where, and what to do.
"""

from __future__ import annotations


class LmcError(Exception):
    exit_code = 1


class ConfigError(LmcError, ValueError):
    """A ValueError too, so that the schema's validators may raise it."""

    exit_code = 2


class WorkloadError(LmcError):
    exit_code = 2


class TraceError(LmcError):
    exit_code = 2


class ModelError(LmcError):
    exit_code = 2


class LayoutError(LmcError):
    exit_code = 2


class EngineError(LmcError):
    exit_code = 1


class RunError(LmcError):
    exit_code = 1


class NodeError(LmcError):
    """The node, or the connection to it, failed; the engine goes on without a cache."""


class NodeAbsent(NodeError):
    """Nobody serves the socket; that may change."""


class TierError(LmcError):
    """A tier failed; the chunk counts as absent."""


class TierFull(TierError):
    pass


class Corrupt(TierError):
    pass


class Forged(Corrupt):
    pass


class TransferError(LmcError):
    """A copy failed; the engine recomputes."""


class CaptureError(TransferError):
    """The driver takes no such call while a CUDA graph is captured; later it will."""
