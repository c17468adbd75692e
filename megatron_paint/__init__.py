"""PAINT on Megatron-Core: partial-solution adaptive interpolated training for self-distilled reasoners."""

__version__ = "0.1.0"
