"""What a repair did, as frozen data."""

from __future__ import annotations

from dataclasses import dataclass

#: What passes that work layer by layer minimise.
OUTPUT_ERROR = "mean squared error of the layer's output, summed over channels"

#: How the note of a pass begins that time cut short.
TIME_UP = "the time was up after"


@dataclass(frozen=True)
class Treated:
    """One layer, or one group of channels, that a pass changed.

    Attributes:
        name: the layer's name, or ``"conv1 -> conv2"`` for channels between layers.
        before: what the pass minimises there, as it was; its meaning is the pass's ``measure``.
        after: the same afterwards.
        seconds: what it took.
    """

    name: str
    before: float
    after: float
    seconds: float = 0.0


@dataclass(frozen=True)
class Repair:
    """What one pass did.

    Attributes:
        name: the pass's.
        measure: what the numbers of the treated layers are.
        treated: what it changed, in the order of the network.
        skipped: pairs of what it left alone, and why.
        notes: what else should be known, one sentence each.
        seconds: of wall time.
        moved: sites whose values it scaled, so that they are distributed otherwise than what their calibrators were
            chosen for; they have been observed and calibrated again.
    """

    name: str
    measure: str
    treated: tuple[Treated, ...]
    skipped: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()
    seconds: float = 0.0
    moved: tuple[str, ...] = ()

    @property
    def cut_short(self) -> bool:
        """Whether the time was up before it had come to every layer."""
        return any(note.startswith(TIME_UP) for note in self.notes)

    def __str__(self) -> str:
        lines = [f"{self.name}: {len(self.treated)} treated in {self.seconds:.1f} s ({self.measure})"]
        lines += [f"  {t.name}: {t.before:.4g} to {t.after:.4g}, {t.seconds:.2f} s" for t in self.treated]
        lines += [f"  {name} left alone: {why}" for name, why in self.skipped]
        return "\n".join([*lines, *(f"  {note}" for note in self.notes)])
