"""Fold BatchNorms into the linear layers around them, exactly, and prove it."""

__version__ = "0.1.0"
