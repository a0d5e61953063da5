"""Samplers. Read `ancestral` first for rows of one length, `sdar` for completions.

For other rooms:
    ancestral blockwise remasking first_hitting
                      of one length, a sampler each
    autoregressive block_refinement sdar canvas dflash self_speculation
                      continue prompts, a sampler each
    speculation       a drafted block read and judged, whatever drafts
    base open_ended   what the samplers of each kind share
    continuous        whole rows in flight, for samplers whose rows end at different times
    corrector         tokens drawn again after a step, given all the others
    batch             prompts of several lengths, laid out for a sampler of one length

Of this room alone:
    block_cache       a block behind the cache of those before it
    block_decoding    blocks of masks, which `sdar` and `block_refinement` share
    canvas_rules      how a step moves a canvas of random tokens
    canvas_state      what a step holds of canvases
    commit_rules      which candidates a step commits
    hidden_states     what a model says of a batch, read again where it has changed
    acceptance        which drafted tokens a target accepts
    categorical       exact draws and filters
    slots             rows in flight, for continuous batching
"""
