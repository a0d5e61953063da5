"""transformers models as denoisers and decoders. Read `opening` first, then `denoiser`.

For other rooms:
    opening           a denoiser by name
    checkpoints       a checkpoint of ours, with its averaged weights
    sampling          a denoiser with its sampler, for rows of one length
    completion        a causal model with its sampler, for prompts that are continued
    tracing           one sample on its way, step by step
    requests          whether a row can be sampled, told before a weight is read
    plans             a model and its tokenizer, planned together before a weight is read
    pretrained        configs and weights by name: one way for every field that names a model
    builtin           small models that need no download
    vocabulary        a model's vocabulary beside that of the tokenizer that made the data
    families          what is known of a family that its config does not say
    default_sampler   the sampler of a model for which the user names none
    layouts           files of a family that has a config and names of weights of its own
    causal decoding
                      a causal model that decodes with a cache; opening and trying one
    denoiser          a model in two parts, encoder and head
    diffusion_gemma   an encoder of clean text, and its decoder of canvases
    adapters          low-rank adapters
    kept_base         adapters that draft beside a model that stays what it was
    layers            the layers of a model
    ragged_cache      keys and values of rows with their own lengths
    cuda_graphs       passes that are recorded once and then replayed
    masked_attention  what computes attention under a rule
    tiled_attention   attention that computes only what a mask leaves
    dflash            the draft: a room of its own

Of this room alone:
    sources           what samplers of one length sample from, before a weight is read
    causal_denoiser   a causal model under explicit masks and positions
    grouped_attention
                      attention to keys that several heads share
    block_masks       flex attention's masks, from the runs of keys that queries see
    diffusion_transformer
                      our own small architecture, which is told the time
    llada_moe         LLaDAs with experts as architectures of transformers; their weights in files
"""
