from __future__ import annotations

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).resolve().parent


def version() -> str:
    # Read, not imported: importing would need Flask before pip has installed it.
    text = (HERE / "flask_pg_sse" / "__init__.py").read_text(encoding="utf-8")
    found = re.search(r"^__version__(?:\s*:\s*\w+)?\s*=\s*[\"']([^\"']+)[\"']", text, re.MULTILINE)
    if found is None:
        raise SystemExit('setup.py: flask_pg_sse/__init__.py has no line __version__ = "…"')
    return found.group(1)


setup(
    name="flask-pg-sse",
    version=version(),
    description="Real-time web pages for Flask out of PostgreSQL: NOTIFY to Server-Sent Events, without Redis",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="flask_pg_sse contributors",
    license="MIT",
    python_requires=">=3.10",
    packages=find_packages(include=["flask_pg_sse", "flask_pg_sse.*"]),
    package_data={"": ["sql/*.sql", "py.typed"]},
    zip_safe=False,
    install_requires=[
        "flask>=3.0",
        "gunicorn[gevent]>=23.0",
        "gevent>=24.10.1",
        "psycopg2-binary>=2.9.9",
        "flask-cors>=5.0",
    ],
    keywords=["flask", "sse", "server-sent events", "postgresql", "listen", "notify", "gevent", "htmx", "real-time"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: Web Environment",
        "Framework :: Flask",
        "Intended Audience :: Developers",
        "Operating System :: POSIX",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Programming Language :: Python :: 3.14",
        "Topic :: Internet :: WWW/HTTP :: Dynamic Content",
        "Typing :: Typed",
    ],
)
