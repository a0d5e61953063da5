"""Ray, and nothing of MLflow. Read `session` first, then `preprocess`.

For other rooms:
    session           a running cluster, or one started on this machine once more than one worker
                      is asked for
    preprocess train generate evaluate frontier
                      what each job does on a cluster
    target_states     hidden states of a draft's target, written once for all rows
    stopping          ending on SIGTERM

Of this room alone:
    actors            items handed out to actors, or done in this process
    train_workers     training on Ray Train workers
    tasks             the tasks of an evaluation, answered by actors
    elastic           how many workers there is room for, and when that changes
    progress          how far a job is, counted together from its workers
    process_group     how workers on several machines find each other
    rank_rows         the rows of each worker, for Ray Data
    console           keeping what means nothing to a user off the terminal
"""
