"""Experiments and pages. Nothing stands on them."""
