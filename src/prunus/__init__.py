"""Prunus: make a neural network sparse and keep it good."""

__version__ = "0.1.0"
