"""From measured rows to a judgement: intervals, tests, front, choice, sentences."""
