"""What is promised under faults, tried out: `make faults`. Read `table` first, then `subject`.

table       a case: its promise, three moments drawn from a seed, and the row that it becomes
subject     a tiny pipeline in a process of its own, and whether it came out as without a fault
moments     the instants of a process that a fault can be put at
signals     killed and interrupted, at any moment, in every job
damage      bytes flipped, files cut, emptied and deleted
disk        a full disk, an output folder that cannot be written, a clock set back
locks       two runs at once, and a holder that was killed
tracking    MLflow absent, silent, refusing; its database locked; its experiment deleted
registered  registered versions and their files deleted; a promotion cut off
on_ray      faults that need Ray: tests of the suite, each run as a case
pairs       two faults at once
"""
