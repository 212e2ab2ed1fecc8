"""Workers: processes that run the jobs of a study, and the jobs."""
