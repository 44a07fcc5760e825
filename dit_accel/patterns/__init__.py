"""Pattern families: which key blocks a head reads, from the grid alone or from its queries and keys."""

from dit_accel.patterns.base import Family, Selection
from dit_accel.patterns.cost import Cost, cost
from dit_accel.patterns.select import FAMILIES, family_named, select

__all__ = ["FAMILIES", "Cost", "Family", "Selection", "cost", "family_named", "select"]
