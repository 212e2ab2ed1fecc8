"""Comparisons: plan, workers, trials, store, judgement, report; what a run will cost; what it has to beat."""
