"""Training SAEs: SAELens's runners with a log, the paper's recipe, comparisons."""
