"""Text to packed rows, and prompts to samples. Read `sources` first, then `preprocess`.

For other rooms:
    sources           where text comes from: the plan of what each task reads
    files             files of text: found, cut into pieces, read
    partition         what one task reads
    preprocess        one partition to its shards
    tokenizers        two of our own, and any of transformers'
    rows              reading packed shards
    order             the order of rows: a function of seed and epoch
    prompts           what a prompt may be, and its token ids
    prompt_index      prompts of any number, in files
    samples           files of samples, written and read back

Of this room alone:
    lines             where lines end
    hub               Hugging Face datasets
    packing           documents to ids, ids to rows of one length
"""
