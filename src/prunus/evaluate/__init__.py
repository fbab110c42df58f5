"""Measurements of a model, and the baselines they are held against."""
