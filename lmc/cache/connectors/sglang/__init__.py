"""SGLang's external cache linker, out of tree: --unified-cache-external-linker-config with linker LmcLinker and this package as the path.

SGLang imports it in each scheduler process, beside the KV pool of one rank: directory and worker are both there (LocalCache). A page of
SGLang is a chunk of lmc.

The linker interface names pages by SGLang's own hash, which knows nothing of model, dtype or rank, and it wants its answer at once: there
is no "ask again". So lmc also looks at the waiting requests before each prefill batch (waiting.py): it sees their tokens, which it hashes
into its own keys, and keeps a request back while its chunks come from disk or a remote tier. What is promised lies in host memory, pinned:
SGLang aborts requests whose promised load fails.
"""

from lmc.cache.connectors.sglang.linker import LmcLinker

__all__ = ["LmcLinker"]
