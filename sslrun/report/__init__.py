"""The report: one page of HTML with tables, curves and pictures of runs.

`collect` gathers runs, `figures` and `looks` draw, `page` writes the HTML. All of it reads runs
through `results.record`.
"""
