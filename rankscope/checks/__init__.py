"""``check``: what is wrong with an adapter, and whether a checkpoint contains it, as findings with what to do."""
