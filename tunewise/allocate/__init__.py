"""Allocators: which sizes and sites are decided anew, and when."""
