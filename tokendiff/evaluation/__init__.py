"""What a checkpoint or its samples are worth. Read `evaluator` first, then `bound`.

For other rooms:
    inputs            what an evaluation is of, checked before a cluster starts
    evaluator         a checkpoint ready to be judged on rows
    bound block_bound
                      the bound on -ln p(x), whole or block by block
    draft_acceptance  how far a draft agrees with a text
    acceptance        what decoding with a draft gained
    generation_metrics reference
                      figures of samples; how likely another model finds them
    pass_times        whether speculative decoding would pay here
    paired            two evaluations of the same rows, row by row
    frontier          quality against speed, and the setting that a rule chooses
    tasks             tasks of lm-evaluation-harness, and our own: a room of its own
    report summary    the page that a person reads, and what stands at its top
"""
