"""Naive twins of the policies that keep several queues; naive.py says what a twin is."""

from __future__ import annotations

from collections.abc import Sequence

from tests.contracts.policy import IsBlocked, Key


class Queues:
    """Several queues, oldest first, with nodes set aside until their children are gone."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.queues: dict[str, list[Key]] = {}
        self.place: dict[Key, str] = {}
        self.aside: set[Key] = set()
        self.there: set[Key] = set()

    def size(self, place: str) -> int:
        return sum(where == place for where in self.place.values())

    def put(self, place: str, key: Key) -> None:
        self.place[key] = place
        self.queues.setdefault(place, []).append(key)

    def take(self, key: Key) -> str:
        place = self.place.pop(key)
        if key in self.aside:
            self.aside.remove(key)
        else:
            self.queues[place].remove(key)
        return place

    def has_children(self, key: Key) -> bool:
        return any(other[:-1] == key for other in self.there)

    def oldest(self, place: str, held: IsBlocked) -> Key | None:
        for key in list(self.queues.get(place, [])):
            if not held(key):
                return key
            self.step_over(place, key)
        return None

    def step_over(self, place: str, key: Key) -> None:
        if self.has_children(key):
            self.queues[place].remove(key)
            self.aside.add(key)

    def gone(self, key: Key) -> None:
        self.there.remove(key)
        parent = key[:-1]
        if parent in self.aside and not self.has_children(parent):
            self.aside.remove(parent)
            self.queues[self.place[parent]].insert(0, parent)

    def begin(self, request_class: int) -> None:
        """What it evicts does not depend on the class."""

    def settle(self, chain: Sequence[Key]) -> None:
        pass

    def trim(self, place: str, limit: int) -> None:
        while self.size(place) > limit:
            self.take(self.queues[place][0])


class NaiveSieve(Queues):
    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self.visited: set[Key] = set()
        self.hand: Key | None = None  # None: at the old end
        self.queues["all"] = []

    def hit(self, key: Key, now: int) -> None:
        self.visited.add(key)

    def insert(self, key: Key, now: int) -> None:
        self.put("all", key)
        self.there.add(key)

    def after(self, key: Key) -> Key | None:
        queue = self.queues["all"]
        index = queue.index(key) + 1
        return queue[index] if index < len(queue) else None

    def victim(self, held: IsBlocked) -> Key | None:
        queue = self.queues["all"]
        for _ in range(3 * len(queue) + 1):
            if not queue:
                break
            key = self.hand if self.hand is not None else queue[0]
            if key not in self.visited and not held(key):
                self.hand = key
                return key
            self.visited.discard(key)
            self.hand = self.after(key)
            if held(key):
                self.step_over("all", key)
        self.hand = None
        return None

    def evict(self, key: Key) -> None:
        if self.hand == key:
            self.hand = self.after(key)
        self.visited.discard(key)
        self.take(key)
        self.there.remove(key)
        parent = key[:-1]
        if parent in self.aside and not self.has_children(parent):
            self.aside.remove(parent)
            queue = self.queues["all"]
            queue.insert(queue.index(self.hand) if self.hand is not None else len(queue), parent)
            self.hand = parent


class NaiveS3Fifo(Queues):
    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self.small = capacity // 10
        self.hits: dict[Key, int] = {}
        self.full = False

    def hit(self, key: Key, now: int) -> None:
        self.hits[key] = min(self.hits[key] + 1, 3)

    def insert(self, key: Key, now: int) -> None:
        was_ghost = key in self.place
        if was_ghost:
            self.take(key)
        self.hits[key] = 0
        warm = not self.full and self.size("small") >= self.small
        self.put("main" if was_ghost or warm else "small", key)
        self.there.add(key)

    def settle(self, chain: Sequence[Key]) -> None:
        self.trim("ghost", self.capacity * 9 // 10)

    def victim(self, held: IsBlocked) -> Key | None:
        if self.size("main") > self.capacity - self.small or self.size("small") == 0:
            return self.search_main(held) or self.search_small(held)
        return self.search_small(held) or self.search_main(held)

    def search_small(self, held: IsBlocked) -> Key | None:
        for key in list(self.queues.get("small", [])):
            if self.hits[key] >= 2:
                self.take(key)
                self.hits[key] = 0
                self.put("main", key)
            elif not held(key):
                return key
            else:
                self.step_over("small", key)
        return None

    def search_main(self, held: IsBlocked) -> Key | None:
        again = True
        while again:
            again = False
            for key in list(self.queues.get("main", [])):
                if self.hits[key] > 0:
                    self.hits[key] -= 1
                    self.take(key)
                    self.put("main", key)
                    again = True
                elif not held(key):
                    return key
                else:
                    self.step_over("main", key)
        return None

    def evict(self, key: Key) -> None:
        self.full = True
        if self.take(key) == "small":
            self.put("ghost", key)
        self.gone(key)


class Naive2Q(Queues):
    def hit(self, key: Key, now: int) -> None:
        if self.place[key] == "frequent":
            self.take(key)
            self.put("frequent", key)

    def insert(self, key: Key, now: int) -> None:
        was_ghost = key in self.place
        if was_ghost:
            self.take(key)
        self.put("frequent" if was_ghost else "fresh", key)
        self.there.add(key)

    def settle(self, chain: Sequence[Key]) -> None:
        self.trim("ghost", max(1, self.capacity // 2))

    def victim(self, held: IsBlocked) -> Key | None:
        places = ["fresh", "frequent"]
        if self.size("fresh") <= max(1, self.capacity // 4) and self.size("frequent") > 0:
            places.reverse()
        return self.oldest(places[0], held) or self.oldest(places[1], held)

    def evict(self, key: Key) -> None:
        if self.take(key) == "fresh":
            self.put("ghost", key)
        self.gone(key)


class NaiveArc(Queues):
    target = 0.0

    def hit(self, key: Key, now: int) -> None:
        self.take(key)
        self.put("T2", key)

    def adapt(self, key: Key) -> None:
        b1, b2 = self.size("B1"), self.size("B2")
        if self.place.get(key) == "B1":
            self.target = min(self.target + max(1.0, b2 / b1), self.capacity)
        elif self.place.get(key) == "B2":
            self.target = max(self.target - max(1.0, b1 / b2), 0.0)

    def insert(self, key: Key, now: int) -> None:
        self.adapt(key)
        was_ghost = key in self.place
        if was_ghost:
            self.take(key)
        self.put("T2" if was_ghost else "T1", key)
        self.there.add(key)

    def settle(self, chain: Sequence[Key]) -> None:
        self.trim("B1", max(0, self.capacity - self.size("T1")))
        self.trim("B2", max(0, 2 * self.capacity - self.size("T1") - self.size("T2") - self.size("B1")))

    def from_once(self) -> bool:
        return self.size("T1") > self.target or self.size("T2") == 0

    def victim(self, held: IsBlocked) -> Key | None:
        places = ["T1", "T2"] if self.from_once() else ["T2", "T1"]
        return self.oldest(places[0], held) or self.oldest(places[1], held)

    def evict(self, key: Key) -> None:
        self.put("B1" if self.take(key) == "T1" else "B2", key)
        self.gone(key)


class NaiveLirs(Queues):
    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self.stack: list[Key] = []  # oldest first
        self.most_low = capacity - max(1, capacity // 100)
        self.full = False
        self.queues["ghost"] = []

    def top(self, key: Key) -> None:
        if key in self.stack:
            self.stack.remove(key)
        self.stack.append(key)

    def prune(self) -> None:
        while self.stack and self.place[self.stack[0]] != "low":
            key = self.stack.pop(0)
            if self.place[key] == "ghost":
                self.take(key)

    def demote(self) -> None:
        key = self.stack.pop(0)
        self.take(key)
        self.put("high", key)
        self.prune()

    def promote(self, key: Key) -> None:
        self.take(key)
        self.put("low", key)
        self.top(key)
        self.prune()
        if self.size("low") > self.most_low:
            self.demote()

    def hit(self, key: Key, now: int) -> None:
        if self.place[key] == "low":
            self.top(key)
            self.prune()
        elif key in self.stack:
            self.promote(key)
        else:
            self.take(key)
            self.put("high", key)
            self.top(key)

    def insert(self, key: Key, now: int) -> None:
        if key in self.place:
            self.promote(key)
        else:
            proven = not self.full and self.size("low") < self.most_low
            self.put("low" if proven else "high", key)
            self.top(key)
        self.there.add(key)

    def settle(self, chain: Sequence[Key]) -> None:
        while self.size("ghost") > 2 * self.capacity:
            key = self.queues["ghost"][0]
            self.take(key)
            self.stack.remove(key)

    def victim(self, held: IsBlocked) -> Key | None:
        key = self.oldest("high", held)
        if all(self.place[low] != "low" or held(low) for low in self.stack):
            return key
        while key is None:
            self.demote()
            key = self.oldest("high", held)
        return key

    def evict(self, key: Key) -> None:
        self.full = True
        was_low = self.take(key) == "low"
        if was_low:
            self.stack.remove(key)
        if key in self.stack:
            self.put("ghost", key)
        if was_low:
            self.prune()
        self.gone(key)
