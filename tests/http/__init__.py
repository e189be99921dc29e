"""Tests of apps and streams over HTTP, most of them against real web servers."""
