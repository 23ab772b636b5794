"""Resampling from a prior: which drafted tokens it draws anew, and the law of what comes out."""
