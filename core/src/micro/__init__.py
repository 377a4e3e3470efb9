"""Micro: a framework for distributed systems."""
