"""Everything that can be declared is in pyproject.toml; this file is where compiled extensions are added to the build."""

from setuptools import setup

setup()
