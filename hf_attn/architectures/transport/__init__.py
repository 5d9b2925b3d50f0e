"""Optimal transport between two sets of vectors: exact and entropic plans, and the map that a plan means."""

from .entropic import entropic_plan, entropic_plan_eager
from .exact import exact_plan
from .maps import squared_distances, transported


__all__ = ["entropic_plan", "entropic_plan_eager", "exact_plan", "squared_distances", "transported"]
