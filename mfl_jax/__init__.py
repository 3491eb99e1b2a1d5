"""Encoders for routine H&E, taught by denser partner images. The host side, pixels to batches, is input_pipeline."""

__version__ = "0.1.0"
