"""Tools for operators: read a board from outside and make frames, events and findings of it.

No engine and no front-end imports this folder. The tools attach read-only and ask no process, so they work while
every process of the group hangs, and cost the group nothing.
"""
