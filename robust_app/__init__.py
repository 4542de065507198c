"""Certified robust training of image classifiers, built on :mod:`mogd`."""
