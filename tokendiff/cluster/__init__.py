"""Ray, and nothing of MLflow. Read `session` first, then `preprocess`.

For other rooms:
    session           a running cluster, or one started on this machine
    preprocess train generate evaluate
                      what each job does on a cluster
    stopping          ending on SIGTERM
"""
