"""Prompt styles and chat templates, and the stop strings that end an answer."""
