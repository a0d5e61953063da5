"""Text to packed rows, and prompts to samples. Read `sources` first, then `preprocess`.

For other rooms:
    sources           where text comes from: the plan of what each task reads
    files             files of text: found, cut into pieces, read
    partition         what one task reads
    preprocess        one partition to its shards
    tokenizers        two of our own, and any of transformers'
    rows              reading packed shards
    target_states     hidden states of a draft's target for these rows, written and read
    order             the order of rows: a function of seed and epoch
    prompts           what a prompt may be, and its token ids
    prompt_index      prompts of any number, in files
    samples           files of samples, written and read back
    bad_rows          rows that cannot be used: named in errors/, counted, and refused if too many
    row_failures      rows at which workers die, set aside in set_aside/
    templates         conversations to tokens by a chat template, answers told apart
    chat_documents    conversations as documents that fit in a row
    streams           files of text as bytes, decompressed on the way

Of this room alone:
    shard_index       which shards and row groups a split has, in arrays
    chats             formats of conversations
    fitting           whole documents into rows
    columns           where a text stands in a row
    tables            csv, tsv, and one JSON array
    lines             where lines end
    hub               Hugging Face datasets
    encoding          texts to ids, and where a token begins
    packing           documents to ids, ids to rows of one length
"""
