"""Measurements that change nothing."""
