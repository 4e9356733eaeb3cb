"""Build entry point; everything that is not about compiling is in pyproject.toml."""

from setuptools import setup

setup()
