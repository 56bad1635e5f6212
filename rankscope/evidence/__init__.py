"""What a study says about the low-intrinsic-rank hypothesis: a module for each line of evidence, verdicts by rules."""
