"""What loading a data set found, dropped and changed."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["LoadReport"]


@dataclass
class LoadReport:
    """The way from the files to the loaded data set, in numbers.

    Every interaction of the files is either loaded or counted under one reason in ``dropped``.
    """

    source: str
    """Where the data came from."""
    format: str
    """Name of the file format that was read."""
    raw_interactions: int = 0
    """Rows in the interaction files."""
    raw_users: int = 0
    raw_items: int = 0
    """Different items in the interaction files."""
    dropped: dict[str, int] = field(default_factory=dict)
    """Interactions left out, by reason, in the order in which they were left out."""
    renamed: tuple[tuple[str, str], ...] = ()
    """(title in the files, title in the catalogue) of items whose title another item has too."""
    notes: list[str] = field(default_factory=list)
    """Anything else that was changed or ignored."""
    interactions: int = 0
    users: int = 0
    items: int = 0

    def drop(self, reason: str, count: int) -> None:
        """Count interactions left out for a reason; a count of 0 is not listed."""
        if count:
            self.dropped[reason] = self.dropped.get(reason, 0) + count

    def __str__(self) -> str:
        lines = [
            f"{self.source} ({self.format})",
            f"  read    {_counts(self.raw_interactions, self.raw_users, self.raw_items)}",
        ]
        lines += [f"  dropped {count:,} ({reason})" for reason, count in self.dropped.items()]
        if self.renamed:
            examples = ", ".join(f"{old!r} -> {new!r}" for old, new in self.renamed[:3])
            more = ", ..." if len(self.renamed) > 3 else ""
            lines.append(f"  renamed {len(self.renamed):,} duplicate titles: {examples}{more}")
        lines += [f"  note    {note}" for note in self.notes]
        mean = self.interactions / self.users if self.users else 0.0
        lines.append(
            f"  loaded  {_counts(self.interactions, self.users, self.items)}"
            f" ({mean:.1f} interactions a user)"
        )
        return "\n".join(lines)


def _counts(interactions: int, users: int, items: int) -> str:
    return f"{interactions:,} interactions, {users:,} users, {items:,} items"
