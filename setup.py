"""What can be declared is declared in pyproject.toml; this is where compiled extensions are added to the build."""

from setuptools import setup

setup()
