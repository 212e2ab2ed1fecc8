"""Pages about runs and studies: one self-contained HTML file each."""
