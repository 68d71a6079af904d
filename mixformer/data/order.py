"""The order of samples: batch after batch, from the seed and the position alone, with a state to go on from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np


class Place(NamedTuple):
    """A sample in the order: the number of its source, the round, and its number in the source."""

    source: int
    round: int
    number: int


class Deck:
    """The numbers below `size` without end, each once a round, shuffled anew in every round.

    Args:
        size: how many.
        seed: of the order.
        shuffle: False for the plain order.
    """

    def __init__(self, size: int, seed: Sequence[int], shuffle: bool = True) -> None:
        self.size, self.seed, self.shuffle = size, list(seed), shuffle
        self.round, self.position = 0, 0
        self._late: list[int] = []
        self._order = self._shuffled()

    def _shuffled(self) -> Any:
        if not self.shuffle:
            return range(self.size)
        return np.random.default_rng([*self.seed, self.round]).permutation(self.size)

    def draw(self, held: set[int]) -> tuple[int, int]:
        """The next round and number; those in `held` come as late in the round as can be."""
        while self.position < self.size:
            index = int(self._order[self.position])
            self.position += 1
            if index not in held:
                return self.round, index
            self._late.append(index)
        if self._late:
            return self.round, self._late.pop(0)
        self._turn_over()
        return self.draw(held)

    def _turn_over(self) -> None:
        self.round, self.position = self.round + 1, 0
        self._order = self._shuffled()

    def state_dict(self) -> dict[str, Any]:
        """Where the next draw goes on."""
        return {"round": self.round, "position": self.position, "late": list(self._late), "size": self.size}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there.

        Raises:
            ValueError: the state of another number of samples.
        """
        if state["size"] != self.size:
            raise ValueError(
                f"The data has {self.size} samples, but {state['size']} when the state was saved: resume with the same "
                f"files, or start anew."
            )
        self.round, self.position, self._late = state["round"], state["position"], list(state["late"])
        self._order = self._shuffled()


class Shards(Protocol):
    """A source in parts, whose sizes are known when they are asked for."""

    @property
    def name(self) -> str:
        """For messages."""
        ...

    @property
    def num_shards(self) -> int:
        """How many parts."""
        ...

    def size(self, shard: int) -> int:
        """How many samples a part has, at least one."""
        ...

    def number(self, shard: int, index: int) -> int:
        """The number in the source of a sample of a part."""
        ...

    def ahead(self, shard: int) -> None:
        """Make ready what is needed soon."""
        ...

    def release(self, shards: set[int]) -> None:
        """Let go of all parts but these."""
        ...


