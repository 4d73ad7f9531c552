"""The parts of the verb `plan`: rules to try, one pass over a run, an engine's settings, the choice, the drawing."""
