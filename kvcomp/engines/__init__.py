"""Serving engines that run kvcomp's methods on their own block tables."""
