"""The command `ortho decompose`: recipe, selection, plan, job and report."""
