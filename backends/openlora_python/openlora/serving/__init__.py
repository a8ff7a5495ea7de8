"""Serving: the three steps of the ensemble, and the launcher that keeps them alive."""
