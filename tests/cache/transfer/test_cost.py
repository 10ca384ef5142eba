from __future__ import annotations

import numpy as np
import pytest

from lmc.cache.transfer.backends.auto import AutoBackend
from lmc.cache.transfer.cost import PIECE_SIZES, CostModel, Rate, calibrate
from lmc.cache.transfer.planner import Descriptors, Direction
from lmc.errors import TransferError


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Device:
    """A device of which everything is known: the copy engine pays for each piece below a cliff, the kernel pays per call and per byte."""

    def __init__(self, clock: Clock, slowness: float = 1.0) -> None:
        self.clock = clock
        self.slowness = slowness

    def seconds(self, name: str, direction: Direction, size: int, count: int) -> float:
        if name == "dma":
            return 5e-6 + count * max(1.2e-6 if direction is Direction.LOAD else 0.1e-6, size / 50e9)
        return 20e-6 + count * size / (40e9 if direction is Direction.LOAD else 30e9)

    def measure(self, name: str, direction: Direction, size: int, count: int) -> float:
        seconds = self.seconds(name, direction, size, count)
        self.clock.now += seconds * self.slowness
        return seconds


def copies(direction: Direction, *sizes: int) -> Descriptors:
    size = np.array(sizes, dtype=np.uint64)
    return Descriptors(np.zeros_like(size), np.zeros_like(size), size, direction)


@pytest.fixture
def model() -> CostModel:
    clock = Clock()
    return calibrate(["dma", "kernel"], Device(clock).measure, clock=clock)


@pytest.mark.parametrize("direction", list(Direction))
@pytest.mark.parametrize("size", [4096, 6000, 8192, 20_000, 40_000, 65_536, 1 << 20, 1 << 24])
@pytest.mark.parametrize("count", [1, 16, 5000])
def test_the_faster_backend_is_chosen(model: CostModel, direction: Direction, size: int, count: int) -> None:
    device = Device(Clock())
    truth = {name: device.seconds(name, direction, size, count) for name in ("dma", "kernel")}
    chosen = model.fastest(["dma", "kernel"], copies(direction, *[size] * count))
    assert truth[chosen] <= 1.25 * min(truth.values())  # interpolation may miss by a little near the crossover


def test_the_crossover_is_found_per_direction(model: CostModel) -> None:
    small = [8192] * 1000
    assert model.fastest(["dma", "kernel"], copies(Direction.LOAD, *small)) == "kernel"
    assert model.fastest(["dma", "kernel"], copies(Direction.STORE, *small)) == "dma"
    assert model.fastest(["dma", "kernel"], copies(Direction.LOAD, *[1 << 20] * 10)) == "dma"


def test_mixed_sizes_are_summed(model: CostModel) -> None:
    """The mean of one large and many small pieces is a size that no piece has."""
    mixed = copies(Direction.LOAD, 1 << 22, *[4096] * 600)
    assert np.mean(mixed.size) > 8192
    assert model.fastest(["dma", "kernel"], mixed) == "kernel"


def test_a_slow_device_is_measured_at_fewer_sizes_but_never_at_none() -> None:
    clock = Clock()
    model = calibrate(["dma", "kernel"], Device(clock, slowness=1e6).measure, budget_s=0.1, clock=clock)
    assert {len(rate.sizes) for rate in model.rates.values()} == {1}
    assert {rate.sizes[0] for rate in model.rates.values()} == {PIECE_SIZES[0]}
    quick = Clock()
    model = calibrate(["dma", "kernel"], Device(quick).measure, budget_s=0.1, clock=quick)
    assert {len(rate.sizes) for rate in model.rates.values()} == {len(PIECE_SIZES)}
    assert quick.now < 0.1


def test_the_log_line_names_rates() -> None:
    rate = Rate(0.0, (4096, 32768), (4096e-9, 32768e-9 / 2))
    line = CostModel({("dma", Direction.LOAD): rate}, 0.01).describe()
    assert line == "load by dma: 4 KiB 1.0, 32 KiB 2.0 GB/s"


class Recorder:
    def __init__(self, name: str, reason: str = "") -> None:
        self.name = name
        self.reason = reason
        self.streams: list[int] = []

    def refuses(self, descriptors: Descriptors) -> str:
        return self.reason

    def execute(self, descriptors: Descriptors, stream: int = 0) -> None:
        self.streams.append(stream)


def auto(dma: Recorder, kernel: Recorder, model: CostModel | None, forced: str = "") -> AutoBackend:
    return AutoBackend({"dma": dma, "kernel": kernel}, model, lambda queue: queue(99), forced=forced)


def test_the_choice_is_counted(model: CostModel) -> None:
    dma, kernel = Recorder("dma"), Recorder("kernel")
    backend = auto(dma, kernel, model)
    backend.execute(copies(Direction.LOAD, *[8192] * 1000), stream=7)
    backend.execute(copies(Direction.STORE, *[8192] * 1000))
    assert kernel.streams == [7]
    assert dma.streams == [99]  # without a stream, one of its own that it waits for
    assert backend.chosen == {("kernel", "load"): 1, ("dma", "store"): 1}


def test_a_backend_that_refuses_is_passed_over_and_counted(model: CostModel) -> None:
    dma, kernel = Recorder("dma"), Recorder("kernel", "the slots are not pinned")
    for forced in ("", "kernel"):
        backend = auto(dma, kernel, model, forced)
        backend.execute(copies(Direction.LOAD, *[8192] * 1000), stream=7)
        assert backend.refused == {"kernel: the slots are not pinned": 1}
        assert backend.chosen == {("dma", "load"): 1}


def test_the_setting_overrides_the_model(model: CostModel) -> None:
    for chosen_model in (model, None):
        backend = auto(Recorder("dma"), Recorder("kernel"), chosen_model, forced="dma")
        backend.execute(copies(Direction.LOAD, *[8192] * 1000), stream=7)
        assert backend.chosen == {("dma", "load"): 1}


def test_no_backend_left_is_an_error(model: CostModel) -> None:
    backend = auto(Recorder("dma", "broken"), Recorder("kernel", "unaligned"), model)
    with pytest.raises(TransferError, match="dma: broken; kernel: unaligned"):
        backend.execute(copies(Direction.LOAD, 8192), stream=7)


def test_no_copies_choose_nothing(model: CostModel) -> None:
    backend = auto(Recorder("dma"), Recorder("kernel"), model)
    backend.execute(copies(Direction.LOAD))
    assert not backend.chosen


def test_a_rate_is_interpolated_inside_and_proportional_beyond() -> None:
    rate = Rate(0.5, (1000, 2000), (1.0, 3.0))
    seconds = {size: rate.seconds(copies(Direction.LOAD, size)) for size in (100, 1000, 1500, 2000, 8000)}
    assert seconds == {100: 1.5, 1000: 1.5, 1500: 2.5, 2000: 3.5, 8000: 12.5}
