"""Results as pages: sections of text, tables and pictures, in one file that needs nothing else."""
