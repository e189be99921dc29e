"""For tools that know no pyproject.toml; everything stands there."""

from setuptools import setup

setup()
