"""Metrics on Triton's metrics port. Imported in stubs only."""

from __future__ import annotations

import triton_python_backend_utils as pb_utils

from .metrics import Family, Metric


class TritonRegistry:
    """Families and metrics live as long as the stub: Triton drops a family whose object is gone."""

    def __init__(self) -> None:
        self._families: dict[str, pb_utils.MetricFamily] = {}

    def metric(self, family: Family, labels: dict[str, str]) -> Metric:
        made = self._families.get(family.name)
        if made is None:
            kind = getattr(pb_utils.MetricFamily, family.kind.upper())
            made = pb_utils.MetricFamily(name=family.name, description=family.description, kind=kind)
            self._families[family.name] = made
        if family.kind == "histogram":
            return made.Metric(labels=labels, buckets=list(family.buckets))
        return made.Metric(labels=labels)
