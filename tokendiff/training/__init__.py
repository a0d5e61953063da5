"""A training run in one process or many, without Ray. Read `trainer` first, then `run`.

For other rooms:
    inputs            what a run starts from, checked before a cluster starts
    identity          which run a folder holds, and whether it is finished
    commits           the commits of hub models that a run began with, and goes on with
    memory activations
                      what a worker will need of it; what a pass keeps of it
    run               from config and data to `checkpoint-N/` and `final/`
    trainer           the loop
    world             the workers of a run, seen from one of them

Of this room alone:
    sharding          how a model lies on the workers
    optimizer muon schedules ema
                      what steps the weights, and how far; averaged weights
    late_figures      what a step came to, read when the next one is queued
    building          what a config trains: model, adapters, objective
    spikes            steps whose loss or gradient jumps, and what ends a run of them
    state             what checkpoints hold, and how it is read again
    saving            checkpoints written while training goes on
    watching          held-out rows judged as the run goes on, the best step, an early end
    model_card        the README.md of final/
    heldout           what an unwatched draft says of rows that it does not learn from
"""
