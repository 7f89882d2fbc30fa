"""For those on call: reads a board from outside and turns what it says into frames, events and findings.

Nothing in here is imported by an engine or a front-end. Whoever looks attaches read-only and asks nobody, so it
works while every process of the group hangs, and costs them nothing.
"""
