"""Analyses of updates: spectra, comparisons and inspection; their results have a versioned JSON form."""
