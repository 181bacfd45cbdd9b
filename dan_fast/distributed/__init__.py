"""Processes that work together: how they join, collectives with derivatives of any order, division of slots."""
