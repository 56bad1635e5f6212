"""What a study says about the low-intrinsic-rank hypothesis: a folder for each line of evidence, verdicts by rules."""
