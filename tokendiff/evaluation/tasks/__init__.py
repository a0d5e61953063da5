"""Tasks that users compare models by. Read `requests` first, then `setup` and `answering`.

For other rooms:
    requests          what a task asks, as text, and what is answered
    setup             requests to tokens, and which a model cannot serve
    answering         a model that answers: what an actor holds
    suite             tasks by name, asked and judged
    quality           a task's figure as the quality of a frontier
    harness           the model `tokendiff` of lm-evaluation-harness; imports it

Of this room alone:
    scoring           log-likelihoods of continuations, exact or bounded
    documents         what tasks came to by document, and a digest of what they asked
    builtin           a small set of tasks that needs no network
"""
