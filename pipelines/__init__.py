"""Pipelines: which stages there are, what will run and why, and running it. Read `stage` first.

For other rooms:
    builders          the stages of each kind, made from a config
    runner            running a pipeline, or the stages of one job
    schedule          what will run, and why
    promotion         the gate, and the champion
    retention         deleting what old runs left
    registered        models:/NAME@ALIAS in the place of a path
    record            what a run leaves behind: result.json
    watch             a table and a page of what runs now
    side_by_side      two runs on one page
    tables            what is printed of all this
    paths             where output goes when a path is relative

Of this room alone:
    stage             what a stage is
    graph             how the stages of a file hang together
    execution         running one stage
    attempts          trying again, and stopping what takes too long
    lock              one run at a time
    interrupt         stopping a block of code from another thread
    comparison        the table of a matrix
"""
