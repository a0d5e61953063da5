"""The DFlash draft (arXiv 2602.06036). Read `model` first.

For other rooms:
    model             the draft's layers, which transformers opens
    config            its config, of either layout
    planning          drafts by name, and whether one fits its target
    mask_token        the id that stands for what is to be filled in
    trainee           a draft beside its frozen target, in training
    target_states     which hidden states a run reads, and a target that computes them for rows
    decoder           a target with its draft, in decoding

Of this room alone:
    second_layout     the convolutions and the selector of DFlash 2
    block_attention   attention of many blocks at once, computed where they see something
"""
