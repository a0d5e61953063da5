"""What is proven, and how. Read `oracles` first: brute force, in plain Python and numpy.

For other rooms:
    installed_code    the mathematics against the oracles
    checkpoints       one checkpoint against slow and plain ways to the same
    certificate       what was checked, as a file and as tables

Of this room alone:
    block_checkpoints
                      the same for checkpoints that decode block by block
    oracles toys      brute force, and the language that it enumerates
"""
