"""What is promised under faults, tried out: `make faults`. Read `table` first, then `subject`.

table       a case: its promise, three moments drawn from a seed, and the row that it becomes
subject     a tiny pipeline in a process of its own, and whether it came out as without a fault
moments     the instants of a process that a fault can be put at
signals     killed and interrupted, at any moment, in every job
damage      bytes flipped, files cut, emptied and deleted
disturbances
            faults in the middle of a run, one or several at once, and what ends them
fake_mlflow an MLflow server that can be told to fail
surroundings
            disk, clock, MLflow, locks, and pairs of faults
fake_s3     an S3 server that can be told to fail, or to list late
object_store
            pipelines behind that server
steps       spikes, and steps and rows that memory does not suffice for
inputs      files that nobody would write
in_suite    faults that a test of the suite tries already, most of them on Ray
"""
