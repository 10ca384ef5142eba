"""A process with a real vLLM engine, driven by JSON lines: scheduler, worker and cache live in it, so that a test can look and interfere.

Run as `python -m tests.engines.vllm_driver`; VllmDriver is the other end.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests.engines.ahead import schedule_ahead
from tests.engines.data_parallel import be_one_of_several
from tests.engines.inside_vllm import InsideVllm
from tests.engines.tiny_model import random_image
from tests.engines.traffic import Chances, Tally, break_copies, outcome, run_traffic

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "0-1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "TOKENIZERS_PARALLELISM": "false",
}


class VllmDriver:
    """Starts the engine; each call is one command."""

    def __init__(
        self,
        model: Path,
        *,
        settings: dict[str, Any] | None,
        python: str = sys.executable,
        engine_of_node: int | None = None,
        **options: Any,
    ) -> None:
        """settings None: no connector at all. python: of vLLM's environment, where the test runs in another one. engine_of_node: which
        of several data-parallel engines it is."""
        self.log: list[str] = []
        ranks = options.get("tensor_parallel_size", 1)
        cores = {"VLLM_CPU_OMP_THREADS_BIND": "|".join(str(rank) for rank in range(ranks))} if ranks > 1 else {}
        self._process = subprocess.Popen(
            [python, "-m", "tests.engines.vllm_driver"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **ENVIRONMENT, **cores},
            cwd=Path(__file__).parents[2],
        )
        try:
            self.call("start", model=str(model), settings=settings, options=options, engine_of_node=engine_of_node)
        except AssertionError:
            self.kill()
            raise

    @property
    def pid(self) -> int:
        return self._process.pid

    def __enter__(self) -> VllmDriver:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def send(self, command: str, **arguments: Any) -> None:
        """Give a command and do not wait for the answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"command": command, **arguments}) + "\n")
        self._process.stdin.flush()

    def call(self, command: str, **arguments: Any) -> Any:
        self.send(command, **arguments)
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("ANSWER "):
                answer = json.loads(line.removeprefix("ANSWER "))
                assert "error" not in answer, answer["error"]
                return answer["value"]
            self.log.append(line)
        raise AssertionError(f"the engine process ended in {command!r} with {self._process.wait()}")

    def generate(self, prompts: list[list[int]], **parameters: Any) -> list[dict[str, Any]]:
        """For each prompt: tokens, logprobs (of the chosen tokens), cached (tokens not computed)."""
        answer: list[dict[str, Any]] = self.call("generate", prompts=prompts, parameters=parameters)
        return answer

    def close(self) -> None:
        """End the process by end of input, as an engine that is shut down."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(60)
        self._process.stdout.close()

    def kill(self) -> None:
        """End the process at once, with whatever it was doing."""
        self._process.kill()
        self.close()


_DEFAULTS: dict[str, Any] = {
    "dtype": "float32",
    "max_model_len": 4096,
    "block_size": 32,
    "enable_prefix_caching": False,
    "skip_tokenizer_init": True,
}


class _Engine(InsideVllm):
    def start(
        self, model: str, settings: dict[str, Any] | None, options: dict[str, Any], engine_of_node: int | None
    ) -> None:
        from vllm import LLM
        from vllm.config.kv_events import KVEventsConfig

        from lmc.cache.settings import load_settings
        from lmc.serve.command import secrets
        from lmc.serve.engines import vllm_transfer_config

        if settings is not None:
            config = load_settings(flags=settings).config
            os.environ.update(secrets(config))
            role = options.pop("kv_role", "kv_both")
            options["kv_transfer_config"] = {**vllm_transfer_config(config), "kv_role": role}
        if options.get("async_scheduling"):
            schedule_ahead()
        if engine_of_node is not None:
            be_one_of_several(engine_of_node)
        if "kv_events_config" in options:
            options["kv_events_config"] = KVEventsConfig(**options["kv_events_config"])
        self.llm = LLM(
            model,
            enforce_eager=True,
            disable_log_stats=False,
            seed=0,
            **{**_DEFAULTS, **options},
        )
        self._yield_between_steps()

    def _yield_between_steps(self) -> None:
        """As the engine of a server does while nothing can be computed; without it the steps keep other threads from the interpreter."""
        step = self.core.step_fn

        def step_and_yield() -> tuple[Any, bool]:
            outputs, executed = step()
            if not executed and self.core.scheduler.has_requests():
                time.sleep(0.001)
            return outputs, executed

        self.core.step_fn = step_and_yield

    def generate(self, prompts: list[list[int]], parameters: dict[str, Any]) -> list[dict[str, Any]]:
        """parameters: SamplingParams' own, and cache_salts, adapters ([name, id, folder]) and images (lists of seeds), one for each."""
        from vllm import SamplingParams
        from vllm.lora.request import LoRARequest

        salts = parameters.pop("cache_salts", [None] * len(prompts))
        adapters = [LoRARequest(*one) if one else None for one in parameters.pop("adapters", [None] * len(prompts))]
        images = parameters.pop("images", [None] * len(prompts))
        sampling = SamplingParams(
            temperature=0, ignore_eos=True, detokenize=False, **{"max_tokens": 8, "logprobs": 2, **parameters}
        )
        inputs: list[dict[str, Any]] = [
            {"prompt_token_ids": prompt, **({"cache_salt": salt} if salt else {})}
            for prompt, salt in zip(prompts, salts, strict=True)
        ]
        for one, image in zip(inputs, images, strict=True):
            if image:
                one["multi_modal_data"] = {"image": [random_image(seed) for seed in image]}
        outputs = self.llm.generate(inputs, sampling, use_tqdm=False, lora_request=adapters if any(adapters) else None)
        return [outcome(output) for output in outputs]

    def add_adapter(self, adapter: list[Any]) -> bool:
        """Load [name, id, folder], as a server does when it is told of an adapter."""
        from vllm.lora.request import LoRARequest

        return bool(self.llm.llm_engine.add_lora(LoRARequest(*adapter)))

    def reload_weights(self, folder: str) -> None:
        """Other weights in place, as reinforcement learning does between two rollouts."""
        self.llm.collective_rpc("reload_weights", kwargs={"weights_path": folder})

    def generate_embedded(self, seed: int, length: int, parameters: dict[str, Any]) -> dict[str, Any]:
        """A prompt that is given as random embeddings."""
        import torch
        from vllm import SamplingParams

        size = self.llm.model_config.get_hidden_size()
        embeddings = torch.randn(length, size, generator=torch.Generator().manual_seed(seed))
        sampling = SamplingParams(
            temperature=0, ignore_eos=True, detokenize=False, **{"max_tokens": 8, "logprobs": 2, **parameters}
        )
        return outcome(self.llm.generate({"prompt_embeds": embeddings}, sampling, use_tqdm=False)[0])

    def embed(self, prompts: list[list[int]]) -> list[dict[str, Any]]:
        """Of a pooling model: vector, and cached (tokens not computed)."""
        outputs = self.llm.embed([{"prompt_token_ids": prompt} for prompt in prompts], use_tqdm=False)
        return [{"vector": one.outputs.embedding, "cached": one.num_cached_tokens} for one in outputs]

    def first_token(self, prompt: list[int], extra_args: dict[str, Any]) -> tuple[float, dict[str, int]]:
        """Seconds to the first token, and where the prompt's KV came from; extra_args ask lmc to explain."""
        from vllm import SamplingParams

        sampling = SamplingParams(temperature=0, max_tokens=1, detokenize=False, extra_args=extra_args)
        started = time.perf_counter()
        output = self.llm.generate({"prompt_token_ids": prompt}, sampling, use_tqdm=False)[0]
        return time.perf_counter() - started, output.kv_transfer_params["lmc"]["hit_tokens"]

    def reset_device(self) -> bool:
        """Empty the engine's own prefix cache."""
        return bool(self.llm.reset_prefix_cache())

    def traffic(
        self, requests: list[dict[str, Any]], seed: int, concurrency: int, chances: dict[str, float], most: bool = False
    ) -> dict[str, Any]:
        """Random traffic; see run_traffic."""
        tally, chosen = Tally(), Chances(**chances)
        connected = self.connector is not None
        mend = break_copies(self.worker.copier.backend, seed, chosen, tally) if connected else None
        try:
            run_traffic(
                self.llm.llm_engine,
                requests,
                seed=seed,
                concurrency=concurrency,
                chances=chosen,
                tally=tally,
                most=most,
            )
        finally:
            if mend is not None:
                mend()
        return asdict(tally)

    def leftovers(self) -> dict[str, int]:
        """Everything that must be zero when no request is left and all copies have ended."""
        self.settle()
        self.cache.directory.check()
        side, worker, scheduler = self.connector._scheduler, self.worker, self.core.scheduler
        pool = scheduler.kv_cache_manager.block_pool
        return {
            "operations": self.cache.directory.num_open,
            "pins": self.cache.directory.num_pins,
            "requests of the cache": len(self.cache._requests),
            "loads of the cache": len(self.cache._loading),
            "half-reported operations": len(self.cache._all_ranks),
            "requests of the connector": len(side.tracked),
            "promises of the connector": sum(
                map(len, (side.promises.offers, side.promises.blocks, side.promises.requests))
            ),
            "copies of the worker": sum(threads.num_jobs for threads in worker._tier_copies._threads.values())
            + len(worker.copier._ended),
            "unreported loads": len(worker._loaded) + len(worker._failed_blocks),
            "requests of the engine": len(scheduler.requests),
            "blocks": pool.num_gpu_blocks - 1 - pool.get_num_free_blocks(),
        }

    def slots(self) -> dict[str, Any]:
        """What is in use when all copies and deletions have ended."""
        self.settle()
        directory = self.cache.directory
        return {"usage": directory.usage(), "free_host_slots": directory._places.num_free_slots}

    def settle(self) -> None:
        """Step until no copy is under way."""
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            if not self.cache.busy:
                return
            self.core.step_fn()
            time.sleep(0.001)
        raise AssertionError("copies are still under way")

    def state(self) -> dict[str, Any]:
        self.settle()
        self.cache.directory.check()
        return {
            "usage": self.cache.directory.usage(),
            "open": self.cache.directory.num_open,
            "pins": self.cache.directory.num_pins,
            "requests": len(self.cache._requests),
            "tracked": len(self.connector._scheduler.tracked),
            "free_blocks": self.core.scheduler.kv_cache_manager.block_pool.get_num_free_blocks(),
        }

    def usage(self) -> Any:
        return self.cache.directory.usage()

    def metric(self, name: str, labels: dict[str, str]) -> float:
        return float(self.cache.metrics.registry.get_sample_value(name, labels) or 0.0)

    def by_label(self, name: str, label: str) -> dict[str, int]:
        """A counter's values, summed over its other labels."""
        found: dict[str, int] = {}
        for family in self.cache.metrics.registry.collect():
            for sample in family.samples:
                if sample.name == name and sample.value:
                    found[sample.labels[label]] = found.get(sample.labels[label], 0) + int(sample.value)
        return found

    def engine_metric(self, name: str) -> float:
        """One of vLLM's own counters."""
        return float(sum(metric.value for metric in self.llm.get_metrics() if metric.name == f"vllm:{name}"))

    def reset(self, running: bool = False) -> bool:
        self.settle()
        return bool(self.llm.reset_prefix_cache(reset_connector=True))


def main() -> None:
    engine = _Engine()
    for line in sys.stdin:
        request = json.loads(line)
        command = getattr(engine, request.pop("command"))
        try:
            answer = {"value": command(**request)}
        except Exception as error:  # noqa: BLE001  the test shall see it
            import traceback

            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        print("ANSWER " + json.dumps(answer), flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
