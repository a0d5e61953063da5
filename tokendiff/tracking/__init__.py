"""The run's own log, and its mirrors in MLflow and other trackers. Read `run_log` first.

For other rooms:
    run_log           log.jsonl, the truth of a run
    progress          what a person sees of it while the run goes on
    live              how the runs under a folder stand, by their logs
    mlflow_mirror     the log in MLflow: a parent run, a child for each stage
    mlflow_store mlflow_outbox
                      where the store is; what it has yet to get
    hub               a checkpoint on the Hugging Face hub
    registry          registered models and their aliases

Of this room alone:
    mlflow_delivery mlflow_entities system_metrics
                      bringing outboxes to MLflow; what it stores; the machine's load
    log_sinks         TensorBoard and Weights & Biases, which get the log's numbers
    served_model serving_limits
                      a registered model as MLflow serves it; how much one request may ask for
"""
