"""Losses. Read `mdlm` first, then `chunked`, which all of them go through.

For other rooms:
    mdlm token_noise block_diffusion block_uniform block_refinement autoregressive dflash
                      an objective each
    chunked           the head in chunks of tokens, so that no [B, L, V] tensor ever exists
    blocks            rows of packed documents, cut into blocks

Of this room alone:
    draft_weights     what each drafted token of a block counts
    masked            what the losses at masked positions share
"""
