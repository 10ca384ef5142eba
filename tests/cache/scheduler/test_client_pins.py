"""Pins that requests ask for: their limits, and that nothing of them is left."""

from __future__ import annotations

from tests.cache.instance import CHUNK_BYTES, NOBODY, Clock, Instance, prompt, start

LIMITS = {"host_capacity": 40 * CHUNK_BYTES, "clients_pins": 3, "clients_pin_share": "50%", "clients_pin_seconds": 60}


def ask(instance: Instance, name: str, seed: int, chunks: int, seconds: float) -> None:
    tokens = prompt(seed, 8 * chunks + 2)
    instance.serve(tokens)
    instance.scheduler.lookup(name, tokens, 0, NOBODY)
    instance.scheduler.finish(name, pin_seconds=seconds)


def held(instance: Instance) -> dict[str, int]:
    return {owner: chunks for owner, (chunks, _) in instance.scheduler.directory.pins().items()}


def test_requests_pin_a_number_a_share_and_a_time(instances):
    clock = Clock()
    instance = start(instances, clock=clock, **LIMITS)
    ask(instance, "a", 1, 8, 10)
    ask(instance, "b", 2, 8, 1e9)
    ask(instance, "c", 3, 8, 30)
    assert held(instance) == {"asked a": 8, "asked b": 8, "asked c": 4}, "20 of 40 chunks: the start of a prompt"
    ask(instance, "d", 4, 1, 30)
    assert "asked d" not in held(instance)
    cut = {
        limit: instance.metric("pins_cut_total", limit=f"clients.{limit}")
        for limit in ("pins", "pin_share", "pin_seconds")
    }
    assert cut == {"pins": 1, "pin_share": 1, "pin_seconds": 1}
    clock.now += 11
    instance.pump()
    ask(instance, "d", 4, 1, 30)
    assert held(instance) == {"asked b": 8, "asked c": 4, "asked d": 1}, "what has ended makes room"
    clock.now += 60
    instance.pump()
    assert held(instance) == {}
    instance.scheduler.directory.check()


def test_a_request_that_asks_again_has_one_pin(instances):
    instance = start(instances, clock=Clock(), **LIMITS)
    for _ in range(5):
        ask(instance, "a", 1, 8, 10)
    assert held(instance) == {"asked a": 8}


def test_pins_for_chunks_to_come_are_bounded_and_end_too(instances):
    clock = Clock()
    instance = start(instances, clock=clock, **LIMITS)
    pins = instance.scheduler.client_pins
    for number in range(10):
        pins.ask(f"r{number}", [bytes([number]) * 32], 10, clock.now, later=True)
    assert len(pins.waiting) == 3
    clock.now += 11
    instance.pump()
    pins.ask("late", [b"x" * 32], 10, clock.now, later=True)
    assert list(pins.waiting) == ["asked late"]
    instance.scheduler.reset()
    assert not pins.waiting and held(instance) == {}


def test_an_operators_pin_is_no_requests_whatever_its_name(instances):
    instance = start(instances, clock=Clock(), **LIMITS)
    directory, tokens = instance.scheduler.directory, prompt(1, 26)
    instance.serve(tokens)
    keys = instance.scheduler._track("x", tokens, NOBODY, 0.0).chain.extend(tokens)
    directory.pin(keys, "admin ops", 1e9)
    for name in ("admin ops", "ops", "promise x", "asked x"):
        ask(instance, name, 1, 3, 0)
    assert held(instance) == {"admin ops": 3}
