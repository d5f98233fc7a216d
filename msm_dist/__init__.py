"""Masked spectrogram modeling with masked autoencoders, at any scale."""

__version__ = "0.1.0"
