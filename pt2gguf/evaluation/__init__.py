"""Measuring what a converted model says against what it should say."""