class ShardDeck(Deck):
    """The samples of shards without end: all of one shard, then all of the next, each once a round.

    The order of the shards is new in every round, and so is that of the samples in each.

    Args:
        shards: the source.
        seed: of the order.
        shuffle: False for the plain order.
    """

    def __init__(self, shards: Shards, seed: Sequence[int], shuffle: bool = True) -> None:
        self.shards, self.turn, self._released = shards, -1, -1  # turn: number of the shard, counted over all rounds
        super().__init__(0, seed, shuffle)

    def shard(self, turn: int) -> int:
        """The shard whose turn it is."""
        turns, place = divmod(turn, self.shards.num_shards)
        if not self.shuffle:
            return place
        return int(np.random.default_rng([*self.seed, turns]).permutation(self.shards.num_shards)[place])

    def _shuffled(self) -> Any:
        if self.turn < 0:
            return range(0)
        shard = self.shard(self.turn)
        first = self.shards.number(shard, 0)
        if not self.shuffle:
            return range(first, first + self.size)
        return first + np.random.default_rng([*self.seed, self.round, 1 + shard]).permutation(self.size)

    def _turn_over(self) -> None:
        size = self.shards.size(self.shard(self.turn + 1))
        self.turn, self.size, self.position = self.turn + 1, size, 0
        self.round = self.turn // self.shards.num_shards
        self._order = self._shuffled()
        self.shards.ahead(self.shard(self.turn + 1))

    def state_dict(self) -> dict[str, Any]:
        """The round and the shard, and where in it the next draw goes on."""
        return {**super().state_dict(), "turn": self.turn, "shards": self.shards.num_shards}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there.

        Raises:
            ValueError: the state of another number of shards, or of another number of samples in the one that is
                gone on with.
        """
        if state.get("shards") != self.shards.num_shards:
            raise ValueError(
                f"{self.shards.name} has {self.shards.num_shards} shards, but {state.get('shards')} when the state was "
                f"saved: resume with the same data, or start anew."
            )
        self.turn, self.round, self.size = state["turn"], state["round"], state["size"]
        self.position, self._late = state["position"], list(state["late"])
        if self.position < self.size or self._late:
            found = self.shards.size(self.shard(self.turn))
            if found != self.size:
                raise ValueError(
                    f"Shard {self.shard(self.turn)} of {self.shards.name} has {found} samples, but {self.size} when "
                    f"the state was saved: resume with the same data, or start anew."
                )
        self._order = self._shuffled()

    def release(self, turn: int) -> None:
        """Let go of the shards before a turn."""
        if turn != self._released:
            self.shards.release({self.shard(other) for other in range(max(turn, 0), self.turn + 2)})
            self._released = turn


class Order:
    """Places of samples, batch after batch.

    Args:
        sizes: samples of each source, or a source whose size is not known.
        weights: how often the sources come; None for all samples of all sources once a round.
        batch_size: of a batch of all processes together.
        seed: of the order.
        shuffle: False for that of the files.

    Raises:
        ValueError: a source of unknown size beside others, without weights.
    """

    def __init__(
        self, sizes: Sequence[int | Shards], weights: Sequence[float] | None, batch_size: int, seed: int,
        shuffle: bool = True,
    ) -> None:
        known = [size for size in sizes if isinstance(size, int)]
        unknown = [size for size in sizes if not isinstance(size, int)]
        if unknown and weights is None and len(sizes) > 1:
            raise ValueError(
                f"How many samples {unknown[0].name} has is not known before it is read, so it takes a weight to mix "
                f"it with others: give one to each source."
            )
        self.batch_size, self.weights, self._ends = batch_size, weights, np.cumsum(known)
        self._together = weights is None and not unknown
        amounts: Sequence[int | Shards] = [sum(known)] if self._together else sizes
        self.decks: list[Deck] = []
        for number, size in enumerate(amounts):
            own = [seed % 2**32, number]
            self.decks.append(Deck(size, own, shuffle) if isinstance(size, int) else ShardDeck(size, own, shuffle))
        self.drawn = [0] * len(self.decks)

    def next(self) -> list[Place]:
        """The places of the next batch; none twice unless there are fewer samples than it takes."""
        places: list[Place] = []
        held: list[set[int]] = [set() for _ in self.decks]
        for _ in range(self.batch_size):
            number = self._deck()
            self.drawn[number] += 1
            turn, index = self.decks[number].draw(held[number])
            held[number].add(index)
            places.append(self._place(number, turn, index))
        return places

    def _deck(self) -> int:
        """The source that is furthest behind its share."""
        if self.weights is None:
            return 0
        done = sum(self.drawn) + 1
        behind = [w * done - n * sum(self.weights) for w, n in zip(self.weights, self.drawn, strict=True)]
        return behind.index(max(behind))

    def _place(self, number: int, turn: int, index: int) -> Place:
        if not self._together:
            return Place(number, turn, index)
        source = int(np.searchsorted(self._ends, index, side="right"))
        return Place(source, turn, index - int(self._ends[source - 1]) if source else index)

    def state_dict(self) -> dict[str, Any]:
        """Where the next batch goes on."""
        return {"drawn": list(self.drawn), "decks": [deck.state_dict() for deck in self.decks]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there.

        Raises:
            ValueError: the state of other sources.
        """
        if len(state["decks"]) != len(self.decks):
            raise ValueError(f"The data has {len(self.decks)} weighted sources, but {len(state['decks'])} when saved.")
        self.drawn = list(state["drawn"])
        for deck, saved in zip(self.decks, state["decks"], strict=True):
            deck.load_state_dict(saved)

    def release(self, state: dict[str, Any]) -> None:
        """Let go of what no batch from that state on needs."""
        for deck, saved in zip(self.decks, state["decks"], strict=True):
            if isinstance(deck, ShardDeck):
                deck.release(saved["turn"])
