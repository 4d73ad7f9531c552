"""Parts of `plan`: pruning rules, one pass over a run, settings of engines, the choice, tables and plots."""
