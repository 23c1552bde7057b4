"""Preference texts built from items: what teaches the TRM, and warms up a policy.

No data set comes with the preferences of its users, so they are made up from what is known:
phrases about the user's recent items, about items like the target, and about something else
altogether. The shares decide how far the TRM trusts a preference. With few about the target it
ignores them, and nothing that a policy asks for changes what it finds; with nothing else its
ranking without a preference suffers (docs/RESULTS.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from deeprec.trm.phrases import Int64Array, Kind, PhraseBook

RECENT_ITEMS = 5  # a preference sums up the end of a history


@dataclass
class PreferenceMix:
    """What preferences are made of: shares of the examples, the rest has none.

    Beside its preference every example is learnt without one as well.
    """

    target: float = 0.7
    """About the target's categories and year, and titles like it."""
    history: float = 0.2
    """About the user's last items."""
    wrong: float = 0.1
    """About the target of somebody else."""
    noise: float = 0.2
    """Share of the phrases about a target that are about the history instead."""
    named: float = 0.7
    """Share of a target's "like …" phrases that name the target itself."""
    max_phrases: int = 4
    kinds: dict[str, float] = field(
        default_factory=lambda: {
            "category": 0.25,
            "year": 0.05,
            "decade": 0.05,
            "word": 0.05,
            "like": 0.6,
        }
    )
    """Relative frequency of each kind of phrase."""

    def __post_init__(self) -> None:
        if min(self.target, self.history, self.wrong) < 0 or self.carried > 1 + 1e-9:
            raise ValueError(
                "PreferenceMix: target, history and wrong must be shares that add up to at most "
                f"1, got {self.target}, {self.history}, {self.wrong}"
            )
        unknown = {kind.upper() for kind in self.kinds} - set(Kind.__members__)
        if unknown or sum(self.kinds.values()) <= 0 or min(self.kinds.values()) < 0:
            raise ValueError(
                f"PreferenceMix.kinds: expected weights of {[k.name.lower() for k in Kind]}, "
                f"got {self.kinds}"
            )
        if self.max_phrases < 1:
            raise ValueError(f"PreferenceMix.max_phrases must be 1 or more, got {self.max_phrases}")

    @property
    def carried(self) -> float:
        """Share of the examples that carry a preference."""
        return self.target + self.history + self.wrong


class PreferenceWriter:
    """Draws preferences about items, as phrase ids or as texts.

    ``similar`` int64 ``[n_items + 1, S]`` lists items like each item, for "like …" phrases about
    a target; row 0 is unused.
    """

    def __init__(
        self, book: PhraseBook, similar: Int64Array, mix: PreferenceMix | None = None
    ) -> None:
        self.book = book
        self.mix = mix or PreferenceMix()
        self._similar = similar
        weights = np.array([self.mix.kinds.get(kind.name.lower(), 0.0) for kind in Kind])
        self._kinds = weights / weights.sum()

    def about_items(self, items: Sequence[Sequence[int]], rng: np.random.Generator) -> list[str]:
        """One preference text for each list of items, e.g. "Action; 2013; like Gravity (2013)".

        Every phrase is about a random item of its list. An empty list has an empty preference.
        """
        width = self.mix.max_phrases
        chosen = np.array(
            [rng.choice(row, width) if len(row) else np.zeros(width) for row in items],
            dtype=np.int64,
        ).reshape(len(items), width)
        return self.book.join(self._phrases(chosen, self._draw_kinds(len(items), rng), rng))

    def for_training(
        self, history: Int64Array, lengths: Int64Array, targets: Int64Array,
        rng: np.random.Generator,
    ) -> Int64Array:  # fmt: skip
        """Phrase ids ``[B, max_phrases]`` of a batch of examples, mixed; all 0: no preference."""
        rows, width = len(targets), self.mix.max_phrases
        kinds = self._draw_kinds(rows, rng)
        back = rng.integers(0, np.minimum(lengths, RECENT_ITEMS)[:, None], (rows, width))
        recent = np.take_along_axis(history, lengths[:, None] - 1 - back, axis=1)
        near = self._similar[
            targets[:, None], rng.integers(0, self._similar.shape[1], (rows, width))
        ]
        named = (kinds != Kind.LIKE) | (rng.random((rows, width)) < self.mix.named)
        about_target = np.where(named, targets[:, None], near)
        noise = rng.random((rows, width)) < self.mix.noise
        about_target = np.where(noise, recent, about_target)
        shuffled = rng.permutation(rows)

        share = rng.random((rows, 1))
        items = np.zeros((rows, width), dtype=np.int64)
        upper = 0.0
        for part, source in (
            (self.mix.target, about_target),
            (self.mix.history, recent),
            (self.mix.wrong, about_target[shuffled]),
        ):
            items = np.where((upper <= share) & (share < upper + part), source, items)
            upper += part
        # Another user's preference keeps the kinds it was made with.
        wrong = (share >= upper - self.mix.wrong) & (share < upper)
        return self._phrases(items, np.where(wrong, kinds[shuffled], kinds), rng)

    def _draw_kinds(self, rows: int, rng: np.random.Generator) -> Int64Array:
        return rng.choice(len(Kind), size=(rows, self.mix.max_phrases), p=self._kinds)

    def _phrases(
        self, items: Int64Array, kinds: Int64Array, rng: np.random.Generator
    ) -> Int64Array:
        """A random phrase about each item ``[B, K]``, of which the first 1…K are kept, as ids."""
        width = items.shape[1]
        count = rng.integers(1, width + 1, (len(items), 1))
        return np.where(np.arange(width) < count, self.book.draw(items, kinds, rng), 0)
