"""Answers to a file of prompts, with their scores: what `lifecycle score` needs."""
