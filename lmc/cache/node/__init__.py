"""One cache for all engines of a machine: the node process (start with server.py), and how an engine's two halves attach to it."""
