"""Slow readings of the methods, written from the papers, and checks that compare with them."""
