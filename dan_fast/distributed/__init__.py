"""Collectives that can be differentiated any number of times, and how slots are divided over ranks."""
