"""For tools that know no pyproject.toml, and to leave nothing behind in the source; all else stands there."""

import sys
import tempfile

from setuptools import setup

# `pip install .` runs these commands in the source itself, where they would leave build/ and flask_pg_sse.egg-info.
elsewhere = {}
if {"bdist_wheel", "dist_info", "egg_info"} & set(sys.argv):
    scratch = tempfile.TemporaryDirectory(prefix="flask-pg-sse-build-")
    elsewhere = {"build": {"build_base": scratch.name}, "egg_info": {"egg_base": scratch.name}}

setup(options=elsewhere)
