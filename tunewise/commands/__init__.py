"""The commands of `tunewise`, one module per group; heavy imports happen inside the functions."""
