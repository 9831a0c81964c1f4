"""A check of each numbered equation of the paper, one module for each part of it."""
