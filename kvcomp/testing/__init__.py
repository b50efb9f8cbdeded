"""Tiny models to try a method on."""
